//! The source at work: it carries out what its machine decides, on sockets, locks and bytes.

mod engine;
mod item;
mod window;

use std::borrow::Cow;
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use soccr::Lock;
use soccr_image::stream::{Decoded, Decoder, Message, STATE_LIMIT, Writer};

use crate::drive::Outbox;
use crate::error::{Error, ErrorKind, Result};
use crate::guide::{Guide, Path};
use crate::mover::{Event as Told, Shared};
use crate::protocol::{Action, Answer, Event, Fate, Id, Source};
use crate::users::Users;

pub(crate) use item::{Condition, Item};

/// How many connections are silent at a time: as many as a target restores together. The processes that use their sockets stand
/// still meanwhile, some ten milliseconds.
const WINDOW: usize = 128;

/// The longest thing that a target says: a refusal with its reason.
const LONGEST_ANSWER: u32 = 4096;

/// The most notes of a target, besides three about each connection.
const NOTES: usize = 1000;

/// How connections leave.
#[derive(Default)]
pub(crate) struct Manner {
    /// Who else uses their sockets.
    pub(crate) users: Option<Box<dyn Users>>,
    /// Steers their packets after them, or else keeps this host silent about them.
    pub(crate) path: Path,
    /// The channel carries no answers.
    pub(crate) is_one_way: bool,
}

/// A connection that has come to rest.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) socket: TcpStream,
    pub(crate) fate: Fate,
    /// Why it has not moved.
    pub(crate) error: Error,
}

/// Connections on their way out.
pub(crate) struct Departure {
    shared: Arc<Shared>,
    machine: Source,
    items: Vec<Item>,
    /// The silent connections by index, and the locks that keep them silent.
    window: Range<usize>,
    locks: Vec<Lock>,
    /// The locks of earlier windows, where no answer says when their connections have arrived.
    kept: Vec<Lock>,
    guide: Guide,
    /// Some connections of the window may already be silenced or steered.
    is_diverted: bool,
    /// The first connection has left.
    has_begun: bool,
    is_one_way: bool,
    /// When END was written.
    finished: Option<Instant>,
    /// The target has said END.
    has_heard_all: bool,
    writer: Writer<Outbox>,
    /// Where in the stream each COMMIT ends.
    commits: Vec<(u64, Id)>,
    decoder: Decoder,
    /// How many notes have come.
    notes: usize,
    /// Nothing more is heard.
    is_deaf: bool,
    deadline: Option<Instant>,
    /// Why nothing more can be said.
    broken: Option<Error>,
    /// Why connections stay that have no reason of their own.
    reason: Option<(ErrorKind, String)>,
    /// Declared last, so that it is dropped last: the users go on when everything else is done.
    users: Option<Box<dyn Users>>,
}

impl Departure {
    pub(crate) fn new(shared: Arc<Shared>, manner: Manner, items: Vec<Item>) -> Self {
        let Manner { users, path, is_one_way } = manner;
        let mut writer = Writer::new(Outbox::default()).expect("memory takes every byte");
        let begin = Message::Begin {
            connections: items.len() as u32,
            answers: !is_one_way,
            notes: shared.is_heard(),
            place: shared.place,
            steered: path.told(),
        };
        writer.send(&begin).expect("memory takes every byte");
        let mut machine = Source::new(items.len(), WINDOW);
        if is_one_way {
            machine.handle(Event::Hello).expect("it is the first");
        }
        Self {
            machine,
            guide: Guide::new(path),
            deadline: Some(Instant::now() + shared.limits.start),
            shared,
            items,
            window: 0..0,
            locks: Vec::new(),
            kept: Vec::new(),
            is_diverted: false,
            has_begun: false,
            is_one_way,
            finished: None,
            has_heard_all: false,
            writer,
            commits: Vec::new(),
            decoder: Decoder::with_limit(LONGEST_ANSWER),
            notes: 0,
            is_deaf: false,
            broken: None,
            reason: None,
            users,
        }
    }

    /// How many connections there are.
    #[cfg(feature = "tokio")]
    pub(crate) fn count(&self) -> usize {
        self.items.len()
    }

    /// What has become of each connection, in their order.
    pub(crate) fn outcomes(mut self) -> Vec<Ended> {
        self.take_outcomes()
    }

    fn take_outcomes(&mut self) -> Vec<Ended> {
        let (kind, why) = self.reason.take().unwrap_or((ErrorKind::Gone, "it was not sent".into()));
        (1..=self.items.len() as Id).for_each(|id| self.tell(id));
        let has_moved = |id| self.machine.fate(id) == Some(Fate::Moved);
        if !self.is_one_way && !self.has_heard_all && (1..=self.items.len() as Id).any(has_moved) {
            self.shared.tell(Told::Unfinished(&why));
        }
        let items = std::mem::take(&mut self.items).into_iter().zip(1..);
        let ended = items.map(|(item, id)| Ended {
            fate: self.fate(id, &item).unwrap_or(Fate::Unknown),
            socket: item.seat.into_socket().into(),
            error: item.error.unwrap_or_else(|| Error::new(kind, why.clone())),
        });
        ended.collect()
    }

