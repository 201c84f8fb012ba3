//! CRIU's images: read as CRIU itself reads them, and not one byte changed that need not be.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value as Json;
use soccr::connection::State;
use soccr::settings::Value;
use soccr_image::criu::{Directory, Protocol, Socket, Stream, rewrite, sockets};
use soccr_image::{AddressMap, ErrorKind};

const FILES: &[u8] = include_bytes!("criu/files.img");

/// Sockets with a `tcp-stream` image: the listener has none.
const STREAMS: [u32; 6] = [0xa919d, 0xa919e, 0xa919f, 0xa91a0, 0xa91a1, 0xa91a2];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/criu")
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
fn without_a_match_nothing_changes() {
    for rules in [&[][..], &["10.0.0.1=10.0.0.2"], &["127.0.0.1:7000=10.0.0.2", "[::1]:1=::2"][..1]] {
        let (bytes, changed) = rewrite(FILES, &maps(rules)).unwrap();
        let expected = usize::from(rules.len() == 1 && rules[0].starts_with("127"));
        assert_eq!(changed, expected, "{rules:?}");
        assert_eq!(bytes == FILES, changed == 0);
    }
}

#[test]
fn only_what_a_rule_concerns_changes() {
    let old = sockets(FILES).unwrap();
    let rules = ["127.0.0.1:7000=192.0.2.1:80", "127.0.0.1=198.51.100.255", "::1=2001:db8::ffff:1"];
    let (bytes, changed) = rewrite(FILES, &maps(&rules)).unwrap();
    assert_eq!(changed, 7);
    let new = sockets(&bytes).unwrap();
    for (old, new) in old.iter().zip(&new) {
        let (local, remote) = match (old.state, old.local) {
            (State::Listen, _) => ("192.0.2.1:80".parse().unwrap(), "0.0.0.0:0".parse().unwrap()),
            (_, SocketAddr::V4(_)) => {
                let ip: IpAddr = "198.51.100.255".parse().unwrap();
                ((ip, old.local.port()).into(), (ip, old.remote.port()).into())
            }
            _ => {
                let ip: IpAddr = "2001:db8::ffff:1".parse().unwrap();
                ((ip, old.local.port()).into(), (ip, old.remote.port()).into())
            }
        };
        assert_eq!(*new, Socket { local, remote, ..old.clone() });
    }
    // What rules have done, rules undo: then every byte is where it was.
    let rules = ["192.0.2.1:80=127.0.0.1:7000", "198.51.100.255=127.0.0.1", "2001:db8::ffff:1=::1"];
    let (back, changed) = rewrite(&bytes, &maps(&rules)).unwrap();
    assert_eq!(changed, 7);
    assert!(back == FILES);
}

/// The container by hand: the entry of the socket with number 13, changed by `change`.
fn with_changed_entry(change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let (mut out, mut rest) = (FILES[..8].to_vec(), &FILES[8..]);
    while !rest.is_empty() {
        let length = u32::from_le_bytes(rest[..4].try_into().unwrap()) as usize;
        let mut entry = rest[4..4 + length].to_vec();
        if entry.starts_with(&[8, 4, 16, 13]) {
            change(&mut entry);
        }
        out.extend((entry.len() as u32).to_le_bytes());
        out.extend(entry);
        rest = &rest[4 + length..];
    }
    out
}

/// The message of the socket within its entry, replaced by what `change` makes of it.
fn with_changed_socket(change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    with_changed_entry(|entry| {
        assert_eq!((entry[4], entry[5] as usize), (0x22, entry.len() - 6));
        let mut socket = entry.split_off(6);
        change(&mut socket);
        entry.truncate(5);
        entry.extend([socket.len() as u8 | 0x80, (socket.len() >> 7) as u8]);
        entry.extend(socket);
    })
}

#[test]
fn unknown_fields_and_unusual_encodings_stay() {
    // Unknown: field 1000, a varint of needless length, and field 1001, bytes, in socket and entry.
    let unknown = [0xc0, 0x3e, 0x81, 0x80, 0x00, 0xca, 0x3e, 3, b'a', b'b', b'c'];
    let files = with_changed_socket(|socket| {
        socket.splice(0..0, unknown);
        socket.extend(unknown);
    });
    let rules = (maps(&["127.0.0.1=10.1.2.3"]), maps(&["10.1.2.3=127.0.0.1"]));
    let (bytes, _) = rewrite(&files, &rules.0).unwrap();
    assert_eq!(bytes.windows(unknown.len()).filter(|window| *window == unknown).count(), 2);
    let again = sockets(&bytes).unwrap();
    assert_eq!(again[2].local.ip(), "10.1.2.3".parse::<IpAddr>().unwrap());
    let (back, _) = rewrite(&bytes, &rules.1).unwrap();
    assert!(back == files);
}

