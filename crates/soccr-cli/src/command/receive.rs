//! `soccr receive`: connections out of a pipe, for a program.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use clap::value_parser;
use soccr::Restored;
use soccr::steer::Numbers;
use soccr_handover::channel::Pair;
use soccr_handover::{Announced, Event, Limits, Mover, Offer, Origin, Received, Terms};
use soccr_image::AddressMap;

use crate::command::completions;
use crate::exit::{Coded, Exit};
use crate::fidelity::{Demands, Reports, Trust};
use crate::give::parting::Parting;
use crate::give::rescue::rescue_unless;
use crate::give::state::States;
use crate::give::{Handover, Live, Recipient, give_up};
use crate::lifeline::{self, Claim};
use crate::signals::Bell;
use crate::{descriptors, exit, mapping, network};

/// Receive connections from `soccr send`, and give them to a program
///
/// Reads standard input, and answers on standard output where the source listens (`soccr send --via`); the program then finds
/// /dev/null as both, and as standard error where that is a pipe. It starts when the source has sent everything, or is gone, provided
/// that a connection has arrived. It runs in a session of its own, because relays such as socat(1) kill what they have started when
/// the stream ends.
#[derive(clap::Args, Debug)]
#[command(
    override_usage = "\
soccr receive [OPTIONS] [--stdio] -- PROGRAM [ARGUMENT]...
       soccr receive [OPTIONS] --send-fd UNIX_SOCKET
       soccr receive [OPTIONS] --adopt
       soccr receive [OPTIONS] --connect ADDRESS:PORT [--proxy-protocol 1|2]",
    after_help = "\
Examples:
  soccr send --pid 4711 --fd 5 --via 'ssh host soccr receive -- ./server'
  soccr send --pid 4711 --all --via 'soccr receive --netns /run/netns/blue -- ./server'
  soccr send --pid 4711 --all --via 'ssh host soccr receive --detach --log server.log -- ./server'
  soccr send --port 443 --via 'ssh host soccr receive --send-fd /run/proxy.sock'
  soccr send --pid 4711 --all --via 'soccr receive --adopt'     to the server that listens on that port now"
)]
pub(crate) struct Receive {
    /// Receive under another address: each end that is OLD becomes NEW (IP, or IP:PORT)
    #[arg(long, value_name = "OLD=NEW")]
    map: Vec<AddressMap>,
    /// The network namespace to restore in: a path, a name of ip-netns(8), or the number of a process
    #[arg(long, value_name = "PATH|NAME|PID", add = completions::namespaces())]
    netns: Option<String>,
    /// How many seconds the source may take to let go of a connection that is ready here; then it is refused. Also to go on when all
    /// that have come are here; then these are given to the program, and the others stay
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = value_parser!(u64).range(1..=86400))]
    timeout: u64,
    /// When packets for an address that this host does not have are delivered here, to what has been received
    #[arg(long, value_name = "WHEN", value_enum, default_value = "auto")]
    steered: Steered,
    /// Other numbers for this delivery, where the usual ones are taken: the mark of its packets, its routing table, and the
    /// priority of its first rule
    #[arg(long, value_name = "MARK,TABLE,PRIORITY", value_parser = parse_numbers, default_value = "0x50cc,20684,1000")]
    steered_numbers: Numbers,
    /// End when the program runs: without it, this command and ssh(1) stay as long as the program
    #[arg(long, conflicts_with_all = ["adopt", "send_fd"])]
    detach: bool,
    /// Append the program's standard error to this file. Without it, and where standard error is a pipe, it is lost
    #[arg(long, value_name = "FILE", conflicts_with_all = ["adopt", "send_fd"])]
    log: Option<PathBuf>,
    #[command(flatten)]
    demands: Demands,
    #[command(flatten)]
    handover: Handover,
}

/// When packets for an address that is not this host's are delivered.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Steered {
    /// Where the source steers them (`soccr send --steer`)
    Auto,
    /// Wherever they come from
    Always,
    /// Not by this command
    Never,
}

fn parse_numbers(text: &str) -> Result<Numbers, String> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    let all: Option<Vec<u32>> = text.split(',').map(number).collect();
    // Zero is no mark, the tables 253 to 255 are the kernel's, and so are the rules with the lowest and highest priority.
    match all.as_deref() {
        Some([mark @ 1..=u32::MAX, table @ (1..253 | 256..=u32::MAX), priority @ 1..32_764]) => {
            let mut numbers = Numbers::default();
            (numbers.mark, numbers.table, numbers.priority) = (*mark, *table, *priority);
            Ok(numbers)
        }
        _ => {
            Err("not MARK,TABLE,PRIORITY with a mark that is not 0, a free table and a priority under 32764"
                .into())
        }
    }
}

