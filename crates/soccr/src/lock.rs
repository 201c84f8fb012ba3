//! [`Lock`]: the network kept quiet around connections while they are saved and moved.
//!
//! All packets of a locked connection, in both directions, stop at the first hook of the firewall, before connection
//! tracking; the rules of others are not touched. Only packets with the mark 0xC114 (`SO_MARK`) pass: those that this
//! library sends itself. See [`Mode`] for what becomes of the packets that arrive.
//!
//! One move on one host, of which the peer feels nothing but the time of the lock:
//!
//! ```no_run
//! # fn main() -> soccr::Result<()> {
//! # let stream = std::net::TcpStream::connect("192.0.2.1:80").unwrap();
//! let locker = soccr::lock::Locker::new(soccr::lock::Mode::HOLD)?; // once, for many moves
//!
//! let lock = locker.lock(&[soccr::Flow::of(&stream)?])?;
//! let paused = soccr::pause(&stream)?;
//! let connection = paused.save()?;
//! paused.detach()?;
//! let restored = connection.restore()?;
//! lock.release_into(&[&restored])?; // gives it what has arrived meanwhile
//! let stream = restored.resume()?;
//! # Ok(())
//! # }
//! ```
//!
//! Between two hosts the packets travel with the connection. The source calls [`Lock::take`] and sends the [`Held`]
//! packets behind the connection; [`Lock::persist`] then keeps it silent for [`SILENCE`], or until packets no longer
//! reach it, so that a late one draws no reset. The target calls [`Held::replay`] between `restore` and
//! `resume`.
//!
//! # Firewalls
//! Held packets come back over `lo`, with the mark. Rules that drop packets of invalid connections, or let only established
//! ones pass, let these pass too; so does `rp_filter`. A rule against foreign addresses on `lo` does not: if the
//! kernel reports the drop, you get an error, and the peer sends again what it misses.

mod capture;
mod held;
mod packets;
mod persistent;
mod reader;
mod replay;
mod rule;
mod table;
mod transaction;

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use soccr_netlink::{Family, Socket};

use crate::connection::{Connection, Flow};
use crate::conntrack;
use crate::diag::Diag;
use crate::error::{Error, Result};
use crate::sys::raw::Ways;
use crate::sys::signals::without_signals;
use crate::sys::{descriptor, namespace};
use capture::Capture;
use packets::Back;
use reader::Reader;
use table::{Table, Unlock};

pub use held::Held;
pub use persistent::{PersistentLock, PersistentLocks, SILENCE};

/// What becomes of the packets that arrive for a locked connection. What it sends itself is always dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They are dropped. The peer sends them again when its timer runs out: after 200 ms or more.
    Drop,
    /// They are kept and delivered when the lock is [released](Lock::release), up to `limit` bytes for all
    /// connections of one [`Locker`] together. Beyond it acknowledgements that later ones replace are let go
    /// first, then whatever arrives; [`Locker::dropped`] counts.
    Hold {
        /// In bytes.
        limit: usize,
    },
}

impl Mode {
    /// [`Mode::Hold`] with 64 MiB.
    pub const HOLD: Self = Self::Hold { limit: 64 << 20 };
}

/// Makes [`Lock`]s in one network namespace.
///
/// It owns an nftables table, which the kernel removes when the `Locker` and its locks are gone, however the process
/// ends. Making one takes about a millisecond, a lock from it tens of microseconds: keep one for many locks.
///
/// One that holds has a thread, which takes no signals: those that a program blocks in its own threads wait for it.
///
/// Forked children that do not `exec` keep the table, and what is locked, for as long as they live: its socket is open
/// in them too.
#[derive(Debug)]
pub struct Locker {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// `None` only while it is dropped.
    table: Mutex<Option<Table>>,
    reader: Option<Arc<Reader>>,
    thread: Option<JoinHandle<()>>,
}

impl Locker {
    /// A locker for the network namespace of the calling thread.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN` there, and without `CAP_NET_RAW` to hold; the kernel lacks nftables (Linux 5.12,
    /// `CONFIG_NF_TABLES_INET`) or, to hold, `CONFIG_NFT_LOG` and `CONFIG_NETFILTER_NETLINK_LOG`.
    pub fn new(mode: Mode) -> Result<Self> {
        let sockets = Sockets::open(mode).map_err(|error| Error::system("netfilter socket", error));
        sockets.and_then(|sockets| Self::start(sockets, mode)).map_err(|error| error.at("lock"))
    }

