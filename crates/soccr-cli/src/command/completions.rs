//! `soccr completions`: a shell asks this command for what may come next, also for processes, descriptors and locks.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};
use rustix::process::Pid;
use soccr::diag::Diag;
use soccr::lock::PersistentLock;
use soccr_handover::foreign::process;

use crate::exit::{self, Exit};
use crate::pid::parse_pid;

/// The shell that asks. The scripts that `soccr completions` prints set this variable.
const ASKS: &str = "SOCCR_COMPLETE";

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
        let shells = Shells::builtins();
        let shell = shells.completer(&self.shell.to_string()).context("no completions for this shell")?;
        let mut text = Vec::new();
        shell.write_registration(ASKS, "soccr", "soccr", "soccr", &mut text)?;
        exit::written(io::stdout().write_all(&text))
    }
}

/// If a shell asks about the command line, answers it and ends the process.
pub(crate) fn answer(command: fn() -> Command) {
    CompleteEnv::with_factory(command).var(ASKS).complete();
}

/// Processes that have TCP sockets in this network namespace.
pub(crate) fn processes() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let mut counts = BTreeMap::new();
        let (sockets, all) = (sockets().unwrap_or_default(), process::all().unwrap_or_default());
        for (inode, holders) in process::holders(&all).unwrap_or_default() {
            if sockets.contains(&inode) {
                for holder in holders {
                    *counts.entry(holder.pid.as_raw_pid()).or_insert(0) += 1;
                }
            }
        }
        let described = |(pid, count): (i32, usize)| {
            let name = Pid::from_raw(pid).and_then(|pid| process::name(pid).ok()).unwrap_or_default();
            CompletionCandidate::new(pid.to_string())
                .help(Some(format!("{name}, TCP sockets: {count}").into()))
        };
        counts.into_iter().map(described).collect()
    })
}

/// The sockets of the process that `--pid` names on the same command line.
pub(crate) fn descriptors() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let mut words = std::env::args().skip_while(|word| word != "--pid").skip(1);
        let Some(pid) = words.next().and_then(|word| parse_pid(&word).ok()) else {
            return Vec::new();
        };
        let mut descriptors = Vec::new();
        let _ = process::sockets(pid, |fd, _| descriptors.push(CompletionCandidate::new(fd.to_string())));
        descriptors
    })
}

/// Locks that stay, by name.
pub(crate) fn locks() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let locks = PersistentLock::list().unwrap_or_default();
        locks
            .into_iter()
            .filter(|lock| !lock.flows.is_empty())
            .map(|lock| CompletionCandidate::new(lock.name))
            .collect()
    })
}

/// The network namespaces that ip-netns(8) knows.
pub(crate) fn namespaces() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let entries = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
        entries.map(|entry| CompletionCandidate::new(entry.file_name())).collect()
    })
}

fn sockets() -> Result<HashSet<u64>> {
    let mut inodes = HashSet::new();
    Diag::open()?.visit(|socket| {
        inodes.insert(socket.inode.into());
    })?;
    Ok(inodes)
}