#[test]
fn options_of_other_kinds_keep_their_layout() {
    // sk_opts: 3 s 5 µs of SO_SNDTIMEO, bound to eth0, lingering 7 s. Protocol buffers: the last of a field counts.
    let more = [&[0x18, 3, 0x20, 5, 0x7a, 4][..], b"eth0", &[0xc0, 0x01, 7]].concat();
    let with = |opts: &[u8]| {
        with_changed_socket(|socket| {
            let at = socket.windows(2).position(|bytes| bytes == [0x72, 0x2a]).unwrap();
            let length = 42 + opts.len();
            socket[at + 1] = length as u8 & 0x7f | 0x80;
            socket.splice(at + 2..at + 2, [(length >> 7) as u8]);
            socket.splice(at + 3 + 42..at + 3 + 42, opts.iter().copied());
        })
    };
    let socket = sockets(&with(&more)).unwrap().remove(2);
    let bytes = |name: &str| match socket.settings.iter().find(|setting| setting.0 == name) {
        Some((_, Value::Bytes(bytes))) => bytes.clone(),
        other => panic!("{name}: {other:?}"),
    };
    assert_eq!(bytes("SO_BINDTODEVICE"), b"eth0");
    assert_eq!(bytes("SO_LINGER"), [1i32.to_ne_bytes(), 7i32.to_ne_bytes()].concat());
    assert_eq!(bytes("SO_SNDTIMEO"), [3i64.to_ne_bytes(), 5i64.to_ne_bytes()].concat());
}

#[test]
fn packed_addresses_are_read_and_rewritten_packed() {
    let files = with_changed_socket(|socket| {
        let at = socket.windows(6).position(|bytes| bytes == [0x58, 0xff, 0x80, 0x80, 0x08, 0x60]).unwrap();
        socket.splice(at..at + 5, [0x5a, 4, 0xff, 0x80, 0x80, 0x08]);
    });
    assert_eq!(sockets(&files).unwrap(), sockets(FILES).unwrap());
    let (bytes, changed) = rewrite(&files, &maps(&["127.0.0.1=255.255.255.255"])).unwrap();
    assert_eq!(changed, 6);
    assert_eq!(
        sockets(&bytes).unwrap(),
        sockets(&rewrite(FILES, &maps(&["127.0.0.1=255.255.255.255"])).unwrap().0).unwrap()
    );
    assert!(bytes.windows(7).any(|bytes| bytes == [0x5a, 5, 0xff, 0xff, 0xff, 0xff, 0x0f]));
}

#[test]
fn mapped_addresses_of_ipv6_sockets_follow_ipv4_rules() {
    let files = {
        let old: Vec<u8> = [[0x58, 0], [0x58, 0], [0x58, 0]].concat();
        let at = FILES
            .windows(11)
            .position(|w| w[..6] == old && w[6..] == [0x58, 0x80, 0x80, 0x80, 0x08])
            .unwrap();
        let mut files = FILES.to_vec();
        // ::1 becomes ::ffff:0.0.0.1. Third word 0 → 0xffff0000 takes four bytes more: in entry and socket, whose lengths follow.
        files.splice(at + 5..at + 6, [0x80, 0x80, 0xfc, 0xff, 0x0f]);
        let entry = files.windows(8).position(|w| w[4..] == [8, 4, 16, 16]).unwrap();
        files[entry] += 4;
        files[entry + 9] += 4;
        files
    };
    assert_eq!(sockets(&files).unwrap()[5].local.ip(), "::ffff:0.0.0.1".parse::<IpAddr>().unwrap());
    let (bytes, changed) = rewrite(&files, &maps(&["0.0.0.1=10.9.8.7"])).unwrap();
    assert_eq!(changed, 1);
    assert_eq!(sockets(&bytes).unwrap()[5].local.ip(), "::ffff:10.9.8.7".parse::<IpAddr>().unwrap());
}

#[test]
fn a_listener_keeps_its_missing_peer() {
    let (bytes, changed) = rewrite(FILES, &maps(&["0.0.0.0=10.0.0.1"])).unwrap();
    assert_eq!(changed, 0);
    assert!(bytes == FILES);
}

