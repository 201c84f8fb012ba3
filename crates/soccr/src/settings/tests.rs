//! Every row of the table, against the kernel.

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{AddressFamily, SocketType, socket};

use super::*;
use crate::flow::Flow;

const STAGES: [Stage; 5] =
    [Stage::BeforeBind, Stage::BeforeConnect, Stage::InRepair, Stage::Injected, Stage::Last];
const LOCAL: [&str; 3] = ["127.0.0.1:1", "[::1]:1", "[::ffff:127.0.0.1]:1"];

/// A value that no new socket has.
fn sample(row: &Row) -> Value {
    let number = |number: i32| Value::Number(number);
    match row.name {
        "IP_TOS" | "IPV6_TCLASS" => number(0x48),
        "IP_TTL" | "IPV6_UNICAST_HOPS" => number(77),
        "IP_MTU_DISCOVER" | "IPV6_MTU_DISCOVER" => number(2),
        "IP_LOCAL_PORT_RANGE" => number(50_000 << 16 | 40_000),
        "IP_UNICAST_IF" | "IPV6_UNICAST_IF" => number(1_i32.to_be()),
        "IP_OPTIONS" => Value::Bytes(vec![1, 1, 1, 0]),
        // A segment routing header (RFC 8754) whose only segment is ::1.
        "IPV6_RTHDR" => Value::Bytes([&[0, 2, 4][..], &[0; 20], &[1]].concat()),
        "IPV6_HOPOPTS" | "IPV6_RTHDRDSTOPTS" | "IPV6_DSTOPTS" => Value::Bytes(vec![0, 0, 1, 4, 0, 0, 0, 0]),
        "IPV6_AUTOFLOWLABEL" | "SO_TXREHASH" | "SO_PEEK_OFF" => number(0),
        "TCP_CONGESTION" => Value::Bytes(b"reno".to_vec()),
        "TCP_KEEPIDLE" | "TCP_KEEPINTVL" | "TCP_LINGER2" => number(33),
        "TCP_WINDOW_CLAMP" | "TCP_USER_TIMEOUT" | "TCP_NOTSENT_LOWAT" => number(55_000),
        "TCP_RTO_MAX_MS" => number(60_000),
        "TCP_RTO_MIN_US" | "TCP_DELACK_MAX_US" => number(100_000),
        "TCP_SYNCNT" | "TCP_KEEPCNT" | "SO_PRIORITY" | "SO_RCVLOWAT" => number(3),
        "SO_BINDTODEVICE" => Value::Bytes(b"lo\0".to_vec()),
        "SO_BUSY_POLL" => number(50),
        "SO_LINGER" => Value::Bytes([1_i32.to_ne_bytes(), 5_i32.to_ne_bytes()].concat()),
        "SO_RCVTIMEO" | "SO_SNDTIMEO" => Value::Bytes([3_i64.to_ne_bytes(), 0_i64.to_ne_bytes()].concat()),
        "SO_MAX_PACING_RATE" => Value::Bytes(5_000_000_u64.to_ne_bytes().to_vec()),
        "SO_TIMESTAMPING" | "SO_TIMESTAMPING_NEW" => Value::Bytes(vec![1 << 4, 0, 0, 0, 0, 0, 0, 0]),
        "SO_TXTIME" => Value::Bytes([1_i32.to_ne_bytes(), 1_i32.to_ne_bytes()].concat()),
        "SO_ATTACH_FILTER" => Value::Bytes([[6, 0, 0, 0, 0xff, 0xff, 0, 0]; 2].concat()),
        _ => number(1),
    }
}

fn new_socket(local: SocketAddr) -> OwnedFd {
    let family = if local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    socket(family, SocketType::STREAM, None).unwrap()
}

/// Whether this user may set options that need `CAP_NET_ADMIN`.
fn privileged() -> bool {
    let socket = new_socket("127.0.0.1:1".parse().unwrap());
    sockopt::set(socket.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, &1).is_ok()
}

fn connection(local: SocketAddr) -> (OwnedFd, TcpStream) {
    let ip = if local.is_ipv4() || local.ip().to_canonical().is_ipv6() {
        local.ip()
    } else {
        "::".parse().unwrap()
    };
    let listener = TcpListener::bind((ip, 0)).unwrap();
    let peer = TcpStream::connect((local.ip(), listener.local_addr().unwrap().port())).unwrap();
    let accepted = listener.accept().unwrap().0;
    // Inherited from the listener, where the standard library had set it.
    sockopt::set(accepted.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, &0).unwrap();
    (accepted.into(), peer)
}

fn apply_all(settings: &Settings, fd: &OwnedFd, local: SocketAddr) -> Vec<Skipped> {
    let mut skipped = Vec::new();
    STAGES.into_iter().for_each(|stage| settings.apply(fd.as_fd(), stage, local, &mut skipped));
    skipped
}

