//! How bytes and time drive the target.

use std::time::Instant;

use soccr_image::stream::{Decoded, Message};

use super::{Arrival, BATCH, PATIENCE};
use crate::drive::{Engine, Outbox};
use crate::error::{Error, ErrorKind};

impl Engine for Arrival {
    fn advance(&mut self) {
        while self.error.is_none() && !self.is_complete {
            match self.decoder.decode() {
                Ok(Decoded::Message(message)) => {
                    if !matches!(message, Message::Connection { .. } | Message::State { .. }) {
                        self.place();
                    }
                    self.hear(message);
                }
                Ok(Decoded::Incomplete) => break,
                Ok(Decoded::End) => self.complete(),
                Ok(_) => {}
                Err(error) => match error.connection() {
                    // Nobody would take the connection back; the peer sends the held packets again.
                    Some(id) if !self.is_heard() && self.machine.waits(id) => self.shared.warn(error),
                    Some(id) => {
                        self.state = None;
                        self.refuse(id, error);
                    }
                    None => self.give_up(Error::of(ErrorKind::Violation, "the source", error)),
                },
            }
            if self.is_full() {
                self.place();
            }
            if self.committed.len() >= BATCH {
                self.raise();
            }
        }
        let more_arrive = !self.arriving.is_empty() && self.machine.announced() > 0;
        let more_leave = !self.committed.is_empty() && self.machine.waiting() > 0;
        if more_arrive || more_leave {
            self.patience.get_or_insert_with(|| Instant::now() + PATIENCE);
        } else {
            self.place();
            self.raise();
        }
        if self.machine.waiting() == 0 {
            self.decision = None;
        }
        if self.machine.is_settled() {
            // The source need not wait for us to hear that it has nothing more to say.
            self.say_end();
        }
        if !self.has_said_all {
            self.terms.notes.take().iter().for_each(|note| self.say(note));
        }
        self.silence = self.silence().map(|limit| self.heard + limit);
        match self.output().bytes().is_empty() {
            true => self.reading = None,
            false => drop(self.reading.get_or_insert_with(|| Instant::now() + self.shared.limits.answer)),
        }
    }

    fn output(&mut self) -> &mut Outbox {
        match &mut self.writer {
            Some(writer) => writer.get_mut(),
            None => &mut self.unheard,
        }
    }

    fn feed(&mut self, bytes: &[u8]) {
        self.has_begun |= !bytes.is_empty();
        self.heard = Instant::now();
        self.decoder.feed(bytes);
    }

    fn ended(&mut self, _: bool) {
        if self.is_complete {
            // It has said its last word, and still hears ours.
            return;
        }
        self.is_unheard();
        match self.has_begun {
            true => self.give_up(Error::new(ErrorKind::Gone, "the source is gone")),
            // Between two streams.
            false => self.is_complete = true,
        }
    }

    fn stop(&mut self, reason: String) {
        match self.is_due() {
            true => self.give_up(Error::new(ErrorKind::Stopped, reason)),
            false => self.is_complete = true,
        }
    }

    fn broken(&mut self, error: std::io::Error) {
        self.is_unheard();
        match self.is_due() {
            true => self.give_up(Error::of(ErrorKind::Gone, "the source is gone", error)),
            false => self.is_complete = true,
        }
    }

    fn deadline(&self) -> Option<Instant> {
        [self.patience, self.decision, self.reading, self.silence].into_iter().flatten().min()
    }

    fn late(&mut self) {
        let now = Instant::now();
        if self.patience.is_some_and(|until| until <= now) {
            self.place();
            self.raise();
        }
        if self.decision.is_some_and(|until| until <= now) {
            let what = "the source does not say COMMIT in time";
            self.give_up(Error::new(ErrorKind::Late, what));
        }
        if self.reading.is_some_and(|until| until <= now) {
            self.is_unheard();
        }
        if self.silence.is_some_and(|until| until <= now) {
            match self.machine.is_settled() || !self.has_begun {
                true => self.complete(),
                false => self.give_up(Error::new(ErrorKind::Late, "the source says nothing more")),
            }
        }
    }

    fn is_over(&self) -> bool {
        self.is_complete || self.error.is_some()
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        // The connections that arrived are ours, and nobody asks for them any more: they end as any dropped stream does.
        if !self.is_complete && self.error.is_none() {
            self.end();
        }
    }
}
