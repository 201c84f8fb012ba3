use std::convert::Infallible;

use etherparse::{IpNumber, NetSlice, SlicedPacket, TcpOptionElement, TransportSlice};
use proptest::prelude::*;

use super::*;

const V4: [&str; 2] = ["192.0.2.1:4000", "198.51.100.7:80"];
const V6: [&str; 2] = ["[2001:db8::1]:4000", "[2001:db8:5::7]:80"];
const MAPPED: [&str; 2] = ["[::ffff:192.0.2.1]:4000", "[::ffff:198.51.100.7]:80"];

fn segment<'a>([source, destination]: [&str; 2], payload: &'a [u8]) -> Segment<'a> {
    Segment {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        seq: 0xfffffff0,
        ack: 0x01020304,
        flags: flags::ACK | flags::PSH,
        window: 501,
        timestamps: Some((0xdeadbeef, 7)),
        urgent: 0,
        payload,
    }
}

fn packet(segment: &Segment<'_>) -> Vec<u8> {
    let mut packet = vec![0xaa; 9];
    segment.write(&mut packet);
    packet
}

/// What an independent reader makes of a packet: checks both checksums and gives flags, seq, payload.
fn read(packet: &[u8]) -> (u8, u32, Vec<u8>) {
    let sliced = SlicedPacket::from_ip(packet).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
    let header = tcp.to_header();
    let expected = match sliced.net.unwrap() {
        NetSlice::Ipv4(v4) => {
            let ip = v4.header().to_header();
            assert_eq!((ip.protocol, ip.header_checksum), (IpNumber::TCP, ip.calc_header_checksum()));
            assert_eq!(usize::from(ip.total_len), packet.len());
            header.calc_checksum_ipv4(&ip, tcp.payload())
        }
        NetSlice::Ipv6(v6) => {
            let ip = v6.header().to_header();
            assert_eq!(usize::from(ip.payload_length) + 40, packet.len());
            header.calc_checksum_ipv6(&ip, tcp.payload())
        }
        _ => panic!("no IP"),
    };
    assert_eq!(header.checksum, expected.unwrap());
    (
        packet[packet.len() - tcp.payload().len() - header.header_len() + 13],
        tcp.sequence_number(),
        tcp.payload().into(),
    )
}

fn run(packet: &[u8]) -> Run {
    Run::new(packet, Parsed::new(packet).unwrap())
}

fn pieces(mut run: Run, limit: usize) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    let collect = |piece: &[u8]| {
        pieces.push(piece.to_vec());
        Ok::<_, Infallible>(())
    };
    run.pieces(limit, collect).unwrap();
    pieces
}

fn rewritten(packet: &[u8], limit: usize) -> Vec<Vec<u8>> {
    pieces(run(packet), limit)
}

#[test]
fn every_field_reads_back() {
    for addresses in [V4, V6, MAPPED] {
        let mut segment = segment(addresses, b"hello");
        segment.flags |= flags::URG;
        segment.urgent = 5;
        let packet = packet(&segment);
        assert_eq!(packet[0] >> 4, if addresses == V6 { 6 } else { 4 });
        assert_eq!(read(&packet), (segment.flags, segment.seq, b"hello".to_vec()));

        let sliced = SlicedPacket::from_ip(&packet).unwrap();
        let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
        assert_eq!((tcp.source_port(), tcp.destination_port()), (4000, 80));
        assert_eq!((tcp.acknowledgment_number(), tcp.window_size()), (segment.ack, 501));
        assert_eq!(tcp.urgent_pointer(), 5);
        let options: Vec<_> = tcp.options_iterator().map(Result::unwrap).collect();
        assert_eq!(options.last(), Some(&TcpOptionElement::Timestamp(0xdeadbeef, 7)));

        let parsed = Parsed::new(&packet).unwrap();
        assert_eq!(parsed.source.ip(), segment.source.ip().to_canonical());
        assert_eq!(parsed.destination.ip(), segment.destination.ip().to_canonical());
        assert_eq!((parsed.source.port(), parsed.destination.port()), (4000, 80));
        assert_eq!((parsed.seq, parsed.ack, parsed.flags), (segment.seq, segment.ack, segment.flags));
        assert_eq!((parsed.checksum(&packet), parsed.missing), (Checksum::Full, 0));
        assert_eq!(&packet[parsed.payload.clone()], b"hello");
        assert!(!parsed.is_pure_ack());
    }
}

