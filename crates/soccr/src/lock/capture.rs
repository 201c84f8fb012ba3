//! The packets that a lock holds back: the rule that drops them copies them to a netlink socket first
//! (`log group`, NFLOG), in their order.
//!
//! A thread of the [`Locker`](super::Locker) reads along, because the kernel keeps little for an ordinary user, and
//! because a packet may still be on its way through the rule when its connection is unlocked.
//!
//! # References
//! `linux/netfilter/nfnetlink_log.h`.

use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use soccr_netlink::{ACK, Batch, REQUEST, Socket, attributes};

use super::held::Held;
use super::packets::{Back, Packets};
use super::replay::Replay;
use super::rule::{LOG_LIMIT, TAIL, TAIL_SAVED};
use super::table::Unlock;
use crate::connection::Flow;
use crate::error::{Error, Result};
use crate::segment::{Parsed, Run};
use crate::sys::raw::bound_interface;

/// How long connections may catch up with their packets. A peer that gets no answer stops within its window: only one that
/// never stops makes it as long.
const LONGEST_RELEASE: Duration = Duration::from_secs(1);

/// A log group, the packets that have come from it, and the way back for them.
#[derive(Debug)]
pub(super) struct Capture {
    socket: Socket,
    group: u16,
    packets: Packets,
    next: u32,
    /// What has been released, until its memory is given back.
    spent: Vec<Run>,
    /// Why nothing is read any more while nobody asks.
    failure: Option<io::Error>,
}

