//! The source of a hand-over: connections on their way out of a process.
//!
//! The words and their order are those of [`soccr_image::stream`]. Nothing is stopped or locked before the target has said hello:
//! that is its preamble. Then windows of connections move one after the other, and the processes are stopped only while one is on its
//! way. Until its COMMIT a connection lives on in its process, kept silent by the lock alone; see [`captive`](crate::captive). With
//! its COMMIT it leaves. Where the COMMIT could not be written, or the target is known to have ended without a TAKEN, or cannot
//! restore it, the process gets it back in the same socket: it is stopped until that is known, or the time limit is over.

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use soccr::Connection;
use soccr::Lock;
use soccr::connection::{ControlBlock, Flow};
use soccr::lock::{Held, Locker, Mode};
use soccr_image::stream::{Message, Writer};

use crate::captive::Captive;
use crate::guide::Guide;
use crate::keeper::Keeper;
use crate::progress::Progress;
use crate::signals::Deaf;
use crate::via::{Answer, Deadline, Output, Via};
use crate::{exit, network};

/// How many connections are on their way at a time: a batch of the target. They are silent together, and their queues are
/// in memory.
pub(crate) const WINDOW: usize = 256;

/// The most that a target has to say about a connection: READY, TAKEN, and a word that comes too late.
const WORDS: usize = 3;

/// What is said of a target that needs longer than it may.
const TOO_LATE: &str = "the target answers too late";

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// For the target to start, and then for each window to move.
    pub(crate) answer: Duration,
}

/// How many connections ended up where.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    /// At the target.
    pub(crate) gone: usize,
    /// Still in their processes.
    pub(crate) failed: usize,
    /// Nobody knows, or nowhere.
    pub(crate) lost: usize,
}

/// A connection and how far it has got.
#[derive(Debug)]
struct Item {
    id: u32,
    captive: Captive,
    /// What the lock has held for it.
    held: Held,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// In its process, not sent yet.
    Here,
    /// Sent, and in its process as well.
    Sent(ControlBlock),
    /// The target has it in place, or can have it.
    Ready(ControlBlock),
    /// COMMIT is said: only this value is left here.
    Left(Box<Connection>),
    Gone,
    /// It stays in its process, and that has been reported.
    Stays,
    Lost,
}

/// Connections of processes that are stopped.
#[derive(Debug)]
pub(crate) struct Source {
    items: Vec<Item>,
    locker: Locker,
    /// Those that are on their way.
    window: Range<usize>,
    /// On them, in their order.
    locks: Vec<Lock>,
    limits: Limits,
    deadline: Deadline,
    /// How many answers have come.
    heard: usize,
    guide: Guide,
    /// Since the first connection has left.
    deaf: Option<Deaf>,
    /// Continues the processes when everything else is done.
    keeper: Keeper,
}

impl Source {
    /// To be called in the network namespace of the connections. Whatever is written to the target has this `deadline`.
    pub(crate) fn new(
        captives: Vec<Captive>,
        keeper: Keeper,
        limits: Limits,
        deadline: Deadline,
        guide: Guide,
    ) -> Result<Self> {
        let locker = Locker::new(Mode::HOLD)?;
        let mut items = Vec::with_capacity(captives.len());
        for (captive, id) in captives.into_iter().zip(1..) {
            let held = Held { flow: captive.flow()?, packets: Vec::new() };
            items.push(Item { id, captive, held, stage: Stage::Here });
        }
        let (window, locks, heard, deaf) = (0..0, Vec::new(), 0, None);
        Ok(Self { items, locker, window, locks, limits, deadline, heard, guide, deaf, keeper })
    }

    /// Moves the connections to a target that answers.
    pub(crate) fn hand_over(mut self, mut via: Via, output: Output) -> Result<Outcome> {
        let broken = self.talk(&mut via, output).err();
        if broken.is_some() && self.has_left() {
            // What it said before it broke still counts.
            let _ = self.listen(&via, |item| matches!(item.stage, Stage::Left(_)));
        }
        let certain = broken.is_some() && self.has_left() && via.target_has_ended(&self.deadline);
        let reason = broken.unwrap_or_else(|| anyhow!(TOO_LATE));
        let outcome = self.settle(&exit::line(&reason), certain);
        via.part();
        Ok(outcome)
    }

