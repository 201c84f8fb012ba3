//! Who has the connection when: the two ends of a hand-over as state machines without I/O.
//!
//! Events go in, actions come out. A machine knows connections by number only; what an action means for sockets, locks and
//! bytes is the driver's affair, and so is the time. [`Source`] and [`Target`] can thus be led through every order of messages,
//! every cut and every kill, which the tests of this crate do.
//!
//! # Who has it
//!
//! ```text
//!                 source                                             target
//!   Here      its socket, untouched                            │
//!   Offered   its socket, kept silent by a lock                │  a silent socket, or a value in memory
//!   Ready     the same; the target can have it                 │  the same
//!   ── detach, COMMIT ──────────────────────────────────────────────────────────────────────────────
//!   Left      a value in memory                                │  it is the target's, as soon as it has read COMMIT
//!   Moved     nothing                                          │  TAKEN is said: its socket comes to life
//! ```
//!
//! - The target brings a connection to life only behind its COMMIT, and says TAKEN before that. Once it has said REFUSED, no
//!   later word about that connection is obeyed.
//! - The source puts a connection that has left back into its socket in three cases only: the target says REFUSED, the COMMIT
//!   cannot have been read, or the target is proven to have ended without any connection.
//! - In every other case (no answer in time, a channel cut between COMMIT and TAKEN) the source reports
//!   [`Unknown`](Fate::Unknown): the target has the connection, or nobody.
//! - A source that is *killed* between detach and COMMIT takes the value with it: nobody is left to report that.

mod source;
mod target;

pub use source::{Action, Answer, Event, Fate, Source};
pub use target::{Deed, News, Target};

/// The number of a connection in a hand-over: from 1 on.
pub type Id = u32;

/// An end said what it cannot say at that point: it does not know its part, or records were exchanged on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation(pub(crate) &'static str);

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Violation {}
