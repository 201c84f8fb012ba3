//! A thread whose system calls fail when a test wants it.

use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;

use crate::{Call, Supervisor};

/// The calls that this library makes for a socket, and that by which it opens a file.
const CALLS: [i64; 15] = [
    libc::SYS_socket,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_ioctl,
    libc::SYS_fcntl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_openat,
];

/// Which call is to fail, and which one has.
#[derive(Debug, Default)]
struct Plan {
    /// Calls that still go on.
    left: Option<usize>,
    errno: i32,
    /// The only calls that count, or all but that which opens files: a lab opens some, too.
    only: Option<&'static [i64]>,
    failed: Option<Call>,
    /// The same call fails from then on.
    for_good: bool,
}

impl Plan {
    fn decide(&mut self, call: Call) -> Option<i32> {
        if !self.only.map_or(call.number != libc::SYS_openat, |only| only.contains(&call.number)) {
            return None;
        }
        let same = |failed: Call| (failed.number, option_of(failed)) == (call.number, option_of(call));
        if self.for_good && self.failed.is_some_and(same) {
            return Some(self.errno);
        }
        match self.left.take() {
            Some(0) => {
                self.failed = Some(call);
                return Some(self.errno);
            }
            Some(left) => self.left = Some(left - 1),
            None => {}
        }
        None
    }
}

/// A fault that the kernel seems to have in one call of a [`supervised`] thread.
#[derive(Clone, Debug)]
pub struct Faults(Arc<Mutex<Plan>>);

impl Faults {
    /// After `left` more calls the next one fails with `errno`.
    pub fn arm(&self, left: usize, errno: i32) {
        *self.0.lock().unwrap() = Plan { left: Some(left), errno, ..Plan::default() };
    }

    /// The same, where that call goes on failing.
    pub fn arm_for_good(&self, left: usize, errno: i32) {
        *self.0.lock().unwrap() = Plan { left: Some(left), errno, for_good: true, ..Plan::default() };
    }

    /// The same, of these calls alone.
    pub fn arm_among(&self, calls: &'static [i64], left: usize, errno: i32) {
        *self.0.lock().unwrap() = Plan { left: Some(left), errno, only: Some(calls), ..Plan::default() };
    }

    /// It has come to that.
    pub fn has_failed(&self) -> bool {
        self.0.lock().unwrap().failed.is_some()
    }

    /// The call that has failed, if it has come to that.
    pub fn disarm(&self) -> Option<Call> {
        std::mem::take(&mut *self.0.lock().unwrap()).failed
    }
}

/// Runs `body` on a thread whose calls can be made to fail.
pub fn supervised(body: impl FnOnce(&Faults) + Send) {
    let faults = Faults(Arc::default());
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let for_body = faults.clone();
        scope.spawn(move || {
            sender.send(Supervisor::of_this_thread(&CALLS)).unwrap();
            body(&for_body);
        });
        let supervisor = receiver.recv().unwrap().expect("seccomp");
        while supervisor.decide(|call| faults.0.lock().unwrap().decide(call)).unwrap().is_some() {}
    });
}

/// Runs `body` on a thread of its own, and returns which of these calls it has made.
pub fn calls_of(calls: &'static [i64], body: impl FnOnce() + Send) -> Vec<Call> {
    let mut made = Vec::new();
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        scope.spawn(move || {
            sender.send(Supervisor::of_this_thread(calls)).unwrap();
            body();
        });
        let supervisor = receiver.recv().unwrap().expect("seccomp");
        let mut note = |call| {
            made.push(call);
            None
        };
        while supervisor.decide(&mut note).unwrap().is_some() {}
    });
    made
}

/// The level and the name of the option that `getsockopt(2)` or `setsockopt(2)` is called for.
pub fn option_of(call: Call) -> (i32, i32) {
    (call.arguments[1] as i32, call.arguments[2] as i32)
}
