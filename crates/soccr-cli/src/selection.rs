//! Which connections of which processes a command is about.

pub(crate) mod matching;

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, RawFd};

use anyhow::{Context, Result, bail};
use rustix::process::Pid;
use soccr::Flow;
use soccr_handover::ErrorKind;
use soccr_handover::foreign::namespace::{self, Identity};
use soccr_handover::foreign::process;
use soccr_handover::foreign::{Captive, Process};

use crate::command::completions;
use crate::exit::{self, Coded, Exit};
use crate::network;
use crate::pid::parse_pid;

use matching::Matching;

/// Connections of running processes
#[derive(clap::Args, Debug)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true).args(["fd", "all", "port", "peer"]))]
#[command(group = clap::ArgGroup::new("connections").multiple(true).args(["fd", "all", "port", "peer"]))]
#[command(group = clap::ArgGroup::new("whose").multiple(true).args(["pid", "name"]))]
pub(crate) struct Selection {
    /// A process that has connections; may be repeated. Without it, all processes that can be seen
    #[arg(long, value_name = "PID", value_parser = parse_pid, add = completions::processes())]
    pid: Vec<Pid>,
    /// Also the descendants of these processes
    #[arg(long, requires_all = ["whose", "connections"], conflicts_with = "fd")]
    children: bool,
    /// The number of a descriptor of the one process (see `soccr list`); may be repeated
    #[arg(long, value_name = "FD", requires = "pid", conflicts_with_all = ["all", "port", "peer", "name"], add = completions::descriptors())]
    fd: Vec<RawFd>,
    /// All connections of the processes, except those to this host itself
    #[arg(long, requires = "whose")]
    all: bool,
    #[command(flatten)]
    matching: Matching,
    /// Also connections to this host itself, whose peers cannot follow them to another host; --fd takes those anyway
    #[arg(long, requires = "connections", conflicts_with = "fd")]
    with_local: bool,
}

impl Selection {
    /// The one process that is named.
    ///
    /// # Errors
    /// Several processes are named.
    pub(crate) fn one_process(&self, why: &str) -> Result<Option<Pid>> {
        match self.pid[..] {
            [] => Ok(None),
            [pid] => Ok(Some(pid)),
            _ => bail!(Coded(Exit::Usage, format!("{why} is of one process: name one --pid"))),
        }
    }

    /// Whether connections are named, not only a process.
    pub(crate) fn is_any(&self) -> bool {
        self.all || !self.fd.is_empty() || self.matching.is_any()
    }

    /// Refuses a name that says nothing: no connections are asked for.
    ///
    /// # Errors
    /// There is one.
    pub(crate) fn refuse_name(&self, why: &str) -> Result<()> {
        match self.matching.wants_all_names() {
            true => Ok(()),
            false => bail!(Coded(Exit::Usage, format!("{why} alone takes no --name: name one --pid"))),
        }
    }

    /// The connections that are asked for, all in the network namespace of the first. A connection that cannot be taken is
    /// reported by itself. `peer` is that of a connection whose peer the kernel has forgotten.
    ///
    /// # Errors
    /// No such process or connection.
    pub(crate) fn find(
        &self,
        peer: Option<SocketAddr>,
        fail: &mut impl FnMut(anyhow::Error),
    ) -> Result<Vec<Captive>> {
        match self.search(peer, fail)? {
            (captives, false) if captives.is_empty() => {
                bail!("there is no such connection{}", self.elsewhere())
            }
            (captives, true) if captives.is_empty() => bail!("there is no other connection"),
            (captives, _) => Ok(captives),
        }
    }

    /// The same, where none is no error.
    pub(crate) fn find_any(&self, fail: &mut impl FnMut(anyhow::Error)) -> Result<Vec<Captive>> {
        self.search(None, fail).map(|(captives, _)| captives)
    }

