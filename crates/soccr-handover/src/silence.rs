//! A host that stays silent about connections that have left it: late packets of the peers draw no reset.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use rustix::io::Errno;
use soccr::Flow;
use soccr::lock::{PersistentLock, PersistentLocks};

/// The prefix of locks that a hand-over leaves behind: their time is limited, and a connection that comes back ends them.
const PREFIX: &str = "left-";

/// One lock for all movers of a network: to make or remove a table takes milliseconds, to add an element microseconds.
const NAME: &str = "left-by-handover";

/// A unique name for such a lock: process numbers are used again, in containers soon.
pub fn name() -> String {
    format!("{PREFIX}{:016x}", RandomState::new().hash_one(std::process::id()))
}

/// Begins and ends silences, again and again: see [`PersistentLocks`].
#[derive(Debug)]
pub(crate) struct Silencer(PersistentLocks);

impl Silencer {
    /// In the network namespace of the calling thread, from whatever thread it is used later.
    pub(crate) fn new() -> soccr::Result<Self> {
        PersistentLocks::new().map(Self)
    }

    /// [`begin`].
    pub(crate) fn begin(&mut self, flows: &[Flow], limit: Duration) -> soccr::Result<()> {
        if limit.is_zero() || flows.is_empty() {
            return Ok(());
        }
        /// Others make and remove the lock at the same time.
        const ATTEMPTS: usize = 10;
        let failed_with = |error: &soccr::Error, errno: Errno| error.errno() == Some(errno.raw_os_error());
        let mut outcome = Ok(());
        for _ in 0..ATTEMPTS {
            outcome = self.extend(flows, limit);
            match &outcome {
                // There is no such lock yet, or no longer.
                Err(error) if failed_with(error, Errno::NOENT) => {
                    outcome = self.0.create(NAME, flows, Some(limit));
                    if !matches!(&outcome, Err(error) if failed_with(error, Errno::EXIST)) {
                        break;
                    }
                }
                // One of them had left before, and came back without the lock being ended. The lock goes with the last of them.
                Err(error) if failed_with(error, Errno::EXIST) => drop(self.lift(flows)?),
                _ => break,
            }
        }
        outcome
    }

    fn extend(&mut self, flows: &[Flow], limit: Duration) -> soccr::Result<()> {
        let mut lock = PersistentLock { name: NAME.into(), flows: Vec::new(), remaining: None };
        self.0.extend(&mut lock, flows, Some(limit))
    }

    /// [`lift`].
    pub(crate) fn lift(&mut self, back: &[Flow]) -> soccr::Result<Lifted> {
        let mut lifted = Lifted::default();
        if back.is_empty() {
            return Ok(lifted);
        }
        let back: HashSet<Flow> = back.iter().map(Flow::on_the_wire).collect();
        for lock in self.0.list()? {
            let held: Vec<Flow> = lock.flows.iter().filter(|flow| back.contains(flow)).copied().collect();
            if held.is_empty() {
                continue;
            }
            if lock.name.starts_with(PREFIX) {
                self.0.unlock(&lock, &held)?;
                lifted.silent.extend(held);
            } else {
                lifted.locked.extend(held.into_iter().map(|flow| (flow, lock.name.clone())));
            }
        }
        Ok(lifted)
    }
}

/// What [`lift`] has found, as packets show it.
#[derive(Debug, Default)]
pub(crate) struct Lifted {
    /// Connections that have been silent.
    pub(crate) silent: Vec<Flow>,
    /// Connections that people have locked.
    pub(crate) locked: Vec<(Flow, String)>,
}

/// Stays silent about these connections for this time, in the network namespace of the calling thread.
///
/// # Errors
/// Those of [`PersistentLock::create`].
pub fn begin(flows: &[Flow], limit: Duration) -> soccr::Result<()> {
    Silencer::new()?.begin(flows, limit)
}

/// Ends the silence about connections that are back, in the network namespace of the calling thread. Locks made by people stay:
/// they have their reasons. Connections under such a lock are returned, each with its lock.
///
/// # Errors
/// Those of [`PersistentLock::list`] and [`PersistentLock::unlock`].
pub fn lift(back: &[Flow]) -> soccr::Result<Vec<(Flow, String)>> {
    Ok(Silencer::new()?.lift(back)?.locked)
}
