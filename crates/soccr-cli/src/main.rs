//! The `soccr` command.
//!
//! One file per subcommand; what several of them need has a room of its own: [`process`], [`stop`], [`network`],
//! [`captive`], [`silence`], [`handover`], [`describe`], [`table`], [`exit`].

mod captive;
mod cli;
mod describe;
mod exit;
mod handover;
mod inspect;
mod list;
mod network;
mod process;
mod restore;
mod save;
mod silence;
mod stop;
mod sys;
mod table;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    exit::report(cli::Cli::parse().run())
}