/// The rows that apply to `local`, that this kernel has, and that are not filled in by other means.
fn rows(local: SocketAddr) -> impl Iterator<Item = &'static Row> {
    let rows = TABLE.iter().filter(move |row| row.applies(local) && row.kind != Kind::Md5Keys);
    rows.filter(move |row| {
        let is_known = is_known(row, local);
        if !is_known {
            soccr_lab::skip(format_args!("this kernel has no {}", row.name));
        }
        is_known
    })
}

fn is_known(row: &Row, local: SocketAddr) -> bool {
    let read = row.read(new_socket(local).as_fd(), &mut [0; table::LONGEST]);
    let errno = read.err().and_then(|error| error.raw_os_error());
    !matches!(errno, Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP))
}

fn value_of(row: &Row, fd: &OwnedFd) -> Option<Value> {
    if row.name == REUSEADDR {
        return Some(Value::Number(sockopt::get(fd.as_fd(), row.level, row.number).unwrap()));
    }
    row.read(fd.as_fd(), &mut [0; table::LONGEST]).unwrap()
}

/// Carries each option alone from a socket to another one.
fn carries_each(make: impl Fn(SocketAddr) -> (OwnedFd, Option<TcpStream>), first_stages: &[Stage]) {
    for local in LOCAL.map(|text| text.parse().unwrap()) {
        for row in rows(local).filter(|row| !first_stages.contains(&row.stage)) {
            let ((from, _peer), (to, _other)) = (make(local), make(local));
            let before = value_of(row, &to);
            match row.write(from.as_fd(), &sample(row)) {
                Err(error) if error.raw_os_error() == Some(libc::EPERM) && !privileged() => {
                    soccr_lab::skip(format_args!("{} needs more rights than this user has", row.name));
                    continue;
                }
                outcome => outcome.unwrap_or_else(|error| panic!("{local} {}: {error}", row.name)),
            }
            let value = value_of(row, &from);
            assert_ne!(value, before, "{local} {}", row.name);

            let mut settings = read(from.as_fd(), local);
            if row.name == REUSEADDR {
                settings.set(row.name, value.clone().unwrap());
            }
            let skipped = apply_all(&settings, &to, local);
            let of_this_stage =
                skipped.iter().filter(|s| !first_stages.iter().any(|stage| stage_of(s) == *stage));
            assert_eq!(of_this_stage.count(), 0, "{local} {}: {skipped:?}", row.name);
            assert_eq!(value_of(row, &to), value, "{local} {}", row.name);
        }
    }
}

fn stage_of(skipped: &Skipped) -> Stage {
    TABLE[table::position(&skipped.name).unwrap()].stage
}

fn read(fd: BorrowedFd<'_>, local: SocketAddr) -> Settings {
    let mut settings = Settings::default();
    settings.read_into(fd, local, u32::MAX).unwrap();
    settings
}

#[test]
fn every_option_of_a_new_socket_is_carried() {
    carries_each(|local| (new_socket(local), None), &[]);
}

#[test]
fn every_later_option_of_a_connection_is_carried() {
    carries_each(
        |local| {
            let (socket, peer) = connection(local);
            (socket, Some(peer))
        },
        &[Stage::BeforeBind],
    );
}

