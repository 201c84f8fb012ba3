//! The thread that reads held packets while their connections are locked.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::capture::Capture;

/// A [`Capture`], and what its thread shares with the locks.
#[derive(Debug)]
pub(super) struct Reader {
    capture: Mutex<Capture>,
    readable: OwnedFd,
    stop: OwnedFd,
}

impl Reader {
    /// Starts the thread. It ends when it is told to [stop](Self::stop).
    pub(super) fn start(capture: Capture) -> io::Result<Arc<Self>> {
        let readable = capture.socket().as_fd().try_clone_to_owned()?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let reader = Arc::new(Self { capture: Mutex::new(capture), readable, stop });
        let shared = Arc::clone(&reader);
        thread::Builder::new().name("soccr-hold".into()).spawn(move || shared.run())?;
        Ok(reader)
    }

    pub(super) fn stop(&self) {
        // An event counter that is written once cannot be full.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }

    pub(super) fn capture(&self) -> MutexGuard<'_, Capture> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let mut events =
                [PollFd::new(&self.readable, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
            match poll(&mut events, None) {
                Ok(_) if events[1].revents().is_empty() => {}
                Err(Errno::INTR) => continue,
                _ => return,
            }
            // Whoever takes or releases reads too, and reports.
            let _ = self.capture().read();
        }
    }
}