#[test]
fn a_checksum_left_to_the_network_card_is_completed() {
    for addresses in [V4, V6] {
        let whole = packet(&segment(addresses, &[7; 4000]));
        let parsed = Parsed::new(&whole).unwrap();
        let mut partial = whole.clone();
        let at = parsed.header.start + 16;
        let pseudo =
            pseudo_header(parsed.source.ip(), parsed.destination.ip(), whole.len() - parsed.header.start);
        partial[at..at + 2].copy_from_slice(&fold(pseudo).to_be_bytes());
        assert_eq!(parsed.checksum(&partial), Checksum::Partial);
        assert_eq!(rewritten(&partial, PACKET_LIMIT), [whole]);
    }
}

#[test]
fn damage_is_seen() {
    let mut packet = packet(&segment(V4, b"hello"));
    *packet.last_mut().unwrap() ^= 1;
    assert_eq!(Parsed::new(&packet).unwrap().checksum(&packet), Checksum::Wrong);
}

#[test]
fn a_long_segment_becomes_several() {
    for addresses in [V4, V6] {
        let payload: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
        let mut long = segment(addresses, &payload);
        long.flags |= flags::FIN | flags::CWR;
        let pieces = rewritten(&packet(&long), 1500);
        let mut next = long.seq;
        let mut joined = Vec::new();
        for (index, piece) in pieces.iter().enumerate() {
            assert!(piece.len() <= 1500);
            let (flags, seq, data) = read(piece);
            assert_eq!(seq, next);
            assert_eq!(flags & flags::FIN != 0, index + 1 == pieces.len());
            assert_eq!(flags & flags::CWR != 0, index == 0);
            next = next.wrapping_add(data.len() as u32);
            joined.extend(data);
        }
        assert_eq!(joined, payload);
    }
}

/// The pointer counts from the sequence number of its segment, to behind the urgent byte.
#[test]
fn each_piece_points_to_the_same_urgent_byte() {
    for (addresses, urgent) in
        [V4, V6].into_iter().flat_map(|v| [1, 1400, 3000, 4000, 0xffff].map(|u| (v, u)))
    {
        let mut long = segment(addresses, &[1; 4000]);
        (long.flags, long.urgent) = (long.flags | flags::URG, urgent);
        for piece in rewritten(&packet(&long), 1500) {
            let parsed = Parsed::new(&piece).unwrap();
            let pointer = u16::from_be_bytes(*piece[parsed.header.start + 18..].first_chunk().unwrap());
            let offset = parsed.seq.wrapping_sub(long.seq);
            let expected = u32::from(urgent).checked_sub(offset).filter(|rest| *rest > 0);
            let found = (parsed.flags & flags::URG != 0).then_some(u32::from(pointer));
            assert_eq!(found, expected, "{urgent} at {offset}");
            assert!(found.is_some() || pointer == 0);
        }
    }
}

#[test]
fn a_packet_gets_the_service_of_its_socket() {
    for addresses in [V4, V6] {
        let mut packet = packet(&segment(addresses, b"hello"));
        set_service(&mut packet, Some(0xb8), Some(ORDINARY_HOP_LIMIT));
        match SlicedPacket::from_ip(&packet).unwrap().net.unwrap() {
            NetSlice::Ipv4(v4) => {
                let header = v4.header().to_header();
                assert_eq!((header.dscp.value() << 2, header.time_to_live), (0xb8, 64));
            }
            NetSlice::Ipv6(v6) => {
                let header = v6.header().to_header();
                assert_eq!((header.traffic_class, header.hop_limit), (0xb8, 64));
            }
            _ => panic!("no IP"),
        }
        let mut same = packet.clone();
        set_service(&mut same, None, None);
        assert_eq!(same, packet);
    }
}

#[test]
fn what_was_cut_off_is_not_acknowledged_as_finished() {
    let mut long = segment(V4, &[1; 1000]);
    long.flags |= flags::FIN;
    let whole = packet(&long);
    let cut = &whole[..900];
    assert_eq!(Parsed::new(cut).unwrap().missing, whole.len() - 900);
    let (flags, _, data) = read(&rewritten(cut, PACKET_LIMIT)[0]);
    assert_eq!((flags & flags::FIN, data.len()), (0, 900 - 52));
}

/// The peer, who repeats what is missing, says it again.
#[test]
fn what_was_cut_off_is_not_urgent() {
    for (urgent, is_told) in [(848, true), (849, false)] {
        let mut long = segment(V4, &[1; 1000]);
        (long.flags, long.urgent) = (long.flags | flags::URG, urgent);
        let (flags, _, data) = read(&rewritten(&packet(&long)[..900], PACKET_LIMIT)[0]);
        assert_eq!((flags & flags::URG != 0, data.len()), (is_told, 848));
    }
}

