//! Threads of the library take no signals: a program knows its own threads alone, and blocks a signal in those.

use std::mem::MaybeUninit;

/// What a thread causes itself. The kernel would end the process, where the thread blocks it, whatever handler there is.
const FAULTS: [libc::c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS];

/// Starts a thread in a way that it blocks all signals that others send: it inherits what this thread blocks meanwhile.
pub fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    let mut all = MaybeUninit::uninit();
    // SAFETY: sigfillset initializes the set, from which sigdelset takes signals that exist.
    let all = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        for signal in FAULTS {
            libc::sigdelset(all.as_mut_ptr(), signal);
        }
        all.assume_init()
    };
    let _before = change(libc::SIG_BLOCK, &all).map(Before);
    start()
}

/// What the thread blocked before, and blocks again when this is dropped.
struct Before(libc::sigset_t);

impl Drop for Before {
    fn drop(&mut self) {
        let _ = change(libc::SIG_SETMASK, &self.0);
    }
}

/// `pthread_sigmask(3)`. Returns what was blocked before.
fn change(how: libc::c_int, set: &libc::sigset_t) -> Option<libc::sigset_t> {
    let mut before = MaybeUninit::uninit();
    // SAFETY: the set is initialized, and so is the one before where the call succeeds.
    unsafe { (libc::pthread_sigmask(how, set, before.as_mut_ptr()) == 0).then(|| before.assume_init()) }
}
