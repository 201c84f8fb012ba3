//! `soccr send`: connections of running processes, into a pipe.

mod backlog;
mod dry_run;
mod via;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use clap::value_parser;
use rustix::io::ioctl_fionread;
use soccr::Flow;
use soccr_handover::channel::OneWay;
use soccr_handover::foreign::{Captive, Keeper, Sharing, namespace};
use soccr_handover::{ErrorKind, Event, Limits, Mover, Outcome, Path, Users};

use crate::exit::{self, Exit};
use crate::give::rescue::rescue;
use crate::guide::{Hop, Made, check_hops, parse_hop, path};
use crate::nat::Nat;
use crate::selection::Selection;
use crate::show::progress::Progress;
use crate::signals::{Bell, Deaf, Unstoppable};
use crate::traffic::Traffic;
use crate::{descriptors, sys};

use backlog::Backlog;
use via::{Left, Via};

/// Move connections of running processes through a pipe
///
/// The target starts first. Then a process is stopped while its connections are on their way, and what the peers send meanwhile is
/// held and sent along. With --via a connection leaves only when the target has restored it, or, in the same network, has agreed to
/// take it. If anything breaks before, the connection stays where it is, and the process notices nothing. Once it has left, this host
/// stays silent about it for the time of --silence.
///
/// Messages of the target appear here, also through ssh(1).
///
/// Ctrl-C, SIGHUP and SIGTERM end this command and its target as long as no connection has left, and are ignored from then on. The
/// target, ssh(1) included, is started with SIGINT, SIGQUIT, SIGHUP and SIGTSTP ignored, so that the terminal does not cut a move;
/// `soccr receive` has a program heed them again.
///
/// A connection with kernel TLS (kTLS) takes its keys along, to a program that leaves TLS to the kernel as well. It cannot go back once it
/// has left: if the target fails then, it is saved in an image.
///
/// The exit status is 0 only if the target has not failed either. A target on this host that gives the connections to a server
/// (--adopt, --send-fd) is waited for. A target that has taken connections and does not say within a minute what it has done with them has failed.
///
/// Without --via the stream goes to standard output. There is no way back then: a connection leaves as soon as it has been
/// written, and this command cannot know whether it arrived.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  soccr send --pid 4711 --fd 5 --via 'ssh host soccr receive -- ./server'
  soccr send --pid 4711 --all --via 'soccr receive --netns /run/netns/blue -- ./server'
  soccr send --port 443 --via 'ssh host soccr receive --send-fd /run/proxy.sock'
  soccr send --pid 4711 --all --via 'ssh host soccr receive -- ./server' --steer 192.0.2.2
  soccr send --name nginx --children --peer 192.0.2.0/24 --via 'ssh host soccr receive --adopt'
  soccr send --pid 4711 --all --idle 5 --via 'soccr receive --adopt'
  soccr send --pid 4711 --all --listener --via 'ssh host soccr receive --adopt'
  soccr send --pid 4711 --all --dry-run --via 'ssh host soccr receive -- ./server'
  soccr send --pid 4711 --fd 5 | ssh host soccr receive -- ./server")]
pub(crate) struct Send {
    #[command(flatten)]
    selection: Selection,
    /// Only connections that have been idle for this time: nothing sent or received, and nothing in their queues. The others stay.
    /// A request that the program has read and not yet answered cannot be seen: give more seconds than an answer takes
    #[arg(long, value_name = "SECONDS", requires = "connections")]
    idle: Option<u32>,
    /// Also move the connections that wait in the accept queues of the process, in order. Those that stay return to the queue (root,
    /// Linux 6.9), or are saved in images. If this command is asked to end before one has left, this happens to all of them
    #[arg(long, requires = "pid", requires = "via", group = "which")]
    listener: bool,
    /// Run this command of the shell as the target, with both its ends connected, in the network of the caller
    #[arg(long, value_name = "COMMAND")]
    via: Option<String>,
    /// How many seconds the target may take to start, and then to read and answer each 128 connections: a process is stopped no
    /// longer
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = value_parser!(u64).range(1..=86400))]
    timeout: u64,
    /// For how many seconds this host stays silent about connections that have left it
    #[arg(long, value_name = "SECONDS", default_value_t = soccr::lock::SILENCE.as_secs(),
        value_parser = value_parser!(u64).range(..=86400))]
    silence: u64,
    /// Instead of being silent, send on the packets of connections that have left: to this address of the target, on a network
    /// that both hosts share; or to ADDRESS dev DEVICE, the other end of a tunnel: once for each address family.
    /// Or vxlan:ADDRESS, and a tunnel is made to that address of the target (UDP port 4789)
    #[arg(long, value_name = "NEXT_HOP", value_parser = parse_hop, requires = "via", conflicts_with = "silence")]
    steer: Vec<Hop>,
    /// Have the target's answers come back through this host, where the network between it and the peers lets no foreign addresses
    /// pass
    #[arg(long, requires = "steer", conflicts_with_all = ["silence", "dry_run"])]
    return_via_source: bool,
    /// Only ask the target whether it would have the connections: their addresses, a route, room, the rights and its program. Nothing is
    /// stopped, locked or moved; what can only be seen by reading a connection is not looked at
    #[arg(long, requires = "via", conflicts_with_all = ["listener", "steer", "silence"])]
    dry_run: bool,
    /// One JSON array, an object for each connection
    #[arg(long, requires = "dry_run", conflicts_with_all = ["listener", "steer", "silence"])]
    json: bool,
}

