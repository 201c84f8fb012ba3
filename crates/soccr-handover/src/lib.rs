//! Live TCP connections move between programs, and what their owners know about them moves along.
//!
//! ```standalone_crate
//! # use soccr_handover::{Mover, Outcome};
//! # use tokio::{io::{duplex, AsyncReadExt, AsyncWriteExt, DuplexStream}, net::{TcpListener, TcpStream}};
//! # type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
//! # struct Session(String);
//! # impl Session {
//! #     fn encode(&self) -> Vec<u8> { self.0.clone().into_bytes() }
//! #     fn decode(bytes: &[u8]) -> Result<Self> { Ok(Self(String::from_utf8(bytes.to_vec())?)) }
//! # }
//! # async fn serve(mut stream: TcpStream, session: Session) -> Result<()> {
//! #     let mut name = String::new();
//! #     stream.read_to_string(&mut name).await?;
//! #     Ok(stream.write_all(format!("{} {name}", session.0).as_bytes()).await?)
//! # }
//! // The program that has the connection; `read_ahead` is what it has read and not dealt with.
//! async fn give_away(
//!     mover: &Mover, // one for the whole process
//!     stream: TcpStream,
//!     read_ahead: &[u8],
//!     session: Session,
//!     channel: &mut DuplexStream, // anything that is read and written: a UNIX socket, TLS, the pipes of ssh
//! ) -> Result<()> {
//!     let departing = mover.take(stream)?.unread(read_ahead)?.with_state(session.encode());
//!     match departing.send(channel).await {
//!         Outcome::Moved => Ok(()),
//!         Outcome::Stays(stream, _why) => serve(stream, session).await, // as if nothing had happened
//!         Outcome::Unknown(why) => Err(why.into()), // the other end has it, or nobody
//!     }
//! }
//!
//! // The program that gets it: here, or on another host.
//! async fn take_over(mover: &Mover, channel: DuplexStream) -> Result<()> {
//!     let mut arrivals = mover.listen_async(channel);
//!     while let Some(arrived) = arrivals.next().await? {
//!         let session = Session::decode(arrived.state())?;
//!         tokio::spawn(serve(arrived.into_stream()?, session));
//!     }
//!     Ok(())
//! }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn example() -> Result<()> {
//! #     let listener = TcpListener::bind("127.0.0.1:0").await?;
//! #     let mut peer = TcpStream::connect(listener.local_addr()?).await?;
//! #     let (mut stream, _) = listener.accept().await?;
//! #     peer.write_all(b"Ada").await?;
//! #     let mut read_ahead = Vec::new();
//! #     stream.read_buf(&mut read_ahead).await?;
//! #     let (mut here, there) = duplex(4096);
//! #     let taking = tokio::spawn(async move { take_over(&Mover::new()?, there).await });
//! #     give_away(&Mover::new()?, stream, &read_ahead, Session("hello".into()), &mut here).await?;
//! #     drop(here);
//! #     peer.write_all(b" Lovelace").await?;
//! #     peer.shutdown().await?;
//! #     let mut answer = String::new();
//! #     peer.read_to_string(&mut answer).await?;
//! #     assert_eq!(answer, "hello Ada Lovelace");
//! #     taking.await?
//! # }
//! # fn main() {
//! #     match soccr_lab::enter() {
//! #         Ok(()) => example().unwrap(),
//! #         Err(reason) => soccr_lab::skip(reason),
//! #     }
//! # }
//! ```
//!
//! The same without a runtime: [`Departing::send`] and [`Mover::listen`] of [`std::net::TcpStream`]s, through a [`Channel`]
//! of descriptors, pipes or threads. Many connections move many times faster together: [`Mover::send_all`].
//!
//! [`Channel`]: channel::Channel
//!
//! A connection with TLS in the kernel (kTLS) moves as well: what the program knows of the session is its state. A program that hands its own
//! over must have no other descriptor of it. See [`soccr::tls`].
//!
//! # What holds
//! - A connection is never in two programs. It can be in none only if the outcome is [`Unknown`](Outcome::Unknown), or if a program is
//!   killed while the connection is in its memory alone. [`protocol`] has the table; the tests lead its machines through every order
//!   of messages, cuts and kills.
//! - Nothing is locked before the target has said that it is there and prepared. From then on the connections of a batch, up to
//!   128, are silent until they have arrived or stay: what their peers send meanwhile goes along.
//! - The program at the other end of a channel can make any connection, on behalf of any address of this host: trust the channel as
//!   far as that program. Look at each connection before it is taken ([`Terms::accept_if`]), and give the channel to nobody else.
//!
//! # State
//! Up to 16 MiB of bytes go with each connection. This crate does not look into them: give them a version number. A target that has no
//! use for them drops them, unless they are [critical](Departing::with_critical_state). Decode them in [`Terms::accept_if`]: a
//! connection whose state cannot be understood then stays at its source.
//!
//! # Threads, blocking, fork, namespaces, epoll after detach
//! - **Threads.** A [`Mover`] has one, which reads what the lock holds, and one for a moment when it is dropped. Restoring many
//!   connections uses as many threads as there are processors, until they are restored. All of these block all signals, and leave
//!   them to yours. Any thread may use a mover, many at a time.
//! - **Blocking.** `send`, `send_all` and `next` wait for the other end, up to the [`Limits`]. With the feature `tokio` only
//!   system calls block, for microseconds to milliseconds, on the threads of `spawn_blocking`; the runtime needs its clock and I/O
//!   driver (`enable_all`). Dropping a future ends the hand-over at once; that thread puts what can come back into
//!   [`Mover::came_back`].
//! - **Fork.** A child that does not `exec` shares the sockets: what has left can come back into them only while it does not use
//!   them. It also holds the lock of the mover open for as long as it lives.
//! - **Namespaces.** A mover belongs to the network namespace of the thread that has made it. Threads that use it must be in the
//!   same one, those of a runtime included.
//! - **epoll.** A connection that has left leaves a socket behind, which `send` closes; processes with duplicates of it see `EPOLLHUP`
//!   and `ECONNABORTED`. A connection that stays keeps its socket and its epoll registrations, but epoll may have reported events
//!   that no longer hold. A tokio stream is registered anew.
//!
//! # Rights
//! `CAP_NET_ADMIN` and `CAP_NET_RAW` in the user namespace that owns the network namespace, at both ends; see [`soccr`].
#![cfg_attr(not(feature = "foreign"), forbid(unsafe_code))]

