//! The state that a source has sent along with a connection: the program gets it as a sealed memory file.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// The states, each with the index of its connection.
pub(crate) type State = (usize, OwnedFd);

/// Writes the state into a sealed file, positioned at its beginning.
pub(crate) fn keep(bytes: &[u8]) -> Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(memfd_create("soccr-state", flags).context("memfd_create")?);
    file.write_all(bytes).and_then(|()| file.rewind()).context("a state")?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).context("fcntl(F_ADD_SEALS)")?;
    Ok(file.into())
}