impl Capture {
    /// Opens a group that nobody else listens to. `socket` and `back` are in the namespace
    /// where the packets are.
    pub(super) fn open(mut socket: Socket, back: Back, limit: usize) -> io::Result<Self> {
        /// Enough to find a free group where nine of ten are taken, many times over.
        const ATTEMPTS: usize = 256;
        // What the kernel may keep until the thread comes; more only with privileges in the first namespace.
        socket.set_receive_buffer(limit)?;
        let mut outcome = Err(io::ErrorKind::AddrInUse.into());
        for _ in 0..ATTEMPTS {
            let group = (RandomState::new().hash_one(std::process::id()) as u16).max(1);
            match bind(&mut socket, group) {
                Ok(()) => {
                    let packets = Packets::new(Some(back), limit);
                    return Ok(Self { socket, group, packets, next: 0, spent: Vec::new(), failure: None });
                }
                // Another socket has this group.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EBUSY)) => {
                    outcome = Err(error);
                }
                Err(error) => return Err(error),
            }
        }
        outcome
    }

    /// The number that the rule needs.
    pub(super) fn group(&self) -> u16 {
        self.group
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// What has been captured, as far as it has been read.
    pub(super) fn packets(&mut self) -> &mut Packets {
        &mut self.packets
    }

    /// The packets of these connections, in order; further ones are kept.
    pub(super) fn take(&mut self, flows: &[Flow]) -> io::Result<Vec<Held>> {
        self.failure.take().map_or(Ok(()), Err)?;
        self.read(Instant::now() + LONGEST_RELEASE)?;
        let mut packets = |flow| self.packets.take(flow).into_iter().map(Run::into_packet).collect();
        Ok(flows.iter().map(|flow| Held { flow: *flow, packets: packets(flow) }).collect())
    }

    /// Gives these connections their packets, has them unlocked, and gives them what came between. `sockets` are the connections,
    /// in the same order, or none. Returns how many packets that were.
    ///
    /// What came between is overtaken by what arrives by itself. Connections that have packets are kept silent until all
    /// of them are there: so their peers hear of no gap, and send nothing again. With the others it is a rare chance.
    ///
    /// # Errors
    /// The first error. Everything is tried nevertheless.
    pub(super) fn release(
        &mut self,
        flows: &[Flow],
        sockets: &[BorrowedFd<'_>],
        mut unlock: impl FnMut(Unlock, &[Flow]) -> Result<()>,
    ) -> Result<usize> {
        let mut replays = HashMap::new();
        let end = Instant::now() + LONGEST_RELEASE;
        let failure = self.failure.take().map_or(Ok(()), |error| Err(Error::system("NFLOG", error)));
        let mut outcome = failure.and(self.catch_up(flows, sockets, &mut replays, end, true));
        let (waiting, idle): (Vec<_>, Vec<_>) = flows.iter().partition(|flow| replays.contains_key(flow));
        outcome = outcome.and(unlock(Unlock::Both, &idle));
        outcome = outcome.and(unlock(Unlock::Receive, &waiting));
        // From now on packets arrive by themselves.
        for replay in replays.values_mut().filter(|replay| !replay.returned.is_empty()) {
            let returned = std::mem::take(&mut replay.returned);
            outcome = outcome.and(self.packets.replay(replay, returned, None));
        }
        outcome = outcome.and(self.catch_up(flows, &[], &mut replays, end, false));
        self.packets.forget(flows);
        outcome = outcome.and(unlock(Unlock::Send, &waiting));
        let mut count = 0;
        for mut replay in replays.into_values() {
            match self.packets.finish(&mut replay) {
                Ok(replayed) => count += replayed,
                Err(error) => outcome = outcome.and(Err(error)),
            }
            self.spent.append(&mut replay.spent);
        }
        outcome.map(|()| count)
    }

    /// Gives these connections their packets until none is left, or this time has come. What comes back while they are
    /// locked is kept.
    fn catch_up(
        &mut self,
        flows: &[Flow],
        sockets: &[BorrowedFd<'_>],
        replays: &mut HashMap<Flow, Replay>,
        end: Instant,
        locked: bool,
    ) -> Result<()> {
        let mut outcome = Ok(());
        loop {
            outcome = outcome.and(self.read(end).map_err(|error| Error::system("NFLOG", error)));
            let mut has_all = true;
            for (index, flow) in flows.iter().enumerate() {
                if self.packets.is_empty() {
                    break;
                }
                let held = self.packets.take(flow);
                if !held.is_empty() {
                    has_all = false;
                    let socket = sockets.get(index).copied();
                    let replay = match replays.entry(*flow) {
                        Entry::Occupied(replay) => replay.into_mut(),
                        Entry::Vacant(place) => {
                            let interface = match socket {
                                Some(socket) => bound_interface(socket).map(Some),
                                None => self.packets.bound_interface(flow),
                            };
                            match interface {
                                Ok(Some(interface)) => place.insert(self.packets.replay_of(*flow, interface)),
                                Ok(None) => {
                                    self.packets.discard(&[*flow]);
                                    continue;
                                }
                                // If nobody is there they draw a reset; if somebody is, the peer sends them again.
                                Err(error) => {
                                    self.packets.lost(held.len());
                                    outcome = outcome.and(Err(error));
                                    continue;
                                }
                            }
                        }
                    };
                    let came_back = replay.came_back(&held);
                    if locked && (came_back || !replay.returned.is_empty()) {
                        replay.returned.extend(held);
                    } else {
                        outcome = outcome.and(self.packets.replay(replay, held, socket));
                    }
                }
            }
            if has_all || Instant::now() > end {
                return outcome;
            }
        }
    }

    /// Takes in what the kernel has queued, for the thread that reads while nobody asks. Whoever asks next is told of an error.
    /// Returns whether to go on.
    pub(super) fn read_along(&mut self) -> bool {
        /// Then it is the turn of those who wait.
        const TURN: Duration = Duration::from_millis(1);
        self.failure = self.read(Instant::now() + TURN).err().or(self.failure.take());
        self.failure.is_none()
    }

    /// The thread has ended, because of this.
    pub(super) fn fail(&mut self, error: io::Error) {
        self.failure = Some(error);
    }

    /// What has been released, to be dropped where nobody waits.
    pub(super) fn take_spent(&mut self) -> Vec<Run> {
        std::mem::take(&mut self.spent)
    }

    /// Takes in what the kernel has queued, unless there is more than can be taken in until then.
    fn read(&mut self, end: Instant) -> io::Result<()> {
        let Self { socket, packets, next, .. } = self;
        loop {
            let more = socket.poll(|kind, payload| {
                if kind != PACKET {
                    return;
                }
                let copy = Copy::new(payload);
                if let Some(number) = copy.number {
                    packets.lost(number.wrapping_sub(*next) as usize);
                    *next = number.wrapping_add(1);
                }
                packets.push(&copy.packet(), copy.interface);
            });
            match more {
                Ok(true) if Instant::now() < end => {}
                Ok(_) => return Ok(()),
                // Packets were lost; their numbers tell how many.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// A packet as the kernel has copied it.
#[derive(Debug, Default)]
struct Copy<'a> {
    /// Counts the packets of the group.
    number: Option<u32>,
    interface: u32,
    packet: &'a [u8],
    /// What is in the place of the Ethernet header.
    ethernet: &'a [u8],
    tail_saved: bool,
}

impl<'a> Copy<'a> {
    fn new(message: &'a [u8]) -> Self {
        let mut copy = Self::default();
        for (kind, value) in attributes(message.get(HEADER..).unwrap_or_default()) {
            match (kind, value.first_chunk().map(|n| u32::from_be_bytes(*n))) {
                (ATTRIBUTE_SEQUENCE, number) => copy.number = number,
                (ATTRIBUTE_INTERFACE, Some(index)) => copy.interface = index,
                (ATTRIBUTE_PAYLOAD, _) => copy.packet = value,
                (ATTRIBUTE_HARDWARE_HEADER, _) => copy.ethernet = value,
                (ATTRIBUTE_PREFIX, _) => {
                    copy.tail_saved = value.strip_suffix(&[0]) == Some(TAIL_SAVED.as_bytes())
                }
                _ => {}
            }
        }
        copy
    }

    /// The whole packet where the kernel could copy only its first part, and the rule has written the rest where its
    /// Ethernet header was; otherwise what was copied. What is missing then, the peer sends again.
    fn packet(&self) -> Cow<'a, [u8]> {
        let ipv6 = self.packet.first().is_some_and(|first| first >> 4 == 6);
        let tail = self.ethernet.get(..TAIL[usize::from(ipv6)]).filter(|_| self.tail_saved);
        match (Parsed::new(self.packet), tail) {
            (Some(parsed), Some(tail)) if self.packet.len() == LOG_LIMIT && parsed.missing == tail.len() => {
                Cow::Owned([self.packet, tail].concat())
            }
            _ => Cow::Borrowed(self.packet),
        }
    }
}

/// Reads a message of a log group.
#[cfg(fuzzing)]
pub(crate) fn fuzz(message: &[u8]) {
    let copy = Copy::new(message);
    let packet = copy.packet();
    if let Some(parsed) = Parsed::new(&packet) {
        parsed.checksum(&packet);
    }
}

fn bind(socket: &mut Socket, group: u16) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(CONFIG, REQUEST | ACK, |m| {
        let [high, low] = group.to_be_bytes();
        m.bytes(&[0, 0, high, low]);
        m.attribute(CONFIG_COMMAND, &[COMMAND_BIND]);
        m.attribute(CONFIG_MODE, &[0, 0, 0xff, 0xff, COPY_PACKET, 0]); // as much as can be
        m.be32(CONFIG_THRESHOLD, 1);
        m.attribute(CONFIG_FLAGS, &NUMBERED.to_be_bytes());
    });
    socket.transact(&batch)
}

// linux/netfilter/nfnetlink_log.h
const HEADER: usize = 4;
const SUBSYSTEM: u16 = 4 << 8;
const PACKET: u16 = SUBSYSTEM;
const CONFIG: u16 = SUBSYSTEM | 1;
const CONFIG_COMMAND: u16 = 1;
const COMMAND_BIND: u8 = 1;
const CONFIG_MODE: u16 = 2;
const COPY_PACKET: u8 = 2;
const CONFIG_THRESHOLD: u16 = 5;
const CONFIG_FLAGS: u16 = 6;
const NUMBERED: u16 = 1;
const ATTRIBUTE_INTERFACE: u16 = 4;
const ATTRIBUTE_PAYLOAD: u16 = 9;
const ATTRIBUTE_PREFIX: u16 = 10;
const ATTRIBUTE_SEQUENCE: u16 = 12;
const ATTRIBUTE_HARDWARE_HEADER: u16 = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::packets::tests::packet;

    /// What the kernel says of a packet that is longer than a copy.
    fn message(packet: &[u8], ethernet: &[u8], prefix: Option<&str>) -> Vec<u8> {
        let mut batch = Batch::new();
        batch.message(PACKET, REQUEST, |m| {
            m.bytes(&[0; HEADER]);
            m.attribute(ATTRIBUTE_HARDWARE_HEADER, ethernet);
            if let Some(prefix) = prefix {
                m.string(ATTRIBUTE_PREFIX, prefix);
            }
            m.attribute(ATTRIBUTE_PAYLOAD, packet);
        });
        batch.as_bytes()[16..].to_vec()
    }

    #[test]
    fn a_tail_is_put_back_only_where_the_rule_has_saved_it() {
        let whole = packet(1, &vec![5; 65535 - 40]);
        let (first, tail) = whole.split_at(LOG_LIMIT);
        let ethernet = [tail, &[0; 10]].concat();
        let read =
            |packet, ethernet, prefix| Copy::new(&message(packet, ethernet, prefix)).packet().into_owned();
        assert_eq!(read(first, &ethernet, Some(TAIL_SAVED)), whole);
        // Linux before 6.18 says of every copy that its prefix is empty.
        for prefix in [None, Some(""), Some("tai"), Some("tails")] {
            assert_eq!(read(first, &ethernet, prefix), first, "{prefix:?}");
        }
        for ethernet in [&[][..], &[1, 2, 3]] {
            assert_eq!(read(first, ethernet, Some(TAIL_SAVED)), first);
        }
        assert_eq!(read(&whole[..100], &[1; 14], Some(TAIL_SAVED)), whole[..100]);
    }
}
