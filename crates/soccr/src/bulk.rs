//! Many connections at once: one lock, one pass over the sockets, one stream, and threads that restore.
//!
//! ```no_run
//! use soccr::bulk::{self, Needs, Saved};
//! use soccr::lock::{Locker, Mode};
//! use soccr::{Connection, Flow};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let streams: Vec<std::net::TcpStream> = Vec::new();
//! let flows: Vec<Flow> = streams.iter().filter_map(|stream| Flow::of(stream).ok()).collect();
//! Needs::of(&flows).check()?;
//! let lock = Locker::new(Mode::HOLD)?.lock(&flows)?; // all of them in one transaction
//!
//! let mut connections: Vec<(usize, Connection)> = Vec::new(); // or a file, or a pipe
//! bulk::save(&streams, |index, saved| {
//!     match saved {
//!         Ok(Saved { connection, paused }) => {
//!             connections.push((index, connection.clone()));
//!             paused.detach()?;
//!         }
//!         Err(error) => eprintln!("connection {index} stays: {error}"),
//!     }
//!     Ok::<_, soccr::Error>(())
//! })?;
//!
//! let mut restored = Vec::new();
//! bulk::restore(connections, |index, outcome| match outcome {
//!     Ok(socket) => restored.push((index, socket)),
//!     Err(error) => eprintln!("connection {index} is lost: {error}"),
//! });
//! lock.release()?; // one transaction again
//! bulk::resume(restored, |index, outcome| println!("connection {index} goes on: {outcome:?}"));
//! # Ok(()) }
//! ```
//!
//! Reading a socket is limited by the system calls and gains nothing from a second thread; making one does. These threads block
//! all signals, and so would a program that is started on one.

mod pool;
mod room;

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::OnceLock;

use crate::connection::Connection;
use crate::error::Result;
use crate::pause::{Paused, pause};
use crate::restore;
use crate::resume::Restored;
use crate::settings::Settings;
use crate::sys::raw::Injectors;

pub use room::Needs;

/// A connection that [`save`] has read.
#[derive(Debug)]
pub struct Saved<'a, 'fd> {
    /// Its value, in memory that the next connection will use: write it, or clone it.
    pub connection: &'a Connection,
    /// Its socket. Dropping it resumes the connection.
    pub paused: Paused<'fd>,
}

/// Pauses and saves sockets one after the other, and gives each to `each` under its place among them. A socket that
/// cannot be saved is given as the error and goes on as before; the others are not concerned.
///
/// Memory is taken once, for the largest connection. [Lock](crate::lock::Locker::lock) them all before.
///
/// # Errors
/// The first that `each` returns; the sockets behind it are not touched.
pub fn save<'fd, Fd: AsFd + 'fd, E>(
    sockets: impl IntoIterator<Item = &'fd Fd>,
    mut each: impl FnMut(usize, Result<Saved<'_, 'fd>>) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let (mut connection, mut injectors) = (Connection::empty(), Injectors::default());
    sockets.into_iter().enumerate().try_for_each(|(index, socket)| {
        let saved = pause(socket)
            .and_then(|paused| paused.save_with(&mut injectors, &mut connection).map(|()| paused));
        each(index, saved.map(|paused| Saved { connection: &connection, paused }))
    })
}

/// Restores connections on as many threads as there are processors, in the network namespace of the calling one, and
/// gives each to `each` under its key, in any order. One that cannot be restored is given as the error.
///
/// Options that a new socket has by itself, as they are when the first connection comes, are not set once more.
///
/// `connections` may come slowly, such as from a pipe: what has come is restored meanwhile, and `each` is called on another
/// thread, so that the other side can be answered. A few hundred connections are kept waiting at most, or 16 MiB of
/// queues: then the next one is not asked for yet.
pub fn restore<K: Send>(
    connections: impl IntoIterator<Item = (K, Connection)>,
    each: impl FnMut(K, Result<Restored>) + Send,
) {
    Kit::default().restore(connections, each);
}

/// [Resumes](Restored::resume) restored connections on as many threads as there are processors: each sends packets, and
/// the kernel takes in the answers. Gives each to `each` under its key, in any order.
pub fn resume<K: Send>(
    restored: impl IntoIterator<Item = (K, Restored)>,
    each: impl FnMut(K, Result<TcpStream>) + Send,
) {
    Kit::default().resume(restored, each);
}

/// What is opened to restore and to resume, kept for the next call: raw sockets, and one that asks Netfilter, which the kernel
/// takes milliseconds to close where rules or elements of sets were removed a moment ago. Whoever restores again and again has one.
///
/// Threads that use it are in one network namespace.
#[derive(Debug, Default)]
pub struct Kit {
    rack: pool::Rack<Injectors>,
}

impl Kit {
    /// See [`restore`].
    pub fn restore<K: Send>(
        &self,
        connections: impl IntoIterator<Item = (K, Connection)>,
        mut each: impl FnMut(K, Result<Restored>) + Send,
    ) {
        let cost = |(_, connection): &(K, Connection)| connection.queued();
        let fresh: [OnceLock<Settings>; 2] = Default::default();
        let work = |injectors: &mut Injectors, (key, mut connection): (K, Connection)| {
            let family = &fresh[usize::from(connection.local.is_ipv4())];
            connection.settings.forget_defaults(family.get_or_init(|| settings_of_new(connection.local)));
            (key, connection.restore_with(injectors))
        };
        pool::run(&self.rack, connections, cost, work, |(key, restored)| each(key, restored));
    }

    /// See [`resume`].
    pub fn resume<K: Send>(
        &self,
        restored: impl IntoIterator<Item = (K, Restored)>,
        mut each: impl FnMut(K, Result<TcpStream>) + Send,
    ) {
        let work = |injectors: &mut Injectors, (key, restored): (K, Restored)| {
            (key, restored.resume_with(injectors))
        };
        pool::run(&self.rack, restored, |_| 0, work, |(key, resumed)| each(key, resumed));
    }
}

/// What a new socket has, as sysctls decide now; nothing where none can be made.
fn settings_of_new(local: SocketAddr) -> Settings {
    restore::open(local)
        .map_or_else(|_| Settings::default(), |socket| Settings::of_new(socket.as_fd(), local))
}