impl Receive {
    pub(crate) fn run(&self) -> Result<Exit> {
        if matches!(self.steered, Steered::Never) && self.steered_numbers != Numbers::default() {
            bail!(Coded(Exit::Usage, "--steered never: there is no delivery for --steered-numbers".into()));
        }
        mapping::refuse_twice(&self.map)?;
        let mut parting = match self.detach || self.handover.is_kept_here() {
            false => Parting::default(),
            true => match Parting::apart(self.detach)? {
                Ok(parting) => parting,
                Err(exit) => return Ok(exit),
            },
        };
        if let Some(path) = &self.log {
            parting.log_to(path)?;
        }
        let claim = lifeline::claim()?;
        network::enter(self.netns.as_deref())?;
        parting.end_with_parent()?;
        let recipient = self.handover.find()?;
        descriptors::raise_limit();
        let terms = self.terms(&recipient);
        exit::complain_by(&terms.notes);
        let counts = Arc::new(Counts::default());
        let intake = Intake {
            recipient,
            reports: self.demands.reports(Trust::Safe),
            claim,
            is_here: self.netns.is_some(),
            counts: Arc::clone(&counts),
            states: States::default(),
            announced: 0,
        };
        let intake = Arc::new(Mutex::new(intake));
        let bell = Bell::hang()?;
        let mover = self.mover(&counts)?;
        parting.prepare()?;
        let (read, write) = (rustix::stdio::stdin(), rustix::stdio::stdout());
        let mut channel = Pair { read, write }.until(&bell, "this command has been asked to end");
        let received = mover.receive_all(&mut channel, terms.for_recipient(Arc::clone(&intake) as _));
        let Received { arrived, outcome, end, was_trial, .. } = received;
        let deaf = bell.deafen();
        exit::complain_of_all(counts.complaints().drain(..));
        if let Err(error) = &outcome {
            exit::complain(&error.to_string());
        }
        let Some(intake) = Arc::into_inner(intake) else { bail!("the hand-over is not over") };
        let Intake { recipient, reports, states: mut kept, .. } =
            intake.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = reports.tell() {
            exit::complain(&exit::line(&error));
        }
        let mut left = Ok(());
        if counts.is_heard.load(Ordering::Relaxed) {
            left = parting.leave_source(end);
        }
        if was_trial && outcome.is_ok() {
            parting.end();
            return left.map(|()| Exit::Done);
        }
        let (failed, lost) = (counts.failed.load(Ordering::Relaxed), counts.lost.load(Ordering::Relaxed));
        if lost > 0 {
            let error = anyhow!("{lost} of the connections are lost");
            if !exit::fail_by_source(&error) {
                exit::complain(&exit::line(&error));
            }
        }
        let (all, mut states, mut homeless) = (arrived.len(), Vec::new(), Vec::new());
        let mut streams = Vec::with_capacity(all);
        for arrived in arrived {
            let (flow, has_state) = (arrived.flow(), !arrived.state().is_empty());
            let state = match has_state && recipient.takes_states() {
                true => recipient
                    .check_room(all, states.len() + 1)
                    .and_then(|()| kept.take(flow, arrived.state()))
                    .map(Some),
                false => Ok(None),
            };
            let name = arrived.name().to_owned();
            match (arrived.into_stream(), state) {
                (Err(error), _) => left = left.and(Err(error.into())),
                // The source did not listen, or it would have stayed there.
                (Ok(stream), Err(error)) if kept.is_critical(flow) => {
                    exit::complain(&format!("{name}: {}", exit::line(&error)));
                    homeless.push(Live { flow, stream, has_state });
                }
                (Ok(stream), state) => {
                    match state {
                        Ok(state) => states.extend(state.map(|state| (streams.len(), state))),
                        Err(error) => exit::complain(&format!(
                            "{name}: it goes without its state: {}",
                            exit::line(&error)
                        )),
                    }
                    streams.push(Live { flow, stream, has_state });
                }
            }
        }
        if let Err(error) = left {
            streams.append(&mut homeless);
            return give_up(&streams, &error, &parting);
        }
        if !homeless.is_empty() {
            let error = anyhow!("the states of {} connections could not be passed on", homeless.len());
            if streams.is_empty() {
                return give_up(&homeless, &error, &parting);
            }
            let error = rescue_unless(&mut |_| false, &homeless, &error);
            if !exit::fail_by_source(&error) {
                exit::complain(&exit::line(&error));
            }
        }
        match streams.len() {
            0 if lost > 0 => bail!(Coded(Exit::Lost, "no connection has arrived".into())),
            0 if failed > 0 || outcome.is_err() => bail!("no connection has arrived"),
            0 => bail!("the source has sent no connection"),
            _ => match recipient.give(streams, &states, deaf, parting) {
                Ok(Exit::Done) if lost > 0 || !homeless.is_empty() => Ok(Exit::SomeFailed),
                given => given,
            },
        }
    }

