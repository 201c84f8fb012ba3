//! How bytes and time drive the source.

use std::time::Instant;

use super::Departure;
use crate::drive::{Engine, Outbox};
use crate::error::{Error, ErrorKind};

impl Engine for Departure {
    fn advance(&mut self) {
        if self.is_one_way && self.output().bytes().is_empty() {
            self.assume();
        }
        while !self.writer.get_mut().is_long() {
            // What is decided is carried out before anything else is heard.
            if let Some(action) = self.machine.action() {
                self.perform(action);
            } else if !self.listen() {
                break;
            }
        }
    }

    fn output(&mut self) -> &mut Outbox {
        self.writer.get_mut()
    }

    fn feed(&mut self, bytes: &[u8]) {
        self.decoder.feed(bytes);
    }

    fn ended(&mut self, proven: bool) {
        self.mute(Error::new(ErrorKind::Gone, "the target is gone"));
        // What it has said before still counts.
        self.advance();
        self.give_up(Error::new(ErrorKind::Gone, "the target is gone"), proven);
    }

    fn wants_proof(&self) -> bool {
        let mut left = self.items.iter().zip(1..).filter(|(item, _)| item.seat.has_left());
        left.any(|(_, id)| self.machine.fate(id).is_none())
    }

    fn broken(&mut self, error: std::io::Error) {
        let error = Error::of(ErrorKind::Gone, "the target is gone", error);
        if self.is_one_way || self.broken.is_some() {
            return self.give_up(error, false);
        }
        // What it has said before still counts.
        self.mute(error);
    }

    fn has_said_all(&self) -> bool {
        self.finished.is_some()
    }

    fn stop(&mut self, reason: String) {
        self.begin_nothing(Error::new(ErrorKind::Stopped, reason));
    }

    fn deadline(&self) -> Option<Instant> {
        match self.finished {
            // The target may be passing them on.
            Some(at) if !self.wants_proof() => Some(at + self.shared.limits.end),
            _ => self.deadline,
        }
    }

    fn late(&mut self) {
        let late = Error::new(ErrorKind::Late, "the target answers too late");
        // Over, and still here: nobody takes what has been said.
        if self.is_one_way || self.finished.is_some() || self.broken.is_some() || self.machine.is_over() {
            return self.give_up(late, false);
        }
        self.begin_nothing(late);
    }

    fn is_over(&self) -> bool {
        self.machine.is_over()
    }
}