    /// The connections, and whether others were named that are not among them.
    fn search(
        &self,
        peer: Option<SocketAddr>,
        fail: &mut impl FnMut(anyhow::Error),
    ) -> Result<(Vec<Captive>, bool)> {
        if !self.fd.is_empty() {
            self.one_process("--fd")?;
        }
        self.pid.iter().try_for_each(|pid| process::look_into(*pid))?;
        let mut has_failed = false;
        let fail = &mut |error| {
            has_failed = true;
            fail(error);
        };
        let mut captives = self.select(peer, fail)?;
        let Some(first) = captives.first() else { return Ok((captives, has_failed)) };
        let first = Identity::of_socket(first.as_fd())?;
        let check = |captive: &Captive| {
            if Identity::of_socket(captive.as_fd()).with_context(|| captive.name().to_owned())? != first {
                bail!("{}: it is in another network namespace: take it by itself", captive.name());
            }
            captive.flow()?;
            Ok(())
        };
        captives.retain(|captive| check(captive).map_err(&mut *fail).is_ok());
        if peer.is_some() {
            check_forgotten(&captives)?;
        }
        if self.fd.is_empty() && !self.with_local && !captives.is_empty() {
            has_failed |= leave_out_local(&mut captives)?;
        }
        Ok((captives, has_failed))
    }

    fn select(&self, peer: Option<SocketAddr>, fail: &mut impl FnMut(anyhow::Error)) -> Result<Vec<Captive>> {
        let mut found = Found::default();
        if !self.fd.is_empty() {
            let pid = self.one_process("--fd")?.context("--fd without --pid")?;
            let process = Process::open(pid)?;
            for fd in &self.fd {
                match Captive::new(&process, *fd).and_then(|captive| told(captive, peer)) {
                    Ok(captive) if found.seen.insert(captive.inode()) => found.captives.push(captive),
                    Ok(_) => {}
                    Err(error) => fail(error.into()),
                }
            }
            return Ok(found.captives);
        }
        // A process may leave its connections to a child that it starts meanwhile.
        let mut known = HashSet::from([rustix::process::getpid()]);
        for _ in 0..LOOKS {
            let mut processes = self.processes()?;
            processes.retain(|pid| known.insert(*pid));
            if processes.is_empty() {
                break;
            }
            for pid in processes {
                self.select_of(pid, peer, &mut found, fail)?;
            }
        }
        Ok(found.captives)
    }

    /// The connections of one process.
    fn select_of(
        &self,
        pid: Pid,
        peer: Option<SocketAddr>,
        found: &mut Found,
        fail: &mut impl FnMut(anyhow::Error),
    ) -> Result<()> {
        let process = match Process::open(pid) {
            Err(_) if process::has_ended(pid) => return Ok(()),
            opened => opened?,
        };
        let is_named = !self.pid.is_empty();
        let mut listed = Vec::new();
        let note = |fd, inode| listed.push((fd, inode));
        match is_named {
            true => process::sockets(pid, note).unwrap_or_else(|error| fail(error.into())),
            false => process::visible_sockets(pid, note)?,
        }
        for (fd, inode) in listed {
            if found.seen.contains(&inode) {
                continue;
            }
            let captive = Captive::find(&process, fd);
            match captive.and_then(|captive| captive.map(|captive| told(captive, peer)).transpose()) {
                // What has left this descriptor since may be in another process, and it may have got another connection.
                Ok(Some(captive)) if found.seen.insert(captive.inode()) => match self.wants(&captive) {
                    Ok(true) => found.captives.push(captive),
                    Ok(false) => {}
                    Err(error) => fail(error.into()),
                },
                Ok(_) => {}
                // Nobody has asked for this process by its number: it is left out.
                Err(error) if error.kind() == ErrorKind::NoPermission && !is_named => {}
                Err(error) => fail(error.into()),
            }
        }
        Ok(())
    }

