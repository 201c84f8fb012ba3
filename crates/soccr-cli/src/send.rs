//! `soccr send`: connections of running processes, into a pipe.

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::value_parser;
use soccr::Flow;

use crate::captive::Captive;
use crate::exit::Exit;
use crate::guide::{Guide, Hop, find_hops, parse_hop};
use crate::keeper::Keeper;
use crate::nat::Nat;
use crate::network;
use crate::process::Sharing;
use crate::selection::Selection;
use crate::silence::Silence;
use crate::source::{Limits, Source};
use crate::via::{self, Deadline, Output};
use crate::{descriptors, exit};

/// Move connections of running processes through a pipe
///
/// A process is stopped only while connections of it are on their way, not before the target has started, and what the peers send
/// meanwhile is held and sent along. With --via a
/// connection leaves only when the target has said that it has it, or, in the same network, that it can have it;
/// whatever breaks before leaves it where it is, and the process notices nothing. Once it has left, this host stays silent about it for the time of --silence.
///
/// Without --via the stream goes to standard output. There is no way back then: a connection leaves as soon as it has been
/// written, and whether it arrived nobody can know here.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  soccr send --pid 4711 --fd 5 --via 'ssh host soccr receive -- ./server'
  soccr send --pid 4711 --all --via 'soccr receive --netns /run/netns/blue -- ./server'
  soccr send --port 443 --via 'ssh host soccr receive --send-fd /run/proxy.sock'
  soccr send --pid 4711 --all --via 'ssh host soccr receive -- ./server' --steer 192.0.2.2
  soccr send --pid 4711 --all --idle 5 --via 'soccr receive --adopt'
  soccr send --pid 4711 --fd 5 | ssh host soccr receive -- ./server")]
pub(crate) struct Send {
    #[command(flatten)]
    selection: Selection,
    /// Only connections that have been idle for this time: nothing sent or received, and nothing in their queues. The others stay
    #[arg(long, value_name = "SECONDS")]
    idle: Option<u32>,
    /// Run this command of the shell as the target, with both its ends connected, in the network of the caller
    #[arg(long, value_name = "COMMAND")]
    via: Option<String>,
    /// How many seconds the target may take to start, and then to read and answer each 256 connections: a process is stopped no
    /// longer
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = value_parser!(u64).range(1..=86400))]
    timeout: u64,
    /// For how many seconds this host stays silent about connections that have left it
    #[arg(long, value_name = "SECONDS", default_value_t = soccr::lock::SILENCE.as_secs(),
        value_parser = value_parser!(u64).range(..=86400))]
    silence: u64,
    /// Instead of being silent, send on the packets of connections that have left: to this address of the target, on a network
    /// that both hosts share; or to ADDRESS dev DEVICE, the other end of a tunnel. Once for each address family
    #[arg(long, value_name = "NEXT_HOP", value_parser = parse_hop, requires = "via", conflicts_with = "silence")]
    steer: Vec<Hop>,
}

impl Send {
    pub(crate) fn run(&self) -> Result<Exit> {
        if self.via.is_none() && std::io::stdout().is_terminal() {
            bail!("connections are not for a terminal: pipe them into `soccr receive`, or name it by --via");
        }
        descriptors::raise_limit();
        let limits = Limits { answer: Duration::from_secs(self.timeout) };
        let mut failed = 0;
        let mut fail = |error: anyhow::Error| {
            exit::complain(&exit::line(&error));
            failed += 1;
        };
        let mut captives = self.selection.find(&mut fail)?;
        if let Some(seconds) = self.idle {
            captives = only_idle(captives, Duration::from_secs(seconds.into()))?;
        }
        let inodes: Vec<u64> = captives.iter().map(|captive| captive.inode).collect();
        let sockets: Vec<_> = captives.iter().map(|captive| captive.socket().as_fd()).collect();
        let keeper = Keeper::start(&sockets, Sharing::find(&inodes)?, None)?;
        // The command belongs to the network of whoever calls us: from that of a container ssh(1) would reach nobody.
        let via = self.via.as_deref().map(via::Started::new).transpose()?;
        let mut nat = Nat::around(|| network::enter_of(captives[0].socket().as_fd()))
            .with_context(|| captives[0].name.clone())?;
        for captive in &captives {
            if let Some(translated) = captive.flow().ok().and_then(|flow| nat.of(flow)) {
                exit::complain(&format!("{}: {}", captive.name, translated.warning()));
            }
        }
        let deadline = Deadline::after(limits.answer);
        let guide = self.guide(&captives)?;
        let source = Source::new(captives, keeper, limits, deadline.clone(), guide)?;
        let outcome = match via {
            Some(started) => {
                let (via, output) = started.listen(deadline)?;
                source.hand_over(via, output)?
            }
            None => source.push(Output::new(rustix::stdio::stdout().try_clone_to_owned()?, deadline))?,
        };
        Ok(match (outcome.lost, outcome.failed + failed, outcome.gone) {
            (1.., _, _) => Exit::Lost,
            (0, 0, _) => Exit::Done,
            (0, _, 0) => Exit::Failed,
            (0, _, _) => Exit::SomeFailed,
        })
    }

    /// What becomes of the packets of connections that have left. To be called in their network namespace.
    fn guide(&self, captives: &[Captive]) -> Result<Guide> {
        if self.steer.is_empty() {
            return Ok(Guide::Silent(Silence::new(Duration::from_secs(self.silence))));
        }
        let flows: Vec<Flow> = captives.iter().map(Captive::flow).collect::<Result<_>>()?;
        Ok(Guide::Steering { hops: find_hops(&self.steer, &flows).context("--steer")?, flows: Vec::new() })
    }
}

/// Those that are idle, and say so again before they leave.
fn only_idle(captives: Vec<Captive>, time: Duration) -> Result<Vec<Captive>> {
    let all = captives.len();
    let mut idle = Vec::with_capacity(all);
    for captive in captives {
        if captive.is_idle(time)? {
            idle.push(captive.when_idle(time));
        }
    }
    match (idle.len(), all - idle.len()) {
        (0, _) => bail!("no connection has been idle for {} s", time.as_secs()),
        (_, 0) => {}
        (_, busy) => exit::complain(&format!("{busy} of {all} connections are in use, and stay")),
    }
    Ok(idle)
}