    fn talk(&mut self, via: &mut Via, output: Output) -> Result<()> {
        let mut writer = Writer::new(output)?;
        writer.send(&self.begin(true))?;
        match via.answer(&self.deadline) {
            Answer::Hello => {}
            Answer::Gone(reason) => return Err(anyhow!("the target is gone: {reason}")),
            _ => return Err(anyhow!(TOO_LATE)),
        }
        let mut progress = Progress::new("handed over", self.items.len());
        let mut scratch = Connection::empty();
        for window in self.windows() {
            self.lock(window.clone())?;
            for item in &mut self.items[window.clone()] {
                item.send(&mut writer, &mut scratch)?;
            }
            self.listen(via, |item| matches!(item.stage, Stage::Sent(_)))?;
            let mut late = false;
            for item in &mut self.items[window.clone()] {
                if let Stage::Sent(_) = item.stage {
                    late = true;
                    item.stays(TOO_LATE);
                    writer.send(&Message::Abort { connection: item.id, reason: TOO_LATE.into() })?;
                }
            }
            self.commit(window.clone(), &mut writer)?;
            self.listen(via, |item| matches!(item.stage, Stage::Left(_)))?;
            self.unlock();
            self.keeper.go_on()?;
            if late || self.has_left() {
                break;
            }
            window.for_each(|_| progress.step());
        }
        self.deadline.set(self.limits.answer);
        writer.finish()?;
        while let Answer::Message(message) = via.answer(&self.deadline) {
            self.hear(message)?;
        }
        Ok(())
    }

    fn begin(&self, answers: bool) -> Message {
        let steered = matches!(self.guide, Guide::Steering { .. });
        Message::Begin { connections: self.items.len() as u32, answers, place: network::place(), steered }
    }

    fn windows(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let end = self.items.len();
        (0..end).step_by(WINDOW).map(move |start| start..end.min(start + WINDOW))
    }

    /// Begins the time for which the processes do not run, and the peers of these connections hear nothing.
    fn lock(&mut self, window: Range<usize>) -> Result<()> {
        let flows: Vec<Flow> = self.items[window.clone()].iter().map(|item| item.held.flow).collect();
        self.deadline.set(self.limits.answer);
        self.window.end = window.end;
        self.locks.push(self.locker.lock(&flows)?);
        self.keeper.stop()
    }

    /// Takes in answers while there is a connection that waits for one.
    fn listen(&mut self, via: &Via, waits: impl Fn(&Item) -> bool) -> Result<()> {
        while self.items[self.window.clone()].iter().any(&waits) {
            match via.answer(&self.deadline) {
                Answer::Hello => {}
                Answer::Message(message) => self.hear(message)?,
                Answer::Gone(reason) => return Err(anyhow!("the target is gone: {reason}")),
                Answer::End => return Err(anyhow!("the target has ended the hand-over")),
                Answer::Late => return Ok(()),
            }
        }
        Ok(())
    }

    fn hear(&mut self, message: Message) -> Result<()> {
        self.heard += 1;
        if self.heard > WORDS * self.items.len() {
            return Err(anyhow!("the target says more than there is to say"));
        }
        let (id, answered) = answered(message)?;
        let item = (id as usize).checked_sub(1).and_then(|index| self.items.get_mut(index));
        let item = item.context("the target speaks of a connection that was not sent")?;
        item.hear(answered, &mut self.keeper)
    }

    /// Lets the connections go that the target has ready.
    fn commit(&mut self, window: Range<usize>, writer: &mut Writer<Output>) -> Result<()> {
        // What has left lives in this process until the target has it.
        self.deaf.get_or_insert_with(Deaf::begin);
        let ready = self.items[window.clone()].iter().filter(|item| matches!(item.stage, Stage::Ready(_)));
        self.guide.extend(ready.map(|item| item.held.flow).collect())?;
        // From here on nothing arrives that is steered.
        self.collect(window.clone())?;
        for item in &mut self.items[window] {
            if let Stage::Ready(control) = &item.stage {
                let control = control.clone();
                item.leave(&control, writer, &mut self.keeper)?;
            }
        }
        Ok(())
    }

