//! Asks a target what it would say to connections, and does nothing else.

use std::io;
use std::time::{Duration, Instant};

use soccr::Flow;
use soccr_image::stream::{Decoded, Decoder, Message, Writer};

use crate::channel::Channel;
use crate::drive::{self, Engine, Outbox};
use crate::error::{Error, ErrorKind, Result};
use crate::mover::place;

/// The longest thing that a target says.
const LONGEST_ANSWER: u32 = 4096;

/// Asks the [listener](crate::Mover::listen) at the other end of a channel whether it would take these connections, which are in the
/// network namespace of the calling thread: whether it has their addresses, a route, room and the rights, and whether its application
/// accepts such addresses. Nothing is locked, read or stopped.
///
/// Returns for each connection, in their order, why it would be refused. `note` gets what the target has to tell people. `limit` is
/// the time for each answer.
///
/// # Errors
/// The target is not there, refuses all of them, or does not know the question.
pub fn try_out(
    connections: impl IntoIterator<Item = (String, Flow)>,
    channel: &mut impl Channel,
    limit: Duration,
    note: impl FnMut(&str),
) -> Result<Vec<std::result::Result<(), String>>> {
    let connections: Vec<_> = connections.into_iter().collect();
    let mut writer = Writer::new(Outbox::default()).expect("memory takes every byte");
    let begin = Message::Begin {
        connections: connections.len() as u32,
        answers: true,
        notes: true,
        place: place(),
        steered: None,
    };
    writer.send(&begin).expect("memory takes every byte");
    let mut trial = Trial {
        answers: vec![None; connections.len()],
        connections,
        writer,
        decoder: Decoder::with_limit(LONGEST_ANSWER),
        limit,
        deadline: Instant::now() + limit,
        note,
        outcome: None,
        has_said_all: false,
    };
    drive::run(&mut trial, channel);
    trial.outcome.unwrap_or(Ok(()))?;
    let unknown = || Error::new(ErrorKind::Violation, "the target does not know the question: it is older");
    trial.answers.into_iter().map(|answer| answer.ok_or_else(unknown)).collect()
}

struct Trial<F> {
    connections: Vec<(String, Flow)>,
    answers: Vec<Option<std::result::Result<(), String>>>,
    writer: Writer<Outbox>,
    decoder: Decoder,
    limit: Duration,
    deadline: Instant,
    note: F,
    /// The trial is over.
    outcome: Option<Result<()>>,
    has_said_all: bool,
}

impl<F: FnMut(&str)> Trial<F> {
    fn end(&mut self, outcome: Result<()>) {
        self.outcome.get_or_insert(outcome);
        self.writer.get_mut().cut();
    }

    fn fail(&mut self, kind: ErrorKind, what: impl Into<std::borrow::Cow<'static, str>>) {
        self.end(Err(Error::new(kind, what)));
    }

    /// The target is there.
    fn ask(&mut self) {
        for ((name, flow), connection) in std::mem::take(&mut self.connections).into_iter().zip(1..) {
            let question = Message::Trial { connection, name, flow };
            self.writer.send(&question).expect("memory takes every byte");
        }
        self.writer.end().expect("memory takes every byte");
        self.has_said_all = true;
    }

    fn hear(&mut self, message: Message) {
        let (id, answer) = match message {
            Message::Ready { connection } => (connection, Ok(())),
            Message::Refused { connection, reason } => (connection, Err(reason)),
            Message::Note { text, .. } => return (self.note)(&text),
            Message::Here { .. } => return,
            _ => return self.fail(ErrorKind::Violation, "the target does not know its part"),
        };
        match (id as usize).checked_sub(1).and_then(|at| self.answers.get_mut(at)) {
            Some(open @ None) => *open = Some(answer),
            _ => self.fail(ErrorKind::Violation, "the target answers what was not asked"),
        }
    }
}

impl<F: FnMut(&str)> Engine for Trial<F> {
    fn advance(&mut self) {
        while self.outcome.is_none() {
            match self.decoder.decode() {
                Ok(Decoded::Begin) => self.ask(),
                Ok(Decoded::Message(message)) => self.hear(message),
                Ok(Decoded::Incomplete) => return,
                Ok(_) => self.end(Ok(())),
                Err(error) => self.end(Err(Error::of(ErrorKind::Violation, "the target", error))),
            }
        }
    }

    fn output(&mut self) -> &mut Outbox {
        self.writer.get_mut()
    }

    fn feed(&mut self, bytes: &[u8]) {
        self.decoder.feed(bytes);
        self.deadline = Instant::now() + self.limit;
    }

    fn ended(&mut self, _: bool) {
        self.advance();
        self.fail(ErrorKind::Gone, "the target is gone");
    }

    fn broken(&mut self, error: io::Error) {
        self.end(Err(Error::of(ErrorKind::Gone, "the target is gone", error)));
    }

    fn stop(&mut self, reason: String) {
        self.fail(ErrorKind::Stopped, reason);
    }

    fn deadline(&self) -> Option<Instant> {
        Some(self.deadline)
    }

    fn late(&mut self) {
        self.fail(ErrorKind::Late, "the target answers too late");
    }

    fn has_said_all(&self) -> bool {
        self.has_said_all
    }

    fn is_over(&self) -> bool {
        self.outcome.is_some()
    }
}
