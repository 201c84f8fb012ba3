//! `errno` of the calling thread: a call that succeeds leaves it as it was.

pub(super) fn get() -> i32 {
    // SAFETY: the C library gives each thread a place of its own.
    unsafe { *libc::__errno_location() }
}

pub(super) fn set(errno: i32) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno }
}
