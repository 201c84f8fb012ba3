//! soccr: a live TCP connection is a value.

pub mod connection;
mod error;
pub mod settings;

pub use connection::Connection;
pub use error::{Error, ErrorKind, Result};
