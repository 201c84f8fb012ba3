//! The target at work: it carries out what its machine decides, on sockets, locks and bytes.
//!
//! Connections that arrive without a pause are locked, restored and resumed together, as a batch. In the network of the source
//! the old socket keeps its addresses until the COMMIT: there a connection is restored after the COMMIT.

mod engine;
mod hear;
mod place;
mod trial;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::TcpStream;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use soccr::lock::Held;
use soccr::{Connection, Flow, Lock, Restored};
use soccr_image::stream::{Decoder, Message, Writer};

use crate::delivery::Delivery;
use crate::drive::{Engine, Outbox};
use crate::error::{Error, ErrorKind, Result};
use crate::mover::{Event, Shared};
use crate::notes::LastWords;
use crate::protocol::{Deed, Id, News, Target};
use crate::recipient::{Origin, Recipient};
use crate::terms::Terms;

/// The most connections of a batch, and the most bytes in their queues.
const BATCH: usize = 128;
const BATCH_BYTES: usize = 16 << 20;

/// The most connections, and the most bytes in their queues and states, that wait for the source. It sends 128 at a time. The states of
/// connections that are ours count until they are passed on: where nobody would take a connection back, it comes without its state.
const WAITING: usize = 1024;
const WAITING_BYTES: usize = 1 << 30;

/// The most memory that held packets take; each takes as much as [`PACKET`] besides its bytes. Peers send again what is not kept.
const HELD_BYTES: usize = 64 << 20;
const PACKET: usize = 64;

/// How long a batch waits for further announced connections. A batch costs about a millisecond, however small it is.
const PATIENCE: Duration = Duration::from_millis(2);

/// How long the source may take to say END behind the last connection, and a source without answers to close the channel or to begin
/// another stream: it has nothing else to do.
const PARTING: Duration = Duration::from_secs(1);

/// A connection that has been read.
#[derive(Debug)]
struct Arriving {
    id: Id,
    name: String,
    state: Vec<u8>,
    is_critical: bool,
    connection: Connection,
}

/// A connection that is silent until the source says COMMIT.
#[derive(Debug)]
struct Waiting {
    name: String,
    state: Vec<u8>,
    batch: usize,
    place: Place,
    /// Its addresses, those on the wire included.
    flows: Vec<Flow>,
    held: Held,
    /// Its share of [`WAITING_BYTES`].
    bytes: usize,
}

/// Where it waits.
#[derive(Debug)]
enum Place {
    /// In its new socket, complete.
    Restored(Restored),
    /// In memory: the old socket is still in this namespace.
    Behind(Box<Connection>),
}

/// A connection that is ours, and goes on with the rest of its batch.
#[derive(Debug)]
struct Taken {
    id: Id,
    name: String,
    state: Vec<u8>,
    restored: Restored,
    flows: Vec<Flow>,
    held: Held,
}

/// Connections under one lock.
#[derive(Debug)]
struct Batch {
    lock: Lock,
    /// Their addresses, those on the wire included, where they are expected home.
    expected: Vec<Flow>,
    /// Connections that had left this host not long ago: it was silent about them until they were locked.
    silent: Vec<Flow>,
    size: usize,
    /// How many connections the source has not decided about.
    undecided: usize,
    taken: Vec<Taken>,
}

/// A connection that has arrived and lives.
pub(crate) struct Landed {
    pub(crate) number: Id,
    pub(crate) name: String,
    pub(crate) flow: Flow,
    pub(crate) state: Vec<u8>,
    pub(crate) stream: TcpStream,
}

/// Leaves the state out: there may be keys in it.
impl std::fmt::Debug for Landed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Landed")
            .field("name", &self.name)
            .field("flow", &self.flow)
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

