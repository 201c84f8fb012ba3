//! What went wrong with a hand-over, and what a program can do about it.

use std::borrow::Cow;
use std::fmt;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a connection, or all of them, did not move. It prints as one line.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    what: Cow<'static, str>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// What an [`Error`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// This host cannot save the connection, or cannot restore it: the [source](std::error::Error::source) is a [`soccr::Error`].
    Connection,
    /// Somebody else has used the connection meanwhile, or it no longer passes the check that it had to pass to leave: see
    /// [`Departing::provided`](crate::Departing::provided).
    Changed,
    /// The other end refuses the connection, and says why.
    Refused,
    /// The connection is lost: it had left its socket, the target does not have it, and it could not be put back.
    Lost,
    /// The connection has not moved, but its process has lost it: with kernel TLS it cannot be put back into the old socket (see
    /// [`Seat::is_adrift`](crate::Seat::is_adrift)), or the process has closed that meanwhile. It lives in the socket that is given back.
    Adrift,
    /// The other end has not answered, or not read on, in time.
    Late,
    /// The channel is broken, or the other end is gone.
    Gone,
    /// The other end breaks the protocol: what it says cannot be understood, or comes at the wrong moment.
    Violation,
    /// More than can be carried: 64 MiB in a queue, 16 MiB of state.
    TooMuch,
    /// This end was asked to stop before it was through.
    Stopped,
    /// The operating system does not permit it: the text says which right is missing.
    NoPermission,
    /// A call of the operating system.
    System,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, what: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, what: what.into(), source: None }
    }

    pub(crate) fn of(
        kind: ErrorKind,
        what: impl Into<Cow<'static, str>>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, what: what.into(), source: Some(source.into()) }
    }

    #[cfg(feature = "foreign")]
    pub(crate) fn system(what: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::System, what)
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.source, self.what.is_empty()) {
            (Some(source), true) => write!(f, "{source}"),
            (Some(source), false) => write!(f, "{}: {source}", self.what),
            (None, _) => f.write_str(&self.what),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}

/// Says what failed, and keeps the kind of the failure.
#[cfg(feature = "foreign")]
pub(crate) trait Context<T> {
    fn context(self, what: impl Into<Cow<'static, str>>) -> Result<T>;
    fn with_context(self, what: impl FnOnce() -> String) -> Result<T>;
}

#[cfg(feature = "foreign")]
impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl Into<Cow<'static, str>>) -> Result<T> {
        self.map_err(|error| {
            let error = error.into();
            let kind = match error.downcast_ref::<Error>() {
                Some(error) => error.kind,
                None if error.is::<soccr::Error>() => ErrorKind::Connection,
                None => ErrorKind::System,
            };
            Error::of(kind, what, error)
        })
    }

    fn with_context(self, what: impl FnOnce() -> String) -> Result<T> {
        match self {
            Ok(value) => Ok(value),
            failed => failed.context(what()),
        }
    }
}

impl From<soccr::Error> for Error {
    fn from(error: soccr::Error) -> Self {
        Self::of(ErrorKind::Connection, "", error)
    }
}

#[cfg(feature = "foreign")]
impl From<rustix::io::Errno> for Error {
    fn from(error: rustix::io::Errno) -> Self {
        std::io::Error::from(error).into()
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::of(ErrorKind::System, "", error)
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind {
            ErrorKind::Late => std::io::ErrorKind::TimedOut,
            ErrorKind::Gone => std::io::ErrorKind::ConnectionAborted,
            ErrorKind::Violation => std::io::ErrorKind::InvalidData,
            _ => std::io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// The error of a call, and the value that it was given, unchanged.
#[derive(Debug)]
pub struct Rejected<T> {
    /// The value.
    pub value: T,
    /// Why.
    pub error: Error,
}

impl<T> fmt::Display for Rejected<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<T: fmt::Debug> std::error::Error for Rejected<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl<T> From<Rejected<T>> for Error {
    fn from(rejected: Rejected<T>) -> Self {
        rejected.error
    }
}
