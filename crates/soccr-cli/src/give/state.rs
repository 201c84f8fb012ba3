//! The state that a source has sent along with a connection: the program gets it as a sealed memory file.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use soccr::Flow;

/// The states, each with the index of its connection.
pub(crate) type State = (usize, OwnedFd);

/// The states that come with connections, in files since before the connections leave their source, where these can still stay.
#[derive(Debug, Default)]
pub(crate) struct States {
    kept: HashMap<Flow, OwnedFd>,
    /// Connections of no use without their states.
    critical: HashSet<Flow>,
}

impl States {
    /// How many states there are.
    pub(crate) fn count(&self) -> usize {
        self.kept.len()
    }

    pub(crate) fn keep(&mut self, flow: Flow, bytes: &[u8], is_critical: bool) -> Result<()> {
        if is_critical {
            self.critical.insert(flow);
        }
        self.kept.insert(flow, keep(bytes)?);
        Ok(())
    }

    /// The connection is of no use without its state, which could not be kept.
    pub(crate) fn is_critical(&self, flow: Flow) -> bool {
        self.critical.contains(&flow)
    }

    /// The file with this state of the connection. Another one may have had the same addresses, and was refused.
    pub(crate) fn take(&mut self, flow: Flow, bytes: &[u8]) -> Result<OwnedFd> {
        match self.kept.remove(&flow) {
            Some(file) if holds(&file, bytes)? => Ok(file),
            _ => keep(bytes),
        }
    }
}

fn holds(file: &OwnedFd, bytes: &[u8]) -> Result<bool> {
    let mut file = File::from(file.try_clone()?);
    let mut there = Vec::with_capacity(bytes.len());
    file.read_to_end(&mut there).and_then(|_| file.rewind()).context("a state")?;
    Ok(there == bytes)
}

/// Writes the state into a sealed file, positioned at its beginning.
fn keep(bytes: &[u8]) -> Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(memfd_create("soccr-state", flags).context("memfd_create")?);
    file.write_all(bytes).and_then(|()| file.rewind()).context("a state")?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).context("fcntl(F_ADD_SEALS)")?;
    Ok(file.into())
}