/// Connections on their way in: one stream of them.
pub(crate) struct Arrival {
    shared: Arc<Shared>,
    terms: Terms,
    machine: Target,
    decoder: Decoder,
    /// What the source is to hear, if it listens.
    writer: Option<Writer<Outbox>>,
    /// What is thrown away, if it does not.
    unheard: Outbox,
    /// Where the source is; in the same network, its sockets are in the way here.
    origin: Origin,
    /// The state of the connection that comes next, and whether it is critical.
    state: Option<(Id, Vec<u8>, bool)>,
    arriving: Vec<Arriving>,
    arriving_bytes: usize,
    waiting: HashMap<Id, Waiting>,
    waiting_bytes: usize,
    held_bytes: usize,
    /// How long the states are of connections that are ours.
    state_bytes: usize,
    /// Connections that the source has let go of, and that are not restored yet.
    committed: Vec<Id>,
    batches: HashMap<usize, Batch>,
    next_batch: usize,
    landed: VecDeque<Landed>,
    refusals: HashMap<Id, String>,
    /// Connections that could not be restored, and that the source does not take back.
    lost: HashSet<Id>,
    /// Connections that a source that hears nothing may yet let go of, and why they are refused.
    unheard_refusals: BTreeMap<Id, String>,
    /// Why nothing more is taken.
    stopped: Option<String>,
    /// Until when a batch waits for what is still to come.
    patience: Option<Instant>,
    /// Until when the source has to decide.
    decision: Option<Instant>,
    /// Until when it may read what we have said.
    reading: Option<Instant>,
    /// When it has said something last.
    heard: Instant,
    /// Until when it has to say something, since nobody serves what has landed while the stream goes on.
    silence: Option<Instant>,
    /// The source has only asked.
    was_trial: bool,
    /// How many connections would be taken of which it has only asked. They use up room for the rest of this stream.
    tried: usize,
    /// We have said END.
    has_said_all: bool,
    /// Bytes have come.
    has_begun: bool,
    /// Another stream has come before this one: nobody needs to send one more.
    is_behind: bool,
    /// The source has said END.
    is_complete: bool,
    error: Option<Error>,
    /// Declared after the sockets that it serves, so that it is dropped after them: delivery ends if none are left.
    delivery: Delivery,
}

impl Arrival {
    pub(crate) fn new(shared: Arc<Shared>, terms: Terms) -> Self {
        Self {
            shared,
            delivery: Delivery::new(terms.steered, terms.numbers),
            terms,
            machine: Target::new(),
            decoder: Decoder::new(),
            writer: None,
            unheard: Outbox::default(),
            origin: Origin::Unknown,
            state: None,
            arriving: Vec::new(),
            arriving_bytes: 0,
            waiting: HashMap::new(),
            waiting_bytes: 0,
            held_bytes: 0,
            state_bytes: 0,
            committed: Vec::new(),
            batches: HashMap::new(),
            next_batch: 0,
            landed: VecDeque::new(),
            refusals: HashMap::new(),
            lost: HashSet::new(),
            unheard_refusals: BTreeMap::new(),
            stopped: None,
            patience: None,
            decision: None,
            reading: None,
            heard: Instant::now(),
            silence: None,
            was_trial: false,
            tried: 0,
            has_said_all: false,
            has_begun: false,
            is_behind: false,
            is_complete: false,
            error: None,
        }
    }

    /// The same for what may come right behind another stream.
    pub(crate) fn behind_another(mut self) -> Self {
        self.is_behind = true;
        self
    }

    /// Whether the source of this stream reads no answers.
    pub(crate) fn is_one_way(&self) -> bool {
        self.has_begun && self.writer.is_none()
    }

    /// The next connection that lives.
    pub(crate) fn landed(&mut self) -> Option<Landed> {
        let landed = self.landed.pop_front()?;
        self.state_bytes -= landed.state.len();
        Some(landed)
    }

    /// How many more connections are taken behind this stream.
    pub(crate) fn room(&self) -> Option<usize> {
        self.terms.room.map(|room| room + self.tried)
    }

    /// The bytes that came after this stream; `None` if no more can come.
    ///
    /// # Errors
    /// The stream was broken.
    pub(crate) fn next_stream(&mut self, is_open: bool) -> Result<Option<Vec<u8>>> {
        match self.error.take() {
            Some(error) => Err(error),
            None if is_open && self.is_complete => Ok(Some(std::mem::take(&mut self.decoder).into_rest())),
            None => Ok(None),
        }
    }

