//! Socket options, windows and buffers, all the way.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;

use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
use soccr::settings::{Settings, Value};
use soccr::{Fidelity, Lock, Restored, pause};
use soccr_lab::{Family, Pair, Shape, Side, Sniffer, set_option, wait_until};

use crate::ends::Ends;
use crate::fidelity;

/// Values that no new socket has, of options that every connection has.
const NUMBERS: [(&str, i32); 32] = [
    ("SO_MARK", 5),
    ("SO_REUSEPORT", 1),
    ("TCP_NODELAY", 1),
    ("TCP_RTO_MAX_MS", 60_000),
    ("TCP_RTO_MIN_US", 100_000),
    ("TCP_DELACK_MAX_US", 100_000),
    ("TCP_KEEPIDLE", 600),
    ("TCP_KEEPINTVL", 33),
    ("TCP_KEEPCNT", 3),
    ("TCP_SYNCNT", 3),
    ("TCP_LINGER2", 33),
    ("TCP_WINDOW_CLAMP", 100_000),
    ("TCP_USER_TIMEOUT", 55_000),
    ("TCP_NOTSENT_LOWAT", 55_000),
    ("TCP_INQ", 1),
    ("TCP_THIN_LINEAR_TIMEOUTS", 1),
    ("SO_REUSEADDR", 1),
    ("SO_KEEPALIVE", 1),
    ("SO_OOBINLINE", 1),
    ("SO_PRIORITY", 3),
    ("SO_RCVLOWAT", 3),
    ("SO_TXREHASH", 0),
    ("SO_ZEROCOPY", 1),
    ("SO_TIMESTAMP", 1),
    ("SO_SELECT_ERR_QUEUE", 1),
    ("SO_RCVMARK", 1),
    ("IP_BIND_ADDRESS_NO_PORT", 1),
    ("IP_LOCAL_PORT_RANGE", 50_000 << 16 | 40_000),
    ("IP_TTL", 77),
    ("IP_MTU_DISCOVER", 2),
    ("IP_TOS", 0x48),
    ("IP_RECVTTL", 1),
];

const IPV6_NUMBERS: [(&str, i32); 6] = [
    ("IPV6_UNICAST_HOPS", 77),
    ("IPV6_TCLASS", 0x48),
    ("IPV6_MTU_DISCOVER", 2),
    ("IPV6_RECVHOPLIMIT", 1),
    ("IPV6_RECVTCLASS", 1),
    ("IPV6_MINHOPCOUNT", 3),
];

/// Options that not every kernel has: name, level, number, and since when.
const NEW: [(&str, i32, i32, &str); 6] = [
    ("SO_TXREHASH", libc::SOL_SOCKET, 74, "Linux 5.18"),
    ("SO_RCVMARK", libc::SOL_SOCKET, 75, "Linux 6.0"),
    ("IP_LOCAL_PORT_RANGE", libc::IPPROTO_IP, 51, "Linux 6.3"),
    ("TCP_RTO_MAX_MS", libc::IPPROTO_TCP, 44, "Linux 6.15"),
    ("TCP_RTO_MIN_US", libc::IPPROTO_TCP, 45, "Linux 6.17"),
    ("TCP_DELACK_MAX_US", libc::IPPROTO_TCP, 46, "Linux 6.17"),
];

/// Whether a new socket knows no such option.
fn is_unknown(level: i32, option: i32, value: &[u8]) -> bool {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    let set = set_option(&socket, level, option, value);
    set.is_err_and(|error| error.raw_os_error() == Some(libc::ENOPROTOOPT))
}

/// The options of `settings` that are missing: those that this kernel does not have.
fn refused(restored: &Restored, settings: &Settings) -> Vec<String> {
    let report = restored.report();
    let is_missing = |name: &&str| report.get(name).is_some_and(|entry| entry.values().is_none());
    let names: Vec<&str> = settings.iter().map(|(name, _)| name).filter(is_missing).collect();
    for name in &names {
        let new = NEW.iter().find(|(new, ..)| new == name);
        let Some((_, level, option, since)) = new else { panic!("{name} is missing: {report}") };
        assert!(is_unknown(*level, *option, &[0; 4]), "{name} is missing: {report}");
        eprintln!("\nSKIPPED: {name}: this kernel does not have it ({since})\n");
    }
    names.into_iter().map(str::to_owned).collect()
}

