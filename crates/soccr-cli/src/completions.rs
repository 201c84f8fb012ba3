//! `soccr completions` and the man pages: made from the definitions of the command line.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::exit::{self, Exit};

/// Print completions for a shell
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  soccr completions bash > /usr/share/bash-completion/completions/soccr")]
pub(crate) struct Completions {
    /// The shell
    shell: Shell,
}

/// Write the man pages into a directory: soccr.1, and a page for each subcommand
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  soccr man /usr/share/man/man1")]
pub(crate) struct Man {
    /// Where to; it is made where it is missing
    directory: PathBuf,
}

impl Completions {
    pub(crate) fn run(&self) -> Result<Exit> {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "soccr", &mut text);
        exit::written(io::stdout().write_all(&text))
    }
}

impl Man {
    pub(crate) fn run(&self) -> Result<Exit> {
        fs::create_dir_all(&self.directory).with_context(|| self.directory.display().to_string())?;
        let command = Cli::command().disable_help_subcommand(true);
        clap_mangen::generate_to(command, &self.directory)
            .with_context(|| self.directory.display().to_string())?;
        Ok(Exit::Done)
    }
}
