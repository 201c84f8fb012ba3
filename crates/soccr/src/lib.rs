//! soccr: a live TCP connection is a value.

pub mod connection;
mod error;
mod segment;
pub mod settings;
mod sys;

pub use connection::Connection;
pub use error::{Error, ErrorKind, Result};
