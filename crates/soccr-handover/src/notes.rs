//! [`Notes`]: what a target has to tell people, by way of the source.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use soccr_image::stream::{Message, Writer};

use crate::drive::Outbox;

/// What a target has to tell people who may only see what the source tells, such as those at the other end of ssh(1): see
/// [`Terms::notes`](crate::Terms::notes). It is a handle: clones share everything.
#[derive(Clone, Debug, Default)]
pub struct Notes(Arc<Mutex<Pending>>);

#[derive(Debug, Default)]
struct Pending {
    is_open: bool,
    notes: Vec<Message>,
}

impl Notes {
    /// Has the source tell it. `false` where that does not: it has not said BEGIN, passes no notes on, or has been told the END.
    pub fn say(&self, text: impl Into<String>) -> bool {
        self.push(text.into(), false)
    }

    /// The same of a failure: what was to be done with the connections is not done with all of them. The source counts it as its own.
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

    /// It no longer does. What it has not been told.
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

/// What a target has still to say when the connections are where they are to be: its last notes, and END.
#[derive(Debug, Default)]
#[must_use = "the source waits for it"]
pub struct LastWords {
    /// `None` where the source does not listen.
    pub(crate) writer: Option<Writer<Outbox>>,
    pub(crate) notes: Notes,
}

impl LastWords {
    /// What is to be written into the channel, all of it. Nothing more can be said behind it.
    pub fn into_bytes(self) -> Vec<u8> {
        let notes = self.notes.close();
        let Some(mut writer) = self.writer else { return Vec::new() };
        notes.iter().for_each(|note| writer.send(note).expect("memory takes every byte"));
        writer.end().expect("memory takes every byte");
        writer.get_mut().bytes().to_vec()
    }
}
