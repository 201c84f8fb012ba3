//! One connection on its way out.

use std::os::fd::BorrowedFd;

use soccr::lock::Held;

use crate::error::{Error, ErrorKind};
use crate::seat::Seat;

/// A connection on its way.
pub(crate) struct Item {
    pub(crate) seat: Seat,
    pub(crate) name: String,
    pub(crate) unread: Vec<u8>,
    pub(crate) state: Option<Vec<u8>>,
    pub(crate) critical: bool,
    pub(crate) condition: Option<Condition>,
    /// What the lock has held for it.
    pub(super) held: Held,
    pub(super) error: Option<Error>,
    /// It could not be put back.
    pub(super) is_lost: bool,
    /// Its fate has been told.
    pub(super) is_told: bool,
}

impl Item {
    pub(crate) fn new(seat: Seat, name: String) -> Self {
        let held = Held { flow: seat.flow(), packets: Vec::new() };
        Self {
            seat,
            name,
            held,
            unread: Vec::new(),
            state: None,
            critical: false,
            condition: None,
            error: None,
            is_lost: false,
            is_told: false,
        }
    }

    /// Why the connection has come back: its own reason, or the one that holds for all.
    pub(super) fn why(&self, reason: &Option<(ErrorKind, String)>) -> String {
        match (&self.error, reason) {
            (Some(error), _) => error.to_string(),
            (None, Some((_, text))) => text.clone(),
            (None, None) => "it cannot be put back".into(),
        }
    }
}

/// Leaves out its bytes and its owner's: there may be keys among them.
impl std::fmt::Debug for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Item").field("name", &self.name).field("seat", &self.seat).finish_non_exhaustive()
    }
}

/// A check of its socket that a connection must pass to leave.
pub(crate) struct Condition(pub(crate) Box<Check>);

type Check = dyn Fn(BorrowedFd<'_>) -> std::result::Result<(), String> + Send + Sync;

impl std::fmt::Debug for Condition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Condition")
    }
}
