//! Connections as bytes: pure, no sockets.
//!
//! | | |
//! |---|---|
//! | [`write()`], [`read()`] | one connection, to and from anything |
//! | [`save_file`], [`load_file`] | one connection in a file: private, atomic |
//! | [`stream`] | many connections and the words of a hand-over, through a pipe |
//! | [`criu`] | the images of CRIU: list, extract, rewrite addresses |
//! | [`AddressMap`] | `OLD=NEW`: where a connection comes back under another address |
//! | [`draw()`] | the sequence spaces of a connection, for people |
//!
//! Bytes that come in are not trusted: every length is checked before memory is taken, no input panics, and what
//! is read is [validated](soccr::Connection::validate) before it is given to the caller.
//!
//! ```
//! # use soccr::connection::{Connection, ControlBlock, Options, State};
//! let connection = Connection {
//!     local: "192.0.2.1:4000".parse()?,
//!     remote: "192.0.2.2:5000".parse()?,
//!     control: ControlBlock {
//!         state: State::Established,
//!         rcv_nxt: 1000,
//!         inq_len: 5,
//!         write_seq: 2000,
//!         outq_len: 0,
//!         unsq_len: 0,
//!         fin_unsent: false,
//!         reset: false,
//!         options: Options { mss_clamp: 1460, ..Options::default() },
//!         window: None,
//!     },
//!     receive_queue: b"hello".to_vec(),
//!     ..Connection::empty()
//! };
//! let mut bytes = Vec::new();
//! soccr_image::write(&mut bytes, &connection)?;
//! assert_eq!(soccr_image::read(&bytes[..])?, connection);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

pub mod criu;
mod draw;
mod error;
mod file;
mod map;
pub mod stream;

pub use draw::{draw, draw_svg};
pub use error::{Error, ErrorKind, Result};
pub use file::{AtomicFile, load_file, save_file, sync_name};
pub use map::AddressMap;
pub use stream::{read, write};
