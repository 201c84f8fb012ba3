//! `soccr save`: a connection out of a running process, into a file.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Pid;
use soccr::Connection;
use soccr::lock::{Locker, Mode};

use crate::captive::Captive;
use crate::exit::Exit;
use crate::keeper::Keeper;
use crate::process::{self, Process, parse_pid};
use crate::silence::Silence;
use crate::{exit, network};

/// Save a connection of a running process in a file
///
/// The process is stopped for the instant. Unless --keep is given it loses the connection: silently on the wire,
/// with an ordinary error (ECONNABORTED) for the process. This host stays silent about the connection afterwards, for the time
/// of --silence, so that packets of the peer draw no reset; `soccr restore` on this host ends that.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  soccr save --pid 4711 --fd 5 -o c.soccr
  soccr save --pid $(pidof nc) --fd 3 --keep | soccr inspect -")]
pub(crate) struct Save {
    /// The process that has the connection
    #[arg(long, value_name = "PID", value_parser = parse_pid)]
    pid: Pid,
    /// The number of the descriptor there (see `soccr list`)
    #[arg(long, value_name = "FD")]
    fd: RawFd,
    /// Where to: a file that only you can read; standard output without it
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Leave the connection where it is: it goes on
    #[arg(long)]
    keep: bool,
    /// For how many seconds this host stays silent about the connection that has left it
    #[arg(long, value_name = "SECONDS", default_value_t = soccr::lock::SILENCE.as_secs(), conflicts_with = "keep")]
    silence: u64,
    /// The address of the peer, for a connection that both ends have closed
    #[arg(long, value_name = "ADDRESS:PORT")]
    peer: Option<SocketAddr>,
}

impl Save {
    pub(crate) fn run(&self) -> Result<Exit> {
        if self.output.is_none() && std::io::stdout().is_terminal() {
            bail!("an image is not for a terminal: name a file by -o, or use `soccr inspect`");
        }
        let captive = Captive::new(&Process::open(self.pid)?, self.fd)?.with_peer(self.peer);
        let sharing = process::sharing(&[captive.inode])?;
        let mut keeper = Keeper::start(&[captive.socket().as_fd()], &sharing)?;
        network::enter_of(captive.socket().as_fd()).with_context(|| captive.name.clone())?;
        let flow = captive.flow()?;
        let locker = Locker::new(Mode::HOLD)?;
        keeper.stop()?;
        let lock = locker.lock(&[flow])?;
        let connection = captive.save()?;
        if self.keep {
            lock.release()?;
            drop(keeper);
            return self.write(&connection);
        }
        let written = self.write(&connection)?;
        let silence = Silence::begin(lock, Duration::from_secs(self.silence))?;
        captive.let_go(&connection.control)?;
        silence.stay();
        Ok(written)
    }

    fn write(&self, connection: &Connection) -> Result<Exit> {
        if let Some(path) = &self.output {
            soccr_image::save_file(path, connection)?;
            return Ok(Exit::Done);
        }
        let mut stdout = std::io::stdout().lock();
        soccr_image::write(&mut stdout, connection)?;
        exit::written(stdout.flush())
    }
}
