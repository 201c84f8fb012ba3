//! `soccr save`: a connection out of a running process, into a file.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::os::fd::{AsFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::value_parser;
use rustix::process::Pid;
use soccr::Connection;
use soccr::lock::{Locker, Mode};
use soccr_image::AtomicFile;

use crate::captive::Captive;
use crate::exit::Exit;
use crate::keeper::Keeper;
use crate::network;
use crate::process::{Process, Sharing, parse_pid};
use crate::signals::Deaf;
use crate::silence::Silence;
use crate::via::{Deadline, Output};

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
    /// How many seconds the reader of standard output may take to read on; then the connection stays where it is
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = value_parser!(u64).range(1..=86400))]
    timeout: u64,
    /// For how many seconds this host stays silent about the connection that has left it
    #[arg(long, value_name = "SECONDS", default_value_t = soccr::lock::SILENCE.as_secs(),
        value_parser = value_parser!(u64).range(..=86400), conflicts_with = "keep")]
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
        let sharing = Sharing::find(&[captive.inode])?;
        let mut keeper = Keeper::start(&[captive.socket().as_fd()], sharing)?;
        network::enter_of(captive.socket().as_fd()).with_context(|| captive.name.clone())?;
        let flow = captive.flow()?;
        let locker = Locker::new(Mode::HOLD)?;
        keeper.stop()?;
        let lock = locker.lock(&[flow])?;
        let connection = captive.save()?;
        if self.keep {
            lock.release()?;
            drop(keeper);
            self.write(&connection)?.map_or(Ok(()), |image| self.publish(image))?;
            return Ok(Exit::Done);
        }
        let image = self.write(&connection)?;
        let mut silence = Silence::begin(lock, Duration::from_secs(self.silence))?;
        // Between the two the connection is in a file without a name.
        let _deaf = Deaf::begin();
        let last = captive.let_go(&connection.control)?;
        if let Some(image) = image
            && let Err(error) = self.publish(image)
        {
            captive.take_back(&last)?;
            return Err(error);
        }
        silence.stay();
        Ok(Exit::Done)
    }

    /// Writes the image, whole and durable. A file has yet to get its name.
    fn write(&self, connection: &Connection) -> Result<Option<AtomicFile>> {
        let Some(path) = &self.output else {
            let stdout = rustix::stdio::stdout().try_clone_to_owned().context("standard output")?;
            let mut output = Output::new(stdout, Deadline::after(Duration::from_secs(self.timeout)));
            soccr_image::write(&mut output, connection)?;
            return Ok(None);
        };
        let at = || path.display().to_string();
        let mut file = AtomicFile::create(path).with_context(at)?;
        soccr_image::write(&mut file, connection).with_context(at)?;
        file.sync().with_context(at)?;
        Ok(Some(file))
    }

    fn publish(&self, image: AtomicFile) -> Result<()> {
        image.commit().with_context(|| self.output.clone().unwrap_or_default().display().to_string())
    }
}