impl Send {
    pub(crate) fn run(&self) -> Result<Exit> {
        if self.via.is_none() {
            descriptors::check_output(true, "pipe them into `soccr receive`, or name it by --via")?;
        }
        check_hops(&self.steer)?;
        if self.listener {
            self.selection.one_process("--listener")?;
            if !self.selection.is_any() {
                self.selection.refuse_name("--listener")?;
            }
        }
        descriptors::raise_limit();
        let mut failed = 0;
        let mut fail = |error: anyhow::Error| {
            exit::complain(&exit::line(&error));
            failed += 1;
        };
        let mut captives = match self.listener {
            true if !self.selection.is_any() => Vec::new(),
            true => self.selection.find_any(&mut fail)?,
            false => self.selection.find(None, &mut fail)?,
        };
        // Sockets that cannot be had.
        let unseen = failed;
        let idle = self.idle.map(|seconds| Duration::from_secs(seconds.into()));
        if let Some(time) = idle.filter(|_| !captives.is_empty()) {
            captives = only_idle(captives, time)?;
        }
        if let (true, Some(line)) = (self.dry_run, &self.via) {
            return self.ask(line, captives, failed);
        }
        let inodes: Vec<u64> = captives.iter().map(Captive::inode).collect();
        let listening = if self.listener { self.selection.one_process("--listener")? } else { None };
        // Connections that this process accepts would end with it, so it must live until they are back in a queue.
        let bell = listening.map(|_| Bell::hang()).transpose()?;
        let backlog = listening.map_or_else(|| Ok(Backlog::default()), Backlog::take)?;
        let sockets: Vec<_> = captives.iter().map(AsFd::as_fd).chain(backlog.sockets()).collect();
        let Some(first) = sockets.first() else {
            bail!("no connection is there, and none waits to be accepted")
        };
        let keeper = Keeper::start(&sockets, Sharing::find(&inodes)?, None)?;
        // The command runs in the caller's network: from a container's, ssh(1) might reach nobody.
        let via = self.via.as_deref().map(|line| Via::start(line, bell.as_ref())).transpose()?;
        let mut nat = Nat::around(|| Ok(namespace::enter_of(*first)?))?;
        exit::complain_of_all(captives.iter().filter_map(|captive| {
            let translated = captive.flow().ok().and_then(|flow| nat.of(flow))?;
            Some((captive.name().to_owned(), translated.warning()))
        }));
        nat.complain();
        let heard = Arc::new(Heard::default());
        let mover = self.mover(sockets.len(), Arc::clone(&heard))?;
        let waiting = backlog.seats()?;
        let mut departing = Vec::with_capacity(sockets.len());
        let mut names = Vec::with_capacity(sockets.len());
        // By which the keeper knows the sockets of what departs.
        let mut numbers = Vec::with_capacity(sockets.len());
        let accepted = captives.len()..sockets.len();
        for (number, captive) in captives.into_iter().enumerate() {
            let name = captive.name().to_owned();
            let seat = match captive.into_seat() {
                Ok(seat) => seat,
                // It has ended a moment ago.
                Err(error) => {
                    exit::complain(&error.to_string());
                    failed += 1;
                    continue;
                }
            };
            let leaves = mover.take_seat(seat).named(&name);
            names.push(name);
            numbers.push(number);
            departing.push(match idle {
                Some(time) => leaves.provided(move |socket| is_still_idle(socket, time)),
                None => leaves,
            });
        }
        for (name, seat) in waiting {
            departing.push(mover.take_seat(seat).named(&name));
            names.push(name);
        }
        numbers.extend(accepted);
        if departing.is_empty() {
            return Ok(Exit::Failed);
        }
        let flows: Vec<Flow> = departing.iter().map(|departing| departing.flow()).collect();
        let (path, _made) = self.path(&flows)?;
        let users = Unstoppable::new(Numbered { users: keeper, numbers });
        let sending = mover.sending(departing).used_by(users).steered_to(path);
        let lost;
        let outcomes = match via {
            Some(mut via) => {
                via.listen()?;
                let outcomes = sending.through(&mut via);
                lost = report(&names, &flows, &outcomes);
                let has_said_all = !heard.is_unfinished.load(Ordering::Relaxed);
                let has_failed = !via.part(left(&outcomes), has_said_all);
                failed += usize::from(has_failed || heard.failed.load(Ordering::Relaxed));
                outcomes
            }
            None => {
                let outcomes = sending.one_way().through(&mut OneWay(rustix::stdio::stdout()));
                lost = report(&names, &flows, &outcomes);
                outcomes
            }
        };
        let count = |which: fn(&Outcome) -> bool| outcomes.iter().filter(|outcome| which(outcome)).count();
        let gone = count(Outcome::is_moved);
        // Without answers, nobody knows whether a connection arrived.
        if gone > 0 && self.via.is_some() {
            let text =
                self.summary([gone, outcomes.len() - lost - gone + unseen, lost], heard.silent_until());
            // The moves are done, even if nobody reads the report.
            let _ = exit::print(&format!("{text}\n"));
        }
        Ok(match (lost, outcomes.len() - lost - gone + failed, gone) {
            (1.., _, _) => Exit::Lost,
            (0, 0, _) => Exit::Done,
            (0, _, 0) => Exit::Failed,
            (0, _, _) => Exit::SomeFailed,
        })
    }

