//! `soccr resume`: ends the repair mode of a socket that was left paused.

use std::os::fd::{AsFd, RawFd};

use anyhow::{Context, Result, anyhow};
use rustix::process::Pid;
use soccr::{ErrorKind, Paused};
use soccr_handover::foreign::{Captive, Process, namespace};

use crate::command::completions;
use crate::exit::Exit;
use crate::pid::parse_pid;

/// Let a connection go on that was left paused
///
/// A program that is killed while it saves a connection leaves the socket in repair mode: silent, and of no use to its process
/// (`soccr list` says "paused"). Not for a socket that another program is just about to move.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  soccr resume --pid 4711 --fd 5")]
pub(crate) struct Resume {
    /// The process that has the connection
    #[arg(long, value_name = "PID", value_parser = parse_pid, add = completions::processes())]
    pid: Pid,
    /// The number of the descriptor there (see `soccr list`)
    #[arg(long, value_name = "FD", add = completions::descriptors())]
    fd: RawFd,
}

impl Resume {
    pub(crate) fn run(&self) -> Result<Exit> {
        let captive = Captive::new(&Process::open(self.pid)?, self.fd)?;
        let resume = || -> Result<()> {
            namespace::enter_of(captive.as_fd())?;
            let paused = Paused::take_over(captive.as_fd()).map_err(|error| match error.kind() {
                ErrorKind::Refused => {
                    anyhow!("it is not paused (in repair mode): there is nothing to resume")
                }
                _ => error.into(),
            })?;
            Ok(paused.resume()?)
        };
        resume().with_context(|| captive.name().to_owned())?;
        Ok(Exit::Done)
    }
}