    fn terms(&self, recipient: &Recipient) -> Terms {
        let mut terms = Terms::default();
        terms.map = self.map.clone();
        terms.room = Some(recipient.capacity());
        terms.takes_states = recipient.takes_states();
        terms.takes_loopback = self.netns.is_some();
        terms.steered = match self.steered {
            Steered::Auto => soccr_handover::Steered::Auto,
            Steered::Always => soccr_handover::Steered::Always,
            Steered::Never => soccr_handover::Steered::Never,
        };
        terms.numbers = self.steered_numbers;
        terms
    }

    fn mover(&self, counts: &Arc<Counts>) -> Result<Mover> {
        let mut limits = Limits::default();
        limits.decision = Duration::from_secs(self.timeout);
        limits.answer = limits.decision;
        let counts = Arc::clone(counts);
        let listener = move |event: Event<'_>| match event {
            Event::Refused { number, reason } => {
                counts.failed.fetch_add(1, Ordering::Relaxed);
                // A source that reads answers prints the reason itself.
                if !counts.is_heard.load(Ordering::Relaxed) {
                    counts.complaints().push((format!("connection {number}"), reason.to_owned()));
                }
            }
            Event::Lost { number, reason } => {
                counts.lost.fetch_add(1, Ordering::Relaxed);
                counts.complaints().push((format!("connection {number}"), format!("lost: {reason}")));
            }
            Event::Warning(what) => exit::complain(what),
            _ => {}
        };
        Ok(Mover::with(limits)?.on_event(listener))
    }
}

/// How many connections have not arrived.
#[derive(Default)]
struct Counts {
    /// The source reads answers.
    is_heard: AtomicBool,
    failed: AtomicUsize,
    lost: AtomicUsize,
    complaints: Mutex<Vec<(String, String)>>,
}

impl Counts {
    /// Messages for people, printed at the end.
    fn complaints(&self) -> MutexGuard<'_, Vec<(String, String)>> {
        self.complaints.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Decides about each connection that arrives.
struct Intake {
    recipient: Recipient,
    reports: Reports,
    claim: Claim,
    /// `--netns` names the network namespace.
    is_here: bool,
    counts: Arc<Counts>,
    states: States,
    /// How many connections will come.
    announced: usize,
}

impl soccr_handover::Recipient for Intake {
    fn expect(&mut self, announced: &Announced) -> Result<(), String> {
        if announced.origin == Origin::SameHost && !announced.steers && !self.is_here {
            exit::complain(
                "the connections come from another network namespace of this host; to restore them there, name it by --netns",
            );
        }
        self.counts.is_heard.store(announced.answers, Ordering::Relaxed);
        // A source that reads no answers may have let go of the connections already: those that cannot be given are rescued at the end.
        self.announced = announced.connections;
        let room =
            if announced.answers { self.recipient.check_room(announced.connections, 0) } else { Ok(()) };
        room.map_err(|error| exit::line(&error))
    }

    fn accept(&mut self, offer: &mut Offer<'_>) -> Result<(), String> {
        if offer.is_state_critical && !self.recipient.takes_states() {
            return Err(
                "it comes with a state of its application, which this recipient cannot be given".into()
            );
        }
        let accepted =
            self.reports.distrust(offer.connection).and_then(|()| self.recipient.check(offer.connection));
        accepted.map_err(|error| exit::line(&error))?;
        if offer.state.is_empty() || !self.recipient.takes_states() {
            return Ok(());
        }
        let is_heard = self.counts.is_heard.load(Ordering::Relaxed);
        let room = match is_heard {
            true => self.recipient.check_room(self.announced, self.states.count() + 1),
            false => Ok(()),
        };
        let kept = room
            .and_then(|()| self.states.keep(offer.connection.flow(), offer.state, offer.is_state_critical));
        match kept {
            Err(error) if offer.is_state_critical && is_heard => {
                Err(format!("its state cannot be passed on: {}", exit::line(&error)))
            }
            // Tried once more when it is here.
            _ => Ok(()),
        }
    }

    fn inspect(&mut self, name: &str, restored: &Restored) -> Result<(), String> {
        self.reports.add(name, restored).map_err(|error| exit::line(&error))
    }

    fn take(&mut self, _: &str) {
        self.claim.has_taken(self.recipient.is_soon_over());
    }
}
