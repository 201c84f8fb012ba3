//! The `soccr` command.
//!
//! [`command`] has one file per subcommand, [`give`] one per way to give connections to a program, [`show`] the output for people.
//! Code that several subcommands share lies beside them. `soccr-handover` hands connections over.

mod cli;
mod command;
#[cfg(feature = "demo")]
mod demo;
mod descriptors;
mod exit;
mod fidelity;
mod give;
mod guide;
mod lifeline;
mod mapping;
mod nat;
mod network;
mod pid;
mod selection;
mod show;
mod signals;
mod sys;
mod traffic;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    command::completions::answer(cli::public);
    signals::prepare();
    exit::report(cli::Cli::parse().run())
}
