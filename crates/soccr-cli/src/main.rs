//! The `soccr` command.
//!
//! One file per subcommand; what several of them need has a room of its own: [`selection`], [`network`], [`via`], [`handover`],
//! [`rescue`], [`signals`], [`describe`], [`table`], [`exit`]. How connections are handed over is the affair of `soccr-handover`.

mod adopt;
mod backlog;
mod check;
mod cli;
mod completions;
mod consumed;
mod criu;
mod demo;
mod describe;
mod descriptors;
mod exit;
mod fidelity;
mod guide;
mod handover;
mod inspect;
mod lifeline;
mod list;
mod lock;
mod man;
mod nat;
mod network;
mod parting;
mod pipe;
mod progress;
mod receive;
mod relay;
mod rescue;
mod restore;
mod resume;
mod save;
mod selection;
mod send;
mod signals;
mod steer;
mod sys;
mod table;
mod traffic;
mod via;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    completions::answer();
    exit::report(cli::Cli::parse().run())
}
