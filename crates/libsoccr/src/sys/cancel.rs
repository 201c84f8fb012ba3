//! A thread that is cancelled in the middle of a call would unwind through it, which ends the process.

use std::ffi::c_int;
use std::ptr;

/// The same in glibc and musl.
const PTHREAD_CANCEL_DISABLE: c_int = 1;

unsafe extern "C" {
    fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
}

/// While this lives, a cancellation of the thread waits (`pthread_setcancelstate(3)`).
#[derive(Debug)]
pub(super) struct WithoutCancellation {
    before: c_int,
}

impl WithoutCancellation {
    pub(super) fn new() -> Self {
        let mut before = 0;
        // SAFETY: the call writes one number.
        unsafe { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &raw mut before) };
        Self { before }
    }
}

impl Drop for WithoutCancellation {
    fn drop(&mut self) {
        // SAFETY: the state comes from the same call; where it was before is not asked for.
        unsafe { pthread_setcancelstate(self.before, ptr::null_mut()) };
    }
}
