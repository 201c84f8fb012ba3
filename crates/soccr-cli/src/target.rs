//! The target of a hand-over: connections on their way to a recipient.
//!
//! The words and their order are those of [`soccr_image::stream`]. What arrives without a pause is locked, restored and
//! resumed together, as a batch. In the namespace of the source the old socket is in the way until the COMMIT: there a
//! connection is restored behind that.
//!
//! The source is not trusted with this process or this host: what waits for it has limits in number, memory and time, and what
//! is in use here and not its own is refused before it is locked.

mod pipe;
mod restoring;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use soccr::bulk::{self, Needs};
use soccr::lock::{Held, Locker, Mode};
use soccr::{Connection, Flow, Lock, Restored};
use soccr_image::AddressMap;
use soccr_image::stream::{Message, Reader, Writer};

use crate::delivery::{Delivery, Steered};
use crate::fidelity::Reports;
use crate::handover::Recipient;
use crate::lifeline::Claim;
use crate::signals::{Bell, Deaf};
use crate::via::{Deadline, Output};
use crate::{exit, network};
use pipe::{Input, Patient, is_readable};
use restoring::queued;

/// The most connections of a batch, and the most bytes in their queues. A source that sends as many at a time is not
/// waited for.
const BATCH: usize = 256;
const BATCH_BYTES: usize = 16 << 20;

/// The most connections, and the most bytes in their queues, that wait for the source. It sends 256 at a time.
const WAITING: usize = 1024;
const WAITING_BYTES: usize = 1 << 30;

/// The most memory that held packets take; each takes as much as [`PACKET`] besides its bytes. Peers send again what is not kept.
const HELD_BYTES: usize = 64 << 20;
const PACKET: usize = 64;

/// How long a batch waits for what is still announced. Each one takes about a millisecond by itself.
const PATIENCE: Duration = Duration::from_millis(2);

/// Takes connections from a source.
#[derive(Debug)]
pub(crate) struct Target<'a> {
    claim: Claim,
    bell: Bell,
    delivery: Delivery,
    locker: Locker,
    terms: Terms<'a>,
    /// The source is in this network namespace: what is in use here may be its own.
    beside: bool,
    /// It is known to be in another one.
    apart: bool,
    recipient: &'a Recipient,
    reports: Reports<'a>,
    /// How many connections are still to come, as the source has said.
    announced: usize,
    /// How many more connections the recipient can take.
    room: usize,
    /// The last number that the source has used: they ascend.
    last: u32,
    /// It is refused before it has come.
    unwanted: bool,
    arriving: Vec<Arriving>,
    arriving_bytes: usize,
    waiting: BTreeMap<u32, Waiting>,
    /// Those that the source has let go of, and that are not restored yet.
    committed: Vec<Committed>,
    held_bytes: usize,
    batches: BTreeMap<usize, Batch>,
    streams: BTreeMap<u32, TcpStream>,
    answers: Option<Answers>,
    failed: usize,
    lost: usize,
}

/// What the command line says about what may come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms<'a> {
    pub(crate) maps: &'a [AddressMap],
    /// The network namespace is named: it is the one that is meant.
    pub(crate) is_here: bool,
    /// How long the source may take to let go of what is ready here, and to read an answer.
    pub(crate) limit: Duration,
    /// When packets for addresses of other hosts are delivered here.
    pub(crate) steered: Steered,
}

/// The way back to the source.
#[derive(Debug)]
struct Answers {
    writer: Writer<Output>,
    deadline: Deadline,
    /// The source does not read: nothing more is said.
    silent: bool,
}

/// What has become of everything.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) deaf: Deaf,
    pub(crate) streams: Vec<TcpStream>,
    /// The source has listened.
    pub(crate) answered: bool,
    pub(crate) failed: usize,
    pub(crate) lost: usize,
}

/// A connection that has been read.
#[derive(Debug)]
struct Arriving {
    id: u32,
    name: String,
    connection: Connection,
    /// It is in use here: by the source.
    behind: bool,
}

