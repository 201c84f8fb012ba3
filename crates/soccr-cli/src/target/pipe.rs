//! The pipe from the source: read without waiting for longer than a source deserves.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

/// A pipe that is not waited for beyond an instant, nor when the bell rings.
pub(super) struct Patient {
    pub(super) input: File,
    pub(super) bell: OwnedFd,
    pub(super) until: Rc<Cell<Option<Instant>>>,
}

impl Read for Patient {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.until.get().map(|until| until.saturating_duration_since(Instant::now()));
        let limit = left.map(|left| left.try_into().expect("a time limit fits"));
        let mut events = [PollFd::new(&self.input, PollFlags::IN), PollFd::new(&self.bell, PollFlags::IN)];
        poll(&mut events, limit.as_ref())?;
        if !events[1].revents().is_empty() {
            return Err(io::Error::other("this command has been asked to end"));
        }
        if left.is_some_and(|left| left.is_zero()) || events[0].revents().is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the source does not say COMMIT in time (--timeout)",
            ));
        }
        self.input.read(bytes)
    }
}

/// The source has said something, or says it in time.
pub(super) fn is_readable(input: &File, patience: Duration) -> bool {
    let mut events = [PollFd::new(input, PollFlags::IN)];
    let patience = patience.try_into().expect("milliseconds fit");
    poll(&mut events, Some(&patience)).is_ok_and(|count| count > 0)
}

/// Standard input, and how much of it has been read ahead.
pub(super) struct Input {
    pub(super) reader: BufReader<Patient>,
    pub(super) buffered: Rc<Cell<usize>>,
}

impl Read for Input {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(bytes);
        self.buffered.set(self.reader.buffer().len());
        read
    }
}
