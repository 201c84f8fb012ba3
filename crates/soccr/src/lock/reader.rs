//! The thread that reads held packets while their connections are locked.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_gettime,
    timerfd_settime,
};

use super::capture::Capture;
use crate::sys::descriptor;

/// A [`Capture`], and what its thread shares with the locks.
#[derive(Debug)]
pub(super) struct Reader {
    capture: Mutex<Capture>,
    readable: OwnedFd,
    /// A timer that runs out when there is more to do than to read.
    wake: OwnedFd,
    ended: AtomicBool,
}

impl Reader {
    /// Starts the thread, which ends when it is told to [stop](Self::stop).
    pub(super) fn start(capture: Capture) -> io::Result<(Arc<Self>, JoinHandle<()>)> {
        let readable = descriptor::high(capture.socket().as_fd().try_clone_to_owned()?);
        let wake = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let reader = Arc::new(Self {
            capture: Mutex::new(capture),
            readable,
            wake: descriptor::high(wake),
            ended: AtomicBool::new(false),
        });
        let shared = Arc::clone(&reader);
        let thread = thread::Builder::new().name("soccr-hold".into()).spawn(move || shared.run())?;
        Ok((reader, thread))
    }

    pub(super) fn stop(&self) {
        self.ended.store(true, Ordering::Release);
        self.wake_in(Duration::from_nanos(1));
    }

    /// Lets the thread give back the memory of what has been released: that takes about as long as the release, and the
    /// connections are not to wait for it, nor is what they do first.
    pub(super) fn tidy(&self) {
        // One release after the other must not put it off for ever.
        if timerfd_gettime(&self.wake).is_ok_and(|timer| timer.it_value == Timespec::default()) {
            self.wake_in(Duration::from_millis(10));
        }
    }

    fn wake_in(&self, time: Duration) {
        let once = time.try_into().expect("a short time fits");
        let timer = Itimerspec { it_interval: Timespec::default(), it_value: once };
        let _ = timerfd_settime(&self.wake, TimerfdTimerFlags::empty(), &timer);
    }

    pub(super) fn capture(&self) -> MutexGuard<'_, Capture> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let mut events =
                [PollFd::new(&self.readable, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
            match poll(&mut events, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(_) => return,
            }
            if !events[1].revents().is_empty() {
                // First, or it could swallow what comes after the question.
                let _ = rustix::io::read(&self.wake, &mut [0; size_of::<u64>()]);
                if self.ended.load(Ordering::Acquire) {
                    return;
                }
                let spent = self.capture().take_spent();
                drop(spent);
            }
            // Whoever takes or releases reads too, and reports.
            let _ = self.capture().read();
        }
    }
}