/// A connection that is silent until the source says COMMIT.
#[derive(Debug)]
struct Waiting {
    name: String,
    batch: usize,
    since: Instant,
    /// In its queues.
    bytes: usize,
    place: Place,
    held: Held,
}

/// Where it waits.
#[derive(Debug)]
enum Place {
    /// In its new socket, complete.
    Restored(Restored),
    /// In memory, while the old socket is in this namespace.
    Behind(Box<Connection>),
}

/// A connection to be restored now that its old socket is out of the way.
#[derive(Debug)]
struct Committed {
    id: u32,
    name: String,
    batch: usize,
    connection: Connection,
    held: Held,
}

/// Connections under one lock.
#[derive(Debug)]
struct Batch {
    lock: Lock,
    /// How many the source has not decided about.
    undecided: usize,
    /// Those that are ours: they go on when the rest is decided.
    taken: Vec<(u32, Restored, Held)>,
}

impl<'a> Target<'a> {
    pub(crate) fn new(
        terms: Terms<'a>,
        recipient: &'a Recipient,
        reports: Reports<'a>,
        claim: Claim,
    ) -> Result<Self> {
        Ok(Self {
            claim,
            bell: Bell::hang()?,
            delivery: Delivery::new(terms.steered)?,
            locker: Locker::new(Mode::HOLD)?,
            terms,
            beside: false,
            apart: false,
            recipient,
            reports,
            announced: 0,
            room: recipient.capacity(),
            last: 0,
            unwanted: false,
            arriving: Vec::new(),
            arriving_bytes: 0,
            waiting: BTreeMap::new(),
            committed: Vec::new(),
            held_bytes: 0,
            batches: BTreeMap::new(),
            streams: BTreeMap::new(),
            answers: None,
            failed: 0,
            lost: 0,
        })
    }

    /// Listens to the source until it has said everything. Where that fails, what it has not let go of stays with it.
    pub(crate) fn listen(&mut self, input: File) -> Result<()> {
        let outcome = self.listen_to_the_end(input);
        if let Err(error) = &outcome {
            let gone = error.downcast_ref::<soccr_image::Error>();
            let gone = gone.is_some_and(|error| error.kind() == soccr_image::ErrorKind::Truncated);
            for (id, waiting) in std::mem::take(&mut self.waiting) {
                if !gone {
                    self.give_up(id, &waiting.name, anyhow!(exit::line(error)));
                }
                self.decided(waiting.batch);
            }
        }
        outcome
    }

    fn listen_to_the_end(&mut self, input: File) -> Result<()> {
        let buffered = Rc::new(Cell::new(0));
        let until = Rc::new(Cell::new(None));
        let more = input.try_clone().context("standard input")?;
        let bell = self.bell.as_fd().try_clone_to_owned().context("fcntl(F_DUPFD_CLOEXEC)")?;
        let patient = Patient { input, bell, until: Rc::clone(&until) };
        let input =
            Input { reader: BufReader::with_capacity(64 << 10, patient), buffered: Rc::clone(&buffered) };
        let mut reader = Reader::new(input).context("standard input")?;
        loop {
            let full = self.arriving.len() >= BATCH || self.arriving_bytes >= BATCH_BYTES;
            let idle = buffered.get() == 0 && !is_readable(&more, self.patience());
            if full || idle {
                self.restore()?;
            }
            if idle || self.committed.len() >= BATCH {
                self.restore_committed();
            }
            until.set(self.waiting.values().next().map(|oldest| oldest.since + self.terms.limit));
            match reader.receive() {
                Ok(Some(Message::Connection { id, .. })) if id == self.last && self.unwanted => {}
                Ok(Some(Message::Connection { id, name, connection })) => {
                    if id <= self.last {
                        bail!("the source counts down: {id} comes after {}", self.last);
                    }
                    (self.last, self.unwanted) = (id, false);
                    self.announced = self.announced.saturating_sub(1);
                    self.arriving_bytes += queued(&connection);
                    self.arriving.push(Arriving { id, name, connection, behind: false });
                }
                Ok(Some(message)) => {
                    self.restore()?;
                    self.hear(message)?;
                }
                Ok(None) => return self.restore(),
                Err(error) => match error.connection() {
                    Some(id) => self.distrust(id, error.into()),
                    None => return Err(anyhow::Error::new(error).context("the source")),
                },
            }
        }
    }