    /// Writes the connections to a target that cannot answer.
    pub(crate) fn push(mut self, output: Output) -> Result<Outcome> {
        let broken = self.push_all(output).err();
        if broken.is_some() {
            // What has been written may not have been read.
            self.items.iter_mut().for_each(Item::doubt);
        }
        let reason = broken.unwrap_or_else(|| anyhow!("it was not sent"));
        Ok(self.settle(&exit::line(&reason), false))
    }

    fn push_all(&mut self, output: Output) -> Result<()> {
        let mut writer = Writer::new(output)?;
        writer.send(&self.begin(false))?;
        let mut progress = Progress::new("sent", self.items.len());
        let mut scratch = Connection::empty();
        for window in self.windows() {
            // Nobody says when they have arrived: it stays to the end.
            self.lock(window.clone())?;
            for item in &mut self.items[window.clone()] {
                item.send(&mut writer, &mut scratch)?;
                item.assume(Answered::Ready);
                progress.step();
            }
            self.commit(window.clone(), &mut writer)?;
            self.items[window].iter_mut().for_each(|item| item.assume(Answered::Taken));
            self.keeper.go_on()?;
        }
        writer.finish()?;
        Ok(())
    }

    /// Takes over what the last lock has held so far.
    fn collect(&mut self, window: Range<usize>) -> Result<()> {
        let Some(lock) = self.locks.last() else { return Ok(()) };
        for (item, held) in self.items[window].iter_mut().zip(lock.take()?) {
            item.held.packets.extend(held.packets);
        }
        Ok(())
    }

    /// Ends the time of silence: every connection on the way has arrived, or stays, or the target has had its time.
    fn unlock(&mut self) {
        let window = self.items[self.window.clone()].iter();
        let staying: Vec<_> = window.filter(|item| matches!(item.stage, Stage::Stays)).collect();
        let flows: Vec<Flow> = staying.iter().map(|item| item.held.flow).collect();
        if let Err(error) = self.guide.end_about(&flows) {
            exit::complain(&exit::line(&error));
        }
        let replay = || staying.iter().for_each(|item| drop(item.held.replay(item.captive.socket())));
        replay();
        // What has been held since: for those that have a socket in this network, here or at the target. The rest is thrown
        // away: it would draw a reset.
        self.locks.clear();
        // Before, the answers were dropped. Twice does no harm.
        replay();
        if !self.has_left() {
            self.window.start = self.window.end;
        }
    }

    fn has_left(&self) -> bool {
        self.items[self.window.clone()].iter().any(|item| matches!(item.stage, Stage::Left(_)))
    }

    /// Brings every connection to rest: what has not left stays, and goes on where it was. What has left without an answer
    /// comes back where it is `certain` that nobody has it.
    fn settle(mut self, reason: &str, certain: bool) -> Outcome {
        for item in &mut self.items {
            item.settle(reason, certain, &mut self.keeper);
        }
        self.unlock();
        self.guide.stay();
        let mut outcome = Outcome::default();
        for item in &self.items {
            match item.stage {
                Stage::Gone => outcome.gone += 1,
                Stage::Lost => outcome.lost += 1,
                _ => outcome.failed += 1,
            }
        }
        outcome
    }
}

/// What a target says about a connection.
#[derive(Debug)]
enum Answered {
    Ready,
    Taken,
    Refused(String),
}

fn answered(message: Message) -> Result<(u32, Answered)> {
    match message {
        Message::Ready { connection } => Ok((connection, Answered::Ready)),
        Message::Taken { connection } => Ok((connection, Answered::Taken)),
        Message::Refused { connection, reason } => Ok((connection, Answered::Refused(reason))),
        _ => Err(anyhow!("the target does not know its part")),
    }
}

impl Item {
    /// Sends the connection. It stays in its process for the time being.
    fn send(&mut self, writer: &mut Writer<Output>, scratch: &mut Connection) -> Result<()> {
        match self.captive.save_into(scratch) {
            Ok(()) => {
                writer.connection(self.id, &self.captive.name, scratch)?;
                self.stage = Stage::Sent(scratch.control.clone());
            }
            Err(error) => self.stays(&exit::line(&error)),
        }
        Ok(())
    }