    /// What has become of a connection; `None` while that is open.
    fn fate(&self, id: Id, item: &Item) -> Option<Fate> {
        match self.machine.fate(id) {
            _ if item.is_lost => Some(Fate::Unknown),
            // What was written may not have been read.
            Some(Fate::Moved) if self.is_one_way && self.broken.is_some() => Some(Fate::Unknown),
            fate => fate,
        }
    }

    /// Tells what has become of a connection, once.
    fn tell(&mut self, id: Id) {
        let item = &self.items[id as usize - 1];
        if let (Some(fate), false) = (self.fate(id, item), item.is_told) {
            // Also where the listener panics.
            self.item(id).is_told = true;
            self.shared.tell(Told::Settled { name: &self.items[id as usize - 1].name, fate });
        }
    }

    fn item(&mut self, id: Id) -> &mut Item {
        &mut self.items[id as usize - 1]
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Lock(first, last) => {
                // For the window as a whole, writing included.
                self.extend_deadline();
                let stopped = self.lock(first, last);
                self.handle(Event::Locked);
                if let Err(error) = stopped {
                    self.begin_nothing(error);
                }
            }
            Action::Offer(id) => {
                let offered = self.offer(id);
                let is_assumed = self.is_one_way && offered.is_ok();
                self.answer(id, offered, Event::Offered);
                if is_assumed {
                    self.handle(Event::Heard(id, Answer::Ready));
                }
            }
            Action::Divert => {
                let diverted = self.divert();
                let is_done = diverted.is_ok();
                if let Err(error) = diverted {
                    self.reason.get_or_insert_with(|| (error.kind(), error.to_string()));
                }
                self.handle(Event::Diverted(is_done));
            }
            Action::Commit(id) => {
                let committed = self.commit(id);
                self.answer(id, committed, Event::Committed);
            }
            Action::Abort(id) => {
                let reason = match (&self.items[id as usize - 1].error, &self.reason) {
                    (Some(error), _) => error.to_string(),
                    (None, reason) => reason.as_ref().map(|(_, text)| text.clone()).unwrap_or_default(),
                };
                self.say(&Message::Abort { connection: id, reason });
            }
            Action::Return(id) => self.take_back(id),
            Action::Unlock(first, last) => self.unlock(first, last),
            Action::Finish => {
                self.writer.end().expect("memory takes every byte");
                self.finished = Some(Instant::now());
                self.extend_deadline();
            }
        }
    }

    /// Tells the machine how an action went, and keeps the reason.
    fn answer(&mut self, id: Id, outcome: Result<()>, event: fn(Id, bool) -> Event) {
        let is_done = outcome.is_ok();
        if let Err(error) = outcome {
            let item = self.item(id);
            item.is_lost |= error.kind() == ErrorKind::Lost;
            item.error.get_or_insert(error);
        }
        self.handle(event(id, is_done));
    }

    fn extend_deadline(&mut self) {
        self.deadline = Some(Instant::now() + self.shared.limits.answer);
    }

    /// Has every connection stay that has not left by now.
    fn begin_nothing(&mut self, error: Error) {
        self.reason.get_or_insert_with(|| (error.kind(), error.to_string()));
        self.handle(Event::Late);
    }

    fn offer(&mut self, id: Id) -> Result<()> {
        let Self { items, writer, broken, .. } = self;
        let item = &mut items[id as usize - 1];
        match (item.error.take(), broken) {
            (Some(not_locked), _) => return Err(not_locked),
            (None, Some(_)) => return Err(Error::new(ErrorKind::Gone, "the target is gone")),
            (None, None) => {}
        }
        if let Some(Condition(check)) = &item.condition {
            check(item.seat.as_fd()).map_err(|why| Error::new(ErrorKind::Changed, why))?;
        }
        let Item { seat, unread, .. } = item;
        let mut connection = Cow::Borrowed(seat.save()?);
        if !unread.is_empty() {
            let unread = connection.to_mut().unread(unread);
            unread.map_err(|error| Error::of(ErrorKind::TooMuch, "", error))?;
        }
        if let Some(state) = &item.state {
            if state.len() > STATE_LIMIT {
                return Err(Error::new(ErrorKind::TooMuch, "a state of over 16 MiB"));
            }
            writer.state(id, state, item.critical).map_err(invalid)?;
        }
        writer.connection(id, &item.name, &connection).map_err(invalid)
    }

    /// Takes the connection out of its socket, and writes its COMMIT: it is the target's.
    fn commit(&mut self, id: Id) -> Result<()> {
        if self.broken.is_some() {
            return Err(Error::new(ErrorKind::Gone, "the target is gone"));
        }
        let Self { items, writer, commits, .. } = self;
        let item = &mut items[id as usize - 1];
        writer.held(id, &item.held.packets).map_err(invalid)?;
        item.seat.let_go()?;
        item.held.packets.clear();
        writer.send(&Message::Commit { connection: id }).expect("memory takes every byte");
        commits.push((writer.get_mut().end(), id));
        Ok(())
    }

    fn take_back(&mut self, id: Id) {
        let number = id as usize - 1;
        let item = &mut self.items[number];
        // Behind END its users have gone on, and have seen an error.
        let mut have_run = self.finished.is_some();
        if let Some(users) = &mut self.users {
            // If they can no longer be stopped, the connection is put back all the same: it is in this memory alone.
            have_run |= users.stop().is_err();
            let _ = users.filling(number);
        }
        match item.seat.come_back() {
            Ok(()) => {
                let users = self.users.as_mut().filter(|_| have_run);
                let is_kept = users.is_none_or(|users| users.have(number).unwrap_or(false));
                if item.seat.is_adrift() || !is_kept {
                    let why = item.why(&self.reason);
                    item.error =
                        Some(Error::new(ErrorKind::Adrift, format!("its process has lost it: {why}")));
                }
                if let Some(users) = &mut self.users {
                    let _ = users.filled(number);
                }
            }
            Err(error) => self.lose(number, error),
        }
    }

    /// It could not be put back.
    fn lose(&mut self, number: usize, error: Error) {
        let item = &mut self.items[number];
        item.is_lost = true;
        item.error = Some(Error::of(ErrorKind::Lost, item.why(&self.reason), error));
    }

    /// Without answers, what has been written counts as taken.
    fn assume(&mut self) {
        for (_, id) in std::mem::take(&mut self.commits) {
            self.handle(Event::Heard(id, Answer::Taken));
        }
        if self.finished.is_some() {
            self.handle(Event::End);
        }
    }

    fn say(&mut self, message: &Message) {
        if self.broken.is_none() {
            self.writer.send(message).expect("memory takes every byte");
        }
    }

    fn handle(&mut self, event: Event) {
        if let Err(violation) = self.machine.handle(event) {
            self.give_up(Error::of(ErrorKind::Violation, "", violation), false);
        }
    }

    /// Takes in the next word of the target, where it has come.
    fn listen(&mut self) -> bool {
        if self.is_deaf {
            return false;
        }
        match self.decoder.decode() {
            Ok(Decoded::Begin) => self.handle(Event::Hello),
            Ok(Decoded::Message(message)) => self.hear(message),
            Ok(Decoded::Incomplete) => return false,
            Ok(_) => {
                (self.is_deaf, self.has_heard_all) = (true, true);
                self.handle(Event::End);
            }
            Err(error) => self.give_up(Error::of(ErrorKind::Violation, "the target", error), false),
        }
        true
    }

    fn hear(&mut self, message: Message) {
        let (id, answer) = match message {
            Message::Ready { connection } => (connection, Answer::Ready),
            Message::Taken { connection } => (connection, Answer::Taken),
            Message::Refused { connection, reason } => {
                if let Some(item) = (connection as usize).checked_sub(1).and_then(|at| self.items.get_mut(at))
                {
                    let verb = if item.seat.has_left() { "cannot restore" } else { "refuses" };
                    let what = format!("the target {verb} it: {reason}");
                    item.error.get_or_insert(Error::new(ErrorKind::Refused, what));
                }
                (connection, Answer::Refused)
            }
            Message::Note { text, failed } if self.notes < NOTES + 3 * self.items.len() => {
                self.notes += 1;
                return self.shared.tell(Told::Note { text: &text, failed });
            }
            Message::Here { place } => return self.guide.target_is_at(place, &self.shared),
            _ => {
                return self
                    .give_up(Error::new(ErrorKind::Violation, "the target does not know its part"), false);
            }
        };
        self.handle(Event::Heard(id, answer));
    }

    /// Nothing more is said or heard: connections whose COMMIT the target cannot have read come back.
    fn give_up(&mut self, error: Error, proven: bool) {
        self.is_deaf = true;
        self.mute(error);
        for (end, id) in std::mem::take(&mut self.commits) {
            if end > self.writer.get_mut().passed_on() {
                self.machine.handle(Event::Unread(id)).expect("it is known");
            }
        }
        self.machine.handle(Event::Cut { proven }).expect("it ends everything");
    }

    /// Nothing more can be said.
    fn mute(&mut self, error: Error) {
        self.reason.get_or_insert_with(|| (error.kind(), error.to_string()));
        self.broken.get_or_insert(error);
        self.writer.get_mut().cut();
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        if self.items.is_empty() {
            return;
        }
        // The caller no longer waits for the outcome.
        if !self.machine.is_over() {
            self.give_up(
                Error::new(ErrorKind::Gone, "nobody has waited for the end of the hand-over"),
                false,
            );
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

/// A connection that cannot be written.
fn invalid(error: soccr_image::Error) -> Error {
    Error::of(ErrorKind::Connection, "", error)
}
