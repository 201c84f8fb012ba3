//! The `soccr` command.

mod demo;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// See, save, restore and move live TCP connections.
#[derive(Parser, Debug)]
#[command(name = "soccr", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Watch a connection move between two hosts while data flows both ways
    Demo(demo::Demo),
    /// A program of the demonstration
    #[command(hide = true)]
    DemoProgram,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Demo(demo) => demo::run(&demo),
        Command::DemoProgram => demo::worker::run().map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("soccr: {error:#}");
        ExitCode::FAILURE
    })
}
