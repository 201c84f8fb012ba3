//! A host that stays silent about connections that have left it: late packets of the peers draw no reset.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Result;
use soccr::Lock;
use soccr::connection::Flow;
use soccr::lock::PersistentLock;

use crate::exit;

/// Locks that outlive this process, for a limited time. Dropping it removes them, until they are told to [stay](Self::stay).
#[derive(Debug)]
pub(crate) struct Silence {
    lock: Option<PersistentLock>,
    /// Only where there is to be no silence.
    _lock: Option<Lock>,
}

impl Silence {
    /// Turns the lock of this process into one that stays for this time; none at all for zero.
    pub(crate) fn begin(mut lock: Lock, limit: Duration) -> Result<Self> {
        if limit.is_zero() {
            return Ok(Self { lock: None, _lock: Some(lock) });
        }
        let flows = lock.flows().to_vec();
        let mut stay = || {
            let name = name();
            lock.persist(&name, Some(limit)).map(|()| name)
        };
        // A process that had our number may have left a lock of that name.
        let name = stay().or_else(|_| stay())?;
        Ok(Self { lock: Some(PersistentLock { name, flows, remaining: Some(limit) }), _lock: None })
    }

    /// Locks connections for this time, beside the lock that this process has on them; not at all for zero.
    pub(crate) fn beside(flows: Vec<Flow>, limit: Duration) -> Result<Self> {
        if limit.is_zero() || flows.is_empty() {
            return Ok(Self { lock: None, _lock: None });
        }
        let name = name();
        PersistentLock::create(&name, &flows, Some(limit))?;
        Ok(Self { lock: Some(PersistentLock { name, flows, remaining: Some(limit) }), _lock: None })
    }

    /// The connections have left for good, but for those that stay.
    pub(crate) fn stay_without(self, staying: &[Flow]) -> Result<()> {
        let unlocked = match &self.lock {
            Some(lock) => {
                let here = lock.flows.iter().filter(|flow| staying.contains(flow)).copied();
                lock.unlock(&here.collect::<Vec<_>>())
            }
            None => Ok(()),
        };
        self.stay();
        Ok(unlocked?)
    }

    /// The connections have left for good.
    pub(crate) fn stay(mut self) {
        self.lock = None;
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        if let Some(lock) = &self.lock {
            // It has its time limit in any case.
            let _ = lock.remove();
        }
    }
}

/// Ends the silence about connections that are back. To be called in their network namespace. Locks that people have made
/// stay: they have their reasons.
pub(crate) fn lift(back: &[Flow]) -> Result<()> {
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

/// A name that no other lock of this host has as long as it stays.
fn name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{PREFIX}{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}
