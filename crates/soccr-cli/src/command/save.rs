//! `soccr save`: connections out of running processes, into a file.

mod pipe;

use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail};
use clap::value_parser;
use soccr::Lock;
use soccr::connection::Flow;
use soccr::lock::{Locker, Mode};
use soccr_handover::foreign::{Captive, Keeper, Sharing, namespace};
use soccr_handover::{Seat, Users, silence};
use soccr_image::AtomicFile;
use soccr_image::stream::Writer;

use crate::command::restore::image::{left_behind, refuse_to_replace};
use crate::descriptors;
use crate::exit::{self, Coded, Exit};
use crate::give::rescue::rescue;
use crate::selection::Selection;
use crate::signals::{Deaf, Unstoppable};

use pipe::{Output, Reading};

/// Save connections of running processes in a file
///
/// The processes are stopped for a moment. Unless --keep is given they lose the connections: silently on the wire,
/// with an ordinary error (ECONNABORTED) for the process; one that waits in connect(2) connects once more. This host stays silent about
/// the connections afterwards, for the time of --silence, so that packets of the peers draw no reset; `soccr restore` on this host
/// ends that.
///
/// Connections with kernel TLS (kTLS) are saved with their keys, and go on in programs that leave TLS to the kernel as well. Such an
/// image can be restored once.
///
/// A connection that cannot be saved is named, and stays. Where anything fails after that, all stay.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  soccr save --pid 4711 --fd 5 -o c.soccr
  soccr save --port 443 -o all.soccr
  soccr save --pid $(pidof nc) --fd 3 --keep | soccr inspect -")]
pub(crate) struct Save {
    #[command(flatten)]
    selection: Selection,
    /// Where to: a file that only you can read; standard output without it
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replace an image that is there, or save beside what a killed `soccr save` has left
    #[arg(long, requires = "output", conflicts_with = "timeout")]
    force: bool,
    /// Leave the connections where they are: they go on
    #[arg(long)]
    keep: bool,
    /// How many seconds the reader of standard output may take to read on; then the connections stay where they are
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = value_parser!(u64).range(1..=86400),
        conflicts_with = "output")]
    timeout: u64,
    /// For how many seconds this host stays silent about connections that have left it
    #[arg(long, value_name = "SECONDS", default_value_t = soccr::lock::SILENCE.as_secs(),
        value_parser = value_parser!(u64).range(..=86400), conflicts_with = "keep")]
    silence: u64,
    /// The address of the peer, for the one connection that was reset, or that both ends have closed
    #[arg(long, value_name = "ADDRESS:PORT")]
    forgotten_peer: Option<SocketAddr>,
}

/// How long the peers may take to acknowledge what the kernel has encrypted: the processes are stopped meanwhile.
const SETTLING: Duration = Duration::from_secs(1);

/// A connection that is to be saved: the number by which the keeper knows its socket, its name, and its seat.
type Known = (usize, String, Seat);

/// A connection that is in the image, and still in its process.
struct Saved {
    /// The number by which the keeper knows its socket.
    number: usize,
    name: String,
    seat: Seat,
    /// Dropping this delivers the packets that were held, if the connection is still there.
    _lock: Lock,
}

impl Save {
    pub(crate) fn run(&self) -> Result<Exit> {
        if self.output.is_none() {
            descriptors::check_output(!self.keep, "name a file by -o")?;
        }
        descriptors::raise_limit();
        let mut failed = 0;
        let mut fail = |error: anyhow::Error| {
            exit::complain(&exit::line(&error));
            failed += 1;
        };
        let captives = self.selection.find(self.forgotten_peer, &mut fail)?;
        let inodes: Vec<u64> = captives.iter().map(Captive::inode).collect();
        let sockets: Vec<_> = captives.iter().map(AsFd::as_fd).collect();
        let sink = self.open()?;
        let keeper = Keeper::start(&sockets, Sharing::find(&inodes)?, sink.temporary())?;
        let mut keeper = Unstoppable::new(keeper);
        namespace::enter_of(sockets[0]).with_context(|| captives[0].name().to_owned())?;
        let mut known = Vec::with_capacity(captives.len());
        for (number, captive) in captives.into_iter().enumerate() {
            let name = captive.name().to_owned();
            match self.take(captive) {
                Ok(seat) => known.push((number, name, seat)),
                Err(error) => fail(error),
            }
        }
        if known.is_empty() {
            return Ok(Exit::Failed);
        }
        let locker = Locker::new(Mode::HOLD)?;
        keeper.stop()?;
        let known = settled(known, &mut fail);
        let (mut image, mut saved) = self.write(sink, known, &locker, &mut fail)?;
        let exit = match (saved.len(), failed) {
            (0, _) => return Ok(Exit::Failed),
            (_, 0) => Exit::Done,
            _ => Exit::SomeFailed,
        };
        if self.keep {
            drop(saved);
            keeper.go_on()?;
            return self.finish(&mut image).map(|()| exit);
        }
        let flows: Vec<Flow> = saved.iter().map(|saved| saved.seat.flow()).collect();
        silence::begin(&flows, Duration::from_secs(self.silence))?;
        // An image without its end and its name is not valid.
        let _deaf = Deaf::begin();
        let taken =
            saved.iter_mut().try_for_each(|saved| saved.seat.let_go().with_context(|| saved.name.clone()));
        match taken.and_then(|()| self.finish(&mut image)) {
            Ok(()) => Ok(exit),
            Err(error) => take_back(saved, image.into_inner(), keeper, error),
        }
    }