/// A key for connections with `peer`, as an application sets it.
fn set_key(fd: BorrowedFd<'_>, peer: SocketAddr, key: &[u8]) {
    let mut wanted = [0; 216];
    match peer {
        SocketAddr::V4(v4) => {
            wanted[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            wanted[4..8].copy_from_slice(&v4.ip().octets());
        }
        SocketAddr::V6(v6) => {
            wanted[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            wanted[8..24].copy_from_slice(&v6.ip().octets());
        }
    }
    wanted[130..132].copy_from_slice(&(key.len() as u16).to_ne_bytes());
    wanted[136..136 + key.len()].copy_from_slice(key);
    sockopt::set_bytes(fd, libc::IPPROTO_TCP, libc::TCP_MD5SIG, &wanted).unwrap();
}

#[test]
fn md5_keys_are_carried_and_never_printed() {
    if !privileged() {
        soccr_lab::skip("only CAP_NET_ADMIN may read TCP MD5 keys");
        return;
    }
    let read = |socket: &TcpStream| {
        let (local, remote) = (socket.local_addr().unwrap(), socket.peer_addr().unwrap());
        let mut settings = read(socket.as_fd(), local);
        settings.read_keys(socket.as_fd(), Flow { local, remote }).unwrap();
        settings
    };
    for local in LOCAL.map(|text| text.parse().unwrap()) {
        let (from, to) = (TcpStream::from(connection(local).0), TcpStream::from(connection(local).0));
        assert_eq!(read(&from).get("TCP_MD5SIG"), None);
        set_key(from.as_fd(), from.peer_addr().unwrap(), b"correct horse");
        let settings = read(&from);
        assert!(matches!(settings.get("TCP_MD5SIG"), Some(Value::Secret(keys)) if keys.ends_with(&[0; 67])));
        assert!(format!("{settings:?}").contains("<secret>"));
        assert!(!format!("{settings:?}").contains("99, 111, 114"), "{settings:?}");
        let mut skipped = Vec::new();
        settings.apply(to.as_fd(), Stage::Injected, local, &mut skipped);
        assert!(skipped.is_empty(), "{local} {skipped:?}");
        assert_eq!(read(&to).get("TCP_MD5SIG"), settings.get("TCP_MD5SIG"), "{local}");
    }
}

/// The kernel tells all of them in one message.
#[test]
fn many_md5_keys_are_carried() {
    if !privileged() {
        soccr_lab::skip("only CAP_NET_ADMIN may read TCP MD5 keys");
        return;
    }
    let socket = TcpStream::from(connection("127.0.0.1:1".parse().unwrap()).0);
    for number in 0..100 {
        set_key(socket.as_fd(), ([203, 0, 113, number], 1).into(), b"correct horse");
    }
    let mut settings = Settings::default();
    settings.read_keys(socket.as_fd(), Flow::of(&socket).unwrap()).unwrap();
    assert!(matches!(settings.get("TCP_MD5SIG"), Some(Value::Secret(keys)) if keys.len() == 100 * 100));
}

#[test]
fn unknown_and_refused_options_are_reported() {
    let local = "127.0.0.1:1".parse().unwrap();
    let mut settings = Settings::default();
    settings.set("TCP_OF_TOMORROW", Value::Number(1));
    settings.set("TCP_NODELAY", Value::Number(1));
    settings.set("TCP_KEEPIDLE", Value::Number(-1));
    settings.set("SO_LINGER", Value::Number(1));
    let socket = new_socket(local);
    let skipped = apply_all(&settings, &socket, local);
    let skipped: Vec<_> =
        skipped.iter().map(|skipped| (&*skipped.name, skipped.error.raw_os_error().unwrap())).collect();
    let expected =
        [("TCP_OF_TOMORROW", libc::ENOPROTOOPT), ("TCP_KEEPIDLE", libc::EINVAL), ("SO_LINGER", libc::EINVAL)];
    assert_eq!(skipped, expected);
    assert_eq!(settings.iter().map(|(name, _)| name).next(), Some("TCP_OF_TOMORROW"), "kept");
}

/// Linux 6.18 tells three timers that older kernels have too, and do not tell.
#[test]
fn what_an_older_kernel_does_anyway_is_not_missing() {
    let local = "127.0.0.1:1".parse().unwrap();
    for row in TABLE.iter().filter(|row| row.built_in().is_some()) {
        let (built_in, is_known) = (row.built_in().unwrap(), is_known(row, local));
        for (number, misses) in [(built_in, false), (built_in / 2, !is_known)] {
            let mut settings = Settings::default();
            settings.set(row.name, Value::Number(number));
            let skipped = apply_all(&settings, &new_socket(local), local);
            assert_eq!(!skipped.is_empty(), misses, "{} = {number}", row.name);
        }
    }
}

/// Needs the right to load a program, unlike everything else here.
#[test]
fn an_ebpf_filter_is_reported() {
    use crate::bpf::{Assembler, ProgramSpec, Register, load_program};
    use std::os::fd::AsRawFd;
    const SOCKET_FILTER: u32 = 1;
    let mut program = Assembler::default();
    program.set(Register::R0, -1);
    program.exit();
    let instructions = program.finish();
    let spec = ProgramSpec {
        prog_type: SOCKET_FILTER,
        expected_attach_type: 0,
        attach_btf_id: 0,
        instructions: &instructions,
    };
    let program = match load_program(&spec) {
        Ok(program) => program,
        Err(error) => return soccr_lab::skip(format_args!("{}", soccr_lab::obstacle_to_bpf([5, 8], error))),
    };
    let local = "127.0.0.1:1".parse().unwrap();
    let (from, to) = (new_socket(local), new_socket(local));
    sockopt::set(from.as_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_BPF, &program.as_raw_fd()).unwrap();
    let skipped = apply_all(&read(from.as_fd(), local), &to, local);
    assert_eq!(skipped.iter().map(|skipped| &*skipped.name).collect::<Vec<_>>(), ["SO_ATTACH_BPF"]);
}

#[test]
fn names_are_unique() {
    for (place, row) in TABLE.iter().enumerate() {
        assert_eq!(table::position(row.name), Some(place));
    }
    assert!(TABLE.len() < 256, "a place fits into a byte");
}

#[test]
fn the_mark_that_passes_every_lock_is_not_taken() {
    if !privileged() {
        soccr_lab::skip("SO_MARK needs CAP_NET_ADMIN");
        return;
    }
    let local = "127.0.0.1:1".parse().unwrap();
    let socket = new_socket(local);
    let mut settings = Settings::default();
    settings.set("SO_MARK", Value::Number(0xc114));
    let skipped = apply_all(&settings, &socket, local);
    assert!(skipped[0].name == "SO_MARK" && skipped[0].reason().contains("lock"), "{skipped:?}");
    let mark: i32 = sockopt::get(socket.as_fd(), libc::SOL_SOCKET, libc::SO_MARK).unwrap();
    assert_eq!(mark, 0);
}