    /// A locker for the network namespace of a socket.
    ///
    /// # Errors
    /// The errors of [`new`](Self::new), and `EPERM` without `CAP_SYS_ADMIN` where that is not the namespace of the
    /// calling thread.
    pub fn beside(socket: impl AsFd, mode: Mode) -> Result<Self> {
        let sockets = namespace::open_beside(socket.as_fd(), || Sockets::open(mode))
            .map_err(|error| Error::system("netfilter socket", error));
        sockets.and_then(|sockets| Self::start(sockets, mode)).map_err(|error| error.at("lock"))
    }

    fn start(sockets: Sockets, mode: Mode) -> Result<Self> {
        let Sockets { port, table, held } = sockets;
        let capture = match (mode, held) {
            (Mode::Hold { limit }, Some((log, ways, diag))) => {
                let capture = Capture::open(log, Back::new(ways, diag), limit);
                Some(capture.map_err(|error| Error::system("NFLOG", error).advise(NEEDS))?)
            }
            _ => None,
        };
        let table = Table::create(table, format!("soccr-{port:08x}"), capture.as_ref().map(Capture::group))?;
        let started =
            capture.map(Reader::start).transpose().map_err(|error| Error::system("thread", error))?;
        let (reader, thread) = started.unzip();
        let thread = thread.flatten();
        Ok(Self { shared: Arc::new(Shared { table: Mutex::new(Some(table)), reader, thread }) })
    }

    /// Shows the descriptor with which all its locks end, should this process die.
    pub(crate) fn with_descriptor<T>(&self, look: impl FnOnce(BorrowedFd<'_>) -> T) -> T {
        self.shared.with_table(|table| look(table.socket().as_fd()))
    }

    /// Locks connections: both directions of all of them, in one transaction.
    ///
    /// One behind NAT is locked as its packets arrive, with the addresses of which connection tracking tells. A kernel that
    /// tells nobody (without `nf_conntrack_netlink`) leaves its addresses on the wire unknown, and unlocked.
    ///
    /// # Errors
    /// Refused: a connection that is locked already, by this locker; more than 65536 of one address family, where one behind NAT
    /// counts twice. Nothing is locked then.
    pub fn lock(&self, flows: &[Flow]) -> Result<Lock> {
        self.lock_known(flows.to_vec(), Vec::new())
    }

    /// Locks connections that are to be [restored](Connection::restore) here. Where NAT translates one, and this host does not
    /// know that yet, it is locked as its packets will arrive nevertheless.
    ///
    /// # Errors
    /// The errors of [`lock`](Self::lock).
    pub fn lock_arriving<'a>(&self, connections: impl IntoIterator<Item = &'a Connection>) -> Result<Lock> {
        let (mut flows, mut translated) = (Vec::new(), Vec::new());
        for connection in connections {
            let flow = connection.flow();
            flows.push(flow);
            let wire = connection.tracked.and_then(|tracked| tracked.translation(flow));
            translated.extend(wire.map(|wire| (flow, wire)));
        }
        self.lock_known(flows, translated)
    }

    fn lock_known(&self, flows: Vec<Flow>, translated: Vec<(Flow, Flow)>) -> Result<Lock> {
        self.shared.lock(&flows, translated).map_err(|error| error.at("lock"))?;
        Ok(Lock { shared: Arc::clone(&self.shared), flows })
    }

    /// Waits until nothing is left of the locker, if none of its locks is: no thread, no descriptor, no table. The kernel
    /// takes some 20 ms for that; dropping a locker leaves the waiting to a thread.
    pub fn close(mut self) {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.close();
        }
    }

    /// Packets that arrived for locked connections and could not be kept: over the limit, or because the
    /// kernel had no room for them. The peers send again what was in them.
    pub fn dropped(&self) -> u64 {
        self.shared.reader.as_ref().map_or(0, |reader| reader.capture().packets().dropped())
    }
}

/// Connections whose traffic is stopped.
///
/// Dropping it unlocks them, as [`release`](Self::release) does.
#[derive(Debug)]
#[must_use = "dropping it unlocks at once"]
pub struct Lock {
    shared: Arc<Shared>,
    flows: Vec<Flow>,
}

impl Lock {
    /// Locks connections in the network namespace of the calling thread, and keeps what arrives for them.
    ///
    /// # Errors
    /// The errors of [`Locker::new`] and [`Locker::lock`].
    pub fn hold(flows: &[Flow]) -> Result<Self> {
        Locker::new(Mode::HOLD)?.lock(flows)
    }

    /// Locks connections in the network namespace of the calling thread, and drops what arrives for them.
    ///
    /// # Errors
    /// The errors of [`Locker::new`] and [`Locker::lock`].
    pub fn drop_traffic(flows: &[Flow]) -> Result<Self> {
        Locker::new(Mode::Drop)?.lock(flows)
    }

