//! Packets that have been captured, by connection: kept in order and within a limit, and handed to the connection.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::replay::{LONGEST, Replay};
use crate::connection::Flow;
use crate::diag::Diag;
use crate::error::{Error, Result};
use crate::segment::{Checksum, Parsed, Run};
use crate::sys::raw::{Inward, Ways};

/// What one packet costs beyond its bytes.
const OVERHEAD: usize = size_of::<Run>() + 16;

/// The most packets of one connection, where they do not join. A peer whose segments are of the usual size fills any window
/// with fewer; one that floods tiny ones must not make its release take longer than a moment.
const MOST: usize = 16 << 10;

/// What has been captured, in order, by connection.
#[derive(Debug)]
pub(super) struct Packets {
    flows: HashMap<Flow, Fate>,
    /// Connections whose packets arrive with other addresses than their sockets have (NAT), in both directions.
    wires: HashMap<Flow, Flow>,
    sockets: HashMap<Flow, Flow>,
    /// The discarded packets, and when they were discarded.
    discarded: VecDeque<(Instant, Flow)>,
    /// `None` in tests of what needs no way back.
    back: Option<Back>,
    bytes: usize,
    limit: usize,
    dropped: u64,
}

/// The way back for packets, and whether anybody is there, in the namespace where they are.
#[derive(Debug)]
pub(super) struct Back {
    ways: Ways,
    diag: Diag,
}

impl Back {
    pub(super) fn new(ways: Ways, diag: Diag) -> Self {
        Self { ways, diag }
    }
}

/// What becomes of the packets of a connection that is, or was, locked.
#[derive(Debug)]
enum Fate {
    /// They wait until they are replayed or taken.
    Held { queue: VecDeque<Run>, acks: usize },
    /// The connection has left: nobody here may answer.
    Discarded,
}

impl Packets {
    /// None yet. `limit` is in bytes.
    pub(super) fn new(back: Option<Back>, limit: usize) -> Self {
        let (flows, discarded) = (HashMap::new(), VecDeque::new());
        Self {
            flows,
            wires: HashMap::new(),
            sockets: HashMap::new(),
            discarded,
            back,
            bytes: 0,
            limit,
            dropped: 0,
        }
    }

    /// From now on the packets of these connections are kept. A connection that NAT translates is named with both flows.
    pub(super) fn hold(&mut self, flows: &[Flow], translated: &[(Flow, Flow)]) {
        for (flow, wire) in translated {
            self.wires.insert(flow.on_the_wire(), *wire);
            self.sockets.insert(*wire, flow.on_the_wire());
        }
        for flow in flows {
            let fate = Fate::Held { queue: VecDeque::new(), acks: 0 };
            self.flows.insert(flow.on_the_wire(), fate);
        }
    }

    /// How many packets of these connections there are.
    pub(super) fn count(&self, flows: &[Flow]) -> usize {
        let count = |flow: &Flow| match self.flows.get(&flow.on_the_wire()) {
            Some(Fate::Held { queue, .. }) => queue.len(),
            _ => 0,
        };
        flows.iter().map(count).sum()
    }

    /// Whether there are none of any connection.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Packets that could not be kept.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// So many packets have not come this far.
    pub(super) fn lost(&mut self, count: usize) {
        self.dropped += count as u64;
    }

    /// These connections are not locked any more, or not after all. What has not been taken by now will not arrive.
    pub(super) fn forget(&mut self, flows: &[Flow]) {
        for flow in flows {
            self.dropped += self.take(flow).len() as u64;
            self.flows.remove(&flow.on_the_wire());
            // Late packets go where their own addresses say.
            if let Some(wire) = self.wires.remove(&flow.on_the_wire()) {
                self.sockets.remove(&wire);
            }
        }
    }

    /// From now on the packets of these connections are thrown away.
    pub(super) fn discard(&mut self, flows: &[Flow]) {
        /// Until then the last packet has left the rule.
        const STRAGGLING: Duration = Duration::from_secs(10);
        while self.discarded.front().is_some_and(|(since, _)| since.elapsed() > STRAGGLING) {
            let Some((_, flow)) = self.discarded.pop_front() else { break };
            if matches!(self.flows.get(&flow), Some(Fate::Discarded)) {
                self.flows.remove(&flow);
            }
        }
        for flow in flows {
            self.take(flow);
            self.flows.insert(flow.on_the_wire(), Fate::Discarded);
            self.discarded.push_back((Instant::now(), flow.on_the_wire()));
        }
    }

