//! What is wrong with an image, and which connection it concerns.

use std::borrow::Cow;
use std::{fmt, io};

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an image could not be read or written. It prints as one line.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    connection: Option<u32>,
    name: String,
    what: Cow<'static, str>,
    source: Option<io::Error>,
}

/// What an [`Error`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Reading or writing failed: [`source`](std::error::Error::source) says how.
    Io,
    /// The bytes are of another format altogether.
    Foreign,
    /// A newer version wrote it, and it needs something that this one doesn't know.
    Newer,
    /// The bytes end too early: the file was cut off, or the other end of the pipe is gone.
    Truncated,
    /// The bytes were changed, or exceed a limit.
    Damaged,
    /// The bytes are in order and their meaning is not: values contradict each other.
    Invalid,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, what: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, connection: None, name: String::new(), what: what.into(), source: None }
    }

    pub(crate) fn damaged(what: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Damaged, what)
    }

    pub(crate) fn invalid(what: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Invalid, what)
    }

    pub(crate) fn newer(what: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Newer, format!("{what}: written by a newer version; update soccr here"))
    }

    pub(crate) fn io(what: impl Into<Cow<'static, str>>, source: io::Error) -> Self {
        Self { source: Some(source), ..Self::new(ErrorKind::Io, what) }
    }

    /// Reading failed: the end of the bytes where there had to be more is a kind of its own.
    pub(crate) fn reading(source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::UnexpectedEof => {
                Self::new(ErrorKind::Truncated, "ends too early: it was cut off, or its writer is gone")
            }
            _ => Self::io("read", source),
        }
    }

    /// Only connection `id` of a stream is concerned.
    pub(crate) fn of(mut self, id: u32, name: &str) -> Self {
        (self.connection, self.name) = (Some(id), name.to_owned());
        self
    }

    /// The stream holds a single connection: its number says nothing.
    pub(crate) fn of_all(mut self) -> Self {
        self.connection = None;
        self
    }

    /// Says where: the path of a file, or which part of it.
    pub(crate) fn at(mut self, place: impl fmt::Display) -> Self {
        self.what = format!("{place}: {}", self.what).into();
        self
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The number of the only connection that failed: the others are unharmed, and the
    /// [`Reader`](crate::stream::Reader) or [`Writer`](crate::stream::Writer) can go on. `None`: the whole stream has failed.
    pub fn connection(&self) -> Option<u32> {
        self.connection
    }

    /// The name of that connection, where it is known.
    pub fn name(&self) -> Option<&str> {
        Some(self.name.as_str()).filter(|name| !name.is_empty())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.connection, self.name()) {
            (Some(id), Some(name)) => write!(f, "connection {id} ({name}): ")?,
            (Some(id), None) => write!(f, "connection {id}: ")?,
            (None, _) => {}
        }
        f.write_str(&self.what)?;
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match (&error.kind, &error.source) {
            (_, Some(source)) => source.kind(),
            (ErrorKind::Truncated, _) => io::ErrorKind::UnexpectedEof,
            (ErrorKind::Newer, _) => io::ErrorKind::Unsupported,
            _ => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_reading_keeps_its_kind_and_its_source() {
        let read = |kind: io::ErrorKind| Error::reading(kind.into());
        assert_eq!(read(io::ErrorKind::UnexpectedEof).kind(), ErrorKind::Truncated);
        let broken = read(io::ErrorKind::BrokenPipe);
        assert_eq!(broken.kind(), ErrorKind::Io);
        assert!(std::error::Error::source(&broken).is_some());
        let kinds = [
            (broken, io::ErrorKind::BrokenPipe),
            (read(io::ErrorKind::UnexpectedEof), io::ErrorKind::UnexpectedEof),
            (Error::newer("a field"), io::ErrorKind::Unsupported),
            (Error::invalid("a field"), io::ErrorKind::InvalidData),
        ];
        for (error, kind) in kinds {
            assert_eq!(io::Error::from(error).kind(), kind);
        }
    }
}