    /// The connections, as they were given.
    pub fn flows(&self) -> &[Flow] {
        &self.flows
    }

    /// How many packets are held for these connections by now; segments that follow each other become one.
    pub fn held(&self) -> usize {
        self.shared.reader.as_ref().map_or(0, |reader| reader.capture().packets().count(&self.flows))
    }

    /// Takes what has been held so far, for each connection in the order of [`flows`](Self::flows). The connections
    /// stay locked, and what arrives from now on is held as well: for another call, or for the
    /// [release](Self::release).
    ///
    /// # Errors
    /// System: the netlink socket could not be read.
    pub fn take(&self) -> Result<Vec<Held>> {
        match &self.shared.reader {
            Some(reader) => {
                let taken = reader.capture().take(&self.flows);
                taken.map_err(|error| Error::system("NFLOG", error).at("take"))
            }
            None => Ok(self.flows.iter().map(|flow| Held { flow: *flow, packets: Vec::new() }).collect()),
        }
    }

    /// Unlocks the connections and delivers what has been held, in order. They answer when all of it is there: a peer hears
    /// of no gap. Returns how many packets that were.
    ///
    /// What has been held for a connection that has no socket in that namespace (any more) is thrown away, because it would
    /// draw a reset; so will what arrives from then on, unless the lock is made to [stay](Self::persist).
    ///
    /// Release a restored connection before it is [resumed](crate::Restored::resume): what it then sends at once reaches
    /// the peer.
    ///
    /// # Errors
    /// The first failure of many possible ones, after everything has been tried. `EPERM` where a firewall drops
    /// what the host sends to itself; refused where a socket cannot hear that, because its address is not this host's, or
    /// belongs to another device than the one it is bound to. The peer sends again what was held.
    pub fn release(mut self) -> Result<usize> {
        let flows = std::mem::take(&mut self.flows);
        self.shared.release(&flows, &[]).map_err(|error| error.at("unlock"))
    }

    /// Like [`release`](Self::release), and quicker where much is held: `sockets` are the restored connections, in the order of
    /// [`flows`](Self::flows). Most of what is held goes straight into their receive queues, and their peers hear of it when they
    /// are [resumed](crate::Restored::resume), right after. If you end repair mode
    /// yourself, call `release`: only `resume` announces the appended data.
    ///
    /// # Errors
    /// The errors of `release`. Invalid: as many sockets as connections are needed; they are unlocked nevertheless.
    pub fn release_into(mut self, sockets: &[impl AsFd]) -> Result<usize> {
        if sockets.len() != self.flows.len() {
            return Err(Error::invalid("there is not one socket for each connection").at("unlock"));
        }
        let flows = std::mem::take(&mut self.flows);
        let sockets: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        self.shared.release(&flows, &sockets).map_err(|error| error.at("unlock"))
    }

    /// Hands the connections to a [`PersistentLock`], which stays when the process ends: under a name, for a limited
    /// time or until it is removed. It drops what arrives. What is held now is gone: [take](Self::take) it first.
    ///
    /// This is how a host stays silent after a connection has left it, while late packets may still come:
    ///
    /// ```no_run
    /// # fn example(mut lock: soccr::Lock) -> soccr::Result<()> {
    /// lock.persist("moved-to-b", Some(soccr::lock::SILENCE))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The errors of [`PersistentLock::create`]. The connections stay in this lock then.
    pub fn persist(&mut self, name: &str, limit: Option<Duration>) -> Result<()> {
        self.shared.persist(name, &self.flows, limit).map_err(|error| error.at("lock"))?;
        self.flows.clear();
        Ok(())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let flows = std::mem::take(&mut self.flows);
        // There is nobody left to tell.
        let _ = self.shared.release(&flows, &[]);
    }
}

impl Shared {
    /// Packets arrive with the addresses that they have before they are translated: for some connections those are known.
    fn lock(&self, flows: &[Flow], mut translated: Vec<(Flow, Flow)>) -> Result<()> {
        flows.iter().chain(translated.iter().map(|(_, wire)| wire)).try_for_each(validate)?;
        let known: HashSet<Flow> = translated.iter().map(|(flow, _)| *flow).collect();
        let others: Vec<Flow> = flows.iter().filter(|flow| !known.contains(flow)).copied().collect();
        let found = self.with_table(|table| conntrack::translated(table.socket(), &others));
        translated.extend(found.map_err(|error| Error::system("conntrack", error))?);
        self.with_table(|table| table.reserve(flows, &translated))?;
        let add = || self.with_table(|table| table.add(flows));
        let Some(reader) = &self.reader else { return add() };
        reader.capture().packets().hold(flows, &translated);
        let added = add();
        if added.is_err() {
            reader.capture().packets().forget(flows);
        }
        added
    }

