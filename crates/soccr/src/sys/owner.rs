//! Files of another user.

use std::io;

/// Runs `work` with the calling thread as this user and group where files are concerned (`setfsuid(2)`): what it opens, such as
/// a socket, is theirs. Rights over the network stay as they are.
///
/// # Errors
/// `EPERM` without `CAP_SETUID` and `CAP_SETGID`.
pub(crate) fn as_owner<T>(user: u32, group: u32, work: impl FnOnce() -> T) -> io::Result<T> {
    // The group first: afterwards there may be no right to change it.
    let group = Changed::set(libc::setfsgid, group)?;
    let user = Changed::set(libc::setfsuid, user)?;
    let result = work();
    drop(user);
    drop(group);
    Ok(result)
}

/// A number of the thread that is put back when this is dropped.
struct Changed {
    set: unsafe extern "C" fn(u32) -> i32,
    before: u32,
}

impl Changed {
    fn set(set: unsafe extern "C" fn(u32) -> i32, to: u32) -> io::Result<Self> {
        // SAFETY: the calls take a number and touch no memory of ours. They return the one before, and say nothing of errors.
        let before = unsafe { set(to) } as u32;
        let changed = Self { set, before };
        // SAFETY: as above. Minus one is nobody's number: it changes nothing.
        if unsafe { set(u32::MAX) } as u32 == to {
            Ok(changed)
        } else {
            Err(io::Error::from_raw_os_error(libc::EPERM))
        }
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { (self.set)(self.before) };
    }
}
