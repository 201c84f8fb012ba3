//! Checkpoint and restore live TCP connections: **a connection is a value**.
//!
//! [`pause`] a socket, [`save`](Paused::save) its connection into a [`Connection`], plain data that can be sent anywhere,
//! [`restore`](Connection::restore) it there, [`resume`](Restored::resume). The peer notices nothing: sequence numbers,
//! windows, options and every byte in both queues are as they were. A [`Lock`] keeps the network quiet meanwhile, and
//! delivers afterwards what has arrived.
//!
//! ```text
//!  here                                                          there
//!  lock ── pause ── save ── detach          Connection           restore ── unlock ── resume
//!                     └──────────────── any bytes, any time ────────┘
//! ```
//!
//! It rests on `TCP_REPAIR` (Linux 4.12; 5.14 for buffers that stay tuned), and needs `CAP_NET_ADMIN` in the
//! user namespace that owns the network namespace, and `CAP_NET_RAW` there to hold packets and for half-closed connections: root, or
//! anybody under `unshare -Urn`.
//!
//! # Example
//! A connection leaves its socket and continues in another one:
//!
//! ```standalone_crate
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # if let Err(reason) = soccr_lab::enter() { eprintln!("skipped: {reason}"); return Ok(()); }
//! use std::io::{Read, Write};
//! use std::net::{TcpListener, TcpStream};
//!
//! let listener = TcpListener::bind("127.0.0.1:0")?;
//! let mut peer = TcpStream::connect(listener.local_addr()?)?;
//! let (stream, _) = listener.accept()?;
//! peer.write_all(b"unread ")?;
//!
//! let lock = soccr::Lock::hold(&[soccr::Flow::of(&stream)?])?; // from here on packets wait
//! let paused = soccr::pause(&stream)?;
//! let connection = paused.save()?;
//! paused.detach()?; // this socket forgets the connection; nothing reaches the wire
//!
//! let restored = connection.restore()?; // HERE: in this process or another one
//! lock.release()?; // what the peer sent meanwhile arrives now
//! let mut stream: TcpStream = restored.resume()?;
//!
//! peer.write_all(b"and new")?;
//! let mut read = [0; 14];
//! stream.read_exact(&mut read)?;
//! assert_eq!(&read, b"unread and new");
//! # Ok(()) }
//! ```
//!
//! THERE, on another host, what was held travels behind the connection, and the old host stays silent: a late packet to it
//! would draw a reset. See [`lock`].
//!
//! ```no_run
//! # fn example(connection: soccr::Connection, mut lock: soccr::Lock) -> soccr::Result<()> {
//! let held = lock.take()?; // HERE, behind the detach
//! lock.persist("moved", Some(soccr::lock::SILENCE))?; // once it lives THERE
//!
//! let restored = connection.restore()?; // THERE
//! held[0].replay(&restored)?;
//! let stream = restored.resume()?;
//! # Ok(()) }
//! ```
//!
//! # What can go wrong
//! Guards undo on drop: an early `?` leaves no socket frozen, no lock behind, and never resets the peer. Every [`Error`] names
//! the step, the option, the errno and what to do. What cannot be carried, such as a listener or MPTCP, is refused with the reason.
//!
//! If the socket belongs to another process (`pidfd_getfd(2)`), stop that process between `pause` and `detach`.

#[cfg(not(target_os = "linux"))]
compile_error!("soccr rests on TCP_REPAIR, which only Linux has");

pub mod adopt;
mod bpf;
mod buffers;
pub mod bulk;
mod congestion;
pub mod connection;
pub mod conntrack;
pub mod diag;
mod error;
mod fidelity;
mod fin;
pub mod firewall;
mod flow;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzz;
pub mod lock;
mod nftables;
mod pause;
mod queue;
mod report;
mod restore;
mod resume;
mod rtt;
mod save;
mod segment;
pub mod settings;
mod state;
pub mod steer;
mod sys;
pub mod tls;
mod window;

pub use congestion::{close_prepared, prepare};
pub use connection::{Connection, Flow};
pub use error::{Error, ErrorKind, Result};
pub use fidelity::Fidelity;
pub use lock::Lock;
pub use pause::{Paused, pause};
pub use report::{Entry, Report};
pub use restore::Restore;
pub use resume::Restored;
pub use save::Position;
/// For the threads of `soccr-handover`.
#[doc(hidden)]
pub use sys::signals::without_signals;
pub use sys::tcp::Queue;
