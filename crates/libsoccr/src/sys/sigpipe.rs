//! A pipe that nobody reads is a failure to be told, not a signal that ends the host.

use std::mem::MaybeUninit;
use std::ptr;

/// While this lives, the thread gets no `SIGPIPE`. Then its signals are as before: the one that a write has caused is gone.
#[derive(Debug)]
pub(super) struct WithoutSigpipe {
    sigpipe: libc::sigset_t,
    before: libc::sigset_t,
    was_pending: bool,
}

impl WithoutSigpipe {
    pub(super) fn new() -> Self {
        // What is pending before is not ours to take.
        let was_pending = is_pending();
        let (mut sigpipe, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: sigemptyset initializes the one set, and pthread_sigmask the other: its arguments are valid.
        unsafe {
            libc::sigemptyset(sigpipe.as_mut_ptr());
            libc::sigaddset(sigpipe.as_mut_ptr(), libc::SIGPIPE);
            libc::pthread_sigmask(libc::SIG_BLOCK, sigpipe.as_ptr(), before.as_mut_ptr());
            Self { sigpipe: sigpipe.assume_init(), before: before.assume_init(), was_pending }
        }
    }
}

impl Drop for WithoutSigpipe {
    fn drop(&mut self) {
        let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the sets are initialized; nobody is told about the signal that is taken.
        unsafe {
            if !self.was_pending && is_pending() {
                libc::sigtimedwait(&raw const self.sigpipe, ptr::null_mut(), &raw const at_once);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut());
        }
    }
}

fn is_pending() -> bool {
    let mut pending = MaybeUninit::uninit();
    // SAFETY: sigpending initializes the set.
    unsafe {
        libc::sigpending(pending.as_mut_ptr());
        libc::sigismember(pending.as_ptr(), libc::SIGPIPE) == 1
    }
}
