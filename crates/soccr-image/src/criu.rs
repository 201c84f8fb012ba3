//! The images of [CRIU](https://criu.org): list their connections, extract one, rewrite addresses.
//!
//! A dump is a directory of files. Three of them concern TCP:
//!
//! ```text
//!  inventory.img            what was dumped, and that this is a dump
//!  files.img                every open file; the sockets among them have addresses, state, options
//!  tcp-stream-INODE.img     sequence numbers, windows and queues of one connection, found by the socket's inode (hex)
//!
//!  0        4        8        12           12 + length
//!  ├────────┼────────┼────────┼────────────┼──────────────┤ …
//!  │ common │ magic  │ length │ message    │ queue bytes  │   numbers: little-endian u32
//!  └────────┴────────┴────────┴────────────┴──────────────┘   (inventory.img has no common magic,
//!                    └ once per entry ─────┘                   only tcp-stream has queue bytes)
//! ```
//!
//! The messages are protocol buffers. They are read field by field and changed in place: fields unknown here, their order and the
//! encoding of everything not rewritten stay as they are, byte for byte.
//!
//! Rewriting covers every Internet socket of `files.img`: connections, listeners, UDP. It does not cover what a dump of a *whole
//! network namespace* holds as well (`netdev`, `ifaddr`, `route`, `rule`, firewall and conntrack images: those addresses come with
//! the namespace), packets queued in UDP sockets, nor what the program keeps in its memory. Images of big-endian machines
//! are refused.
//!
//! ```
//! # let directory = tempfile::tempdir().unwrap();
//! # for file in ["inventory.img", "files.img", "tcp-stream-a919e.img"] {
//! #     std::fs::copy(format!("tests/criu/images/{file}"), directory.path().join(file)).unwrap();
//! # }
//! use soccr_image::criu::Directory;
//!
//! let mut images = Directory::open(directory.path())?;
//! for socket in images.sockets() {
//!     println!("{} {} {} {}", socket.id, socket.state, socket.local, socket.remote);
//! }
//! assert_eq!(images.extract(images.socket(13)?)?.receive_queue.len(), 5000);
//!
//! let rewritten = images.rewrite(&["127.0.0.1=192.0.2.7".parse()?])?;
//! assert_eq!(rewritten.sockets, 6);
//! # Ok::<(), soccr_image::Error>(())
//! ```

mod container;
mod directory;
mod network;
mod protobuf;
mod rewrite;
mod socket;
mod stream;

pub use directory::{Directory, Rewritten};
pub use rewrite::rewrite;
pub use socket::{Protocol, Socket, sockets};
pub use stream::Stream;