#[test]
fn files_are_replaced_whole_and_keep_their_mode() {
    use std::os::unix::fs::PermissionsExt;
    let directory = copy();
    let path = directory.path().join("files.img");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    let mut images = Directory::open(directory.path()).unwrap();
    assert_eq!(images.rewrite(&maps(&["10.0.0.1=10.0.0.2"])).unwrap().sockets, 0);
    assert_eq!(images.rewrite(&maps(&["127.0.0.1=127.0.0.2"])).unwrap().sockets, 6);
    assert_eq!(
        images.extract(images.socket(13).unwrap()).unwrap().local.ip(),
        "127.0.0.2".parse::<IpAddr>().unwrap()
    );
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(images.rewrite(&maps(&["127.0.0.2=127.0.0.1"])).unwrap().sockets, 6);
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let entry = entry.unwrap();
        let old = std::fs::read(golden().join(entry.file_name())).unwrap();
        assert!(std::fs::read(entry.path()).unwrap() == old, "{:?}", entry.file_name());
    }
}

/// A dump of tasks with a network namespace of their own: 192.0.2.1/24 and 2001:db8::1/64 on an interface, a gateway.
fn copy_with_network() -> tempfile::TempDir {
    let directory = copy();
    for name in ["ifaddr-9.img", "route-9.img", "route6-9.img"] {
        std::fs::copy(golden().join("../criu-network").join(name), directory.path().join(name)).unwrap();
    }
    directory
}

#[test]
fn addresses_and_routes_of_a_namespace_follow() {
    let directory = copy_with_network();
    let read = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
    let has = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).any(|window| window == what);
    let before = ["ifaddr-9.img", "route-9.img", "route6-9.img"].map(read);
    let mut images = Directory::open(directory.path()).unwrap();

    let rules = ["192.0.2.1=198.51.100.7", "192.0.2.254=198.51.100.1", "2001:db8::1=2001:db8:7::1"];
    let rewritten = images.rewrite(&maps(&rules)).unwrap();
    // The address of each family; the default route, the IPv4 network, the route by the gateway, the IPv6 network.
    assert_eq!((rewritten.sockets, rewritten.addresses, rewritten.routes), (0, 2, 4));
    assert!(rewritten.missing.is_empty() && rewritten.unreachable.is_empty(), "{rewritten:?}");
    let [addresses, routes, routes6] = ["ifaddr-9.img", "route-9.img", "route6-9.img"].map(read);
    assert!(has(&addresses, &[198, 51, 100, 7]) && has(&addresses, &[198, 51, 100, 255]));
    assert!(
        has(&routes, &[198, 51, 100, 0])
            && has(&routes, &[198, 51, 100, 1])
            && has(&routes, &[203, 0, 113, 0])
    );
    let ipv6 = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
    assert!(has(&addresses, &ipv6("2001:db8:7::1")) && has(&routes6, &ipv6("2001:db8:7::")));
    for bytes in [&addresses, &routes] {
        assert!(!has(bytes, &[192, 0, 2]));
    }

    let back = ["198.51.100.7=192.0.2.1", "198.51.100.1=192.0.2.254", "2001:db8:7::1=2001:db8::1"];
    images.rewrite(&maps(&back)).unwrap();
    assert!(["ifaddr-9.img", "route-9.img", "route6-9.img"].map(read) == before);
}

#[test]
fn what_a_rewrite_leaves_to_be_done_is_told() {
    let directory = copy_with_network();
    let mut images = Directory::open(directory.path()).unwrap();
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    // Sockets get an address that nobody configures.
    let rewritten = images.rewrite(&maps(&["127.0.0.1=192.0.2.99"])).unwrap();
    assert_eq!(rewritten.missing, [ip("192.0.2.99")]);
    // And here one that the namespace has, but its gateway is elsewhere.
    let rewritten = images.rewrite(&maps(&["192.0.2.99=198.51.100.7", "192.0.2.1=198.51.100.7"])).unwrap();
    assert_eq!((&rewritten.missing[..], &rewritten.unreachable[..]), (&[][..], &[ip("192.0.2.254")][..]));
}

#[test]
fn damaged_network_images_change_no_file() {
    let addresses = std::fs::read(golden().join("../criu-network/ifaddr-9.img")).unwrap();
    let directory = copy_with_network();
    let path = directory.path().join("ifaddr-9.img");
    for length in 1..addresses.len() {
        std::fs::write(&path, &addresses[..length]).unwrap();
        let rules = maps(&["127.0.0.1=1.2.3.4"]);
        let outcome = Directory::open(directory.path()).unwrap().rewrite(&rules);
        if outcome.is_err() {
            assert!(std::fs::read(directory.path().join("files.img")).unwrap() == FILES, "{length}");
        } else {
            // A whole number of messages.
            std::fs::copy(golden().join("files.img"), directory.path().join("files.img")).unwrap();
        }
    }
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
