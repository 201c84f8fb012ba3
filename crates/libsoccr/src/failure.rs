//! Why a call failed, as the line of text and the numbers that C gets.

use std::ffi::{CString, c_char, c_int};
use std::{fmt, io};

use soccr_core::ErrorKind;

/// The result of a call, before the border turns it into −1 or null.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// `SOCCR_INVALID` and its siblings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Invalid = 1,
    Refused = 2,
    System = 3,
}

/// One line: step, option, errno, remedy; and what can be acted on.
#[derive(Debug)]
pub(crate) struct Failure {
    text: String,
    pub(crate) kind: Kind,
    pub(crate) errno: i32,
}

impl Failure {
    /// A call that makes no sense: the mistake is the caller's.
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), kind: Kind::Invalid, errno: libc::EINVAL }
    }

    /// Names the argument that is null.
    pub(crate) fn null(argument: &str) -> Self {
        Self::new(format!("{argument} is NULL"))
    }

    /// It cannot be done with this connection.
    pub(crate) fn refused(text: impl Into<String>) -> Self {
        Self { text: text.into(), kind: Kind::Refused, errno: libc::EOPNOTSUPP }
    }

    /// An error of the core.
    fn of(kind: ErrorKind, errno: Option<i32>, text: String) -> Self {
        match (kind, errno) {
            (_, Some(errno)) => Self::system(text, errno),
            (ErrorKind::Invalid, None) => Self::new(text),
            (ErrorKind::System, None) => Self::system(text, libc::EIO),
            // That the connection has changed is no mistake of the caller, either.
            _ => Self::refused(text),
        }
    }

    /// The kernel, or the C library, has refused.
    pub(crate) fn system(text: impl Into<String>, errno: i32) -> Self {
        Self { text: text.into(), kind: Kind::System, errno }
    }
}

impl From<soccr_core::Error> for Failure {
    fn from(error: soccr_core::Error) -> Self {
        // Only values that were given for a restore are checked outside of a step.
        let step = if error.step().is_empty() { "restore: " } else { "" };
        Self::of(error.kind(), error.errno(), format!("{step}{error}"))
    }
}

impl From<soccr_image::Error> for Failure {
    fn from(error: soccr_image::Error) -> Self {
        let text = format!("image: {error}");
        let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<io::Error>());
        match source.and_then(io::Error::raw_os_error) {
            Some(errno) => Self::system(text, errno),
            // Cut off, damaged, of another format or a newer version.
            None => Self { text, kind: Kind::Refused, errno: libc::EBADMSG },
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A failure as `libsoccr_last_error` and its siblings tell it.
#[derive(Clone, Debug)]
pub(crate) struct LastError {
    text: CString,
    kind: Kind,
    errno: c_int,
}

impl LastError {
    pub(crate) fn new(failure: &Failure, text: CString) -> Self {
        Self { text, kind: failure.kind, errno: failure.errno }
    }

    pub(crate) fn text(&self) -> *const c_char {
        self.text.as_ptr()
    }

    pub(crate) fn kind(&self) -> c_int {
        self.kind as c_int
    }

    pub(crate) fn errno(&self) -> c_int {
        self.errno
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_mistake_of_the_caller_is_invalid() {
        for (kind, errno, expected) in [
            (ErrorKind::Invalid, None, (Kind::Invalid, libc::EINVAL)),
            (ErrorKind::Refused, None, (Kind::Refused, libc::EOPNOTSUPP)),
            (ErrorKind::Changed, None, (Kind::Refused, libc::EOPNOTSUPP)),
            (ErrorKind::System, None, (Kind::System, libc::EIO)),
            (ErrorKind::System, Some(libc::EPERM), (Kind::System, libc::EPERM)),
        ] {
            let failure = Failure::of(kind, errno, String::new());
            assert_eq!((failure.kind, failure.errno), expected, "{kind:?}");
        }
    }
}
