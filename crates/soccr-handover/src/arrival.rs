//! The target at work: what the machine decides happens to sockets, locks and bytes here.
//!
//! What arrives without a pause is locked, restored and resumed together, as a batch. In the network of the source the old
//! socket is in the way until the COMMIT: there a connection is restored behind that.

mod engine;
mod place;

use std::collections::{HashMap, VecDeque};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use soccr::bulk::{self, Needs};
use soccr::lock::Held;
use soccr::{Connection, Lock, Restored};
use soccr_image::AddressMap;
use soccr_image::stream::{Decoder, Message, Writer};

use crate::drive::Outbox;
use crate::error::{Error, ErrorKind, Result};
use crate::listen::Terms;
use crate::mover::Shared;
use crate::protocol::{Deed, Id, News, Target};

/// The most connections of a batch, and the most bytes in their queues.
const BATCH: usize = 256;
const BATCH_BYTES: usize = 16 << 20;

/// The most bytes that wait for their COMMIT in memory: held packets, and connections whose old socket is in the way.
const MEMORY: usize = 512 << 20;

/// How long a batch waits for what is still announced. Each one takes about a millisecond by itself.
const PATIENCE: Duration = Duration::from_millis(2);

/// A connection that has been read.
#[derive(Debug)]
struct Arriving {
    id: Id,
    name: String,
    state: Vec<u8>,
    connection: Connection,
}

/// A connection that is silent until the source says COMMIT.
#[derive(Debug)]
struct Waiting {
    name: String,
    state: Vec<u8>,
    batch: usize,
    place: Place,
    held: Held,
    /// What it takes of [`MEMORY`].
    bytes: usize,
}

/// Where it waits.
#[derive(Debug)]
enum Place {
    /// In its new socket, complete.
    Restored(Restored),
    /// In memory, while the old socket is in this namespace.
    Behind(Box<Connection>),
}

/// A connection that is ours, and goes on with the rest of its batch.
#[derive(Debug)]
struct Taken {
    name: String,
    state: Vec<u8>,
    restored: Restored,
    held: Held,
}

/// Connections under one lock.
#[derive(Debug)]
struct Batch {
    lock: Lock,
    size: usize,
    /// How many the source has not decided about.
    undecided: usize,
    taken: Vec<Taken>,
}

/// A connection that has arrived and lives.
#[derive(Debug)]
pub(crate) struct Landed {
    pub(crate) name: String,
    pub(crate) state: Vec<u8>,
    pub(crate) stream: TcpStream,
}

/// Connections on their way in: one stream of them.
pub(crate) struct Arrival {
    shared: Arc<Shared>,
    terms: Terms,
    machine: Target,
    decoder: Decoder,
    /// Where the source listens.
    writer: Option<Writer<Outbox>>,
    /// Where it does not.
    unheard: Outbox,
    /// The source is in the same network: its sockets are in the way here.
    is_beside: bool,
    /// It is known to be in another one.
    is_apart: bool,
    /// The state of the connection that comes next.
    state: Option<(Id, Vec<u8>)>,
    arriving: Vec<Arriving>,
    arriving_bytes: usize,
    waiting: HashMap<Id, Waiting>,
    waiting_bytes: usize,
    /// Those that the source has let go of, and that are not restored yet.
    committed: Vec<Id>,
    batches: HashMap<usize, Batch>,
    next_batch: usize,
    landed: VecDeque<Landed>,
    refusals: HashMap<Id, String>,
    /// Until when a batch waits for what is still to come.
    patience: Option<Instant>,
    /// Until when the source has to decide.
    decision: Option<Instant>,
    /// Until when it may read what we have said.
    reading: Option<Instant>,
    /// We have said END.
    has_said_all: bool,
    /// Bytes have come.
    has_begun: bool,
    /// The source has said END.
    is_complete: bool,
    error: Option<Error>,
}

impl Arrival {
    pub(crate) fn new(shared: Arc<Shared>, terms: Terms) -> Self {
        Self {
            shared,
            terms,
            machine: Target::new(),
            decoder: Decoder::new(),
            writer: None,
            unheard: Outbox::default(),
            is_beside: false,
            is_apart: false,
            state: None,
            arriving: Vec::new(),
            arriving_bytes: 0,
            waiting: HashMap::new(),
            waiting_bytes: 0,
            committed: Vec::new(),
            batches: HashMap::new(),
            next_batch: 0,
            landed: VecDeque::new(),
            refusals: HashMap::new(),
            patience: None,
            decision: None,
            reading: None,
            has_said_all: false,
            has_begun: false,
            is_complete: false,
            error: None,
        }
    }

    /// The next connection that lives.
    pub(crate) fn landed(&mut self) -> Option<Landed> {
        self.landed.pop_front()
    }

    /// How many more connections are taken.
    pub(crate) fn room(&self) -> Option<usize> {
        self.terms.room
    }

    /// What has come behind this stream; `None` where nothing more can come.
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

