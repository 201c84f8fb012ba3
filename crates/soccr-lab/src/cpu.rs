//! Where threads run.

use rustix::process::getpid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// A thread that stays on one CPU, with the threads that it starts, until this value is dropped.
///
/// What one CPU sends into a veth link stays in order. Packets that two CPUs send overtake each other, as on no wire.
#[derive(Debug)]
#[must_use = "dropping it lets the thread go"]
pub struct OnCpu {
    before: CpuSet,
}

impl OnCpu {
    /// Keeps the calling thread on the `nth` CPU of those that the first thread of the process may use, or on a lower one
    /// where there are fewer.
    ///
    /// # Panics
    /// Where the kernel refuses it.
    pub fn stay(nth: usize) -> Self {
        let allowed = sched_getaffinity(Some(getpid())).expect("sched_getaffinity");
        let cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
        let mut one = CpuSet::new();
        one.set(cpus.take(nth + 1).last().expect("the process runs somewhere"));
        let before = sched_getaffinity(None).expect("sched_getaffinity");
        sched_setaffinity(None, &one).expect("sched_setaffinity");
        Self { before }
    }
}

impl Drop for OnCpu {
    fn drop(&mut self) {
        sched_setaffinity(None, &self.before).expect("sched_setaffinity back");
    }
}
