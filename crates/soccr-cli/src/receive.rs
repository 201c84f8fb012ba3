//! `soccr receive`: connections out of a pipe, for a program.

use std::fs::{File, OpenOptions};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::value_parser;
use soccr_image::AddressMap;

use crate::delivery::Steered;
use crate::exit::{Coded, Exit};
use crate::fidelity::{Demands, Trust};
use crate::handover::Handover;
use crate::target::{Target, Terms};
use crate::{completions, descriptors, exit, lifeline, network};

/// Receive connections from `soccr send`, and give them to a program
///
/// Reads standard input, and answers on standard output where the source listens (`soccr send --via`); the program then finds
/// /dev/null as both. It starts when the source has sent everything, or is gone, provided that a connection has arrived.
#[derive(clap::Args, Debug)]
#[command(
    override_usage = "\
soccr receive [OPTIONS] [--stdio] -- PROGRAM [ARGUMENT]...
       soccr receive [OPTIONS] --send-fd UNIX_SOCKET
       soccr receive [OPTIONS] --adopt
       soccr receive [OPTIONS] --connect ADDRESS:PORT [--proxy-protocol 1|2]",
    after_help = "\
Examples:
  soccr send --pid 4711 --fd 5 --via 'ssh host soccr receive -- ./server'
  soccr send --pid 4711 --all --via 'soccr receive --netns /run/netns/blue -- ./server'
  soccr send --port 443 --via 'ssh host soccr receive --send-fd /run/proxy.sock'
  soccr send --pid 4711 --all --via 'soccr receive --adopt'     to the server that listens on that port now"
)]
pub(crate) struct Receive {
    /// Receive under another address: each end that is OLD becomes NEW (IP, or IP:PORT)
    #[arg(long, value_name = "OLD=NEW")]
    map: Vec<AddressMap>,
    /// The network namespace to restore in: a path, a name of ip-netns(8), or the number of a process
    #[arg(long, value_name = "PATH|NAME|PID", add = completions::namespaces())]
    netns: Option<String>,
    /// How many seconds the source may take to let go of a connection that is ready here; then it is refused
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = value_parser!(u64).range(1..=86400))]
    timeout: u64,
    /// When packets for an address that this host does not have are delivered here, to what has been received
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = Steered::Auto)]
    steered: Steered,
    #[command(flatten)]
    demands: Demands,
    #[command(flatten)]
    handover: Handover,
}

impl Receive {
    pub(crate) fn run(&self) -> Result<Exit> {
        // Not while the connections wait for it.
        soccr::prepare();
        let claim = lifeline::claim()?;
        network::enter(self.netns.as_deref())?;
        let recipient = self.handover.find()?;
        descriptors::raise_limit();
        let input = File::from(rustix::stdio::stdin().try_clone_to_owned().context("standard input")?);
        let limit = Duration::from_secs(self.timeout);
        let terms = Terms { maps: &self.map, is_here: self.netns.is_some(), limit, steered: self.steered };
        let mut target = Target::new(terms, &recipient, self.demands.reports(Trust::Safe), claim)?;
        let broken = target.listen(input).err();
        if let Some(error) = &broken {
            exit::complain(&exit::line(error));
        }
        let arrived = target.end();
        if arrived.answered {
            leave_pipe()?;
        }
        if arrived.lost > 0 {
            exit::complain(&format!("{} of the connections are lost", arrived.lost));
        }
        match arrived.streams.len() {
            0 if arrived.lost > 0 => bail!(Coded(Exit::Lost, "no connection has arrived".into())),
            0 if arrived.failed > 0 || broken.is_some() => bail!("no connection has arrived"),
            0 => bail!("the source has sent no connection"),
            _ => recipient.give(arrived.streams, arrived.deaf),
        }
    }
}

/// Standard input and output were the pipes to the source, and it does not read the program's output.
fn leave_pipe() -> Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").context("/dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("dup2")?;
    rustix::stdio::dup2_stdout(&null).context("dup2")?;
    Ok(())
}
