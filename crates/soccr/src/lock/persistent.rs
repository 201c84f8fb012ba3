//! Locks that stay when the process ends.

use std::collections::HashSet;
use std::io;
use std::time::Duration;

use soccr_netlink::{Batch, Family, Socket};

use super::rule::Set;
use super::transaction::{self, Kind, Transaction};
use super::validate;
use crate::connection::Flow;
use crate::conntrack;
use crate::error::{Error, Result};

/// How long a host best stays silent about a connection that has left it: 60 s, the time for which Linux keeps a
/// closed connection in TIME_WAIT against late packets.
pub const SILENCE: Duration = Duration::from_secs(60);

const PREFIX: &str = "soccr-persistent-";
const NAME_LIMIT: usize = 64;

/// A lock that belongs to no process. It drops the traffic of its connections, in both directions, until it is
/// [removed](Self::remove) or its time is over.
///
/// In `nft list ruleset` it is the table `soccr-persistent-` and its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PersistentLock {
    /// The name that it was given.
    pub name: String,
    /// The connections that it locks, [as their packets show them](Flow::on_the_wire) where they have been listed. None are
    /// left when its time is over.
    pub flows: Vec<Flow>,
    /// For how much longer it locks the last of them, where there is a limit. [`contents`](Self::contents) tells it of each.
    pub remaining: Option<Duration>,
}

impl PersistentLock {
    /// Locks connections in the network namespace of the calling thread.
    ///
    /// One behind NAT is locked as its packets arrive as well, where connection tracking tells of it; where it does not know it (yet),
    /// name [all its flows](crate::Connection::flows).
    ///
    /// `name` consists of up to 64 letters, digits and `.`, `_`, `-`. The kernel unlocks by itself when the `limit` is
    /// over, exact to a few milliseconds.
    ///
    /// # Errors
    /// Invalid: another name, or no connections. `EEXIST` where there is a lock of this name; `EPERM` without
    /// `CAP_NET_ADMIN`. Nothing is locked then.
    pub fn create(name: &str, flows: &[Flow], limit: Option<Duration>) -> Result<()> {
        PersistentLocks::new()?.create(name, flows, limit)
    }

    /// Locks more connections, in the network namespace of the calling thread, each for the time of this `limit`.
    ///
    /// # Errors
    /// `EEXIST` where it locks one of them already, `ENOENT` where it has been removed: by others, too, when its time
    /// was over. `EPERM` without `CAP_NET_ADMIN`. None of them is locked then.
    pub fn extend(&mut self, flows: &[Flow], limit: Option<Duration>) -> Result<()> {
        PersistentLocks::new()?.extend(self, flows, limit)
    }

    /// The persistent locks in the network namespace of the calling thread.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`.
    pub fn list() -> Result<Vec<Self>> {
        PersistentLocks::new()?.list()
    }

    /// The connections that it locks now, in the network namespace of the calling thread, and for how much longer each.
    ///
    /// # Errors
    /// `ENOENT` where it has been removed; `EPERM` without `CAP_NET_ADMIN`.
    pub fn contents(&self) -> Result<Vec<(Flow, Option<Duration>)>> {
        let table = format!("{PREFIX}{}", self.name);
        transaction::contents(&mut open()?, &table).map_err(|error| Error::system("nft list", error))
    }

    /// Unlocks, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// `ENOENT` where it has been removed already; `EPERM` without `CAP_NET_ADMIN`.
    pub fn remove(&self) -> Result<()> {
        open().and_then(|mut socket| remove(&mut socket, &self.name)).map_err(|error| error.at("unlock"))
    }

    /// Unlocks some of its connections, in the network namespace of the calling thread, as [`create`](Self::create) locks them. The others stay locked all the
    /// time, those that somebody else has added meanwhile, too. Connections that it no longer locks are passed over.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`.
    pub fn unlock(&self, flows: &[Flow]) -> Result<()> {
        PersistentLocks::new()?.unlock(self, flows)
    }
}

/// The persistent locks of a network namespace, for whoever makes and changes them again and again.
///
/// It keeps its socket: the kernel takes its time to close one of Netfilter, and lets nobody change a table meanwhile (it waits
/// until what was deleted before is free).
#[derive(Debug)]
pub struct PersistentLocks(Socket);

