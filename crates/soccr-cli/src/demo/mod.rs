//! `soccr demo`: a connection that moves between two hosts while data flows both ways.
//!
//! ```text
//!   peer                    host A        host B            one address, many programs
//!    │  bytes both ways       │             │
//!    │◄──────────────────────►│ program 1   │
//!    │                        │ lock, save  │ program 2 starts, locks
//!    │                        │──── image ─►│ restore
//!    │  (router: A → B)       │─ held pkts ►│ replay, unlock
//!    │◄────────────────────────────────────►│
//! ```
//!
//! The hosts are network namespaces of this process; every program is a process of its own.

mod mover;
mod network;
mod pattern;
mod peer;
mod picture;
mod report;
pub(crate) mod servers;
mod wire;
pub(crate) mod worker;

use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context, Result};
use soccr_lab::sysctl;

use crate::exit::Exit;

use mover::Mover;
use network::Network;
use peer::Peer;
use picture::Camera;
use report::{Report, Summary};

/// Watch a connection move between two hosts while data flows both ways
#[derive(clap::Args, Debug)]
pub(crate) struct Demo {
    /// How often the connection moves to the other host
    #[arg(long, default_value_t = 20, value_name = "N")]
    moves: u32,
    /// Among three hosts with addresses of their own: the first one steers packets to where the connection is
    #[arg(long, conflicts_with = "servers")]
    steer: bool,
    /// Replace a server that knows nothing of it, and keep its client: needs root and Linux 6.9
    #[arg(long)]
    servers: bool,
    /// Draw the move with the median silence, every segment of it, as SVG
    #[arg(long, conflicts_with = "servers", value_name = "FILE")]
    picture: Option<PathBuf>,
    /// Print one JSON object instead of the account
    #[arg(long)]
    json: bool,
}

impl Demo {
    /// Runs the demonstration. Fails where a byte was lost or a reset was seen.
    pub(crate) fn run(self) -> Result<Exit> {
        // What cannot be written is found out before the moves.
        let file = self.picture.as_ref().map(|path| {
            File::create(path).map(|file| (path, file)).with_context(|| path.display().to_string())
        });
        let mut file = file.transpose()?;
        // Before any thread starts, and before the report looks at the terminal.
        soccr_lab::enter()?;
        if self.servers {
            return servers::run(self.moves, self.json);
        }
        let network = if self.steer { Network::steered() } else { Network::shared() }?;
        for host in network.hosts().into_iter().chain([network.peer()]) {
            // bbr pauses by itself, for longer than a move takes. Where cubic is not allowed, the account shows that too.
            let _ = host.run(|| sysctl("net/ipv4/tcp_congestion_control", "cubic"));
        }
        let mut report = Report::new(self.json);
        report.network(&network)?;
        let mut mover = Mover::start(&network)?;
        let peer = Peer::connect(network.peer(), mover.address())?;
        mover.accept()?;
        let mut pictures = Vec::new();
        for number in 1..=self.moves {
            report.rested(peer.wait_for_traffic()?);
            let mut camera = file.as_ref().map(|_| Camera::at(network.peer())).transpose()?;
            let moved = mover.move_once(&peer)?;
            report.moved(number, &moved)?;
            if let Some(camera) = &mut camera {
                // The picture shows what came after the move, too.
                peer.wait_for_traffic()?;
                pictures.push(camera.shoot(network.peer(), moved)?);
            }
        }
        report.rested(peer.wait_for_traffic()?);
        let ends = mover.finish(peer)?;
        let summary = Summary::new(&network, &report, &ends);
        report.summary(&summary)?;
        pictures.sort_by_key(|picture| picture.moved().silence);
        if let (Some((path, file)), Some(picture)) = (&mut file, pictures.get(pictures.len() / 2)) {
            picture.write(file).with_context(|| path.display().to_string())?;
        }
        Ok(if summary.is_clean() { Exit::Done } else { Exit::Lost })
    }
}