    /// Takes in a packet that has come through this interface.
    pub(super) fn push(&mut self, bytes: &[u8], interface: u32) {
        let Some(parsed) = Parsed::new(bytes) else {
            self.dropped += 1;
            return;
        };
        if parsed.checksum(bytes) == Checksum::Wrong {
            return;
        }
        let wire = Flow { local: parsed.destination, remote: parsed.source };
        let flow = self.sockets.get(&wire).copied().unwrap_or(wire);
        match self.flows.get_mut(&flow) {
            Some(Fate::Held { queue, acks, .. }) => {
                let packet_cost = bytes.len() + OVERHEAD;
                // To go through the queue for a few of them would take longer than the packets behind may wait.
                if (self.bytes + packet_cost > self.limit || queue.len() >= MOST)
                    && *acks > 1 + queue.len() / 8
                {
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
                let place = place(queue, bytes, &parsed);
                if let Some(before) = place.checked_sub(1).and_then(|index| queue.get_mut(index)) {
                    let cost_before = cost(before);
                    if before.join(bytes, &parsed, LONGEST) {
                        self.bytes += cost(before) - cost_before;
                        return;
                    }
                    // Now there is time for it.
                    before.seal();
                }
                if queue.len() >= MOST {
                    self.dropped += 1;
                    return;
                }
                let run = Run::new(bytes, parsed);
                self.bytes += cost(&run);
                *acks += usize::from(is_pure_ack(&run));
                queue.insert(place, run);
            }
            Some(Fate::Discarded) => {}
            // It was on its way through the rule while its connection was unlocked. What a firewall keeps it
            // from, the peer sends again.
            None => {
                let flow = scoped(flow, interface);
                let delivered = match self.bound_interface(&flow) {
                    Ok(Some(interface)) => {
                        let mut replay = Replay::new(flow, flow, interface);
                        self.replay(&mut replay, [Run::new(bytes, parsed)], None)
                    }
                    other => other.map(drop),
                };
                self.dropped += u64::from(delivered.is_err());
            }
        }
    }

    /// The packets of a connection, in order; further ones are kept.
    pub(super) fn take(&mut self, flow: &Flow) -> VecDeque<Run> {
        let Some(Fate::Held { queue, acks }) = self.flows.get_mut(&flow.on_the_wire()) else {
            return VecDeque::new();
        };
        *acks = 0;
        let runs = std::mem::take(queue);
        self.bytes -= runs.iter().map(cost).sum::<usize>();
        runs
    }

    /// A replay for this connection, whose socket is bound to this interface (0: to none).
    pub(super) fn replay_of(&self, flow: Flow, interface: u32) -> Replay {
        Replay::new(flow, self.wires.get(&flow.on_the_wire()).copied().unwrap_or(flow), interface)
    }

    /// Hands packets to their connection, see [`Replay::packets`].
    pub(super) fn replay(
        &mut self,
        replay: &mut Replay,
        runs: impl IntoIterator<Item = Run>,
        socket: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        self.way(replay).and_then(|way| replay.packets(&way, runs, socket))
    }

    /// Makes the connection answer, see [`Replay::finish`].
    pub(super) fn finish(&mut self, replay: &mut Replay) -> Result<usize> {
        self.way(replay).and_then(|way| replay.finish(&way))
    }

    /// The interface to which the socket of a connection is bound (0: to none), or `None` where it has no socket: packets for
    /// it would draw a reset.
    pub(super) fn bound_interface(&mut self, flow: &Flow) -> Result<Option<u32>> {
        let Some(back) = &mut self.back else { return Ok(None) };
        back.diag.find(flow.local, flow.remote, |socket| socket.interface)
    }

    fn way(&mut self, replay: &Replay) -> Result<Inward<'_>> {
        let back = self.back.as_mut().ok_or_else(|| Error::invalid("no way back for held packets"))?;
        replay.way(&mut back.ways)
    }
}

/// Where a packet belongs: at the end, or before what has overtaken it on the last bit of its way.
fn place(queue: &VecDeque<Run>, packet: &[u8], parsed: &Parsed) -> usize {
    /// Links overtake by a few packets.
    const FARTHEST: usize = 8;
    let overtaking = |run: &&Run| run.has_overtaken(packet, parsed);
    queue.len() - queue.iter().rev().take(FARTHEST).take_while(overtaking).count()
}

fn cost(run: &Run) -> usize {
    run.memory() + OVERHEAD
}