    /// To be called in the network namespace of the connections.
    fn mover(&self, count: usize, heard: Arc<Heard>) -> Result<Mover> {
        let mut limits = Limits::default();
        limits.start = Duration::from_secs(self.timeout);
        limits.answer = limits.start;
        limits.end = limits.end.max(limits.answer);
        limits.silence = Duration::from_secs(self.silence);
        let what = if self.via.is_some() { "handed over" } else { "sent" };
        let progress = Mutex::new(Progress::new(what, count));
        // Until the target has it, a connection that has left is in this process alone.
        let deaf = Mutex::new(None);
        let listener = move |event: Event<'_>| match event {
            Event::Settled { .. } => progress.lock().unwrap_or_else(PoisonError::into_inner).step(),
            Event::Leaving => {
                *deaf.lock().unwrap_or_else(PoisonError::into_inner) = Some(Deaf::begin());
            }
            Event::Silent(time) => {
                let until = SystemTime::now() + time;
                *heard.silent_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
            }
            Event::Note { text, failed } => {
                exit::complain(text);
                heard.failed.fetch_or(failed, Ordering::Relaxed);
            }
            Event::Unfinished(why) => {
                let what = "the target has not said whether it could give the connections away";
                exit::complain(&format!("{what} ({why}): look there"));
                heard.failed.store(true, Ordering::Relaxed);
                heard.is_unfinished.store(true, Ordering::Relaxed);
            }
            Event::Warning(what) => exit::complain(what),
            _ => {}
        };
        Ok(Mover::with(limits)?.on_event(listener))
    }

    /// What has become of the connections: how many left, stay, and are lost.
    fn summary(&self, [gone, stay, lost]: [usize; 3], silent_until: Option<SystemTime>) -> String {
        let mut text = format!("{gone} left");
        let mut more = |count, what: &str| {
            if count > 0 {
                text += &format!(", {count} {what}");
            }
        };
        more(stay, if stay == 1 { "stays" } else { "stay" });
        more(lost, "in doubt");
        if let Some(time) = silent_until {
            text += &format!("; silent about what left until {}", sys::time_of_day(time));
        }
        if !self.steer.is_empty() {
            let hops: Vec<String> = self.steer.iter().map(Hop::to_string).collect();
            text += &format!("; steered to {}", hops.join(", "));
        }
        text
    }

    /// How packets follow these connections. To be called in their network namespace.
    fn path(&self, flows: &[Flow]) -> Result<(Path, Option<Made>)> {
        if self.steer.is_empty() {
            return Ok((Path::default(), None));
        }
        let (path, made) = path(&self.steer, flows).context("--steer")?;
        Ok((if self.return_via_source { path.with_answers() } else { path }, made))
    }
}

