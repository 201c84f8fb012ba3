//! CRIU's images: read as CRIU itself reads them, and not one byte changed that need not be.

mod rewriting;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value as Json;
use soccr::connection::State;
use soccr::settings::Value;
use soccr_image::criu::{Directory, Protocol, Socket, Stream, rewrite, sockets};
use soccr_image::{AddressMap, ErrorKind};

const FILES: &[u8] = include_bytes!("images/files.img");

/// Sockets with a `tcp-stream` image: the listener has none.
const STREAMS: [u32; 6] = [0xa919d, 0xa919e, 0xa919f, 0xa91a0, 0xa91a1, 0xa91a2];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/criu/images")
}

fn json(name: &str) -> Vec<Json> {
    let text = std::fs::read_to_string(golden().join(name)).unwrap();
    let json: Json = serde_json::from_str(&text).unwrap();
    json["entries"].as_array().unwrap().clone()
}

fn stream(inode: u32) -> Stream {
    let bytes = std::fs::read(golden().join(format!("tcp-stream-{inode:x}.img"))).unwrap();
    Stream::parse(&bytes).unwrap()
}

fn maps(texts: &[&str]) -> Vec<AddressMap> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn number(json: &Json) -> u32 {
    match json {
        Json::String(hex) => u32::from_str_radix(hex.trim_start_matches("0x"), 16).unwrap(),
        number => number.as_u64().unwrap().try_into().unwrap(),
    }
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |c| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        other => panic!("{other}"),
    };
    let text: Vec<u8> = text.bytes().filter(|c| !c.is_ascii_whitespace() && *c != b'=').collect();
    let mut bytes = Vec::new();
    for four in text.chunks(4) {
        let bits = four.iter().enumerate().map(|(i, c)| u32::from(digit(*c)) << (18 - 6 * i)).sum::<u32>();
        bytes.extend(&bits.to_be_bytes()[1..four.len()]);
    }
    bytes
}

/// A directory with a copy of the images.
fn copy() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
    }
    directory
}

#[test]
fn every_socket_reads_as_criu_reads_it() {
    let sockets = sockets(FILES).unwrap();
    let truth: Vec<Json> = json("files.json").into_iter().filter_map(|e| e.get("isk").cloned()).collect();
    assert_eq!((sockets.len(), truth.len()), (7, 7));
    for (socket, truth) in sockets.iter().zip(truth) {
        let ip = |name: &str| truth[name][0].as_str().unwrap().parse::<IpAddr>().unwrap();
        let port = |name: &str| truth[name].as_u64().unwrap() as u16;
        assert_eq!((socket.id, socket.inode), (number(&truth["id"]), number(&truth["ino"])));
        assert_eq!(socket.protocol, Protocol::Tcp);
        assert_eq!(socket.state.name(), truth["state"].as_str().unwrap());
        assert_eq!(socket.local, SocketAddr::from((ip("src_addr"), port("src_port"))));
        assert_eq!(socket.remote, SocketAddr::from((ip("dst_addr"), port("dst_port"))));
        assert_eq!(socket.local.is_ipv6(), truth["family"] == "INET6");
        assert_eq!((socket.flags, socket.backlog), (number(&truth["flags"]), number(&truth["backlog"])));
        assert_eq!(socket.namespace, Some(number(&truth["ns_id"])));
        assert_eq!(socket.interface, None);
        let (opts, buffers) = (&truth["opts"], socket.buffers);
        assert_eq!(buffers.send, number(&opts["so_sndbuf"]));
        assert_eq!(buffers.receive, number(&opts["so_rcvbuf"]));
        assert_eq!(buffers.lock, number(&opts["so_buf_lock"]));
        assert_settings(socket, &truth);
    }
}