pub fn every_option_comes_back() {
    for family in [Family::V4, Family::V6, Family::Mapped] {
        let mut ends = Ends::near(family);
        ends.take();
        let settings = &mut ends.saved.settings;
        let ipv4 = NUMBERS.iter().filter(|(name, _)| {
            family != Family::V6 || !matches!(*name, "IP_TTL" | "IP_MTU_DISCOVER" | "IP_TOS" | "IP_RECVTTL")
        });
        let ipv6 = IPV6_NUMBERS.iter().filter(|_| family != Family::V4);
        for (name, number) in ipv4.chain(ipv6) {
            settings.set(name, Value::Number(*number));
        }
        settings.set("SO_RCVTIMEO", Value::Bytes([20_i64.to_ne_bytes(), 0_i64.to_ne_bytes()].concat()));
        settings.set("SO_LINGER", Value::Bytes([1_i32.to_ne_bytes(), 5_i32.to_ne_bytes()].concat()));
        settings.set("SO_MAX_PACING_RATE", Value::Bytes(500_000_000_u64.to_ne_bytes().to_vec()));
        settings.set("SO_ATTACH_FILTER", Value::Bytes([6, 0, 0, 0, 0xff, 0xff, 0, 0].to_vec()));
        let restored = ends.restore();
        let refused = refused(&restored, &ends.saved.settings);
        ends.resume(restored);
        // Twice: the second time from what the kernel told.
        for _ in 0..2 {
            let after = ends.save().settings;
            for (name, value) in
                ends.saved.settings.iter().filter(|(name, _)| !refused.iter().any(|refused| refused == name))
            {
                assert_eq!(after.get(name), Some(value), "{family:?} {name}");
            }
            ends.saved.settings = after;
            ends.take();
            let restored = ends.restore();
            restored.report().strict().unwrap();
            ends.resume(restored);
        }
        ends.transfer();
    }
}

pub fn an_option_that_is_missing_is_fatal_for_the_strict() {
    let mut ends = Ends::near(Family::V4);
    ends.take();
    ends.saved.settings.set("TCP_OF_TOMORROW", Value::Number(1));
    let restored = ends.restore();
    let report = restored.report();
    assert_eq!(fidelity(report, "TCP_OF_TOMORROW"), Fidelity::Missing);
    assert!(!report.is_exact());
    let error = report.strict().unwrap_err();
    assert!(error.to_string().starts_with("restore: TCP_OF_TOMORROW — "), "{error}");
    assert!(report.to_string().contains("TCP_OF_TOMORROW: missing — "), "{report}");
    ends.resume(restored);
    ends.transfer();
}

/// A `struct tcp_diag_md5sig` for the address of `peer`.
fn key(peer: std::net::IpAddr) -> Vec<u8> {
    let mut key = vec![0; 100];
    match peer {
        std::net::IpAddr::V4(v4) => {
            (key[0], key[1]) = (libc::AF_INET as u8, 32);
            key[4..8].copy_from_slice(&v4.octets());
        }
        std::net::IpAddr::V6(v6) => {
            (key[0], key[1]) = (libc::AF_INET6 as u8, 128);
            key[4..20].copy_from_slice(&v6.octets());
        }
    }
    key[2..4].copy_from_slice(&6_u16.to_ne_bytes());
    key[20..26].copy_from_slice(b"secret");
    key
}

pub fn keys_come_back() {
    // A `struct tcp_md5sig` without a key.
    if is_unknown(libc::IPPROTO_TCP, libc::TCP_MD5SIG, &[0; 216]) {
        return eprintln!("\nSKIPPED: TCP MD5: this kernel has none (CONFIG_TCP_MD5SIG)\n");
    }
    for (family, bound) in
        [Family::V4, Family::V6].into_iter().flat_map(|family| [(family, false), (family, true)])
    {
        let mut ends = Ends::near(family);
        ends.take();
        let paused = pause(&ends.peer).unwrap();
        let mut peer = paused.save().unwrap();
        paused.detach().unwrap();
        // Both ends begin to sign.
        for connection in [&mut ends.saved, &mut peer] {
            connection.settings.set("TCP_MD5SIG", Value::Secret(key(connection.remote.ip())));
        }
        if bound {
            ends.saved.settings.set("SO_BINDTODEVICE", Value::Bytes(b"eth0\0".to_vec()));
        }
        let restored = ends.restore();
        assert!(restored.report().get("TCP_MD5SIG").is_none(), "{}", restored.report());
        ends.peer = ends.pair.b.run(|| peer.restore()).unwrap().resume().unwrap();
        ends.resume(restored);
        ends.transfer();
        let restored = ends.restored();
        assert_eq!(ends.saved.settings.get("TCP_MD5SIG"), Some(&Value::Secret(key(ends.saved.remote.ip()))));
        restored.report().strict().unwrap();
        ends.resume(restored);
        ends.transfer();
    }
}

