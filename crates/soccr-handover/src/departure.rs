//! The source at work: what the machine decides happens to sockets, locks and bytes here.

use std::collections::HashMap;
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use soccr::connection::ControlBlock;
use soccr::lock::Held;
use soccr::{Connection, Flow, Lock};
use soccr_image::stream::{Decoded, Decoder, Message, STATE_LIMIT, Writer};

use crate::departing::{Departing, Stream};
use crate::drive::{Engine, Outbox};
use crate::error::{Error, ErrorKind, Result};
use crate::mover::{Event as Told, Shared};
use crate::protocol::{Action, Answer, Event, Fate, Id, Source};
use crate::seat::Seat;
use crate::silence;

/// How many connections are silent at a time: as many as a target restores together.
const WINDOW: usize = 256;

/// The longest thing that a target says: a refusal with its reason.
const LONGEST_ANSWER: u32 = 4096;

/// A connection on its way.
#[derive(Debug)]
pub(crate) struct Item<F> {
    pub(crate) seat: Seat<F>,
    pub(crate) name: String,
    pub(crate) unread: Vec<u8>,
    pub(crate) state: Option<Vec<u8>>,
    pub(crate) critical: bool,
    /// What the lock has held for it.
    held: Held,
    /// What was sent, but for the bytes.
    saved: Option<ControlBlock>,
    /// All that is left of it here, since it was detached.
    value: Option<Box<Connection>>,
    error: Option<Error>,
    /// It could not be put back.
    is_lost: bool,
    /// What has become of it has been told.
    is_told: bool,
}

impl<F> Item<F> {
    pub(crate) fn new(seat: Seat<F>, name: String) -> Self {
        let held = Held { flow: seat.flow, packets: Vec::new() };
        Self {
            seat,
            name,
            held,
            unread: Vec::new(),
            state: None,
            critical: false,
            saved: None,
            value: None,
            error: None,
            is_lost: false,
            is_told: false,
        }
    }
}

/// A connection that has come to rest.
#[derive(Debug)]
pub(crate) struct Ended<F> {
    pub(crate) socket: F,
    pub(crate) fate: Fate,
    /// Why it has not moved.
    pub(crate) error: Error,
}

/// Connections on their way out.
pub(crate) struct Departure {
    shared: Arc<Shared>,
    machine: Source,
    items: Vec<Item<TcpStream>>,
    /// The silent connections by index, and the locks that keep them silent.
    window: Range<usize>,
    locks: Vec<Lock>,
    /// What the locks have held by now is in the items.
    collected: bool,
    /// The memory of the last connection that was saved.
    scratch: Connection,
    writer: Writer<Outbox>,
    /// Where in the stream each COMMIT ends.
    commits: Vec<(u64, Id)>,
    decoder: Decoder,
    deadline: Option<Instant>,
    /// Why nothing more can be said.
    broken: Option<Error>,
    /// Why whatever has no reason of its own stays.
    reason: Option<(ErrorKind, String)>,
}

impl Departure {
    pub(crate) fn new<S: Stream>(
        shared: Arc<Shared>,
        departing: impl IntoIterator<Item = Departing<S>>,
    ) -> Self {
        let items: Vec<_> = departing.into_iter().map(|departing| *departing.item).collect();
        let mut writer = Writer::new(Outbox::default()).expect("memory takes every byte");
        let begin = Message::Begin {
            connections: items.len() as u32,
            answers: true,
            place: shared.place,
            steered: false,
        };
        writer.send(&begin).expect("memory takes every byte");
        Self {
            machine: Source::new(items.len(), WINDOW),
            deadline: Some(Instant::now() + shared.limits.start),
            shared,
            items,
            window: 0..0,
            locks: Vec::new(),
            collected: false,
            scratch: Connection::empty(),
            writer,
            commits: Vec::new(),
            decoder: Decoder::with_limit(LONGEST_ANSWER),
            broken: None,
            reason: None,
        }
    }