fn assert_settings(socket: &Socket, truth: &Json) {
    let names = [
        ("opts", "reuseaddr", "SO_REUSEADDR"),
        ("opts", "so_priority", "SO_PRIORITY"),
        ("opts", "so_rcvlowat", "SO_RCVLOWAT"),
        ("opts", "so_dontroute", "SO_DONTROUTE"),
        ("opts", "so_reuseport", "SO_REUSEPORT"),
        ("opts", "so_keepalive", "SO_KEEPALIVE"),
        ("opts", "so_oobinline", "SO_OOBINLINE"),
        ("ip_opts", "ttl", "IP_TTL"),
        ("tcp_opts", "nodelay", "TCP_NODELAY"),
        ("tcp_opts", "keepcnt", "TCP_KEEPCNT"),
        ("tcp_opts", "keepidle", "TCP_KEEPIDLE"),
        ("tcp_opts", "keepintvl", "TCP_KEEPINTVL"),
    ];
    let mut expected: Vec<(&str, i64)> = names
        .iter()
        .filter_map(|(group, field, name)| {
            let value = truth[group].get(field)?;
            Some((*name, value.as_bool().map_or_else(|| value.as_i64().unwrap(), i64::from)))
        })
        .chain(truth.get("v6only").map(|only| ("IPV6_V6ONLY", only.as_bool().unwrap().into())))
        .collect();
    let mut settings: Vec<(&str, i64)> = socket
        .settings
        .iter()
        .map(|(name, value)| match value {
            Value::Number(number) => (name, i64::from(*number)),
            other => panic!("{name}: {other:?}"),
        })
        .collect();
    expected.sort();
    settings.sort();
    assert_eq!(settings, expected, "socket {}", socket.id);
}

#[test]
fn every_stream_reads_as_criu_reads_it() {
    for inode in STREAMS {
        let stream = stream(inode);
        let truth = &json(&format!("tcp-stream-{inode:x}.json"))[0];
        let get = |name: &str| number(&truth[name]);
        assert_eq!(stream.inq_seq, get("inq_seq"));
        assert_eq!(stream.outq_seq, get("outq_seq"));
        assert_eq!(stream.unsq_len, get("unsq_len"));
        assert_eq!(stream.receive_queue.len() as u32, get("inq_len"));
        assert_eq!(stream.send_queue.len() as u32, get("outq_len"));
        assert!(stream.receive_queue == base64(truth["extra"]["inq"].as_str().unwrap()));
        assert!(stream.send_queue == base64(truth["extra"]["outq"].as_str().unwrap()));
        let (options, mask) = (&stream.options, get("opt_mask"));
        assert_eq!(u32::from(options.mss_clamp), get("mss_clamp"));
        let scale = options.window_scale.unwrap();
        assert_eq!((u32::from(scale.snd), u32::from(scale.rcv)), (get("snd_wscale"), get("rcv_wscale")));
        assert_eq!(options.timestamps, Some(get("timestamp")));
        assert_eq!((mask, options.sack, options.ecn, options.microseconds), (7, true, false, false));
        let window = stream.window.unwrap();
        assert_eq!(
            [window.snd_wl1, window.snd_wnd, window.max_window, window.rcv_wnd, window.rcv_wup],
            ["snd_wl1", "snd_wnd", "max_window", "rcv_wnd", "rcv_wup"].map(get)
        );
        assert_eq!((stream.cork, stream.nodelay), (None, None));
    }
}

/// As CRIU writes it with our C library: the bits of `opt_mask` from 9 on.
#[test]
fn the_round_trip_time_is_in_the_options() {
    let path = golden().join(format!("tcp-stream-{:x}.img", STREAMS[0]));
    let mut bytes = std::fs::read(path).unwrap();
    // Field 5, a varint: 7 becomes 7 | 300 << 9, which takes two bytes more.
    let at = bytes.windows(2).position(|pair| pair == [5 << 3, 7]).unwrap();
    assert_eq!(Stream::parse(&bytes).unwrap().rtt, Duration::ZERO);
    bytes.splice(at + 1..at + 2, [0x87, 0xb0, 0x09]);
    bytes[8] += 2;
    let stream = Stream::parse(&bytes).unwrap();
    assert_eq!(stream.rtt, Duration::from_micros(300 * 8));
    assert_eq!((stream.options.sack, stream.options.ecn), (true, false));
    let images = Directory::open(golden()).unwrap();
    let socket = images.sockets().iter().find(|socket| socket.state == State::Established).unwrap();
    assert_eq!(socket.connection(stream).unwrap().path.unwrap().rtt, Duration::from_micros(2400));
}

