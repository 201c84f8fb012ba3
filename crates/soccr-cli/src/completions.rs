//! `soccr completions`: made from the definitions of the command line.

use std::io::{self, Write};

use anyhow::Result;
use clap_complete::Shell;

use crate::cli;
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

impl Completions {
    pub(crate) fn run(&self) -> Result<Exit> {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut cli::public(), "soccr", &mut text);
        exit::written(io::stdout().write_all(&text))
    }
}
