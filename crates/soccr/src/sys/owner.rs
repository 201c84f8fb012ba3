//! Files of another user.

use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::process::{
    DumpableBehavior, Pid, Signal, dumpable_behavior, getpid, getppid, kill_process,
    parent_process_death_signal, set_dumpable_behavior, set_parent_process_death_signal,
};
use rustix::thread::{CapabilitySets, capabilities, set_capabilities};

/// Runs `work` with the calling thread as this user and group where files are concerned (`setfsuid(2)`): what it opens, such as
/// a socket, is theirs. Rights over the network stay as they are.
///
/// A socket given to them later (`fchown(2)`) would not do: firewalls (`skuid`) go by who has opened it.
///
/// # Errors
/// `EPERM` without `CAP_SETUID` and `CAP_SETGID`.
pub(crate) fn as_owner<T>(user: u32, group: u32, work: impl FnOnce() -> T) -> io::Result<T> {
    /// Whether the process can be dumped is read and put back by one thread at a time.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // Dropped last: also the way back takes them away.
    let _lost = Lost::note()?;
    // The group first: afterwards there may be no right to change it.
    let _group = Changed::set(libc::setfsgid, group)?;
    let _user = Changed::set(libc::setfsuid, user)?;
    Ok(work())
}

/// What the kernel takes from whoever becomes another user; it is put back when this is dropped.
struct Lost {
    /// Root among the users of files gets the capabilities over files, another user loses them (`capabilities(7)`).
    capabilities: CapabilitySets,
    dumpable: DumpableBehavior,
    signal: Option<Signal>,
    parent: Option<Pid>,
}

impl Lost {
    fn note() -> io::Result<Self> {
        Ok(Self {
            capabilities: capabilities(None)?,
            dumpable: dumpable_behavior()?,
            signal: parent_process_death_signal()?,
            parent: getppid(),
        })
    }
}

impl Drop for Lost {
    fn drop(&mut self) {
        // First: whoever gets some can be dumped no more.
        let _ = set_capabilities(None, self.capabilities);
        // The third behaviour is the kernel's to choose.
        if self.dumpable != DumpableBehavior::DumpableReadableOnlyByRoot {
            let _ = set_dumpable_behavior(self.dumpable);
        }
        if let Some(signal) = self.signal {
            let _ = set_parent_process_death_signal(Some(signal));
            if getppid() != self.parent {
                // It has died meanwhile.
                let _ = kill_process(getpid(), signal);
            }
        }
    }
}

/// A number of the thread that is put back when this is dropped.
struct Changed {
    set: unsafe extern "C" fn(u32) -> i32,
    before: u32,
}

impl Changed {
    fn set(set: unsafe extern "C" fn(u32) -> i32, to: u32) -> io::Result<Self> {
        // SAFETY: the calls take a number and touch no memory of ours. They return the one before, and say nothing of errors.
        let before = unsafe { set(to) } as u32;
        let changed = Self { set, before };
        // SAFETY: as above. Minus one is nobody's number: it changes nothing.
        if unsafe { set(u32::MAX) } as u32 == to {
            Ok(changed)
        } else {
            Err(io::Error::from_raw_os_error(libc::EPERM))
        }
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { (self.set)(self.before) };
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::thread::CapabilitySet;

    use super::*;

    /// Runs the test on a thread with these effective capabilities.
    fn keeps(effective: CapabilitySet, user: u32) {
        thread::spawn(move || {
            let sets = CapabilitySets { effective, ..capabilities(None).unwrap() };
            set_capabilities(None, sets).unwrap();
            as_owner(user, user, || ()).unwrap();
            assert_eq!(capabilities(None).unwrap(), sets);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn the_thread_has_the_capabilities_that_it_had() {
        let all = capabilities(None).unwrap().effective;
        if !all.contains(CapabilitySet::SETUID | CapabilitySet::SETGID) {
            return soccr_lab::skip("this user may open no files for another one");
        }
        keeps(all, 1000);
        keeps(all - CapabilitySet::DAC_OVERRIDE, 1000);
    }
}