impl PersistentLocks {
    /// Those of the calling thread's network namespace, from whatever thread it is used later.
    ///
    /// # Errors
    /// The errors of opening a netlink socket.
    pub fn new() -> Result<Self> {
        open().map(Self).map_err(|error| error.at("lock"))
    }

    /// [`PersistentLock::create`].
    ///
    /// # Errors
    /// Its errors.
    pub fn create(&mut self, name: &str, flows: &[Flow], limit: Option<Duration>) -> Result<()> {
        with_wires(&mut self.0, flows)
            .and_then(|flows| {
                transaction::set_longest(&self.0)?;
                create(&mut self.0, name, &flows, limit)
            })
            .map_err(|error| error.at("lock"))
    }

    /// [`PersistentLock::extend`].
    ///
    /// # Errors
    /// Its errors.
    pub fn extend(
        &mut self,
        lock: &mut PersistentLock,
        flows: &[Flow],
        limit: Option<Duration>,
    ) -> Result<()> {
        with_wires(&mut self.0, flows)
            .and_then(|flows| {
                transaction::set_longest(&self.0)?;
                extend(&mut self.0, lock, &flows, limit)
            })
            .map_err(|error| error.at("lock"))
    }

    /// [`PersistentLock::list`].
    ///
    /// # Errors
    /// Its errors.
    pub fn list(&mut self) -> Result<Vec<PersistentLock>> {
        list(&mut self.0).map_err(|error| error.at("list locks"))
    }

    /// [`PersistentLock::unlock`].
    ///
    /// # Errors
    /// Its errors.
    pub fn unlock(&mut self, lock: &PersistentLock, flows: &[Flow]) -> Result<()> {
        with_wires(&mut self.0, flows)
            .and_then(|flows| unlock(&mut self.0, lock, &flows))
            .map_err(|error| error.at("unlock"))
    }
}

/// Connections as their sockets know them, and as packets show them before they are translated, as far as that is known here.
fn with_wires(socket: &mut Socket, flows: &[Flow]) -> Result<Vec<Flow>> {
    let translated =
        conntrack::translated(socket, flows).map_err(|error| Error::system("conntrack", error))?;
    let named: HashSet<Flow> = flows.iter().map(Flow::on_the_wire).collect();
    let wires = translated.into_iter().map(|(_, wire)| wire).filter(|wire| !named.contains(wire));
    Ok(flows.iter().copied().chain(wires).collect())
}

/// Makes a persistent lock in the namespace of `socket`.
pub(super) fn create(socket: &mut Socket, name: &str, flows: &[Flow], limit: Option<Duration>) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.is_empty() || name.len() > NAME_LIMIT || !name.bytes().all(allowed) {
        let remedy = "use up to 64 letters, digits, points, hyphens and underscores";
        return Err(Error::invalid("the name of the lock").advise(remedy));
    }
    if flows.is_empty() {
        // It could not be told from one whose time is over.
        return Err(Error::invalid("a lock of no connections"));
    }
    flows.iter().try_for_each(validate)?;
    for table in transaction::names(socket).map_err(|error| Error::system("nft list", error))? {
        let Some(other) = table.strip_prefix(PREFIX) else { continue };
        // A table whose time is over is empty. Somebody else may be doing the same, and have removed it already. Where neither is
        // certain, it stays.
        let (is_over, is_gone) = match transaction::contents(socket, &table) {
            Ok(contents) if contents.is_empty() => (true, matches!(remove_empty(socket, &table), Ok(true))),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => (true, true),
            _ => (false, false),
        };
        if other == name && !is_over {
            return Err(not_created(io::Error::from_raw_os_error(libc::EEXIST)));
        }
        if other == name && !is_gone {
            // Its elements are over, but the kernel has not removed them yet, so the table is used again.
            let mut lock = PersistentLock { name: name.to_owned(), flows: Vec::new(), remaining: None };
            match extend(socket, &mut lock, flows, limit) {
                // Somebody else has removed it meanwhile.
                Err(error) if error.errno() == Some(libc::ENOENT) => {}
                outcome => return outcome,
            }
        }
    }
    let table = format!("{PREFIX}{name}");
    let mut batch = Batch::new();
    let most = transaction::most_elements(socket)?;
    for (index, flows) in flows.chunks(most).enumerate() {
        let mut transaction = Transaction::begin(&mut batch, &table);
        if index == 0 {
            transaction.create(Kind::Persistent);
        }
        transaction.add(Set::Flows, flows, limit);
        if let Err(error) = transaction.commit(socket) {
            // The table is ours, even where only the answer to its making was lost, but for a race for the name.
            if index > 0 || error.raw_os_error() != Some(libc::EEXIST) {
                let _ = remove(socket, name);
            }
            return Err(not_created(error));
        }
    }
    Ok(())
}