/// Users who know the sockets by other numbers: some of these have ended before the move began.
struct Numbered<U> {
    users: U,
    numbers: Vec<usize>,
}

impl<U: Users> Users for Numbered<U> {
    fn stop(&mut self) -> soccr_handover::Result<()> {
        self.users.stop()
    }

    fn go_on(&mut self) -> soccr_handover::Result<()> {
        self.users.go_on()
    }

    fn filling(&mut self, number: usize) -> soccr_handover::Result<()> {
        self.users.filling(self.numbers[number])
    }

    fn have(&mut self, number: usize) -> soccr_handover::Result<bool> {
        self.users.have(self.numbers[number])
    }

    fn filled(&mut self, number: usize) -> soccr_handover::Result<()> {
        self.users.filled(self.numbers[number])
    }
}

/// What the hand-over reported, for the summary.
#[derive(Default)]
struct Heard {
    /// The target has not done with all connections what it was to do.
    failed: AtomicBool,
    /// The target has not said its last word.
    is_unfinished: AtomicBool,
    silent_until: Mutex<Option<SystemTime>>,
}

impl Heard {
    fn silent_until(&self) -> Option<SystemTime> {
        *self.silent_until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn left(outcomes: &[Outcome]) -> Left {
    match outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Stays(..))).count() {
        0 if outcomes.iter().all(Outcome::is_moved) => Left::All,
        staying if staying == outcomes.len() => Left::None,
        _ => Left::Some,
    }
}

/// Prints which connections have not moved, and why; how many of them are lost, or in doubt.
fn report(names: &[String], flows: &[Flow], outcomes: &[Outcome]) -> usize {
    let mut lost = 0;
    exit::complain_of_all(names.iter().zip(flows).zip(outcomes).filter_map(|((name, flow), outcome)| {
        let text = match outcome {
            Outcome::Moved => return None,
            Outcome::Stays(stream, error) if error.kind() == ErrorKind::Adrift => {
                let error = rescue([(*flow, stream)], &anyhow!("{error}"));
                lost += usize::from(exit::code(&error) == Exit::Lost);
                exit::line(&error)
            }
            Outcome::Stays(_, error) => format!("stays: {error}"),
            Outcome::Unknown(error) => {
                lost += 1;
                match error.kind() {
                    ErrorKind::Lost => format!("lost: {error}"),
                    _ => format!("the target has it, or it is lost: {error}"),
                }
            }
        };
        Some((name.clone(), text))
    }));
    lost
}

/// Leaves out the connections that are not idle.
fn only_idle(captives: Vec<Captive>, time: Duration) -> Result<Vec<Captive>> {
    let all = captives.len();
    let mut idle = Vec::with_capacity(all);
    for captive in captives {
        if is_idle(captive.as_fd(), time).with_context(|| captive.name().to_owned())? {
            idle.push(captive);
        }
    }
    match (idle.len(), all - idle.len()) {
        (0, _) => bail!("no connection has been idle for {} s", time.as_secs()),
        (_, 0) => {}
        (_, busy) => exit::complain(&format!("{busy} of {all} connections are in use, and stay")),
    }
    Ok(idle)
}

/// Checked again once the connection is locked.
fn is_still_idle(socket: BorrowedFd<'_>, time: Duration) -> Result<(), String> {
    match is_idle(socket, time) {
        Ok(true) => Ok(()),
        Ok(false) => Err("it is in use again (--idle)".into()),
        Err(error) => Err(exit::line(&error)),
    }
}

/// Whether no data were sent or received for this time, and none wait in the queues.
fn is_idle(socket: BorrowedFd<'_>, time: Duration) -> Result<bool> {
    let info = sys::tcp_info(socket).context("TCP_INFO")?;
    let unread = ioctl_fionread(socket).context("FIONREAD")?;
    Ok(unread == 0 && Traffic::read(&info).is_some_and(|traffic| traffic.is_idle(time)))
}