    /// Takes in an answer.
    fn hear(&mut self, answered: Answered, keeper: &mut Keeper) -> Result<()> {
        match (&self.stage, answered) {
            (Stage::Sent(_) | Stage::Ready(_), Answered::Refused(reason)) => {
                self.stays(&format!("the target refuses it: {reason}"))
            }
            // Only behind the COMMIT it could try.
            (Stage::Left(_), Answered::Refused(reason)) => {
                if let Stage::Left(connection) = std::mem::replace(&mut self.stage, Stage::Stays) {
                    let reason = format!("the target cannot restore it: {reason}");
                    self.come_back(&connection, &reason, keeper);
                }
            }
            (Stage::Sent(_), answered @ Answered::Ready) | (Stage::Left(_), answered @ Answered::Taken) => {
                self.assume(answered);
            }
            // Late words about what is settled already.
            (Stage::Stays, Answered::Ready | Answered::Refused(_)) => {}
            _ => return Err(anyhow!("the target does not know its part")),
        }
        Ok(())
    }

    /// Goes on as after an answer, where the stage is one that waits for it.
    fn assume(&mut self, answered: Answered) {
        self.stage = match (std::mem::replace(&mut self.stage, Stage::Stays), answered) {
            (Stage::Sent(control), Answered::Ready) => Stage::Ready(control),
            (Stage::Left(_), Answered::Taken) => Stage::Gone,
            (stage, _) => stage,
        };
    }

    /// Takes the connection from its process, and says that it is the target's.
    fn leave(
        &mut self,
        control: &ControlBlock,
        writer: &mut Writer<Output>,
        keeper: &mut Keeper,
    ) -> Result<()> {
        writer.held(self.id, &self.held.packets)?;
        let connection = match self.captive.let_go(control) {
            Ok(connection) => connection,
            Err(error) => {
                let reason = exit::line(&error);
                self.stays(&reason);
                return Ok(writer.send(&Message::Abort { connection: self.id, reason })?);
            }
        };
        self.held.packets.clear();
        if let Err(error) = writer.send(&Message::Commit { connection: self.id }) {
            // The target cannot have read all of it.
            self.come_back(&connection, &error.to_string(), keeper);
            return Err(error.into());
        }
        self.stage = Stage::Left(Box::new(connection));
        Ok(())
    }

    /// Nobody can tell any longer that it has arrived.
    fn doubt(&mut self) {
        if let Stage::Gone = self.stage {
            exit::complain(&format!("{}: the target has it, or it is lost", self.captive.name));
            self.stage = Stage::Lost;
        }
    }

    fn settle(&mut self, reason: &str, certain: bool, keeper: &mut Keeper) {
        match std::mem::replace(&mut self.stage, Stage::Stays) {
            Stage::Here | Stage::Sent(_) | Stage::Ready(_) => self.stays(reason),
            Stage::Left(connection) if certain => self.come_back(&connection, reason, keeper),
            Stage::Left(_) => {
                let name = &self.captive.name;
                exit::complain(&format!("{name}: the target has it, or it is lost: {reason}"));
                self.stage = Stage::Lost;
            }
            settled @ (Stage::Gone | Stage::Stays | Stage::Lost) => self.stage = settled,
        }
    }

    fn come_back(&mut self, connection: &Connection, reason: &str, keeper: &mut Keeper) {
        let number = self.id as usize - 1;
        // A keeper that has been killed must not cost the connection: it lives in this process alone.
        let _ = keeper.stop().and_then(|()| keeper.filling(number));
        match self.captive.take_back(connection) {
            Ok(()) => {
                let _ = keeper.filled(number);
                self.stays(reason);
            }
            Err(error) => {
                exit::complain(&format!("{}: lost: {reason}; {}", self.captive.name, exit::line(&error)));
                self.stage = Stage::Lost;
            }
        }
    }

    fn stays(&mut self, reason: &str) {
        let name = &self.captive.name;
        // Reasons of its own begin with the name already.
        let reason = reason.strip_prefix(&format!("{name}: ")).unwrap_or(reason);
        exit::complain(&format!("{name}: stays: {reason}"));
        self.stage = Stage::Stays;
    }
}
