//! soccr: a live TCP connection is a value.
#![allow(dead_code)]

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
mod restore;
mod save;
mod segment;
pub mod settings;
mod sys;

pub use connection::Connection;
pub use error::{Error, ErrorKind, Result};
pub use lock::Lock;
pub use pause::{Paused, pause};
pub use restore::{Restore, Restored};
pub use sys::tcp::Queue;