    /// The recipient's answer. `None` without a recipient: then everything is taken.
    fn ask<T>(&self, question: impl FnOnce(&mut dyn Recipient) -> T) -> Option<T> {
        let recipient = self.terms.recipient.as_ref()?;
        Some(question(&mut *recipient.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    fn handle(&mut self, news: News) {
        if let Err(error) = self.machine.handle(news) {
            return self.give_up(Error::of(ErrorKind::Violation, "the source does not know its part", error));
        }
        self.perform_all();
    }

    fn perform_all(&mut self) {
        while let Some(deed) = self.machine.deed() {
            self.perform(deed);
        }
    }

    fn perform(&mut self, deed: Deed) {
        match deed {
            // Placed together with the rest of its batch.
            Deed::Place(_) => {}
            Deed::Ready(id) => {
                self.decision.get_or_insert_with(|| Instant::now() + self.shared.limits.decision);
                self.say(&Message::Ready { connection: id });
            }
            Deed::Refuse(id) => {
                let reason = self.refusals.remove(&id).or_else(|| self.stopped.clone()).unwrap_or_default();
                match (self.lost.contains(&id), self.is_heard()) {
                    (true, _) => self.shared.tell(Event::Lost { number: id, reason: &reason }),
                    (false, true) => self.shared.tell(Event::Refused { number: id, reason: &reason }),
                    (false, false) => drop(self.unheard_refusals.insert(id, reason.clone())),
                }
                self.say(&Message::Refused { connection: id, reason });
            }
            Deed::Forget(id) => {
                if let Some(Waiting { batch, place, held, .. }) = self.remove(id) {
                    // Closed before the lock ends: otherwise held packets would go into this socket, be acknowledged, and be lost.
                    drop(place);
                    self.delivery.doubt();
                    self.held_bytes -= bytes_of_packets(&held);
                    self.make_room();
                    self.decided(batch);
                }
            }
            Deed::Take(id) => match self.waiting.get(&id).map(|waiting| &waiting.place) {
                Some(Place::Restored(_)) => self.take(id),
                _ => self.committed.push(id),
            },
        }
    }

    /// Refuses a connection: no later word about it is obeyed.
    fn refuse(&mut self, id: Id, reason: impl std::fmt::Display) {
        self.refusals.insert(id, reason.to_string());
        self.handle(News::Bad(id));
    }

    fn remove(&mut self, id: Id) -> Option<Waiting> {
        let waiting = self.waiting.remove(&id)?;
        self.waiting_bytes -= waiting.bytes;
        Some(waiting)
    }

    /// Says something to the source. If the source no longer hears it, the rest of its stream tells what it has decided.
    fn say(&mut self, message: &Message) {
        if let Some(writer) = &mut self.writer {
            writer.send(message).expect("memory takes every byte");
        }
    }

    /// Whether the source may still hear what is said, and take back what is refused.
    fn is_heard(&mut self) -> bool {
        self.writer.as_mut().is_some_and(|writer| !writer.get_mut().is_cut())
    }

    /// The source hears nothing any more: its notes are told here.
    fn is_unheard(&mut self) {
        self.output().cut();
        for note in self.terms.notes.close() {
            if let Message::Note { text, .. } = note {
                self.shared.warn(text);
            }
        }
    }

    fn say_end(&mut self) {
        if let (Some(writer), false) = (&mut self.writer, self.has_said_all || self.terms.leaves_end) {
            let notes = self.terms.notes.close();
            notes.iter().for_each(|note| writer.send(note).expect("memory takes every byte"));
            writer.end().expect("memory takes every byte");
            self.has_said_all = true;
        }
    }

    /// Hands END over to the caller, who says it.
    pub(crate) fn last_words(&mut self) -> LastWords {
        LastWords { writer: self.writer.take(), notes: self.terms.notes.clone() }
    }

    /// The connection is ours from here on.
    fn take(&mut self, id: Id) {
        let Some(waiting) = self.remove(id) else { return };
        let Waiting { name, state, batch, place: Place::Restored(restored), flows, held, .. } = waiting
        else {
            return;
        };
        self.ask(|recipient| recipient.take(&name));
        self.say(&Message::Taken { connection: id });
        self.state_bytes += state.len();
        if let Some(batch) = self.batches.get_mut(&batch) {
            batch.taken.push(Taken { id, name, state, restored, flows, held });
        }
        self.handle(News::Taken(id, true));
        self.decided(batch);
    }

    /// The source has decided about one more of a batch.
    fn decided(&mut self, number: usize) {
        let Some(batch) = self.batches.get_mut(&number) else { return };
        batch.undecided -= 1;
        if batch.undecided == 0 {
            self.resume(number);
        }
    }

    fn resume(&mut self, number: usize) {
        let Some(Batch { lock, expected, silent, size, taken, .. }) = self.batches.remove(&number) else {
            return;
        };
        let arrived: Vec<Flow> = taken.iter().flat_map(|taken| &taken.flows).copied().collect();
        self.shared.settle(&expected, &arrived, &silent);
        let restored = taken.into_iter().map(|Taken { id, name, state, restored, held, .. }| {
            // The peer sends again what cannot be delivered.
            let _ = held.replay(&restored);
            self.held_bytes -= bytes_of_packets(&held);
            ((id, name, held.flow, state), restored)
        });
        let restored: Vec<_> = restored.collect();
        match restored.len() == size {
            true => drop(lock.release()),
            // Some did not come: packets held for those would draw resets.
            false => drop(lock),
        }
        let (landed, bytes, shared) = (&mut self.landed, &mut self.state_bytes, &self.shared);
        shared.kit.resume(restored, |(number, name, flow, state), outcome| match outcome {
            Ok(stream) => landed.push_back(Landed { number, name, flow, state, stream }),
            Err(error) => {
                *bytes -= state.len();
                shared.tell(Event::Lost { number, reason: &error.to_string() });
            }
        });
    }

    /// The source has said its last word. What it has not let go of is closed, silently.
    fn end(&mut self) {
        for Arriving { id, .. } in std::mem::take(&mut self.arriving) {
            self.placed(id, Err(self.stopped.clone().unwrap_or_else(|| "the source is gone".into())));
        }
        if self.machine.handle(News::End).is_ok() {
            self.perform_all();
        }
        self.raise();
        for number in self.batches.keys().copied().collect::<Vec<_>>() {
            self.resume(number);
        }
        for (number, reason) in std::mem::take(&mut self.unheard_refusals) {
            self.shared.tell(Event::Refused { number, reason: &reason });
        }
    }

    /// Everything has been said.
    fn complete(&mut self) {
        self.place();
        self.end();
        self.is_complete = true;
        self.say_end();
    }

    /// Whether the source owes something. Behind a stream that is complete, none has to follow.
    fn is_due(&self) -> bool {
        self.has_begun || !self.is_behind
    }

    /// How long the source may be silent, where nobody else limits that.
    fn silence(&self) -> Option<Duration> {
        // What came before this stream waits, too.
        let keeps_waiting = self.is_behind || self.terms.leaves_end && !self.landed.is_empty();
        if !keeps_waiting || self.is_over() {
            return None;
        }
        if !self.is_due() || self.machine.is_settled() {
            return Some(PARTING);
        }
        // A source that hears no answers may have let go already of what is to come. That is no reason to keep others waiting.
        let may_give_up = self.writer.is_some() || self.is_behind;
        (self.machine.waiting() == 0 && may_give_up).then_some(self.shared.limits.decision)
    }

    /// Nothing the source says counts any more. It may still hear that nothing more is taken.
    fn give_up(&mut self, error: Error) {
        if self.error.is_some() || self.is_complete {
            return;
        }
        self.stopped = Some(error.to_string());
        self.error = Some(error);
        if self.machine.handle(News::Late).is_ok() {
            self.perform_all();
        }
        self.end();
        self.say_end();
    }

    fn is_full(&self) -> bool {
        self.arriving.len() >= BATCH || self.arriving_bytes >= BATCH_BYTES
    }
}

fn bytes_of_packets(held: &Held) -> usize {
    held.packets.iter().map(|packet| packet.len() + PACKET).sum()
}

fn violation(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Violation, what)
}
