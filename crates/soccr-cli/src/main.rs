//! The `soccr` command.
//!
//! One file per subcommand; what several of them need has a room of its own: [`process`], [`stop`], [`keeper`], [`network`],
//! [`captive`], [`silence`], [`handover`], [`rescue`], [`signals`], [`describe`], [`table`], [`exit`].

mod adopt;
mod captive;
mod check;
mod cli;
mod completions;
mod criu;
mod delivery;
mod demo;
mod describe;
mod descriptors;
mod exit;
mod fidelity;
mod guide;
mod handover;
mod inspect;
mod keeper;
mod lifeline;
mod list;
mod lock;
mod man;
mod nat;
mod network;
mod process;
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
mod silence;
mod source;
mod steer;
mod stop;
mod sys;
mod table;
mod target;
mod traffic;
mod via;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    completions::answer();
    exit::report(cli::Cli::parse().run())
}