    /// How many connections there are.
    #[cfg(feature = "tokio")]
    pub(crate) fn count(&self) -> usize {
        self.items.len()
    }

    /// What has become of each connection, in their order.
    pub(crate) fn outcomes(mut self) -> Vec<Ended<TcpStream>> {
        self.take_outcomes()
    }

    fn take_outcomes(&mut self) -> Vec<Ended<TcpStream>> {
        let (kind, why) = self.reason.take().unwrap_or((ErrorKind::Gone, "it was not sent".into()));
        (1..=self.items.len() as Id).for_each(|id| self.tell(id));
        let items = std::mem::take(&mut self.items).into_iter().zip(1..);
        let ended = items.map(|(item, id)| Ended {
            fate: fate(&self.machine, id, &item).unwrap_or(Fate::Unknown),
            socket: item.seat.socket,
            error: item.error.unwrap_or_else(|| Error::new(kind, why.clone())),
        });
        ended.collect()
    }

    /// Tells what has become of a connection, once.
    fn tell(&mut self, id: Id) {
        let item = &mut self.items[id as usize - 1];
        if let (Some(fate), false) = (fate(&self.machine, id, item), item.is_told) {
            item.is_told = true;
            self.shared.tell(Told::Settled { name: &item.name, fate });
        }
    }

