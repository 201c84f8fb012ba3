//! The `soccr` command.
//!
//! [`command`] has one file per subcommand, [`give`] one per way to give connections to a program, [`show`] what people see. What several
//! subcommands need has a file of its own here. How connections are handed over is the affair of `soccr-handover`.

mod cli;
mod command;
mod demo;
mod descriptors;
mod exit;
mod fidelity;
mod give;
mod guide;
mod lifeline;
mod nat;
mod network;
mod selection;
mod show;
mod signals;
mod sys;
mod traffic;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    command::completions::answer();
    exit::report(cli::Cli::parse().run())
}