    /// How long it is worth waiting for more, before what has come is restored.
    fn patience(&self) -> Duration {
        let more_arrive = !self.arriving.is_empty() && self.announced > 0;
        let more_are_let_go = !self.committed.is_empty() && !self.waiting.is_empty();
        if more_arrive || more_are_let_go { PATIENCE } else { Duration::ZERO }
    }

    fn hear(&mut self, message: Message) -> Result<()> {
        match message {
            Message::Begin { connections, answers, place, steered } => {
                self.delivery.source_steers(steered);
                let here = network::place();
                self.beside = place.is_some() && place == here;
                self.apart = !self.beside && place.is_some() && here.is_some();
                let on_host = place.zip(here).is_some_and(|(there, here)| there.host == here.host);
                if self.apart && on_host && !self.terms.is_here {
                    exit::complain(
                        "the connections come from another network namespace of this host; where they are to stay in it, name it \
                         by --netns",
                    );
                }
                let connections = connections as usize;
                Needs { connections, ..Needs::default() }.check()?;
                self.announced = connections;
                if answers && self.answers.is_none() {
                    // One that does not listen may have let go of them already: they are rescued in the end.
                    self.recipient.check_room(connections)?;
                    self.answers = Some(Answers::new(self.terms.limit)?);
                }
            }
            Message::Held { connection, mut packets } => {
                if let Some(waiting) = self.waiting.get_mut(&connection) {
                    packets.retain(|packet| {
                        self.held_bytes += packet.len() + PACKET;
                        let keep = self.held_bytes <= HELD_BYTES;
                        self.held_bytes -= if keep { 0 } else { packet.len() + PACKET };
                        keep
                    });
                    waiting.held.packets.extend(packets);
                }
            }
            Message::State { connection, critical: true, .. } => {
                let error =
                    anyhow!("it comes with a state of its application, which a program cannot be given");
                self.distrust(connection, error);
            }
            Message::State { .. } => {}
            Message::Commit { connection } => {
                let id = connection;
                if let Some(Waiting { name, batch, place, held, .. }) = self.waiting.remove(&id) {
                    match place {
                        Place::Restored(restored) => self.take(id, batch, restored, held),
                        Place::Behind(connection) => {
                            let connection = *connection;
                            self.committed.push(Committed { id, name, batch, connection, held });
                        }
                    }
                }
            }
            Message::Abort { connection, .. } => {
                if let Some(waiting) = self.waiting.remove(&connection) {
                    self.room += 1;
                    self.decided(waiting.batch);
                }
            }
            _ => bail!("the source does not know its part"),
        }
        Ok(())
    }

    /// It is ours.
    fn take(&mut self, id: u32, batch: usize, restored: Restored, held: Held) {
        self.claim.has_taken();
        self.answer(&Message::Taken { connection: id });
        if let Some(batch) = self.batches.get_mut(&batch) {
            batch.taken.push((id, restored, held));
        }
        self.decided(batch);
    }

    fn give_up_of(&mut self, batch: usize, id: u32, name: &str, error: anyhow::Error) {
        self.give_up(id, name, error);
        self.decided(batch);
    }

    fn give_up(&mut self, id: u32, name: &str, error: anyhow::Error) {
        self.room += 1;
        self.refuse(id, &if name.is_empty() { error } else { error.context(name.to_owned()) });
    }