    fn unlock(&self, how: Unlock, flows: &[Flow]) -> Result<()> {
        self.with_table(|table| table.unlock(how, flows))
    }

    fn persist(&self, name: &str, flows: &[Flow], limit: Option<Duration>) -> Result<()> {
        self.with_table(|table| {
            let flows = table.with_wires(flows);
            persistent::create(table.socket(), name, &flows, limit)
        })?;
        // What is left in our table is dropped there: the persistent lock drops it too.
        let _ = self.abandon(flows);
        Ok(())
    }

    /// Unlocks, and delivers what has been held.
    fn release(&self, flows: &[Flow], sockets: &[BorrowedFd<'_>]) -> Result<usize> {
        match &self.reader {
            _ if flows.is_empty() => Ok(0),
            Some(reader) => {
                let unlock = |how, flows: &[Flow]| self.unlock(how, flows);
                let released = reader.capture().release(flows, sockets, unlock);
                if !matches!(released, Ok(0)) {
                    reader.tidy();
                }
                released
            }
            None => self.unlock(Unlock::Both, flows).map(|()| 0),
        }
    }

    /// Unlocks, and throws away what has been held.
    fn abandon(&self, flows: &[Flow]) -> Result<()> {
        if let Some(reader) = &self.reader {
            reader.capture().packets().discard(flows);
        }
        self.unlock(Unlock::Both, flows)
    }

    fn with_table<T>(&self, work: impl FnOnce(&mut Table) -> T) -> T {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        work(table.as_mut().expect("the table is there until the drop"))
    }
}

impl Shared {
    fn close(&mut self) {
        drop(self.stop());
        if let Some(thread) = self.thread.take() {
            // A panic there has been told already.
            let _ = thread.join();
        }
        self.reader = None;
    }

    /// Ends the thread that holds, and takes the table, which is gone when it is dropped.
    fn stop(&mut self) -> Option<Table> {
        if let Some(reader) = &self.reader {
            reader.stop();
        }
        self.table.get_mut().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(table) = self.stop() {
            // The kernel takes milliseconds to remove a table: not while connections wait to be resumed.
            let named = std::thread::Builder::new().name("soccr-close".into());
            let _ = without_signals(|| named.spawn(move || drop(table)));
        }
    }
}

/// Everything that has to be opened in the right namespace.
struct Sockets {
    /// The netlink port of `table`.
    port: u32,
    table: Socket,
    /// Where packets are held: from where they come, and the way back for them.
    held: Option<(Socket, Ways, Diag)>,
}

impl Sockets {
    fn open(mode: Mode) -> io::Result<Self> {
        // Tables and groups vanish with the port of their owner: no other socket may ever have it.
        let own = || {
            let port = RandomState::new().hash_one(std::process::id()) as u32;
            Socket::open_at(Family::Netfilter, port)
                .map(|socket| (port, socket.with_descriptor(descriptor::high)))
        };
        let (port, table) = own()?;
        if mode == Mode::Drop {
            return Ok(Self { port, table, held: None });
        }
        Ok(Self { port, table, held: Some((own()?.1, Ways::open()?, Diag::open()?.kept())) })
    }
}

impl AsFd for Sockets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.table.as_fd()
    }
}

#[cfg(fuzzing)]
pub(crate) use capture::fuzz as fuzz_message;

/// The sequence number and the bytes of each run that these packets become.
#[cfg(fuzzing)]
pub(crate) fn fuzz_held(flow: Flow, packets: &[Vec<u8>]) -> Vec<(u32, Vec<u8>)> {
    let mut held = packets::Packets::new(None, usize::MAX);
    held.hold(&[flow], &[]);
    packets.iter().for_each(|packet| held.push(packet, 1));
    held.take(&flow).iter().map(|run| (run.parsed().seq, run.data().to_vec())).collect()
}

const NEEDS: &str = "needs nftables: Linux 5.12 with CONFIG_NF_TABLES_INET, and to hold packets CONFIG_NFT_LOG and \
                     CONFIG_NETFILTER_NETLINK_LOG; CAP_NET_ADMIN and CAP_NET_RAW, as root or under `unshare -Urn`";

fn validate(flow: &Flow) -> Result<()> {
    let families = [flow.local, flow.remote].map(|end| end.ip().to_canonical().is_ipv4());
    if families[0] == families[1] { Ok(()) } else { Err(Error::invalid("the addresses are of two families")) }
}