    /// Refuses --keep for connections that must not exist twice.
    fn take(&self, captive: Captive) -> Result<Seat> {
        let name = captive.name().to_owned();
        let seat = captive.into_seat()?;
        if self.keep && seat.has_kernel_tls()? {
            bail!(
                "{name}: kernel TLS (kTLS) and --keep: two sockets that go on with the same keys would give them away"
            );
        }
        Ok(seat)
    }

    /// Finds out where the image is to go, before anything is stopped.
    fn open(&self) -> Result<Sink> {
        let Some(path) = &self.output else {
            let stdout = rustix::stdio::stdout().try_clone_to_owned().context("standard output")?;
            return Ok(Sink::Output(Output::new(stdout, Duration::from_secs(self.timeout))));
        };
        if !self.force {
            refuse_to_replace(path)?;
        }
        if let Some((left, _)) = left_behind(path).first().filter(|_| !self.force) {
            bail!(
                "{}: a `soccr save` was killed, and has left {}, maybe all that is left of a connection: `soccr restore` \
                 finds it; --force lets it be",
                path.display(),
                left.display()
            );
        }
        if path.exists() && !path.is_file() {
            bail!("{}: not a regular file: leave -o out to write to standard output", path.display());
        }
        Ok(Sink::File(AtomicFile::create(path).with_context(|| path.display().to_string())?))
    }

    /// Locks the connections and writes the image without its end, so that it is not valid yet: the processes still have them.
    fn write(
        &self,
        sink: Sink,
        seats: Vec<Known>,
        locker: &Locker,
        fail: &mut impl FnMut(anyhow::Error),
    ) -> Result<(Writer<Sink>, Vec<Saved>)> {
        let mut all: Vec<Saved> = Vec::with_capacity(seats.len());
        let write = || {
            let mut writer = Writer::new(sink)?;
            for (number, name, mut seat) in seats {
                let lock = locker.lock(&[seat.flow()])?;
                match seat.save() {
                    Ok(connection) => {
                        writer.connection(all.len() as u32 + 1, &name, connection)?;
                        if self.keep {
                            seat.come_back()?;
                        }
                        all.push(Saved { number, name, seat, _lock: lock });
                    }
                    Err(error) => fail(anyhow::Error::new(error).context(name)),
                }
            }
            writer.get_mut().settle()?;
            anyhow::Ok(writer)
        };
        let writer = write().with_context(|| self.destination())?;
        Ok((writer, all))
    }

    /// Ends the image, and gives the file its name.
    fn finish(&self, image: &mut Writer<Sink>) -> Result<()> {
        image.end().with_context(|| self.destination())?;
        let mut finish = || match image.get_mut() {
            Sink::File(file) if self.force => Ok(file.commit()?),
            Sink::File(file) => Ok(file.commit_unless_replaced()?),
            // A slow reader can still read all of it.
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

/// Puts connections back into their processes. Until they are there, the image may be all that there is of them; it stays for those that
/// cannot be put back.
fn take_back(saved: Vec<Saved>, image: Sink, mut keeper: impl Users, why: Error) -> Result<Exit> {
    let (mut back, mut lost) = (Vec::with_capacity(saved.len()), 0);
    for Saved { number, name, mut seat, .. } in saved {
        // Without the keeper, it comes back all the same.
        let _ = keeper.filling(number);
        match seat.come_back() {
            Ok(()) => {
                let _ = keeper.filled(number);
            }
            Err(error) => {
                // The keeper ends what is incomplete, in silence.
                lost += 1;
                exit::complain(&match image.temporary() {
                    Some(file) => {
                        format!("{name}: {error}; it is in {}: see `soccr restore`", file.display())
                    }
                    None => format!("{name}: it is lost: {error}"),
                });
                continue;
            }
        }
        if seat.is_adrift() {
            let (flow, stream) = (seat.flow(), seat.into_socket().into());
            let reason = rescue([(flow, &stream)], &anyhow!("its process has lost it"));
            exit::complain(&format!("{name}: {}", exit::line(&reason)));
        } else {
            back.push(seat.flow());
        }
    }
    if let Err(error) = silence::lift(&back) {
        // Whatever is lost weighs more.
        exit::complain(&format!("this host may stay silent about what is back in its process: {error}"));
    }
    match (lost, image) {
        (0, _) => Err(why),
        (_, Sink::File(file)) => {
            file.leave();
            Err(why)
        }
        (count, Sink::Output(_)) => {
            let what =
                format!("{}; {count} connections could not be put back, and are lost", exit::line(&why));
            Err(Coded(Exit::Lost, what).into())
        }
    }
}

/// Prepares connections with kernel TLS for their locks, while nobody writes to them.
fn settled(seats: Vec<Known>, fail: &mut impl FnMut(anyhow::Error)) -> Vec<Known> {
    let deadline = Instant::now() + SETTLING;
    let mut settle = |(_, name, seat): &Known| {
        let settled = seat.settle(deadline.saturating_duration_since(Instant::now()));
        settled.map_err(|error| fail(anyhow::Error::new(error).context(name.clone()))).is_ok()
    };
    seats.into_iter().filter(|seat| settle(seat)).collect()
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

    /// Waits until what has been written is safe: on disk if it is a file, read if it is a pipe.
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
