//! `soccr restore`: saved connections for a program.

mod consumed;

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use soccr::lock::{Locker, Mode, SILENCE};
use soccr::{Connection, Flow, Restored};
use soccr_handover::silence;
use soccr_image::AddressMap;
use soccr_image::stream::{Message, Reader};

use crate::command::completions;
use crate::exit::{self, Exit};
use crate::fidelity::{Demands, Trust};
use crate::give::Handover;
use crate::give::parting::Parting;
use crate::signals::Deaf;
use crate::{descriptors, network};

/// Give saved connections to a program
///
/// The program runs in the network namespace of the connections. Nothing is sent before all of them are in place; where one fails,
/// the image is as good as before. Connections that cannot be given away after that are saved anew, the messages name the images that
/// count from then on, and the old one gets a name with .consumed behind it. So does an image with keys of kernel TLS at once: it can be
/// restored only once.
#[derive(clap::Args, Debug)]
#[command(
    override_usage = "\
soccr restore [OPTIONS] [FILE] [--stdio] -- PROGRAM [ARGUMENT]...
       soccr restore [OPTIONS] [FILE] --send-fd UNIX_SOCKET
       soccr restore [OPTIONS] [FILE] --adopt",
    after_help = "\
Examples:
  soccr restore c.soccr -- ./server                 as descriptor 3
  soccr restore c.soccr --stdio -- cat              as standard input and output
  soccr restore c.soccr --send-fd /run/server.sock  to a process that waits for it
  soccr restore c.soccr --adopt                     to the server that listens on its port
  soccr restore c.soccr --map 192.0.2.1=192.0.2.9 --netns /run/netns/blue -- ./server"
)]
pub(crate) struct Restore {
    /// The image; standard input without it, or as -
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Restore under another address: each end that is OLD becomes NEW (IP, or IP:PORT)
    ///
    /// The peer must agree: it is for networks that translate addresses, and for peers restored likewise.
    #[arg(long, value_name = "OLD=NEW")]
    map: Vec<AddressMap>,
    /// The network namespace to restore in: a path, a name of ip-netns(8), or the number of a process
    #[arg(long, value_name = "PATH|NAME|PID", add = completions::namespaces())]
    netns: Option<String>,
    #[command(flatten)]
    demands: Demands,
    #[command(flatten)]
    handover: Handover,
}

impl Restore {
    pub(crate) fn run(&self) -> Result<Exit> {
        network::enter(self.netns.as_deref())?;
        let recipient = self.handover.find()?;
        let (file, mut saved) = read(self.file.as_deref())?;
        let file = file.as_deref();
        consumed::check(file, saved.iter().map(|(_, connection)| connection))?;
        if saved.len() > recipient.capacity() {
            bail!("{} connections: there is room for one", saved.len());
        }
        descriptors::raise_limit();
        recipient.check_room(saved.len())?;
        let mut reports = self.demands.reports(Trust::All);
        for (_, connection) in &mut saved {
            AddressMap::apply_to_connection(&self.map, connection);
            recipient.check(connection)?;
            reports.distrust(connection)?;
        }
        soccr::prepare();
        let flows: Vec<Flow> = saved.iter().map(|(_, connection)| connection.flow()).collect();
        let lock = Locker::new(Mode::HOLD)?.lock(&flows)?;
        let restore = |(_, connection): &(_, Connection)| {
            connection.restore().with_context(|| format!("{} {}", connection.local, connection.remote))
        };
        let restored: Vec<Restored> = saved.iter().map(restore).collect::<Result<_>>()?;
        // From here on the connections exist outside of the image, too.
        let deaf = Deaf::begin();
        saved.iter().zip(&restored).try_for_each(|((name, _), restored)| reports.add(name, restored))?;
        reports.tell()?;
        consumed::mark(file, saved.iter().map(|(_, connection)| connection))?;
        let locked = silence::lift(&flows).inspect_err(|_| stay_silent(&flows))?;
        for (Flow { local, remote }, name) in locked {
            exit::complain(&format!("{local} {remote}: still locked: see `soccr unlock {name}`"));
        }
        if let Err(error) = lock.release_into(&restored.iter().collect::<Vec<_>>()) {
            // It is released nevertheless, and the peers send again what they had sent.
            exit::complain(&error.to_string());
        }
        let mut streams = Vec::with_capacity(restored.len());
        for (restored, flow) in restored.into_iter().zip(&flows) {
            match restored.resume() {
                Ok(stream) => streams.push(stream),
                // It is in the image alone, and the other connections are alive already.
                Err(error) => {
                    stay_silent(&[*flow]);
                    if flows.len() == 1 {
                        return Err(error.into());
                    }
                    exit::complain(&format!("{} {}: {error}", flow.local, flow.remote));
                }
            }
        }
        let given = recipient.give(streams, &[], deaf, Parting::default());
        if !matches!(given, Ok(Exit::Done)) {
            consumed::set_aside(file);
        }
        given
    }
}

/// These are in the image alone: a host that answered their peers would reset them.
fn stay_silent(flows: &[Flow]) {
    if let Err(error) = silence::begin(flows, SILENCE) {
        exit::complain(&error.to_string());
    }
}

/// The connections of an image, and their names.
type Saved = Vec<(String, Connection)>;

/// The unfinished file of a `soccr save` that was killed after it had taken the connections. (Killed earlier, its keeper removes the
/// file.) The end of the file may be missing.
fn left_behind(path: &Path) -> Option<(PathBuf, Saved)> {
    let prefix = format!(".{}.", path.file_name()?.to_str()?);
    let directory = path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let left = std::fs::read_dir(directory).ok()?.flatten().find(|entry| {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(&prefix)?.strip_suffix(".tmp"));
        // The `soccr save` may still be running.
        pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists())
    })?;
    let mut connections = Vec::new();
    let _ = read_into(&mut connections, File::open(left.path()).ok()?);
    (!connections.is_empty()).then(|| (left.path(), connections))
}

/// Reads an image from a file or, without a name, from standard input. Also returns the file in which it was found.
pub(crate) fn read(path: Option<&Path>) -> Result<(Option<PathBuf>, Saved)> {
    let mut connections = Vec::new();
    let path = path.filter(|path| *path != Path::new("-"));
    match path {
        Some(path) => {
            let at = || path.display().to_string();
            match File::open(path) {
                Err(error) if !path.exists() => {
                    let Some((left, found)) = left_behind(path) else { return Err(error).with_context(at) };
                    exit::complain(&format!(
                        "{}: a `soccr save` was killed before it was there; {} is restored",
                        path.display(),
                        left.display()
                    ));
                    return Ok((Some(left), found));
                }
                file => read_into(&mut connections, file.with_context(at)?).with_context(at)?,
            }
        }
        None => read_into(&mut connections, File::from(rustix::stdio::stdin().try_clone_to_owned()?))?,
    }
    if connections.is_empty() {
        bail!("there is no connection in it")
    }
    Ok((path.map(Path::to_owned), connections))
}

/// Reads an image to its end.
fn read_into(connections: &mut Saved, source: impl Read) -> Result<()> {
    let mut reader = Reader::new(BufReader::new(source))?;
    while let Some(message) = reader.receive()? {
        match message {
            Message::Connection { name, connection, .. } => connections.push((name, connection)),
            // Only a hand-over has a recipient for states.
            Message::State { critical: false, .. } => {}
            _ => bail!("it is a hand-over, not an image: give it to `soccr receive`"),
        }
    }
    Ok(())
}