    fn item(&mut self, id: Id) -> &mut Item<TcpStream> {
        &mut self.items[id as usize - 1]
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Lock(first, last) => {
                // For the window as a whole, writing included.
                self.extend_deadline();
                self.lock(first, last);
                self.handle(Event::Locked);
            }
            Action::Offer(id) => {
                let offered = self.offer(id);
                self.answer(id, offered, Event::Offered);
            }
            Action::Commit(id) => {
                let committed = self.commit(id);
                self.answer(id, committed, Event::Committed);
            }
            Action::Abort(id) => {
                let reason = self.item(id).error.as_ref().map(ToString::to_string).unwrap_or_default();
                self.say(&Message::Abort { connection: id, reason });
            }
            Action::Return(id) => {
                let item = self.item(id);
                let value = item.value.take().expect("what has left is here as a value");
                if let Err(error) = item.seat.take_back(&value) {
                    item.is_lost = true;
                    item.error = Some(Error::of(ErrorKind::Connection, "it is lost", error));
                }
            }
            Action::Unlock(first, last) => self.unlock(first, last),
            Action::Finish => {
                self.writer.end().expect("memory takes every byte");
                self.extend_deadline();
            }
        }
    }

    /// Tells the machine how an action went, and keeps the reason.
    fn answer(&mut self, id: Id, outcome: Result<()>, event: fn(Id, bool) -> Event) {
        let is_done = outcome.is_ok();
        if let Err(error) = outcome {
            self.item(id).error.get_or_insert(error);
        }
        self.handle(event(id, is_done));
    }

    fn extend_deadline(&mut self) {
        self.deadline = Some(Instant::now() + self.shared.limits.answer);
    }

    /// Keeps the connections of a window silent: all in one transaction, or, where one of them is in the way of the others, each
    /// by itself.
    fn lock(&mut self, first: Id, last: Id) {
        (self.collected, self.window) = (false, first as usize - 1..last as usize);
        let items = &mut self.items[self.window.clone()];
        let flows: Vec<Flow> = items.iter().map(|item| item.seat.flow).collect();
        if let Ok(lock) = self.shared.locker.lock(&flows) {
            self.locks.push(lock);
            return;
        }
        for item in items {
            match self.shared.locker.lock(&[item.seat.flow]) {
                Ok(lock) => self.locks.push(lock),
                Err(error) => item.error = Some(error.into()),
            }
        }
    }

    fn offer(&mut self, id: Id) -> Result<()> {
        let Self { items, scratch, writer, broken, .. } = self;
        let item = &mut items[id as usize - 1];
        match (item.error.take(), broken) {
            (Some(not_locked), _) => return Err(not_locked),
            (None, Some(_)) => return Err(Error::new(ErrorKind::Gone, "the target is gone")),
            (None, None) => item.seat.save_into(scratch)?,
        }
        item.saved = Some(scratch.control.clone());
        scratch.unread(&item.unread).map_err(|error| Error::of(ErrorKind::TooMuch, "", error))?;
        if let Some(state) = &item.state {
            if state.len() > STATE_LIMIT {
                return Err(Error::new(ErrorKind::TooMuch, "a state of over 16 MiB"));
            }
            writer.state(id, state, item.critical).map_err(invalid)?;
        }
        writer.connection(id, &item.name, scratch).map_err(invalid)
    }

    /// Takes the connection out of its socket, and says that it is the target's.
    fn commit(&mut self, id: Id) -> Result<()> {
        if self.broken.is_some() {
            return Err(Error::new(ErrorKind::Gone, "the target is gone"));
        }
        self.collect()?;
        let Self { items, writer, commits, .. } = self;
        let item = &mut items[id as usize - 1];
        writer.held(id, &item.held.packets).map_err(invalid)?;
        let saved = item.saved.as_ref().expect("what leaves has been saved");
        item.value = Some(Box::new(item.seat.let_go(saved)?));
        item.held.packets.clear();
        writer.send(&Message::Commit { connection: id }).expect("memory takes every byte");
        commits.push((writer.get_mut().end(), id));
        Ok(())
    }

    /// Before the first connection of a window leaves: takes over what has been held, and stays silent about all that leave.
    fn collect(&mut self) -> Result<()> {
        if self.collected {
            return Ok(());
        }
        let leaving = self.machine.leaving().map(|id| self.items[id as usize - 1].seat.flow);
        silence::begin(&leaving.collect::<Vec<_>>(), self.shared.limits.silence)?;
        self.collected = true;
        let mut taken = HashMap::new();
        for lock in &self.locks {
            match lock.take() {
                Ok(held) => taken.extend(held.into_iter().map(|held| (held.flow, held.packets))),
                // The peers send it again.
                Err(error) => self.shared.warn(error),
            }
        }
        for item in &mut self.items[self.window.clone()] {
            item.held.packets.extend(taken.remove(&item.seat.flow).unwrap_or_default());
        }
        Ok(())
    }

    /// Ends the time of silence: every connection of the window has arrived, or stays.
    fn unlock(&mut self, first: Id, last: Id) {
        let window = first as usize - 1..last as usize;
        let staying: Vec<&Item<_>> = (first..=last)
            .zip(&self.items[window])
            .filter(|(id, item)| self.machine.fate(*id) == Some(Fate::Stays) && !item.is_lost)
            .map(|(_, item)| item)
            .collect();
        let flows: Vec<Flow> = staying.iter().map(|item| item.seat.flow).collect();
        if self.collected {
            self.shared.end_silence(&flows);
        }
        let replay = || staying.iter().for_each(|item| drop(item.held.replay(&item.seat.socket)));
        replay();
        // What has been held since is delivered to those that have a socket here, or at the target in this network. The rest is
        // thrown away: it would draw a reset.
        self.locks.clear();
        // Before, the answers were dropped. Twice does no harm.
        replay();
        for id in first..=last {
            if self.machine.fate(id).is_some() {
                let item = self.item(id);
                (item.value, item.held.packets) = (None, Vec::new());
                self.tell(id);
            }
        }
    }

    fn say(&mut self, message: &Message) {
        if self.broken.is_none() {
            self.writer.send(message).expect("memory takes every byte");
        }
    }

    fn handle(&mut self, event: Event) {
        if let Err(violation) = self.machine.handle(event) {
            self.give_up(Error::of(ErrorKind::Violation, "the target does not know its part", violation));
        }
    }

    fn hear(&mut self, message: Message) {
        let (id, answer) = match message {
            Message::Ready { connection } => (connection, Answer::Ready),
            Message::Taken { connection } => (connection, Answer::Taken),
            Message::Refused { connection, reason } => {
                if let Some(item) = (connection as usize).checked_sub(1).and_then(|at| self.items.get_mut(at))
                {
                    let what = format!("the target refuses it: {reason}");
                    item.error.get_or_insert(Error::new(ErrorKind::Refused, what));
                }
                (connection, Answer::Refused)
            }
            _ => return self.give_up(Error::new(ErrorKind::Violation, "the target does not know its part")),
        };
        self.handle(Event::Heard(id, answer));
    }

    /// Nothing more is said or heard: what the target cannot have read comes back.
    fn give_up(&mut self, error: Error) {
        self.mute(error);
        for (end, id) in std::mem::take(&mut self.commits) {
            if end > self.writer.get_mut().passed_on() {
                self.machine.handle(Event::Unread(id)).expect("it is known");
            }
        }
        self.machine.handle(Event::Cut { proven: false }).expect("it ends everything");
    }

    /// Nothing more can be said.
    fn mute(&mut self, error: Error) {
        self.reason.get_or_insert_with(|| (error.kind(), error.to_string()));
        self.broken.get_or_insert(error);
        self.writer.get_mut().cut();
    }
}