#[test]
fn every_connection_can_be_extracted() {
    let images = Directory::open(golden()).unwrap();
    let mut states = Vec::new();
    for socket in images.sockets() {
        if socket.state == State::Listen {
            assert!(images.stream(socket).unwrap().is_none());
            assert_eq!(images.extract(socket).unwrap_err().kind(), ErrorKind::Invalid);
            continue;
        }
        let connection = images.extract(socket).unwrap();
        let stream = stream(socket.inode);
        assert_eq!((connection.local, connection.remote), (socket.local, socket.remote));
        assert_eq!(connection.control.rcv_nxt, stream.inq_seq);
        assert_eq!(connection.control.write_seq, stream.outq_seq);
        assert!(connection.receive_queue == stream.receive_queue);
        assert!(connection.send_queue == stream.send_queue);
        assert_eq!(connection.settings, socket.settings);
        let mut bytes = Vec::new();
        soccr_image::write(&mut bytes, &connection).unwrap();
        assert_eq!(soccr_image::read(&bytes[..]).unwrap(), connection);
        states.push(connection.control.state);
    }
    use State::*;
    assert_eq!(states, [Established, Established, Established, CloseWait, Established, FinWait2]);
    assert!(images.socket(1).unwrap_err().to_string().contains("no Internet socket has the number 1"));
}

#[test]
fn unsent_bytes_before_a_fin_leave_the_fin_unsent() {
    let mut socket = sockets(FILES).unwrap().into_iter().find(|socket| socket.inode == 0xa919f).unwrap();
    socket.state = State::FinWait1;
    let connection = socket.connection(stream(0xa919f)).unwrap();
    assert!(connection.control.fin_unsent);
    assert_eq!(connection.control.snd_una(), connection.control.snd_nxt());
}

#[test]
fn a_link_local_connection_needs_its_scope() {
    // The IPv6 socket moved to fe80::1.
    let (bytes, _) = rewrite(FILES, &maps(&["::1=fe80::1"])).unwrap();
    let mut socket = sockets(&bytes).unwrap().remove(5);
    let error = socket.connection(stream(0xa91a1)).unwrap_err();
    assert!(error.to_string().contains("scope"), "{error}");
    socket.set_scope(7);
    let connection = socket.connection(stream(0xa91a1)).unwrap();
    assert_eq!(connection.local.to_string(), "[fe80::1%7]:54402");
    assert_eq!(connection.remote.to_string(), "[fe80::1%7]:7104");
}

#[test]
fn a_directory_that_is_none_is_foreign() {
    let directory = copy();
    assert_eq!(Directory::open(directory.path().join("none")).unwrap_err().kind(), ErrorKind::Io);
    std::fs::copy(golden().join("files.img"), directory.path().join("inventory.img")).unwrap();
    assert_eq!(Directory::open(directory.path()).unwrap_err().kind(), ErrorKind::Foreign);
}

