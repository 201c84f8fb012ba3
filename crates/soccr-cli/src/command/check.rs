//! `soccr check`: what this machine lets this user do, tried out.

mod probe;
mod surroundings;

use std::io::Read;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::command::completions;
use crate::exit::{self, Exit};
use crate::network;
use crate::show::table::{Align, Table, printable};

/// Try out what this machine and user can do
///
/// Everything is done, not derived from versions: two connections over the loopback device are paused, saved, restored and moved. Each
/// line that says "no" has the remedy. Nothing is left behind.
///
/// The exit code is 0 where connections can be moved, with or without the extras, and 1 where not.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  soccr check
  soccr check --netns 4711                              in the network namespace of a process
  soccr check --via 'ssh host soccr check --json'       and what the target of a hand-over can do
  soccr check --json | jq '.[] | select(.works | not) | .detail'")]
pub(crate) struct Check {
    /// Compare with another machine: a shell command that prints what `soccr check --json` prints there
    #[arg(long, value_name = "COMMAND", conflicts_with = "json")]
    via: Option<String>,
    /// The network namespace to try things in: a path, a name of ip-netns(8), or the number of a process
    #[arg(long, value_name = "PATH|NAME|PID", add = completions::namespaces())]
    netns: Option<String>,
    /// One JSON array, an object for each line
    #[arg(long, visible_alias = "stdio")]
    json: bool,
}

/// One thing that was tried.
#[derive(Debug, Deserialize, Serialize)]
struct Finding {
    name: String,
    /// Connections cannot be moved without it.
    essential: bool,
    works: bool,
    /// What was seen; where it does not work, why, and what to do.
    detail: String,
}

impl Check {
    pub(crate) fn run(&self) -> Result<Exit> {
        network::enter(self.netns.as_deref())?;
        let here = probe::all();
        if self.json {
            exit::print(&format!("{}\n", serde_json::to_string_pretty(&here)?))?;
            return Ok(verdict(&here));
        }
        let Some(via) = &self.via else {
            exit::written(print(&here))?;
            return Ok(verdict(&here));
        };
        let there = ask(via)?;
        exit::written(compare(&here, &there))?;
        Ok(if verdict(&here) == Exit::Done { verdict(&there) } else { Exit::Failed })
    }
}

fn verdict(findings: &[Finding]) -> Exit {
    let usable = findings.iter().all(|finding| finding.works || !finding.essential);
    if usable { Exit::Done } else { Exit::Failed }
}

fn ask(via: &str) -> Result<Vec<Finding>> {
    let mut child =
        Command::new("sh").args(["-c", via]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut text = String::new();
    child.stdout.take().context("its output")?.read_to_string(&mut text)?;
    let status = child.wait()?;
    match serde_json::from_str::<Vec<Finding>>(&text) {
        // Each report says whether connections can be moved at all.
        Ok(findings) if findings.iter().any(|finding| finding.essential) => Ok(findings),
        _ => {
            bail!("--via {via}: it did not print what `soccr check --json` prints, and ended with {status}")
        }
    }
}

fn word(finding: Option<&Finding>) -> String {
    match finding {
        None => "–",
        Some(Finding { works: true, .. }) => "yes",
        Some(Finding { essential: true, .. }) => "NO",
        Some(_) => "no",
    }
    .into()
}

fn print(findings: &[Finding]) -> std::io::Result<()> {
    let mut table = Table::new([("CAN", Align::Left), ("", Align::Left), ("DETAIL", Align::Left)]);
    for (number, finding) in findings.iter().enumerate() {
        // One cause, such as a missing right, often shows several times.
        let cause = findings[..number].iter().find(|earlier| earlier.detail == finding.detail);
        let detail = match cause {
            Some(cause) if !finding.works => format!("see {}", cause.name),
            _ => finding.detail.clone(),
        };
        table.row([finding.name.clone(), word(Some(finding)), detail]);
    }
    table.print()
}

fn compare(here: &[Finding], there: &[Finding]) -> std::io::Result<()> {
    let columns =
        [("CAN", Align::Left), ("HERE", Align::Left), ("THERE", Align::Left), ("DETAIL", Align::Left)];
    let mut table = Table::new(columns);
    for finding in here {
        let other = there.iter().find(|other| other.name == finding.name);
        let details: Vec<String> = [Some(("here", finding)), other.map(|other| ("there", other))]
            .into_iter()
            .flatten()
            .filter(|(_, finding)| !finding.works)
            .map(|(place, finding)| format!("{place}: {}", printable(&finding.detail)))
            .collect();
        table.row([finding.name.clone(), word(Some(finding)), word(other), details.join("; ")]);
    }
    table.print()
}