impl Engine for Departure {
    fn advance(&mut self) {
        while !self.writer.get_mut().is_long() {
            let Some(action) = self.machine.action() else { break };
            self.perform(action);
        }
    }

    fn output(&mut self) -> &mut Outbox {
        self.writer.get_mut()
    }

    fn feed(&mut self, bytes: &[u8]) {
        self.decoder.feed(bytes);
        loop {
            match self.decoder.decode() {
                Ok(Decoded::Begin) => self.handle(Event::Hello),
                Ok(Decoded::Message(message)) => self.hear(message),
                Ok(Decoded::Incomplete) => return,
                Ok(_) => return self.handle(Event::End),
                Err(error) => return self.give_up(Error::of(ErrorKind::Violation, "the target", error)),
            }
        }
    }

    fn ended(&mut self) {
        self.give_up(Error::new(ErrorKind::Gone, "the target is gone"));
    }

    fn broken(&mut self, error: std::io::Error) {
        if self.broken.is_some() {
            return self.ended();
        }
        // What it has said before still counts.
        self.mute(Error::of(ErrorKind::Gone, "the target is gone", error));
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn late(&mut self) {
        let what = "the target answers too late";
        if self.broken.is_some() || self.machine.is_over() {
            return self.give_up(Error::new(ErrorKind::Late, what));
        }
        self.reason.get_or_insert((ErrorKind::Late, what.into()));
        self.handle(Event::Late);
    }

    fn is_over(&self) -> bool {
        self.machine.is_over()
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        if self.items.is_empty() {
            return;
        }
        // Nobody waits for the outcome any more.
        if !self.machine.is_over() {
            self.give_up(Error::new(ErrorKind::Gone, "nobody has waited for the end of the hand-over"));
            while let Some(action) = self.machine.action() {
                self.perform(action);
            }
        }
        for Ended { socket, fate, error } in self.take_outcomes() {
            match fate {
                Fate::Moved => {}
                Fate::Stays => self.shared.leave_behind(socket, error),
                Fate::Unknown => self.shared.warn(error),
            }
        }
    }
}

/// What has become of a connection; `None` while that is open.
fn fate<F>(machine: &Source, id: Id, item: &Item<F>) -> Option<Fate> {
    if item.is_lost { Some(Fate::Unknown) } else { machine.fate(id) }
}

/// A connection that cannot be written.
fn invalid(error: soccr_image::Error) -> Error {
    Error::of(ErrorKind::Connection, "", error)
}
