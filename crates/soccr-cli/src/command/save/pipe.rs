//! A pipe to write to, which waits for its reader for a limited time.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

/// The most that a pipe takes without waiting once it is writable (`PIPE_BUF`).
const PIECE: usize = 4096;

/// A pipe to write to, until an instant.
#[derive(Debug)]
pub(crate) struct Output {
    fd: OwnedFd,
    until: Instant,
}

impl Output {
    pub(crate) fn new(fd: OwnedFd, limit: Duration) -> Self {
        Self { fd, until: Instant::now() + limit }
    }

    fn remaining(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

/// What has become of the bytes in a pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// All of them have been read, as far as that can be told.
    Done,
    /// Nobody will read them.
    Closed,
    /// Not in time.
    Late,
}

impl Output {
    /// Waits until what has been written is read.
    pub(crate) fn read(&self) -> Reading {
        let tick = Duration::from_millis(1).try_into().expect("milliseconds fit");
        loop {
            // Not a pipe: there is nothing to wait for.
            if !matches!(rustix::io::ioctl_fionread(&self.fd), Ok(1..)) {
                return Reading::Done;
            }
            let mut closed = [PollFd::new(&self.fd, PollFlags::empty())];
            // poll(2) does not tell when a pipe has been read empty.
            if poll(&mut closed, Some(&tick)).is_ok_and(|count| count > 0) {
                return Reading::Closed;
            }
            if self.remaining().is_zero() {
                return Reading::Late;
            }
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let limit = self.remaining().try_into().expect("a time limit fits");
        let mut writable = [PollFd::new(&self.fd, PollFlags::OUT)];
        if poll(&mut writable, Some(&limit))? == 0 {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the other end does not read"));
        }
        Ok(rustix::io::write(&self.fd, &bytes[..bytes.len().min(PIECE)])?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
