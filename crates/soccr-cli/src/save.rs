//! `soccr save`: a connection out of a running process, into a file.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::value_parser;
use rustix::process::Pid;
use soccr::Connection;
use soccr::lock::{Locker, Mode};
use soccr_image::AtomicFile;
use soccr_image::stream::{Reader, Writer};

use crate::captive::Captive;
use crate::exit::{self, Exit};
use crate::keeper::Keeper;
use crate::network;
use crate::process::{Process, Sharing, parse_pid};
use crate::signals::Deaf;
use crate::silence::Silence;
use crate::via::{Deadline, Output, Reading};

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
    /// Replace an image that is there
    #[arg(long, requires = "output")]
    force: bool,
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
        let sink = self.open()?;
        let mut keeper = Keeper::start(&[captive.socket().as_fd()], sharing, sink.temporary())?;
        network::enter_of(captive.socket().as_fd()).with_context(|| captive.name.clone())?;
        let flow = captive.flow()?;
        let locker = Locker::new(Mode::HOLD)?;
        keeper.stop()?;
        let lock = locker.lock(&[flow])?;
        let connection = captive.save()?;
        if self.keep {
            lock.release()?;
            keeper.go_on()?;
            return self.write(sink, &connection).and_then(|image| self.finish(image)).map(|()| Exit::Done);
        }
        let image = self.write(sink, &connection)?;
        let mut silence = Silence::begin(lock, Duration::from_secs(self.silence))?;
        // Between the two the connection is in a file without a name.
        let _deaf = Deaf::begin();
        let last = captive.let_go(&connection.control)?;
        if let Err(error) = self.finish(image) {
            captive.take_back(&last)?;
            return Err(error);
        }
        silence.stay();
        Ok(Exit::Done)
    }

    /// Finds out where the image is to go, before anything is stopped.
    fn open(&self) -> Result<Sink> {
        let Some(path) = &self.output else {
            let stdout = rustix::stdio::stdout().try_clone_to_owned().context("standard output")?;
            return Ok(Sink::Output(Output::new(stdout, Deadline::after(Duration::from_secs(self.timeout)))));
        };
        let begins_like_an_image = |file| Reader::new(file).is_ok();
        if !self.force && File::open(path).is_ok_and(begins_like_an_image) {
            bail!(
                "{}: it is an image already, maybe all that is left of a connection: --force replaces it",
                path.display()
            );
        }
        Ok(Sink::File(AtomicFile::create(path).with_context(|| path.display().to_string())?))
    }

    /// Writes the image but for its end, without which it is none: the process still has the connection.
    fn write(&self, sink: Sink, connection: &Connection) -> Result<Writer<Sink>> {
        let write = || {
            let mut writer = Writer::new(sink)?;
            writer.connection(1, "", connection)?;
            writer.get_mut().settle()?;
            anyhow::Ok(writer)
        };
        write().with_context(|| self.destination())
    }

    /// Ends the image, and gives the file its name.
    fn finish(&self, image: Writer<Sink>) -> Result<()> {
        let finish = || match image.finish()? {
            Sink::File(file) => Ok(file.commit()?),
            // A slow reader still finds all of it.
            Sink::Output(output) if output.read() == Reading::Closed => bail!("it is not read to its end"),
            Sink::Output(_) => Ok(None),
        };
        if let Some(error) = finish().with_context(|| self.destination())? {
            let name = self.destination();
            exit::complain(&format!(
                "{name}: in place, though its name may not survive a power failure: {error}"
            ));
        }
        Ok(())
    }

    fn destination(&self) -> String {
        self.output.as_ref().map_or("standard output".into(), |path| path.display().to_string())
    }
}

/// Where an image goes.
enum Sink {
    File(AtomicFile),
    Output(Output),
}

impl Sink {
    fn temporary(&self) -> Option<&Path> {
        match self {
            Self::File(file) => Some(file.temporary()),
            Self::Output(_) => None,
        }
    }

    /// Makes sure of what has been written so far: a file is durable, a pipe is read.
    fn settle(&self) -> Result<()> {
        match self {
            Self::File(file) => Ok(file.sync()?),
            Self::Output(output) if output.read() == Reading::Done => Ok(()),
            Self::Output(_) => bail!("its reader does not read on"),
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.write(bytes),
            Self::Output(output) => output.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