pub fn options_of_the_ip_header_come_back() {
    // Over loopback, whose large segments need the header computed anew.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    let paused = pause(&ours).unwrap();
    let mut connection = paused.save().unwrap();
    paused.detach().unwrap();
    let options = Value::Bytes(vec![1, 1, 1, 0]);
    connection.settings.set("IP_OPTIONS", options.clone());
    let mut ours = connection.restore().unwrap().resume().unwrap();
    let paused = pause(&ours).unwrap();
    let after = paused.save().unwrap();
    paused.resume().unwrap();
    assert_eq!(after.settings.get("IP_OPTIONS"), Some(&options));
    ours.write_all(b"through").unwrap();
    peer.read_exact(&mut [0; 7]).unwrap();
    // Over Ethernet, where they leave less room.
    let mut ends = Ends::near(Family::V4);
    ends.take();
    ends.saved.settings.set("IP_OPTIONS", options.clone());
    let restored = ends.restore();
    let entry = restored.report().get("snd_mss").unwrap();
    assert_eq!(entry.values().map(|[before, after]| before - after), Some(4), "{entry}");
    ends.resume(restored);
    assert_eq!(ends.save().settings.get("IP_OPTIONS"), Some(&options));
    ends.transfer();
}

pub fn a_handshake_knows_its_peer() {
    for family in Family::ALL {
        let pair = Pair::shaped(&Shape::default()).unwrap();
        let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, 80))).unwrap();
        let domain = if family == Family::V4 { AddressFamily::INET } else { AddressFamily::INET6 };
        let ours =
            pair.a.run(|| socket_with(domain, SocketType::STREAM, SocketFlags::NONBLOCK, None)).unwrap();
        let line = pair.line.as_ref().unwrap();
        line.lose_next(Side::A, |segment| segment.flags.contains(soccr_lab::Flags::SYN));
        let remote = pair.a.address_of(&pair.b, family, 80);
        assert_eq!(connect(&ours, &remote), Err(rustix::io::Errno::INPROGRESS));
        let paused = pause(&ours).unwrap();
        let connection = paused.save().unwrap();
        paused.detach().unwrap();
        assert_eq!(connection.remote, remote);
        let mut ours = pair.a.run(|| connection.restore()).unwrap().resume().unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        ours.set_nonblocking(false).unwrap();
        wait_until("the connection is established", || ours.peer_addr().is_ok());
        ours.write_all(b"hello").unwrap();
        peer.read_exact(&mut [0; 5]).unwrap();
    }
}

/// We write until nothing more goes.
fn fill(ends: &mut Ends) -> usize {
    let mut total = 0;
    ends.ours.set_nonblocking(true).unwrap();
    wait_until("the window of the peer is closed", || {
        match ends.ours.write(&[7; 65536]) {
            Ok(written) => total += written,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        ends.window().is_some_and(|window| window.snd_wnd == 0)
    });
    ends.ours.set_nonblocking(false).unwrap();
    total
}

pub fn a_closed_window_opens_though_its_update_was_lost() {
    for family in [Family::V4, Family::V6] {
        let mut ends = Ends::near(family);
        let total = fill(&mut ends);
        let flow = soccr::connection::Flow::of(&ends.ours).unwrap();
        let lock = ends.pair.a.run(|| Lock::drop_traffic(&[flow])).unwrap();
        ends.take();
        ends.saved.nonblocking = false;
        let mut wire = Sniffer::on(&ends.pair.a.namespace, "eth0").unwrap();
        // All that has arrived there, so that its window opens; the update is dropped.
        ends.peer.set_nonblocking(true).unwrap();
        let mut read = Vec::new();
        assert_eq!(ends.peer.read_to_end(&mut read).unwrap_err().kind(), ErrorKind::WouldBlock);
        ends.peer.set_nonblocking(false).unwrap();
        wait_until("the update has come and is dropped", || !wire.segments().unwrap().is_empty());
        let restored = ends.restore();
        lock.release().unwrap();
        ends.resume(restored);
        ends.ours.write_all(b"more").unwrap();
        let mut rest = vec![0; total - read.len() + 4];
        ends.peer.read_exact(&mut rest).unwrap();
        assert!(rest.ends_with(b"more"));
        rest.truncate(rest.len() - 4);
        assert!(read.iter().chain(&rest).all(|byte| *byte == 7));
    }
}
