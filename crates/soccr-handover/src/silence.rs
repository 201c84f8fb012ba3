//! A host that stays silent about connections that have left it: late packets of the peers draw no reset.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use rustix::io::Errno;
use soccr::Flow;
use soccr::lock::PersistentLock;

/// Of the locks that a hand-over leaves: their time is limited, and whoever gets a connection back ends them.
const PREFIX: &str = "left-";

/// So many connections share one lock: it remembers them all.
const MOST: usize = 4096;

/// The connections that have left this host not long ago.
#[derive(Debug, Default)]
pub(crate) struct Silence {
    lock: Option<PersistentLock>,
}

impl Silence {
    /// Stays silent about these connections for the time of `limit`, beside the lock that this process has on them.
    pub(crate) fn extend(&mut self, flows: &[Flow], limit: Duration) -> soccr::Result<()> {
        if limit.is_zero() || flows.is_empty() {
            return Ok(());
        }
        if let Some(lock) = self.lock.as_mut().filter(|lock| lock.flows.len() < MOST) {
            match lock.extend(flows, Some(limit)) {
                Ok(()) => return Ok(()),
                // Who makes a lock removes those whose time is over; and one that is gone locks nothing twice.
                Err(error)
                    if [Errno::NOENT, Errno::EXIST]
                        .iter()
                        .any(|errno| error.errno() == Some(errno.raw_os_error())) => {}
                Err(error) => return Err(error),
            }
        }
        // Numbers of processes come again, in containers soon.
        let name = format!("{PREFIX}{:016x}", RandomState::new().hash_one(std::process::id()));
        PersistentLock::create(&name, flows, Some(limit))?;
        self.lock = Some(PersistentLock { name, flows: flows.to_vec(), remaining: Some(limit) });
        Ok(())
    }
}

/// Ends the silence about connections that are back, in the network namespace of the calling thread. Locks that people have
/// made stay: they have their reasons. Those are returned, each with its lock.
pub(crate) fn lift(back: &[Flow]) -> soccr::Result<Vec<(Flow, String)>> {
    let mut locked = Vec::new();
    if back.is_empty() {
        return Ok(locked);
    }
    let back: HashSet<Flow> = back.iter().map(Flow::on_the_wire).collect();
    for lock in PersistentLock::list()? {
        let held: Vec<Flow> = lock.flows.iter().filter(|flow| back.contains(flow)).copied().collect();
        if held.is_empty() {
            continue;
        }
        if lock.name.starts_with(PREFIX) {
            lock.unlock(&held)?;
        } else {
            locked.extend(held.into_iter().map(|flow| (flow, lock.name.clone())));
        }
    }
    Ok(locked)
}
