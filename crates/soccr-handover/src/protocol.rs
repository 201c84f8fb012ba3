//! Who has the connection when: the two ends of a hand-over as state machines without I/O.
//!
//! Events go in, actions come out. A machine knows connections by number only; sockets, locks, bytes and time are the driver's
//! affair. So the tests of this crate lead [`Source`] and [`Target`] through every order of messages, every cut and every kill.
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
//! - The target brings a connection to life only after its COMMIT, and the source reads TAKEN once that is done. Once the target has
//!   said REFUSED, it obeys no later word about that connection.
//! - The source puts a connection that has left back into its socket in three cases only: the target says REFUSED, the COMMIT
//!   cannot have been read, or the target is proven to have ended without any connection.
//! - In every other case (no answer in time, a channel cut between COMMIT and TAKEN) the source reports
//!   [`Unknown`](Fate::Unknown): the target has the connection, or nobody has.
//! - A source that is *killed* between detach and COMMIT takes the value with it: nobody is left to report that.

mod source;
mod target;

pub use source::{Action, Answer, Event, Fate, Source};
pub use target::{Deed, News, Target};

/// The number of a connection in a hand-over: from 1 on.
pub type Id = u32;

/// The other end said what it cannot say at that point: it breaks the protocol, or records were swapped on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation(pub(crate) &'static str);

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Violation {}