#[test]
fn only_sixteen_bits_of_a_segment_size_count() {
    // Field 7 of the stream, a number in one byte or more: one bit above them, as CRIU hands it to the kernel.
    let mut bytes = std::fs::read(golden().join("tcp-stream-a919d.img")).unwrap();
    let plain = Stream::parse(&bytes).unwrap();
    let clamp = u32::from(plain.options.mss_clamp);
    let varint = |number: u32| {
        let groups = [number, number >> 7, number >> 14].map(|group| (group & 0x7f) as u8);
        if number >> 14 == 0 {
            vec![groups[0] | 0x80, groups[1]]
        } else {
            vec![groups[0] | 0x80, groups[1] | 0x80, groups[2]]
        }
    };
    let (old, new) =
        ([&[7 << 3][..], &varint(clamp)].concat(), [&[7 << 3][..], &varint(clamp | 1 << 16)].concat());
    let at = bytes.windows(old.len()).position(|window| window == old).unwrap();
    bytes.splice(at..at + old.len(), new.iter().copied());
    bytes[8] += (new.len() - old.len()) as u8;
    assert_eq!(Stream::parse(&bytes).unwrap(), plain);
}

#[test]
fn damaged_images_are_errors_or_other_values_but_no_panic() {
    let stream = std::fs::read(golden().join("tcp-stream-a919e.img")).unwrap();
    for length in 0..stream.len() {
        assert!(Stream::parse(&stream[..length]).is_err(), "{length}");
    }
    assert!(Stream::parse(&[&stream[..], &[0]].concat()).is_err());
    let rules = maps(&["127.0.0.1=1.2.3.4", "::1=::2"]);
    for length in 0..FILES.len() {
        // Whole entries may be missing: the format has no end.
        let _ = (sockets(&FILES[..length]), rewrite(&FILES[..length], &rules));
    }
    let walk = |bytes: &[u8], end: usize, check: &dyn Fn(&[u8])| {
        let mut bytes = bytes.to_vec();
        for bit in (0..end * 8).step_by(3) {
            bytes[bit / 8] ^= 1 << (bit % 8);
            check(&bytes);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    };
    walk(&stream, 90, &|bytes| drop(Stream::parse(bytes)));
    walk(FILES, FILES.len(), &|bytes| {
        if let (Ok(sockets), Ok((rewritten, _))) = (sockets(bytes), rewrite(bytes, &rules)) {
            assert_eq!(soccr_image::criu::sockets(&rewritten).unwrap().len(), sockets.len());
        }
    });
}

/// Fields 10 and 11 of a stream, and the bit of a reset behind a FIN, which means something only with that of a reset.
#[test]
fn what_old_images_and_ours_add_is_known() {
    let bytes = std::fs::read(golden().join("tcp-stream-a919d.img")).unwrap();
    let with = |more: &[u8]| {
        let mut bytes = bytes.clone();
        let end = 12 + usize::from(bytes[8]);
        bytes.splice(end..end, more.iter().copied());
        bytes[8] += more.len() as u8;
        Stream::parse(&bytes)
    };
    for (number, expected) in [(0, false), (1, true)] {
        let stream = with(&[10 << 3, number, 11 << 3, 1 - number]).unwrap();
        assert_eq!((stream.cork, stream.nodelay), (Some(expected), Some(!expected)));
    }
    // The last of a field counts.
    for (mask, reset, behind_fin) in [(0x200u32, false, false), (0x100, true, false), (0x300, true, true)] {
        let stream = with(&[5 << 3, mask as u8 | 0x80, (mask >> 7) as u8]).unwrap();
        assert_eq!((stream.reset, stream.reset_behind_fin), (reset, behind_fin));
    }
    // A queue of 64 MiB and one byte.
    for number in [1, 3] {
        let error = with(&[number << 3, 0x81, 0x80, 0x80, 0x20]).unwrap_err();
        assert!(error.to_string().contains("over 64 MiB"), "{error}");
    }
}

#[test]
fn who_does_not_wait_is_known() {
    let socket = sockets(FILES).unwrap().into_iter().find(|socket| socket.inode == STREAMS[0]).unwrap();
    for waits in [true, false] {
        let flags = if waits { socket.flags & !0o4000 } else { socket.flags | 0o4000 };
        let connection = Socket { flags, ..socket.clone() }.connection(stream(STREAMS[0])).unwrap();
        assert_eq!(connection.nonblocking, !waits);
    }
}