#[test]
fn ip_options_and_extension_headers_go() {
    let mut v4 = packet(&segment(V4, b"abc"));
    v4[0] = 0x46;
    v4.splice(20..20, [1, 1, 1, 0]);
    let total = v4.len() as u16;
    v4[2..4].copy_from_slice(&total.to_be_bytes());
    assert_eq!(rewritten(&v4, PACKET_LIMIT), [packet(&segment(V4, b"abc"))]);

    let mut v6 = packet(&segment(V6, b"abc"));
    v6[6] = 0;
    v6.splice(40..40, [TCP, 0, 1, 4, 0, 0, 0, 0]);
    v6[5] += 8;
    assert_eq!(rewritten(&v6, PACKET_LIMIT), [packet(&segment(V6, b"abc"))]);
}

#[test]
fn a_packet_over_64_kib_is_split() {
    let mut big = packet(&segment(V6, &[3; 1000]));
    big.resize(100_000, 3);
    big[4..6].fill(0);
    let pieces = rewritten(&big, PACKET_LIMIT);
    assert_eq!(pieces.iter().map(|piece| read(piece).2.len()).sum::<usize>(), 100_000 - 72);
}

#[test]
fn a_packet_gets_other_addresses() {
    for (before, after) in
        [(V4, ["203.0.113.9:1", "203.0.113.10:2"]), (V6, ["[2001:db8:9::1]:1", "[2001:db8:9::2]:2"])]
    {
        let mut run = run(&packet(&segment(before, b"abc")));
        run.seal();
        run.readdress(after[0].parse().unwrap(), after[1].parse().unwrap());
        assert_eq!(run.into_packet(), packet(&segment(after, b"abc")));
    }
}

#[test]
fn the_end_of_a_run_is_its_last_byte() {
    for addresses in [V4, V6] {
        let flags = flags::ACK | flags::PSH | flags::FIN;
        let long = packet(&Segment { flags, ..segment(addresses, b"abcdef") });
        let last = Segment { seq: 0xfffffff5, flags: flags::ACK | flags::FIN, ..segment(addresses, b"f") };
        assert_eq!(run(&long).end().into_packet(), packet(&last));
        let none = Segment { flags: flags::ACK, ..segment(addresses, b"") };
        assert_eq!(run(&packet(&none)).end().into_packet(), packet(&none));
    }
}

#[test]
fn fragments_and_other_protocols_are_no_segments() {
    let whole = packet(&segment(V4, b"hello"));
    for (at, value) in [(6, 0x20), (7, 1), (9, 17), (0, 0x44), (0, 0x75)] {
        let mut packet = whole.clone();
        packet[at] = value;
        assert_eq!(Parsed::new(&packet), None, "{at} {value}");
    }
}

/// The packets made of runs, each read back.
fn joined(packets: &[Vec<u8>], limit: usize) -> Vec<(u8, u32, Vec<u8>)> {
    let mut runs: Vec<Run> = Vec::new();
    for packet in packets {
        let parsed = Parsed::new(packet).unwrap();
        if !runs.last_mut().is_some_and(|run| run.join(packet, &parsed, limit)) {
            runs.push(Run::new(packet, parsed));
        }
    }
    runs.into_iter().map(|run| read(&run.into_packet())).collect()
}

#[test]
fn segments_that_follow_each_other_are_joined() {
    for addresses in [V4, V6] {
        let piece = |at: u32, flags| {
            let payload = [at as u8; 100];
            let seq = 0xfffffff0u32.wrapping_add(100 * at);
            packet(&Segment { seq, flags, ..segment(addresses, &payload) })
        };
        let mut packets: Vec<_> = (0..4).map(|at| piece(at, flags::ACK)).collect();
        packets.push(piece(4, flags::ACK | flags::PSH));
        packets.push(piece(5, flags::ACK | flags::FIN));
        // Bytes behind the end of a packet are padding.
        packets[1].extend([0xee; 6]);
        let payload: Vec<u8> = (0..6).flat_map(|at| [at; 100]).collect();
        let all = flags::ACK | flags::PSH | flags::FIN;
        assert_eq!(joined(&packets, PACKET_LIMIT), [(all, 0xfffffff0, payload)]);
        assert_eq!(joined(&packets, 400).len(), 2);
        assert_eq!(joined(&packets, 0).len(), 6);
    }
}

