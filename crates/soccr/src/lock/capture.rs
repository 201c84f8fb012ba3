//! The packets that a lock holds back: the rule that drops them copies them to a netlink socket first
//! (`log group`, NFLOG), in their order.
//!
//! A thread of the [`Locker`](super::Locker) reads along, because the kernel keeps little for an ordinary user, and
//! because a packet may still be on its way through the rule when its connection is unlocked.
//!
//! # References
//! `linux/netfilter/nfnetlink_log.h`.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use soccr_netlink::{ACK, Batch, REQUEST, Socket, attributes};

use super::canonical;
use super::held::{Held, LONGEST, Replay};
use super::rule::{LOG_LIMIT, TAIL};
use super::table::Unlock;
use crate::connection::Flow;
use crate::error::{Error, Result};
use crate::segment::{Checksum, Parsed, Run};
use crate::sys::raw::Injector;

/// What one packet costs beyond its bytes.
const OVERHEAD: usize = 64;

/// A log group, the packets that have come from it, and the way back for them.
#[derive(Debug)]
pub(super) struct Capture {
    socket: Socket,
    group: u16,
    packets: Packets,
    next: u32,
    /// What has been released, until its memory is given back.
    spent: Vec<Run>,
}

/// What has been captured, in order, by connection.
#[derive(Debug)]
struct Packets {
    flows: HashMap<Flow, Fate>,
    /// Those that were discarded, and when.
    discarded: VecDeque<(Instant, Flow)>,
    injectors: [Option<Injector>; 2],
    bytes: usize,
    limit: usize,
    dropped: u64,
}

/// What becomes of the packets of a connection that is, or was, locked.
#[derive(Debug)]
enum Fate {
    /// They wait until they are replayed or taken.
    Held { queue: VecDeque<Run>, acks: usize },
    /// The connection has left: nobody here may answer.
    Discarded,
}

