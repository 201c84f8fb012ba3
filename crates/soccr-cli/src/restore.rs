//! `soccr restore`: a saved connection for a program.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::Result;
use soccr::Connection;
use soccr::lock::{Locker, Mode};
use soccr_image::AddressMap;
use soccr_image::stream::{Message, Reader};

use crate::exit::{self, Exit};
use crate::fidelity::{Demands, Trust};
use crate::handover::Handover;
use crate::signals::Deaf;
use crate::{network, silence};

/// Give a saved connection to a program
///
/// The program runs in the network namespace of the connection. Nothing is sent before everything is in place; where it fails,
/// the image is as good as before.
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
    /// The network namespace to restore in: a path, or the number of a process
    #[arg(long, value_name = "PATH|PID")]
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
        let mut connection = read(self.file.as_deref())?;
        AddressMap::apply_to_connection(&self.map, &mut connection);
        recipient.check(&connection)?;
        soccr::prepare();
        let mut reports = self.demands.reports(Trust::All);
        reports.distrust(&mut connection)?;
        let lock = Locker::new(Mode::HOLD)?.lock(&[connection.flow()])?;
        let restored = connection.restore()?;
        // From here on the image is not all that there is.
        let deaf = Deaf::begin();
        reports.add("", &restored)?;
        reports.tell()?;
        silence::lift(&[connection.flow()])?;
        lock.release_into(&[&restored])?;
        recipient.give(vec![restored.resume()?], deaf)
    }
}

/// What a `soccr save` to this file has left behind that was killed when it had taken the connection: its keeper removes the file
/// otherwise. The end of it may be missing.
fn left_behind(path: &Path) -> Option<(PathBuf, Connection)> {
    let prefix = format!(".{}.", path.file_name()?.to_str()?);
    let directory = path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let left = std::fs::read_dir(directory).ok()?.flatten().find(|entry| {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(&prefix)?.strip_suffix(".tmp"));
        // One that still runs has its reasons.
        pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists())
    })?;
    let mut reader = Reader::new(BufReader::new(File::open(left.path()).ok()?)).ok()?;
    match reader.receive() {
        Ok(Some(Message::Connection { connection, .. })) => Some((left.path(), connection)),
        _ => None,
    }
}

/// Reads an image from a file or, without a name, from standard input.
pub(crate) fn read(path: Option<&Path>) -> Result<Connection> {
    match path.filter(|path| *path != Path::new("-")) {
        Some(path) => match soccr_image::load_file(path) {
            Err(error) if !path.exists() => match left_behind(path) {
                Some((left, connection)) => {
                    let (left, path) = (left.display(), path.display());
                    exit::complain(&format!(
                        "{path}: a `soccr save` was killed before it was there; {left} is restored"
                    ));
                    Ok(connection)
                }
                None => Err(error.into()),
            },
            loaded => Ok(loaded?),
        },
        None => {
            Ok(soccr_image::read(BufReader::new(File::from(rustix::stdio::stdin().try_clone_to_owned()?)))?)
        }
    }
}