#[test]
fn a_segment_that_says_something_new_stays_apart() {
    for addresses in [V4, V6] {
        let first = Segment { flags: flags::ACK, seq: 1, ..segment(addresses, b"abc") };
        let next = Segment { seq: 4, ..first.clone() };
        let apart = |first: &[u8], next: &[u8]| joined(&[first.into(), next.into()], PACKET_LIMIT).len() == 2;
        assert!(!apart(&packet(&first), &packet(&next)));
        let later = Segment { timestamps: Some((0xdeadbef0, 9)), ..next.clone() };
        let long = Segment { payload: b"abcabc", ..first.clone() };
        let mut run = run(&packet(&first));
        let later = packet(&later);
        assert!(run.join(&later, &Parsed::new(&later).unwrap(), PACKET_LIMIT));
        assert_eq!(run.into_packet(), packet(&long));
        for other in [
            Segment { seq: 5, ..next.clone() },
            Segment { seq: 1, ..next.clone() },
            Segment { ack: 9, ..next.clone() },
            Segment { window: 9, ..next.clone() },
            Segment { timestamps: None, ..next.clone() },
            Segment { payload: b"", ..next.clone() },
            Segment { flags: flags::ACK | flags::URG, ..next.clone() },
            Segment { flags: flags::ACK | flags::RST, ..next.clone() },
            Segment { flags: flags::ACK | flags::CWR, ..next.clone() },
        ] {
            assert!(apart(&packet(&first), &packet(&other)), "{other:?}");
        }
        let ended = Segment { flags: flags::ACK | flags::FIN, ..first.clone() };
        assert!(apart(&packet(&ended), &packet(&next)));
        let mut marked = packet(&next);
        marked[1] |= if addresses == V4 { 3 } else { 0x30 };
        assert!(apart(&packet(&first), &marked));
    }
}

proptest! {
    #[test]
    fn any_segment_is_read_as_it_was_built(
        v6: bool,
        seq: u32,
        ack: u32,
        flags: u8,
        timestamps: Option<(u32, u32)>,
        payload in prop::collection::vec(any::<u8>(), 0..3000),
        limit in 200usize..4000,
    ) {
        let mut segment = segment(if v6 { V6 } else { V4 }, &payload);
        (segment.seq, segment.ack, segment.flags, segment.timestamps) = (seq, ack, flags, timestamps);
        let packet = packet(&segment);
        prop_assert_eq!(read(&packet), (flags, seq, payload.clone()));
        // One checksum in 65536 happens to be that of the pseudo-header, too.
        prop_assert_ne!(Parsed::new(&packet).unwrap().checksum(&packet), Checksum::Wrong);
        let pieces = rewritten(&packet, limit);
        let joined: Vec<u8> = pieces.iter().flat_map(|piece| read(piece).2).collect();
        prop_assert_eq!(joined, payload);
    }

    #[test]
    fn any_bytes_are_survived(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        version in prop::sample::select(&[0x45u8, 0x46, 0x4f, 0x60][..]),
        limit in 0usize..200,
    ) {
        if let Some(first) = bytes.first_mut() {
            *first = version;
        }
        if let Some(protocol) = bytes.get_mut(if version == 0x60 { 6 } else { 9 }) {
            *protocol = TCP;
        }
        if let Some(parsed) = Parsed::new(&bytes) {
            pieces(Run::new(&bytes, parsed.clone()), limit);
            Run::new(&bytes, parsed).end();
        }
    }
}

#[test]
fn a_packet_that_comes_back_is_known() {
    type Change = fn(&mut Segment<'_>);
    for addresses in [V4, V6] {
        let sent = segment(addresses, b"hello");
        let changed = |change: Change| {
            let mut segment = segment(addresses, b"hello");
            change(&mut segment);
            run(&packet(&segment))
        };
        let mut first = run(&packet(&sent));
        // What joins it may bring these.
        let alike: [Change; 3] =
            [|_| (), |segment| segment.flags &= !flags::PSH, |segment| segment.flags |= flags::FIN];
        for change in alike {
            assert!(changed(change).begins_like(&first));
        }
        let others: [Change; 7] = [
            |segment| segment.seq += 1,
            |segment| segment.ack += 1,
            |segment| segment.window += 1,
            |segment| segment.flags |= flags::URG,
            |segment| segment.timestamps = Some((0xdeadbef0, 7)),
            |segment| segment.timestamps = None,
            |segment| segment.payload = b"help!",
        ];
        for (nth, change) in others.iter().enumerate() {
            assert!(!changed(*change).begins_like(&first), "change {nth}");
        }
        let short = run(&packet(&sent));
        let next = packet(&Segment { seq: sent.seq.wrapping_add(5), payload: b" again", ..sent });
        assert!(first.join(&next, &Parsed::new(&next).unwrap(), PACKET_LIMIT));
        assert!(first.begins_like(&short) && !short.begins_like(&first));
    }
}