impl Capture {
    /// Opens a group that nobody else listens to. `socket` and `injectors` (IPv4, IPv6) are in the namespace
    /// where the packets are.
    pub(super) fn open(
        mut socket: Socket,
        injectors: [Option<Injector>; 2],
        limit: usize,
    ) -> io::Result<Self> {
        // What the kernel may keep until the thread comes; more only with privileges in the first namespace.
        socket.set_receive_buffer(limit)?;
        let first = std::process::id() as u16;
        let mut outcome = Err(io::ErrorKind::AddrInUse.into());
        for attempt in 0..256u16 {
            let group = first.wrapping_add(attempt.wrapping_mul(251)).max(1);
            match bind(&mut socket, group) {
                Ok(()) => {
                    let packets = Packets {
                        flows: HashMap::new(),
                        discarded: VecDeque::new(),
                        injectors,
                        bytes: 0,
                        limit,
                        dropped: 0,
                    };
                    return Ok(Self { socket, group, packets, next: 0, spent: Vec::new() });
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

    /// Packets that could not be kept: over the limit, or because the kernel had no room for them.
    pub(super) fn dropped(&self) -> u64 {
        self.packets.dropped
    }

    /// From now on the packets of these connections are kept.
    pub(super) fn hold(&mut self, flows: &[Flow]) {
        for flow in flows {
            let fate = Fate::Held { queue: VecDeque::new(), acks: 0 };
            self.packets.flows.insert(canonical(flow), fate);
        }
    }

    /// How many packets of these connections have been read.
    pub(super) fn held(&self, flows: &[Flow]) -> usize {
        let count = |flow| match self.packets.flows.get(&canonical(flow)) {
            Some(Fate::Held { queue, .. }) => queue.len(),
            _ => 0,
        };
        flows.iter().map(count).sum()
    }

    /// The packets of these connections, in order; further ones are kept.
    pub(super) fn take(&mut self, flows: &[Flow]) -> io::Result<Vec<Held>> {
        self.read()?;
        let mut packets = |flow| self.packets.take(flow).into_iter().map(Run::into_packet).collect();
        Ok(flows.iter().map(|flow| Held { flow: *flow, packets: packets(flow) }).collect())
    }

    /// These connections are not locked after all.
    pub(super) fn forget(&mut self, flows: &[Flow]) {
        for flow in flows {
            self.packets.take(flow);
            self.packets.flows.remove(&canonical(flow));
        }
    }

    /// From now on the packets of these connections are thrown away.
    pub(super) fn discard(&mut self, flows: &[Flow]) {
        /// Until then the last packet has left the rule.
        const STRAGGLING: Duration = Duration::from_secs(10);
        let packets = &mut self.packets;
        while packets.discarded.front().is_some_and(|(since, _)| since.elapsed() > STRAGGLING) {
            let Some((_, flow)) = packets.discarded.pop_front() else { break };
            if matches!(packets.flows.get(&flow), Some(Fate::Discarded)) {
                packets.flows.remove(&flow);
            }
        }
        for flow in flows {
            packets.take(flow);
            packets.flows.insert(canonical(flow), Fate::Discarded);
            packets.discarded.push_back((Instant::now(), canonical(flow)));
        }
    }

    /// Gives these connections their packets, has them unlocked, and gives them what came between.
    /// Returns how many packets that were.
    ///
    /// What came between is overtaken by what arrives by itself. The connections are kept silent until all of it is there:
    /// so their peers hear of no gap, and send nothing again.
    ///
    /// # Errors
    /// The first error. Everything is tried nevertheless.
    pub(super) fn release(
        &mut self,
        flows: &[Flow],
        mut unlock: impl FnMut(Unlock, &[Flow]) -> Result<()>,
    ) -> Result<usize> {
        let mut replays = HashMap::new();
        let mut outcome = self.catch_up(flows, &mut replays);
        let (waiting, idle): (Vec<_>, Vec<_>) = flows.iter().partition(|flow| replays.contains_key(flow));
        outcome = outcome.and(unlock(Unlock::Both, &idle));
        let receive = unlock(Unlock::Receive, &waiting);
        outcome = outcome.and(receive.or_else(|_| unlock(Unlock::Both, &waiting)));
        outcome = outcome.and(self.catch_up(flows, &mut replays));
        self.forget(flows);
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

    /// Gives these connections their packets until none is left.
    fn catch_up(&mut self, flows: &[Flow], replays: &mut HashMap<Flow, Replay>) -> Result<()> {
        /// A peer that gets no answer stops within its window; one that never stops must not keep us here.
        const ROUNDS: usize = 8;
        let mut outcome = Ok(());
        for _ in 0..ROUNDS {
            outcome = outcome.and(self.read().map_err(|error| Error::system("NFLOG", error)));
            if self.packets.bytes == 0 {
                break;
            }
            outcome = outcome.and(self.replay(flows, replays));
        }
        outcome
    }

    /// What has been released, to be dropped where nobody waits.
    pub(super) fn take_spent(&mut self) -> Vec<Run> {
        std::mem::take(&mut self.spent)
    }

    fn replay(&mut self, flows: &[Flow], replays: &mut HashMap<Flow, Replay>) -> Result<()> {
        let mut outcome = Ok(());
        for flow in flows {
            if self.packets.bytes == 0 {
                break;
            }
            let held = self.packets.take(flow);
            if !held.is_empty() {
                let replay = replays.entry(*flow).or_insert_with(|| Replay::new(*flow));
                outcome = outcome.and(self.packets.replay(replay, held));
            }
        }
        outcome
    }

    /// Takes in what the kernel has queued.
    pub(super) fn read(&mut self) -> io::Result<()> {
        let Self { socket, packets, next, .. } = self;
        loop {
            let more = socket.poll(|kind, payload| {
                if kind != PACKET {
                    return;
                }
                let (mut packet, mut ethernet, mut tail_saved, mut interface) = (&[][..], &[][..], false, 0);
                for (kind, value) in attributes(payload.get(HEADER..).unwrap_or_default()) {
                    match (kind, value.first_chunk().map(|n| u32::from_be_bytes(*n))) {
                        (ATTRIBUTE_SEQUENCE, Some(number)) => {
                            packets.dropped += u64::from(number.wrapping_sub(*next));
                            *next = number.wrapping_add(1);
                        }
                        (ATTRIBUTE_INTERFACE, Some(index)) => interface = index,
                        (ATTRIBUTE_PAYLOAD, _) => packet = value,
                        (ATTRIBUTE_HARDWARE_HEADER, _) => ethernet = value,
                        (ATTRIBUTE_PREFIX, _) => tail_saved = true,
                        _ => {}
                    }
                }
                if tail_saved {
                    packets.push(&with_tail(packet, ethernet), interface);
                } else {
                    packets.push(packet, interface);
                }
            });
            match more {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // Packets were lost; their numbers tell how many.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Packets {
    /// Takes in a packet that has come through this interface.
    fn push(&mut self, bytes: &[u8], interface: u32) {
        let Some(parsed) = Parsed::new(bytes) else {
            self.dropped += 1;
            return;
        };
        if parsed.checksum(bytes) == Checksum::Wrong {
            return;
        }
        let flow = Flow { local: parsed.destination, remote: parsed.source };
        match self.flows.get_mut(&flow) {
            Some(Fate::Held { queue, acks, .. }) => {
                let packet_cost = bytes.len() + OVERHEAD;
                if self.bytes + packet_cost > self.limit && *acks > 1 {
                    // The last acknowledgement says what those before it said.
                    let last = queue.iter().rposition(is_pure_ack);
                    let mut index = 0;
                    queue.retain(|run| {
                        let keep = !is_pure_ack(run) || Some(index) == last;
                        index += 1;
                        self.bytes -= if keep { 0 } else { cost(run) };
                        self.dropped += u64::from(!keep);
                        keep
                    });
                    *acks = 1;
                }
                if self.bytes + packet_cost > self.limit {
                    // What the peer has sent last it also sends again.
                    self.dropped += 1;
                    return;
                }
                if let Some(last) = queue.back_mut() {
                    let before = cost(last);
                    if last.join(bytes, &parsed, LONGEST) {
                        self.bytes += cost(last) - before;
                        return;
                    }
                    // Now there is time for it.
                    last.seal();
                }
                let run = Run::new(bytes, parsed);
                self.bytes += cost(&run);
                *acks += usize::from(is_pure_ack(&run));
                queue.push_back(run);
            }
            Some(Fate::Discarded) => {}
            // It was on its way through the rule while its connection was unlocked. What a firewall keeps it
            // from, the peer sends again.
            None => drop(self.replay(&mut Replay::new(scoped(flow, interface)), [Run::new(bytes, parsed)])),
        }
    }

    fn take(&mut self, flow: &Flow) -> VecDeque<Run> {
        let Some(Fate::Held { queue, acks }) = self.flows.get_mut(&canonical(flow)) else {
            return VecDeque::new();
        };
        *acks = 0;
        let runs = std::mem::take(queue);
        self.bytes -= runs.iter().map(cost).sum::<usize>();
        runs
    }

    /// Injects packets. Every one is tried; the first error is returned.
    fn replay(&self, replay: &mut Replay, runs: impl IntoIterator<Item = Run>) -> Result<()> {
        let injector = self.injector(&replay.flow())?;
        let mut outcome = Ok(());
        for run in runs {
            outcome = outcome.and(replay.packet(injector, run));
        }
        outcome
    }

    fn finish(&self, replay: &mut Replay) -> Result<usize> {
        self.injector(&replay.flow()).and_then(|injector| replay.finish(injector))
    }

    fn injector(&self, flow: &Flow) -> Result<&Injector> {
        let injector = &self.injectors[usize::from(!flow.is_ipv4())];
        injector.as_ref().ok_or_else(|| {
            Error::refused(
                "a held packet of a missing address family",
                "the kernel got it after the locker was made",
            )
        })
    }
}

fn cost(run: &Run) -> usize {
    run.memory() + OVERHEAD
}

fn is_pure_ack(run: &Run) -> bool {
    run.parsed().is_pure_ack()
}

/// The whole of a packet of which the kernel could copy only the first part: the rule has written the rest where
/// its Ethernet header was.
fn with_tail<'a>(packet: &'a [u8], ethernet: &[u8]) -> Cow<'a, [u8]> {
    let ipv6 = packet.first().is_some_and(|first| first >> 4 == 6);
    let tail = ethernet.get(..TAIL[usize::from(ipv6)]);
    match (Parsed::new(packet), tail) {
        (Some(parsed), Some(tail)) if packet.len() == LOG_LIMIT && parsed.missing == tail.len() => {
            Cow::Owned([packet, tail].concat())
        }
        _ => Cow::Borrowed(packet),
    }
}

/// The connection of a packet: link-local addresses mean nothing without the interface.
fn scoped(mut flow: Flow, interface: u32) -> Flow {
    for end in [&mut flow.local, &mut flow.remote] {
        if let SocketAddr::V6(end) = end
            && end.ip().is_unicast_link_local()
        {
            end.set_scope_id(interface);
        }
    }
    flow
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
    use crate::segment::{Segment, flags};

    fn flow() -> Flow {
        Flow { local: "192.0.2.1:80".parse().unwrap(), remote: "198.51.100.7:4000".parse().unwrap() }
    }

    fn packet(seq: u32, payload: &[u8]) -> Vec<u8> {
        let segment = Segment {
            source: flow().remote,
            destination: flow().local,
            seq,
            ack: 1,
            flags: flags::ACK,
            window: 1,
            timestamps: None,
            urgent: 0,
            payload,
        };
        let mut packet = Vec::new();
        segment.write(&mut packet);
        packet
    }

    fn packets(limit: usize) -> Packets {
        let queue = VecDeque::new();
        Packets {
            flows: [(flow(), Fate::Held { queue, acks: 0 })].into(),
            discarded: VecDeque::new(),
            injectors: [None, None],
            bytes: 0,
            limit,
            dropped: 0,
        }
    }

    fn taken(packets: &mut Packets) -> Vec<Vec<u8>> {
        packets.take(&flow()).into_iter().map(Run::into_packet).collect()
    }

    #[test]
    fn acknowledgements_give_way_to_data() {
        let acks: Vec<_> = (0..10).map(|seq| packet(seq, &[])).collect();
        let data = packet(10, &[7; 500]);
        let mut packets = packets(10 * (40 + OVERHEAD) + 100);
        acks.iter().chain([&data]).for_each(|packet| packets.push(packet, 1));
        assert_eq!(packets.dropped, 9);
        assert_eq!(taken(&mut packets), [acks[9].clone(), data]);
        assert_eq!(packets.bytes, 0);
    }

    #[test]
    fn over_the_limit_the_newest_go() {
        let sent: Vec<_> = (0..4).map(|seq| packet(seq, &[7; 500])).collect();
        let mut packets = packets(2 * (540 + OVERHEAD));
        sent.iter().for_each(|packet| packets.push(packet, 1));
        assert_eq!(packets.dropped, 2);
        assert_eq!(taken(&mut packets), sent[..2]);
        packets.push(&sent[3], 1);
        assert_eq!(taken(&mut packets), sent[3..]);
    }

    #[test]
    fn data_that_follows_is_joined_and_damage_is_left_out() {
        let sent: Vec<_> = (0..4).map(|index| packet(500 * index, &[index as u8; 500])).collect();
        let mut packets = packets(1 << 20);
        let mut damaged = sent[3].clone();
        *damaged.last_mut().unwrap() ^= 1;
        sent[..3].iter().chain([&damaged, &sent[3]]).for_each(|packet| packets.push(packet, 1));
        let payload: Vec<u8> = (0..4).flat_map(|index| [index; 500]).collect();
        assert_eq!(taken(&mut packets), [packet(0, &payload)]);
        assert_eq!((packets.bytes, packets.dropped), (0, 0));
    }

    #[test]
    fn a_late_packet_keeps_its_interface() {
        let parse = |local: &str, remote: &str| Flow {
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
        };
        let late = parse("[fe80::1]:80", "[fe80::2]:4000");
        assert_eq!(scoped(late, 7), parse("[fe80::1%7]:80", "[fe80::2%7]:4000"));
        let global = parse("[2001:db8::1]:80", "[2001:db8::2]:4000");
        assert_eq!(scoped(global, 7), global);
        assert_eq!(scoped(flow(), 7), flow());
    }

    #[test]
    fn the_tail_of_a_long_packet_is_put_back() {
        let whole = packet(1, &vec![5; 65535 - 40]);
        let (first, tail) = whole.split_at(LOG_LIMIT);
        assert_eq!(*with_tail(first, &[tail, &[0; 10]].concat()), *whole);
        for ethernet in [&[][..], &[1, 2, 3]] {
            assert_eq!(*with_tail(first, ethernet), *first);
        }
        assert_eq!(*with_tail(&whole[..100], &[1; 14]), whole[..100]);
    }
}