mod arrival;
#[cfg(feature = "tokio")]
mod asynchronous;
pub mod channel;
mod delivery;
mod departing;
mod departure;
mod drive;
mod error;
#[cfg(feature = "foreign")]
pub mod foreign;
mod guide;
mod listen;
mod mover;
mod notes;
pub mod protocol;
mod recipient;
mod seat;
pub mod silence;
mod terms;
mod trial;
mod users;

#[cfg(feature = "tokio")]
pub use asynchronous::Arrivals;
pub use departing::{Departing, Outcome, Sending, Stream};
pub use error::{Error, ErrorKind, Rejected, Result};
pub use guide::Path;
pub use listen::{Arrived, Arriving, Received};
pub use mover::{Event, Limits, Mover};
pub use notes::{LastWords, Notes};
pub use recipient::{Announced, Offer, Origin, Recipient};
pub use seat::Seat;
pub use terms::{Steered, Terms};
pub use trial::try_out;
pub use users::Users;

#[cfg(not(target_os = "linux"))]
compile_error!("soccr-handover rests on TCP_REPAIR, which only Linux has");

// What programs move between threads, and share.
const _: () = {
    const fn is_sent<T: Send>() {}
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<Mover>();
    is_shared::<Error>();
    is_sent::<Departing>();
    is_sent::<Outcome>();
    is_sent::<Arrived>();
    is_sent::<Arriving<std::net::TcpStream>>();
};
