//! [`Notes`]: what a target has to tell people, by way of the source.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use soccr_image::stream::{Message, Writer};

use crate::drive::Outbox;

/// What a target has to tell people. Over ssh(1) they see only what the source prints, so it goes there: see
/// [`Terms::notes`](crate::Terms::notes). It is a handle: clones share everything.
#[derive(Clone, Debug, Default)]
pub struct Notes(Arc<Mutex<Pending>>);

#[derive(Debug, Default)]
struct Pending {
    is_open: bool,
    notes: Vec<Message>,
}

impl Notes {
    /// Has the source tell it. Returns `false` if that will not: it has not said BEGIN, passes no notes on, or has been told END.
    pub fn say(&self, text: impl Into<String>) -> bool {
        self.push(text.into(), false)
    }

    /// The same for a failure: not all connections could be dealt with as intended. The source counts the failure as its own.
    pub fn fail(&self, text: impl Into<String>) -> bool {
        self.push(text.into(), true)
    }

    fn push(&self, text: String, failed: bool) -> bool {
        let mut pending = self.pending();
        if pending.is_open {
            pending.notes.push(Message::Note { text, failed });
        }
        pending.is_open
    }

    /// The source passes notes on.
    pub(crate) fn open(&self) {
        self.pending().is_open = true;
    }

    /// From here on it no longer does. Returns what it has not been told.
    pub(crate) fn close(&self) -> Vec<Message> {
        let mut pending = self.pending();
        pending.is_open = false;
        std::mem::take(&mut pending.notes)
    }

    /// What has been said since the last time.
    pub(crate) fn take(&self) -> Vec<Message> {
        std::mem::take(&mut self.pending().notes)
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a target says once the connections have been passed on: its last notes, and END.
#[derive(Debug, Default)]
#[must_use = "the source waits for it"]
pub struct LastWords {
    /// `None` where the source does not listen.
    pub(crate) writer: Option<Writer<Outbox>>,
    pub(crate) notes: Notes,
}

impl LastWords {
    /// What people are told with it, as far as it has been said by now.
    pub fn notes(&self) -> Vec<String> {
        let text = |note: &Message| match note {
            Message::Note { text, .. } => Some(text.clone()),
            _ => None,
        };
        self.notes.pending().notes.iter().filter_map(text).collect()
    }

    /// The bytes to be written into the channel, all of them. Nothing can be said after that.
    pub fn into_bytes(self) -> Vec<u8> {
        let notes = self.notes.close();
        self.writer.map(|writer| last_words(writer, &notes)).unwrap_or_default()
    }

    /// The same, for somebody else to write it where nothing more is said: notes are still taken.
    pub fn so_far(&self) -> Vec<u8> {
        let writer = self.writer.clone();
        writer.map(|writer| last_words(writer, &self.notes.pending().notes)).unwrap_or_default()
    }
}

fn last_words(mut writer: Writer<Outbox>, notes: &[Message]) -> Vec<u8> {
    notes.iter().for_each(|note| writer.send(note).expect("memory takes every byte"));
    writer.end().expect("memory takes every byte");
    writer.get_mut().bytes().to_vec()
}
