//! `soccr man`: the manual pages, made from the definitions of the command line.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Command;

use crate::exit::Exit;

/// Write the man pages into a directory: soccr.1, and a page for each subcommand
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  soccr man /usr/share/man/man1")]
pub(crate) struct Man {
    /// Where to; it is made where it is missing
    directory: PathBuf,
}

/// When the text of the pages has changed last.
const DATE: &str = "2026-11-28";

impl Man {
    /// `command` is the whole command line.
    pub(crate) fn run(&self, command: Command) -> Result<Exit> {
        let write = move || {
            fs::create_dir_all(&self.directory)?;
            let mut command = command.disable_help_subcommand(true);
            command.build();
            pages(&command, &self.directory)
        };
        write().with_context(|| self.directory.display().to_string())?;
        Ok(Exit::Done)
    }
}

/// A page for a command, and one for each of its subcommands.
fn pages(command: &Command, directory: &Path) -> io::Result<()> {
    command.get_subcommands().try_for_each(|command| pages(command, directory))?;
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    let mut file = BufWriter::new(File::create(directory.join(format!("{name}.1")))?);
    let page = clap_mangen::Man::new(with_usage(command.clone()))
        .title(name.to_uppercase())
        .date(DATE)
        .source(concat!("soccr ", env!("CARGO_PKG_VERSION")))
        .manual("soccr");
    page.render_title(&mut file)?;
    page.render_name_section(&mut file)?;
    page.render_synopsis_section(&mut file)?;
    page.render_description_section(&mut file)?;
    page.render_options_section(&mut file)?;
    if command.has_subcommands() {
        page.render_subcommands_section(&mut file)?;
    }
    let rest = command.get_after_long_help().or_else(|| command.get_after_help());
    for section in rest.map(ToString::to_string).unwrap_or_default().split("\n\n") {
        verbatim(section, &mut file)?;
    }
    let others = if name == "soccr" { "" } else { "\\fBsoccr\\fR(1),\n" };
    writeln!(file, ".SH SEE ALSO\n{others}\\fBsoccr\\fR(7)")?;
    file.flush()
}

/// With the usage as `--help` has it: the generator's own leaves the values of options out. What the description has in common with the
/// line of the name is said there.
fn with_usage(mut command: Command) -> Command {
    let usage = command.render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ").to_owned();
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let long = command.get_long_about().map(ToString::to_string).unwrap_or_default();
    let rest = long.strip_prefix(&about).map(str::trim_start).filter(|rest| !rest.is_empty());
    let command = command.override_usage(usage);
    match rest {
        Some(rest) => command.long_about(rest.to_owned()),
        None => command,
    }
}

/// Lines that stay as they are, under the heading that the first of them is.
fn verbatim(section: &str, out: &mut impl Write) -> io::Result<()> {
    let Some((heading, lines)) = section.split_once(":\n") else { return Ok(()) };
    let heading = match heading {
        "Example" | "Examples" => "EXAMPLES",
        "Exit codes" => "EXIT STATUS",
        other => other,
    };
    writeln!(out, ".SH {heading}\n.nf")?;
    for line in lines.lines() {
        let text = line.strip_prefix("  ").unwrap_or(line);
        // \& keeps a dot in front from being a request.
        writeln!(out, "\\&{}", text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq"))?;
    }
    writeln!(out, ".fi")
}
