//! `soccr restore`: saved connections for a program.

mod consumed;
pub(crate) mod image;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use soccr::lock::{Locker, Mode, SILENCE};
use soccr::{Connection, Flow, Restored};
use soccr_handover::silence;
use soccr_image::AddressMap;

use crate::command::completions;
use crate::exit::{self, Exit};
use crate::fidelity::{Demands, Trust};
use crate::give::parting::Parting;
use crate::give::{Handover, Live};
use crate::signals::Deaf;
use crate::{descriptors, mapping, network};

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
       soccr restore [OPTIONS] [FILE] --connect ADDRESS:PORT [--proxy-protocol 1|2]
       soccr restore [OPTIONS] [FILE] --adopt",
    after_help = "\
Examples:
  soccr restore c.soccr -- ./server                 as descriptor 3
  soccr restore c.soccr --stdio -- cat              as standard input and output
  soccr restore c.soccr --send-fd /run/server.sock  to a process that waits for it
  soccr restore c.soccr --adopt                     to the server that listens on its port
  cat soccr-rescued-*.soccr | soccr restore -- ./server
  soccr restore c.soccr --map 192.0.2.1=192.0.2.9 --netns /run/netns/blue -- ./server"
)]
pub(crate) struct Restore {
    /// The image; standard input without it, or as -. Several may come one behind the other, each within a second
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
        mapping::refuse_twice(&self.map)?;
        network::enter(self.netns.as_deref())?;
        let recipient = self.handover.find()?;
        let (file, mut saved) = image::read(self.file.as_deref())?;
        let file = file.as_deref();
        consumed::check(file, saved.iter().map(|(_, connection)| connection))?;
        if saved.len() > recipient.capacity() {
            bail!("{} connections: there is room for one", saved.len());
        }
        descriptors::raise_limit();
        recipient.check_room(saved.len(), 0)?;
        mapping::tell_idle(&self.map, saved.iter().map(|(_, connection)| connection));
        let mut reports = self.demands.reports(Trust::All);
        for (_, connection) in &mut saved {
            AddressMap::apply_to_connection(&self.map, connection);
            recipient.check(connection)?;
            reports.distrust(connection)?;
        }
        soccr::prepare();
        let flows: Vec<Flow> = saved.iter().map(|(_, connection)| connection.flow()).collect();
        let lock = Locker::new(Mode::HOLD)?.lock_arriving(saved.iter().map(|(_, connection)| connection))?;
        let restore = |(_, connection): &(_, Connection)| {
            connection.restore().with_context(|| format!("{} {}", connection.local, connection.remote))
        };
        let restored: Vec<Restored> = saved.iter().map(restore).collect::<Result<_>>()?;
        // From here on the connections exist outside of the image, too.
        let deaf = Deaf::begin();
        saved.iter().zip(&restored).try_for_each(|((name, _), restored)| reports.add(name, restored))?;
        reports.tell()?;
        let mark = consumed::mark(file, saved.iter().map(|(_, connection)| connection))?;
        let silent: Vec<Flow> = saved.iter().flat_map(|(_, connection)| connection.flows()).collect();
        let locked = silence::lift(&silent).inspect_err(|_| {
            stay_silent(&silent);
            mark.undo();
        })?;
        for (Flow { local, remote }, name) in locked {
            exit::complain(&format!("{local} {remote}: still locked: see `soccr unlock {name}`"));
        }
        if let Err(error) = lock.release_into(&restored.iter().collect::<Vec<_>>()) {
            // It is released nevertheless, and the peers send again what they had sent.
            exit::complain(&error.to_string());
        }
        let mut failed = false;
        let mut streams = Vec::with_capacity(restored.len());
        for (restored, flow) in restored.into_iter().zip(flows.iter().copied()) {
            match restored.resume() {
                Ok(stream) => streams.push(Live { flow, stream, has_state: false }),
                // It is in the image alone, and the other connections are alive already.
                Err(error) => {
                    stay_silent(&[flow]);
                    if flows.len() == 1 {
                        return Err(error.into());
                    }
                    exit::complain(&format!("{} {}: {error}", flow.local, flow.remote));
                    failed = true;
                }
            }
        }
        if streams.is_empty() {
            bail!("no connection came to life: the image is as good as before");
        }
        match recipient.give(streams, &[], deaf, Parting::default()) {
            Ok(Exit::Done) if failed => Ok(Exit::SomeFailed),
            Ok(Exit::Done) => Ok(Exit::Done),
            // Those that came to life are in newer images. The others are in this one alone.
            given => {
                if !failed {
                    consumed::set_aside(file);
                }
                given
            }
        }
    }
}

/// These are in the image alone: a host that answered their peers would reset them.
fn stay_silent(flows: &[Flow]) {
    if let Err(error) = silence::begin(flows, SILENCE) {
        exit::complain(&error.to_string());
    }
}