    /// The processes whose connections are meant.
    fn processes(&self) -> Result<Vec<Pid>> {
        let mut processes = if self.pid.is_empty() { process::all()? } else { self.pid.clone() };
        if !self.matching.wants_all_names() {
            let mut named = Vec::with_capacity(processes.len());
            for pid in processes {
                if self.matching.wants_name(&process::name(pid)?) {
                    named.push(pid);
                }
            }
            processes = named;
        }
        if self.children {
            for pid in processes.clone() {
                processes.extend(process::descendants(pid)?);
            }
        }
        Ok(processes)
    }

    /// Where the connections may be instead: in processes of others; and servers of several processes leave them to their children.
    fn elsewhere(&self) -> String {
        let is_hidden =
            |pid: &Pid| process::look_into(*pid).is_err_and(|error| error.kind() == ErrorKind::NoPermission);
        let pid = match self.pid[..] {
            [pid] => pid,
            [] if process::all().is_ok_and(|all| all.iter().any(is_hidden)) => {
                return " in the processes that may be looked into: run as root to see all".into();
            }
            _ => return String::new(),
        };
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
                let children = children.join(", ");
                format!(
                    ": processes that {pid} has started have connections (--children takes them): {children}"
                )
            }
        }
    }

    fn wants(&self, captive: &Captive) -> soccr_handover::Result<bool> {
        if !self.matching.is_any() {
            return Ok(true);
        }
        let Some(Flow { local, remote }) = captive.known_flow()? else {
            // The kernel has forgotten its peer.
            return Ok(self.matching.wants(captive.local()?, (Ipv4Addr::UNSPECIFIED, 0).into()));
        };
        Ok(self.matching.wants(local, remote))
    }
}

/// How often processes are looked for that have started meanwhile: somewhere they start all the time.
const LOOKS: usize = 8;

/// What a selection has found by now.
#[derive(Default)]
struct Found {
    captives: Vec<Captive>,
    /// The inodes of all connections that were looked at: processes share them.
    seen: HashSet<u64>,
}

/// A connection with its peer, if the kernel has forgotten that. One that ends later has another peer.
fn told(captive: Captive, peer: Option<SocketAddr>) -> soccr_handover::Result<Captive> {
    match peer {
        Some(peer) if captive.has_forgotten_peer()? => Ok(captive.with_peer(peer)),
        _ => Ok(captive),
    }
}

/// One address is the peer of one connection.
fn check_forgotten(captives: &[Captive]) -> Result<()> {
    let mut forgotten = Vec::new();
    for captive in captives {
        if captive.has_forgotten_peer()? {
            forgotten.push(captive.name());
        }
    }
    match forgotten.len() {
        0 => {
            exit::complain("--forgotten-peer: each of the connections still has its peer");
            Ok(())
        }
        1 => Ok(()),
        _ => bail!(
            "{}: --forgotten-peer is the peer of one connection: take each of these by itself (--fd)",
            forgotten.join(", ")
        ),
    }
}

/// Leaves out connections whose peers stay on this host and would not find them elsewhere; tells whether there are any.
fn leave_out_local(captives: &mut Vec<Captive>) -> Result<bool> {
    let remotes = || captives.iter().map(|captive| captive.flow().map(|flow| flow.remote));
    let local = namespace::ask_beside(captives[0].as_fd(), || {
        remotes().map(|remote| remote.is_ok_and(network::is_local).into()).collect()
    })
    .with_context(|| captives[0].name().to_owned())?;
    let mut local = local.into_iter().map(|local| local != 0);
    let mut left_out = Vec::new();
    captives.retain(|captive| {
        let stays = local.next() == Some(true);
        if stays {
            let why = "left out: its peer is this host itself (--with-local takes it)";
            left_out.push((captive.name().to_owned(), why.to_owned()));
        }
        !stays
    });
    let has_some = !left_out.is_empty();
    exit::complain_of_all(left_out);
    Ok(has_some)
}