fn extend(
    socket: &mut Socket,
    lock: &mut PersistentLock,
    flows: &[Flow],
    limit: Option<Duration>,
) -> Result<()> {
    flows.iter().try_for_each(validate)?;
    let table = format!("{PREFIX}{}", lock.name);
    let mut batch = Batch::new();
    let most = transaction::most_elements(socket)?;
    for (index, chunk) in flows.chunks(most).enumerate() {
        let mut transaction = Transaction::begin(&mut batch, &table);
        transaction.add(Set::Flows, chunk, limit);
        if let Err(error) = transaction.commit(socket) {
            let _ = unlock(socket, lock, &flows[..index * most]);
            return Err(Error::system("nft add element", error));
        }
    }
    lock.flows.extend(flows);
    Ok(())
}

fn not_created(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EEXIST) => Error::system("nft add table", error).advise(
            "there is a lock of this name, or a connection is named twice: choose another name, or remove it",
        ),
        _ => Error::system("nft add table", error),
    }
}

fn list(socket: &mut Socket) -> Result<Vec<PersistentLock>> {
    let failed = |error| Error::system("nft list", error);
    let mut locks = Vec::new();
    for table in transaction::names(socket).map_err(failed)? {
        let Some(name) = table.strip_prefix(PREFIX) else { continue };
        let contents = match transaction::contents(socket, &table) {
            // Removed since.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            other => other.map_err(failed)?,
        };
        let remaining = contents.iter().filter_map(|(_, left)| *left).max();
        let flows = contents.into_iter().map(|(flow, _)| flow).collect();
        locks.push(PersistentLock { name: name.to_owned(), flows, remaining });
    }
    Ok(locks)
}

fn remove(socket: &mut Socket, name: &str) -> Result<()> {
    let table = format!("{PREFIX}{name}");
    let mut batch = Batch::new();
    let mut transaction = Transaction::begin(&mut batch, &table);
    transaction.remove();
    transaction.commit(socket).map_err(|error| Error::system("nft delete table", error))
}

fn unlock(socket: &mut Socket, lock: &PersistentLock, flows: &[Flow]) -> Result<()> {
    let table = format!("{PREFIX}{}", lock.name);
    let most = transaction::most_elements(socket)?;
    let mut batch = Batch::new();
    let mut delete = |flows: &[Flow]| {
        let mut transaction = Transaction::begin(&mut batch, &table);
        transaction.delete(Set::Flows, flows);
        transaction.commit(socket)
    };
    for chunk in flows.chunks(most) {
        // The time of any may be over by now, and a transaction happens as a whole or not at all.
        if delete(chunk).is_err() {
            for flow in chunk {
                tolerate_absence(delete(&[*flow]), "nft delete element")?;
            }
        }
    }
    let unlocked: HashSet<Flow> = flows.iter().map(Flow::on_the_wire).collect();
    let is_whole = lock.flows.iter().all(|flow| unlocked.contains(&flow.on_the_wire()));
    // Others may have unlocked the rest since it was listed.
    if is_whole || matches!(transaction::contents(socket, &table), Ok(contents) if contents.is_empty()) {
        remove_empty(socket, &table).map_err(|error| Error::system("nft delete table", error))?;
    }
    Ok(())
}

/// Removes a table, unless somebody else has added to it meanwhile. Returns whether it is gone.
fn remove_empty(socket: &mut Socket, table: &str) -> io::Result<bool> {
    let mut batch = Batch::new();
    let mut transaction = Transaction::begin(&mut batch, table);
    transaction.remove_empty();
    match transaction.commit(socket) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
        other => other.map(|()| true),
    }
}

fn tolerate_absence(result: io::Result<()>, what: &'static str) -> Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other.map_err(|error| Error::system(what, error)),
    }
}

fn open() -> Result<Socket> {
    Socket::open(Family::Netfilter).map_err(|error| Error::system("netfilter socket", error))
}
