//! Descriptors: what standard output is, and how many are allowed. Every connection takes one in this process, but the programs that it
//! starts get the limit from before.

use std::io::IsTerminal;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use rustix::fs::{FileType, fstat, major};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::sys;

/// The limit from before.
static GIVEN: OnceLock<Rlimit> = OnceLock::new();

/// Raises the soft limit to the hard one.
pub(crate) fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let _ = GIVEN.set(limit);
    // If this fails, the call that needs more descriptors reports it.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Restores the limit for a program: select(2) does not work with descriptors beyond 1023.
pub(crate) fn keep_limit_from(command: &mut Command) {
    if let Some(limit) = GIVEN.get() {
        sys::limit_descriptors(command, *limit);
    }
}

/// Refuses a standard output where connections do not belong, and, if they leave their processes, one where they would be lost: a
/// descriptor that was closed is `/dev/null`, since the Rust runtime opens that. `instead` says where they may go.
pub(crate) fn check_output(leave: bool, instead: &str) -> Result<()> {
    let output = rustix::stdio::stdout();
    if output.is_terminal() {
        bail!("connections are not for a terminal: {instead}");
    }
    let about = fstat(output).context("standard output")?;
    let is_device = FileType::from_raw_mode(about.st_mode) == FileType::CharacterDevice;
    if leave && is_device && major(about.st_rdev) == MEMORY_DEVICES {
        bail!(
            "standard output is closed, or keeps nothing (/dev/null): the connections would be lost: {instead}"
        );
    }
    Ok(())
}

/// `/dev/null`, `/dev/zero`, and others that take whatever is written.
const MEMORY_DEVICES: u32 = 1;
