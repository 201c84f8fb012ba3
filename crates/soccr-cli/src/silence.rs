//! A host that stays silent about connections that have left it: late packets of the peers draw no reset.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use anyhow::Result;
use soccr::connection::Flow;
use soccr::lock::PersistentLock;

use crate::exit;

/// Locks that outlive this process, for a limited time. Dropping it removes them, until they are told to [stay](Self::stay).
#[derive(Debug)]
pub(crate) struct Silence {
    limit: Duration,
    locks: Vec<PersistentLock>,
}

impl Silence {
    /// About nothing yet.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, locks: Vec::new() }
    }

    /// Stays silent about more connections, beside the lock that this process has on them.
    pub(crate) fn extend(&mut self, flows: Vec<Flow>) -> Result<()> {
        if self.limit.is_zero() || flows.is_empty() {
            return Ok(());
        }
        let limit = Some(self.limit);
        if let Some(lock) = self.locks.last_mut() {
            match lock.extend(&flows, limit) {
                // The target ends the silence about what has come back, and whoever makes a lock removes those whose time
                // is over.
                Err(error) if error.errno() == Some(libc::ENOENT) => drop(self.locks.pop()),
                extended => return Ok(extended?),
            }
        }
        let name = name();
        PersistentLock::create(&name, &flows, limit)?;
        self.locks.push(PersistentLock { name, flows, remaining: limit });
        Ok(())
    }

    /// These connections have not left after all, or are back.
    pub(crate) fn end_about(&self, flows: &[Flow]) -> Result<()> {
        let ended: HashSet<&Flow> = flows.iter().collect();
        self.locks.iter().try_for_each(|lock| {
            let silent: Vec<Flow> = lock.flows.iter().filter(|flow| ended.contains(flow)).copied().collect();
            if silent.is_empty() { Ok(()) } else { Ok(lock.unlock(&silent)?) }
        })
    }

    /// The connections have left for good.
    pub(crate) fn stay(&mut self) {
        self.locks.clear();
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        for lock in &self.locks {
            // It has its time limit in any case.
            let _ = lock.remove();
        }
    }
}

/// Ends the silence about connections that are back. To be called in their network namespace. Locks that people have made
/// stay: they have their reasons.
pub(crate) fn lift(back: &[Flow]) -> Result<()> {
    if back.is_empty() {
        return Ok(());
    }
    let back: HashSet<Flow> = back.iter().map(Flow::on_the_wire).collect();
    for lock in PersistentLock::list()? {
        let held: Vec<Flow> = lock.flows.iter().filter(|flow| back.contains(flow)).copied().collect();
        if held.is_empty() {
            continue;
        }
        if lock.name.starts_with(PREFIX) {
            lock.unlock(&held)?;
            continue;
        }
        for flow in held {
            let (local, remote, name) = (flow.local, flow.remote, &lock.name);
            exit::complain(&format!("{local} {remote}: still locked: see `soccr unlock {name}`"));
        }
    }
    Ok(())
}

/// Of the locks that this command leaves by itself.
const PREFIX: &str = "left-";

/// A name that no other lock has: the numbers of processes come again, in containers soon.
pub(crate) fn name() -> String {
    format!("{PREFIX}{:016x}", RandomState::new().hash_one(std::process::id()))
}
