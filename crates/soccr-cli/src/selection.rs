//! Which connections of which processes a command is about.

use std::collections::HashSet;
use std::os::fd::{AsFd, RawFd};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Pid;
use soccr_handover::foreign::namespace::{self, Identity};
use soccr_handover::foreign::process::{self, Holder};
use soccr_handover::foreign::{Captive, Process};

use crate::cli::parse_pid;
use crate::command::completions;
use crate::exit;
use crate::network;

/// Connections of running processes
#[derive(clap::Args, Debug)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true).args(["fd", "all", "port"]))]
pub(crate) struct Selection {
    /// The process that has the connections
    #[arg(long, value_name = "PID", value_parser = parse_pid, required_unless_present = "port", add = completions::processes())]
    pid: Option<Pid>,
    /// The number of a descriptor there (see `soccr list`); may be repeated
    #[arg(long, value_name = "FD", requires = "pid", conflicts_with_all = ["all", "port"], add = completions::descriptors())]
    fd: Vec<RawFd>,
    /// All connections of the process, but for those to this host itself
    #[arg(long, requires = "pid")]
    all: bool,
    /// All connections with this port at either end, of the process or of all; may be repeated
    #[arg(long, value_name = "PORT")]
    port: Vec<u16>,
    /// With --all and --port: those to this host itself, too. Their peers cannot follow them to another host
    #[arg(long, conflicts_with = "fd")]
    with_local: bool,
}

impl Selection {
    /// The process that is named.
    pub(crate) fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// Connections are asked for, not only a process.
    pub(crate) fn is_any(&self) -> bool {
        self.all || !self.fd.is_empty() || !self.port.is_empty()
    }

    /// The connections that are asked for, all in the network namespace of the first. Each that cannot be had is reported by
    /// itself.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn find(&self, fail: &mut impl FnMut(anyhow::Error)) -> Result<Vec<Captive>> {
        if let Some(pid) = self.pid {
            process::look_into(pid)?;
        }
        let mut captives = self.select(fail)?;
        let Some(first) = captives.first() else { bail!("there is no such connection{}", self.elsewhere()) };
        let first = Identity::of_socket(first.as_fd())?;
        captives.retain(|captive| match Identity::of_socket(captive.as_fd()) {
            Ok(identity) if identity == first => true,
            Ok(_) => {
                fail(anyhow!("{}: it is in another network namespace: take it by itself", captive.name()));
                false
            }
            Err(error) => {
                fail(anyhow::Error::new(error).context(captive.name().to_owned()));
                false
            }
        });
        if self.fd.is_empty() && !self.with_local {
            leave_out_local(&mut captives)?;
        }
        Ok(captives)
    }

    fn select(&self, fail: &mut impl FnMut(anyhow::Error)) -> Result<Vec<Captive>> {
        let mut captives = Vec::new();
        let mut seen = HashSet::new();
        if let (Some(pid), false) = (self.pid, self.fd.is_empty()) {
            let process = Process::open(pid)?;
            for fd in &self.fd {
                match Captive::new(&process, *fd) {
                    Ok(captive) if seen.insert(captive.inode()) => captives.push(captive),
                    Ok(_) => {}
                    Err(error) => fail(error.into()),
                }
            }
            return Ok(captives);
        }
        let processes = self.pid.map_or_else(process::all, |pid| Ok(vec![pid]))?;
        for pid in processes.into_iter().filter(|pid| *pid != rustix::process::getpid()) {
            let Ok(process) = Process::open(pid) else { continue };
            let mut holders = Vec::new();
            let listed = process::sockets(pid, |fd, inode| {
                if seen.insert(inode) {
                    holders.push(Holder { pid, fd });
                }
            });
            if let (Err(error), true) = (listed, self.pid.is_some()) {
                return Err(error).with_context(|| format!("pid {pid}: its descriptors"));
            }
            for holder in holders {
                match Captive::find(&process, holder.fd) {
                    Ok(Some(captive)) if self.wants(&captive) => captives.push(captive),
                    Ok(_) => {}
                    Err(error) if self.pid.is_some() => fail(error.into()),
                    // Of a process that is none of our business, as far as we know.
                    Err(_) => {}
                }
            }
        }
        Ok(captives)
    }

    /// Where the connections may be instead: servers of several processes leave them to their children.
    fn elsewhere(&self) -> String {
        let Some(pid) = self.pid else { return String::new() };
        let has_connections = |pid: &Pid| {
            let Ok(process) = Process::open(*pid) else { return false };
            let mut found = false;
            let _ = process::sockets(*pid, |fd, _| {
                found = found || Captive::find(&process, fd).is_ok_and(|captive| captive.is_some());
            });
            found
        };
        let children: Vec<String> = process::descendants(pid)
            .unwrap_or_default()
            .iter()
            .filter(|pid| has_connections(pid))
            .map(Pid::to_string)
            .collect();
        match children.as_slice() {
            [] => String::new(),
            children => {
                format!(": processes that {pid} has started have connections: {}", children.join(", "))
            }
        }
    }

    fn wants(&self, captive: &Captive) -> bool {
        self.port.is_empty()
            || captive.flow().is_ok_and(|flow| {
                self.port.iter().any(|port| flow.local.port() == *port || flow.remote.port() == *port)
            })
    }
}

/// The peers of these would stay here, and find nobody.
fn leave_out_local(captives: &mut Vec<Captive>) -> Result<()> {
    let remotes = || captives.iter().map(|captive| captive.flow().map(|flow| flow.remote));
    let local = namespace::ask_beside(captives[0].as_fd(), || {
        remotes().map(|remote| remote.is_ok_and(network::is_local).into()).collect()
    })
    .with_context(|| captives[0].name().to_owned())?;
    let mut local = local.into_iter().map(|local| local != 0);
    captives.retain(|captive| {
        let stays = local.next() == Some(true);
        if stays {
            exit::complain(&format!(
                "{}: left out: its peer is this host itself (--with-local takes it)",
                captive.name()
            ));
        }
        !stays
    });
    match captives.is_empty() {
        true => bail!("there is no other connection"),
        false => Ok(()),
    }
}
