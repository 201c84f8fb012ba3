//! The thread that reads held packets while their connections are locked.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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
use crate::sys::signals::without_signals;

/// A [`Capture`], and what its thread shares with the locks.
#[derive(Debug)]
pub(super) struct Reader {
    capture: Mutex<Capture>,
    readable: OwnedFd,
    /// A timer that runs out when there is more to do than to read.
    wake: OwnedFd,
    ended: AtomicBool,
    /// How many wait for the capture: the thread lets them go first, however much there is to read.
    waiting: AtomicUsize,
}

impl Reader {
    /// Starts the thread, which ends when it is told to [stop](Self::stop). Where no thread can be started, whoever takes or
    /// releases reads alone: the kernel keeps less until then.
    pub(super) fn start(capture: Capture) -> io::Result<(Arc<Self>, Option<JoinHandle<()>>)> {
        let readable = descriptor::high(capture.socket().as_fd().try_clone_to_owned()?);
        let wake = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let reader = Arc::new(Self {
            capture: Mutex::new(capture),
            readable,
            wake: descriptor::high(wake),
            ended: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
        });
        let shared = Arc::clone(&reader);
        let named = thread::Builder::new().name("soccr-hold".into());
        let thread = without_signals(|| named.spawn(move || shared.run())).ok();
        reader.ended.store(thread.is_none(), Ordering::Release);
        Ok((reader, thread))
    }

    pub(super) fn stop(&self) {
        self.ended.store(true, Ordering::Release);
        self.wake_in(Duration::from_nanos(1));
    }

    /// Lets the thread give back the memory of what has been released: that takes about as long as the release, and the
    /// connections are not to wait for it, nor is what they do first.
    pub(super) fn tidy(&self) {
        if self.ended.load(Ordering::Acquire) {
            drop(self.capture().take_spent());
            return;
        }
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
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let capture = self.own();
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        capture
    }

    fn own(&self) -> MutexGuard<'_, Capture> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let outcome = self.read_along();
        // Whoever takes or releases is told, and reads alone from then on.
        self.ended.store(true, Ordering::Release);
        if let Err(errno) = outcome {
            self.own().fail(errno.into());
        }
    }

    fn read_along(&self) -> Result<(), Errno> {
        loop {
            let mut events =
                [PollFd::new(&self.readable, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
            match poll(&mut events, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            }
            if !events[1].revents().is_empty() {
                // First, or it could swallow what comes after the question.
                let _ = rustix::io::read(&self.wake, &mut [0; size_of::<u64>()]);
                if self.ended.load(Ordering::Acquire) {
                    return Ok(());
                }
                let spent = self.own().take_spent();
                drop(spent);
            }
            while self.waiting.load(Ordering::Acquire) > 0 {
                thread::yield_now();
            }
            if !self.own().read_along() {
                return Ok(());
            }
        }
    }
}