fn is_pure_ack(run: &Run) -> bool {
    run.parsed().is_pure_ack()
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

#[cfg(test)]
pub(super) mod tests {
    use std::io::{ErrorKind, Read};
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::connection::ControlBlock;
    use crate::segment::{Segment, flags};

    fn flow() -> Flow {
        Flow { local: "192.0.2.1:80".parse().unwrap(), remote: "198.51.100.7:4000".parse().unwrap() }
    }

    /// A segment of [`flow`].
    pub(in crate::lock) fn packet(seq: u32, payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        segment(seq, payload).write(&mut packet);
        packet
    }

    fn segment(seq: u32, payload: &[u8]) -> Segment<'_> {
        Segment {
            source: flow().remote,
            destination: flow().local,
            seq,
            ack: 1,
            flags: flags::ACK,
            window: 1,
            timestamps: None,
            urgent: 0,
            payload,
        }
    }

    fn packets(limit: usize) -> Packets {
        let mut packets = Packets::new(None, limit);
        packets.hold(&[flow()], &[]);
        packets
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
        assert!(packets.is_empty());
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
    fn tiny_packets_have_a_limit_of_their_own() {
        let mut packets = packets(64 << 20);
        for number in 0..MOST as u32 + 10 {
            packets.push(&packet(2 * number, &[7]), 1);
        }
        assert_eq!((packets.count(&[flow()]), packets.dropped), (MOST, 10));
        // A packet that continues one of them still finds room; packets left at the unlock are counted.
        packets.push(&packet(2 * MOST as u32 - 1, &[7]), 1);
        assert_eq!(packets.dropped, 10);
        packets.forget(&[flow()]);
        assert_eq!((packets.dropped, packets.is_empty()), (10 + MOST as u64, true));
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
        assert_eq!((packets.is_empty(), packets.dropped), (true, 0));
    }

    /// Packets of 100 bytes each, by number, about the end of the sequence space; `clock` is their timestamp.
    fn numbered(clock: u32, number: u32, flags: u8) -> Vec<u8> {
        let mut packet = Vec::new();
        let payload = [number as u8; 100];
        let timestamps = Some((clock, 1));
        let seq = (100 * number).wrapping_sub(250);
        Segment { flags, timestamps, ..segment(seq, &payload) }.write(&mut packet);
        packet
    }

    /// The numbers of the packets that were joined, in order.
    fn order(packets: &mut Packets) -> Vec<Vec<u8>> {
        let numbers = |run: Run| run.data().chunks(100).map(|piece| piece[0]).collect();
        packets.take(&flow()).into_iter().map(numbers).collect()
    }

    #[test]
    fn packets_that_were_overtaken_are_put_in_order() {
        let mut packets = packets(1 << 20);
        for number in [0, 3, 1, 4, 2, 7, 6, 5, 8] {
            packets.push(&numbered(10 + number / 2, number, flags::ACK), 1);
        }
        assert_eq!(order(&mut packets).concat(), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(packets.is_empty());
    }

    #[test]
    fn what_says_something_new_stays_where_it_came() {
        // Sent again: with the newer clock it would make what follows invalid.
        let mut packets = packets(1 << 20);
        packets.push(&numbered(10, 2, flags::ACK), 1);
        packets.push(&numbered(11, 1, flags::ACK), 1);
        assert_eq!(order(&mut packets), [[2], [1]]);

        // Behind an acknowledgement the order is that of what they say.
        packets.push(&numbered(10, 2, flags::ACK), 1);
        packets.push(&packet(300, &[]), 1);
        packets.push(&numbered(10, 1, flags::ACK), 1);
        assert_eq!(order(&mut packets), [vec![2], vec![], vec![1]]);

        // The end comes last, and something urgent or the same bytes once more are left alone.
        packets.push(&numbered(10, 2, flags::ACK | flags::FIN), 1);
        packets.push(&numbered(10, 1, flags::ACK), 1);
        packets.push(&numbered(10, 1, flags::ACK), 1);
        packets.push(&numbered(10, 0, flags::ACK | flags::URG), 1);
        assert_eq!(order(&mut packets), [vec![1], vec![1], vec![2], vec![0]]);
    }

    /// A connection over `lo`, its peer, and where it stands; nothing where this user may not pause it.
    pub(in crate::lock) fn connection() -> Option<(TcpStream, TcpStream, ControlBlock)> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, _) = listener.accept().unwrap();
        if !soccr_lab::may_repair() {
            soccr_lab::skip("packets for a socket: needs CAP_NET_ADMIN");
            return None;
        }
        let control = crate::pause(&ours).and_then(|paused| paused.save()).unwrap().control;
        Some((peer, ours, control))
    }

    /// What the peer of the connection might send `offset` bytes further on.
    pub(in crate::lock) fn next(
        ours: &TcpStream,
        control: &ControlBlock,
        offset: u32,
        payload: &[u8],
    ) -> Vec<u8> {
        let Flow { local, remote } = Flow::of(ours).unwrap();
        let next = Segment {
            source: remote,
            destination: local,
            ack: control.snd_nxt(),
            window: 1000,
            ..segment(control.rcv_nxt.wrapping_add(offset), payload)
        };
        let mut packet = Vec::new();
        next.write(&mut packet);
        packet
    }

    /// For one that has left it would draw a reset.
    #[test]
    fn a_late_packet_reaches_a_connection_that_is_here() {
        let Some((peer, mut ours, control)) = connection() else { return };
        let back = Back::new(Ways::open().unwrap(), Diag::open().unwrap());
        let mut packets = Packets::new(Some(back), 1 << 20);
        let late = next(&ours, &control, 0, b"late");
        packets.push(&late, 1);
        let mut read = [0; 4];
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        ours.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"late");
        crate::pause(&ours).unwrap().detach().unwrap();
        packets.push(&late, 1);
        peer.set_nonblocking(true).unwrap();
        assert_eq!(peer.peek(&mut read).unwrap_err().kind(), ErrorKind::WouldBlock);
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
}