    fn hear(&mut self, message: Message) {
        if let (Some((id, _)), false) = (&self.state, matches!(message, Message::Connection { .. })) {
            return self.give_up(violation(format!("the state of connection {id} is not before it")));
        }
        match message {
            Message::Begin { connections, answers, place, .. } => {
                let here = self.shared.place;
                self.is_beside = place.is_some() && place == here;
                self.is_apart = !self.is_beside && place.is_some() && here.is_some();
                let needs = Needs { connections: connections as usize, ..Needs::default() };
                if let Err(error) = needs.check() {
                    return self.give_up(error.into());
                }
                self.handle(News::Begin(connections));
                if answers {
                    // The first word says that everything is prepared.
                    self.writer = Some(Writer::new(Outbox::default()).expect("memory takes every byte"));
                }
            }
            Message::State { connection, bytes, .. } => self.state = Some((connection, bytes)),
            Message::Connection { id, name, mut connection } => {
                let state = match self.state.take() {
                    Some((of, _)) if of != id => {
                        return self.give_up(violation("a state is not before its connection"));
                    }
                    state => state.map(|(_, state)| state).unwrap_or_default(),
                };
                AddressMap::apply_to_connection(&self.terms.map, &mut connection);
                self.handle(News::Offer(id));
                // A number that was used before stands for that connection.
                if self.error.is_none() {
                    self.arriving_bytes += bytes_of(&connection) + state.len();
                    self.arriving.push(Arriving { id, name, state, connection });
                }
            }
            Message::Held { connection, packets } if self.machine.waits(connection) => {
                let bytes: usize = packets.iter().map(Vec::len).sum();
                let Some(waiting) = self.waiting.get_mut(&connection) else { return };
                if self.waiting_bytes + bytes > MEMORY {
                    // The peer sends them again.
                    return;
                }
                (self.waiting_bytes, waiting.bytes) = (self.waiting_bytes + bytes, waiting.bytes + bytes);
                waiting.held.packets.extend(packets);
            }
            Message::Held { .. } => {}
            Message::Commit { connection } => self.handle(News::Commit(connection)),
            Message::Abort { connection, .. } => self.handle(News::Abort(connection)),
            _ => self.give_up(violation("the source does not know its part")),
        }
    }

    fn handle(&mut self, news: News) {
        if let Err(error) = self.machine.handle(news) {
            return self.give_up(Error::of(ErrorKind::Violation, "the source does not know its part", error));
        }
        while let Some(deed) = self.machine.deed() {
            self.perform(deed);
        }
    }

    fn perform(&mut self, deed: Deed) {
        match deed {
            // With the others of its batch.
            Deed::Place(_) => {}
            Deed::Ready(id) => {
                self.decision.get_or_insert_with(|| Instant::now() + self.shared.limits.decision);
                self.say(&Message::Ready { connection: id });
            }
            Deed::Refuse(id) => {
                let reason = self.refusals.remove(&id).unwrap_or_else(|| "it did not come in time".into());
                self.say(&Message::Refused { connection: id, reason });
            }
            Deed::Forget(id) => {
                if let Some(waiting) = self.remove(id) {
                    self.make_room();
                    self.decided(waiting.batch);
                }
            }
            Deed::Take(id) => match self.waiting.get(&id).map(|waiting| &waiting.place) {
                Some(Place::Restored(_)) => self.take(id),
                _ => self.committed.push(id),
            },
        }
    }

    /// Nothing about this connection can be obeyed any more.
    fn refuse(&mut self, id: Id, reason: impl std::fmt::Display) {
        self.refusals.insert(id, reason.to_string());
        self.handle(News::Bad(id));
    }

    fn remove(&mut self, id: Id) -> Option<Waiting> {
        let waiting = self.waiting.remove(&id)?;
        self.waiting_bytes -= waiting.bytes;
        Some(waiting)
    }

    /// Where the source does not hear it, it has gone on without us: its end of the stream tells what it has decided.
    fn say(&mut self, message: &Message) {
        if let Some(writer) = &mut self.writer {
            writer.send(message).expect("memory takes every byte");
        }
    }

    fn say_end(&mut self) {
        if let (Some(writer), false) = (&mut self.writer, self.has_said_all) {
            writer.end().expect("memory takes every byte");
            self.has_said_all = true;
        }
    }

    /// It is ours.
    fn take(&mut self, id: Id) {
        let Some(waiting) = self.remove(id) else { return };
        let Waiting { name, state, batch, place: Place::Restored(restored), held, .. } = waiting else {
            return;
        };
        self.say(&Message::Taken { connection: id });
        if let Some(batch) = self.batches.get_mut(&batch) {
            batch.taken.push(Taken { name, state, restored, held });
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
        let Some(Batch { lock, size, taken, .. }) = self.batches.remove(&number) else { return };
        let restored = taken.into_iter().map(|Taken { name, state, restored, held }| {
            // What cannot be delivered the peer sends again.
            let _ = held.replay(&restored);
            ((name, state), restored)
        });
        let restored: Vec<_> = restored.collect();
        match restored.len() == size {
            true => drop(lock.release()),
            // What was held for the others would draw resets.
            false => drop(lock),
        }
        let (landed, shared) = (&mut self.landed, &self.shared);
        bulk::resume(restored, |(name, state), outcome| match outcome {
            Ok(stream) => landed.push_back(Landed { name, state, stream }),
            Err(error) => shared.warn(format_args!("{name}: it is lost: {error}")),
        });
    }

    /// The source has said its last word. What it has not let go of is closed, silently.
    fn end(&mut self) {
        for Arriving { id, .. } in std::mem::take(&mut self.arriving) {
            self.placed(id, Err("the source is gone".into()));
        }
        if self.machine.handle(News::End).is_ok() {
            while let Some(deed) = self.machine.deed() {
                self.perform(deed);
            }
        }
        self.raise();
        for number in self.batches.keys().copied().collect::<Vec<_>>() {
            self.resume(number);
        }
    }

    /// Nothing the source says counts any more.
    fn give_up(&mut self, error: Error) {
        if self.error.is_none() && !self.is_complete {
            self.error = Some(error);
            self.end();
        }
    }

    fn is_full(&self) -> bool {
        self.arriving.len() >= BATCH || self.arriving_bytes >= BATCH_BYTES
    }
}

fn bytes_of(connection: &Connection) -> usize {
    connection.receive_queue.len() + connection.send_queue.len()
}

fn violation(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Violation, what)
}