    /// A record about this connection cannot be used. What comes about it from here on is not obeyed, a COMMIT least of all.
    fn distrust(&mut self, id: u32, error: anyhow::Error) {
        if let Some(at) = self.arriving.iter().position(|arriving| arriving.id == id) {
            self.arriving.remove(at);
            self.refuse(id, &error);
        } else if self.waiting.contains_key(&id) && self.answers.is_none() {
            // Nobody would take it back; what was held the peer sends again.
            exit::complain(&exit::line(&error));
        } else if let Some(waiting) = self.waiting.remove(&id) {
            self.give_up_of(waiting.batch, id, "", error);
        } else if id > self.last {
            (self.last, self.unwanted) = (id, true);
            self.refuse(id, &error);
        } else {
            // It is decided about already.
            exit::complain(&exit::line(&error));
        }
    }

    fn refuse(&mut self, id: u32, error: &anyhow::Error) {
        let (reason, subject) = (exit::line(error), format!("connection {id}: "));
        let reason = reason.strip_prefix(&subject).unwrap_or(&reason).to_owned();
        exit::complain(&format!("{subject}{reason}"));
        self.failed += 1;
        self.answer(&Message::Refused { connection: id, reason });
    }

    /// Where the source does not hear it, it has gone on without us: its end of the stream tells what it has decided.
    fn answer(&mut self, message: &Message) {
        if let Some(answers) = self.answers.as_mut().filter(|answers| !answers.silent) {
            answers.deadline.set(self.terms.limit);
            answers.silent = answers.writer.send(message).is_err();
        }
    }

    /// The source has decided about one more of a batch.
    fn decided(&mut self, number: usize) {
        let Some(batch) = self.batches.get_mut(&number) else { return };
        batch.undecided -= 1;
        if batch.undecided == 0
            && let Some(batch) = self.batches.remove(&number)
        {
            self.resume(batch);
        }
    }

    fn resume(&mut self, Batch { lock, taken, .. }: Batch) {
        let arrived: Vec<Flow> = taken.iter().map(|(_, _, held)| held.flow).collect();
        self.delivery.settle(lock.flows(), &arrived);
        let restored = taken.into_iter().map(|(id, restored, held)| {
            // What cannot be delivered the peer sends again.
            let _ = held.replay(&restored);
            self.held_bytes -= held.packets.iter().map(|packet| packet.len() + PACKET).sum::<usize>();
            (id, restored)
        });
        let restored: Vec<_> = restored.collect();
        let _ = lock.release();
        let (streams, lost) = (&mut self.streams, &mut self.lost);
        bulk::resume(restored, |id, outcome| match outcome {
            Ok(stream) => {
                streams.insert(id, stream);
            }
            Err(error) => {
                *lost += 1;
                exit::complain(&format!("connection {id}: lost: {error}"));
            }
        });
    }

    /// The source has said its last word. What it has not let go of is closed, silently.
    pub(crate) fn end(mut self) -> Arrived {
        self.waiting.clear();
        self.restore_committed();
        for batch in std::mem::take(&mut self.batches).into_values() {
            self.resume(batch);
        }
        if let Err(error) = self.reports.tell() {
            exit::complain(&exit::line(&error));
        }
        let answered = self.answers.is_some();
        if let Some(answers) = self.answers.filter(|answers| !answers.silent) {
            answers.deadline.set(self.terms.limit);
            // Where the source is gone, nobody waits for it.
            let _ = answers.writer.finish();
        }
        let streams = self.streams.into_values().collect();
        Arrived { deaf: self.bell.deafen(), streams, answered, failed: self.failed, lost: self.lost }
    }
}

impl Answers {
    /// Says hello, on standard output without a buffer: the source waits for every answer.
    fn new(limit: Duration) -> Result<Self> {
        let deadline = Deadline::after(limit);
        let stdout = rustix::stdio::stdout().try_clone_to_owned().context("standard output")?;
        Ok(Self { writer: Writer::new(Output::new(stdout, deadline.clone()))?, deadline, silent: false })
    }
}
