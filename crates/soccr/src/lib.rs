//! soccr: a live TCP connection is a value.

mod bpf;
mod buffers;
mod congestion;
pub mod connection;
pub mod diag;
mod error;
mod fin;
pub mod lock;
mod pause;
mod queue;
mod report;
mod restore;
mod resume;
mod rtt;
mod save;
mod segment;
pub mod settings;
mod sys;

pub use connection::Connection;
pub use error::{Error, ErrorKind, Result};
pub use lock::Lock;
pub use pause::{Paused, pause};
pub use report::{Entry, Fidelity, Report};
pub use restore::Restore;
pub use resume::Restored;
pub use sys::tcp::Queue;
