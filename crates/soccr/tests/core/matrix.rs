//! Moves between hosts that are set up differently, with peers of every kind: afterwards the connection is what it was.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::set_socket_recv_buffer_size;
use soccr_lab::{Family, Host, Pair, State, Test, sysctl, wait_until};

use crate::ends::{Ends, PORT, assert_same_bytes, info, info_bytes, pattern, unconnected};

/// Bytes each way. At one segment per timer these would take a minute and more.
const LENGTH: usize = 2 << 20;
/// So long at most. It takes a hundredth of that, unless the machine is very busy.
const LIMIT: Duration = Duration::from_secs(20);
/// Requests of a few bytes, each of which waits for its answer.
const ECHOES: u32 = 40;

/// How a host is set up, by its name in a test.
type Sysctls = (&'static str, &'static [(&'static str, &'static str)]);

const HOSTS: [Sysctls; 10] = [
    ("plain", &[]),
    ("no_sack", &[("tcp_sack", "0")]),
    ("no_timestamps", &[("tcp_timestamps", "0")]),
    ("no_scaling", &[("tcp_window_scaling", "0")]),
    ("ecn", &[("tcp_ecn", "1")]),
    ("small_buffers", &[("tcp_rmem", "4096 8192 16384"), ("tcp_wmem", "4096 8192 16384")]),
    ("large_buffers", &[("tcp_rmem", "4096 1048576 1073741824")]),
    ("no_metrics", &[("tcp_no_metrics_save", "1")]),
    ("shrinking_window", &[("tcp_shrink_window", "1")]),
    ("reverse_path", &[("conf/all/rp_filter", "1")]),
];

/// What the connection is to, by its name in a test.
struct Peer {
    name: &'static str,
    sysctls: &'static [(&'static str, &'static str)],
    receive_buffer: Option<usize>,
    mtu: u32,
}

const PLAIN: Peer = Peer { name: "plain", sysctls: &[], receive_buffer: None, mtu: 1500 };

const PEERS: [Peer; 11] = [
    PLAIN,
    Peer { name: "no_scaling", sysctls: &[("tcp_window_scaling", "0")], ..PLAIN },
    Peer { name: "no_sack", sysctls: &[("tcp_sack", "0")], ..PLAIN },
    Peer { name: "no_timestamps", sysctls: &[("tcp_timestamps", "0")], ..PLAIN },
    Peer { name: "scale_14", sysctls: &[("tcp_rmem", "4096 131072 1073741824")], ..PLAIN },
    Peer { name: "tiny_window", receive_buffer: Some(1500), ..PLAIN },
    Peer { name: "small_window", receive_buffer: Some(8192), mtu: 65535, ..PLAIN },
    Peer { name: "mtu_600", mtu: 600, ..PLAIN },
    Peer { name: "mtu_1280", mtu: 1280, ..PLAIN },
    Peer { name: "mtu_9000", mtu: 9000, ..PLAIN },
    Peer { name: "mtu_65535", mtu: 65535, ..PLAIN },
];

/// Every target with every peer, and every source.
pub fn tests() -> Vec<Test> {
    let plain = || [&HOSTS[0]];
    let cells = (plain().into_iter().flat_map(|source| HOSTS.iter().map(move |target| (source, target))))
        .flat_map(|(source, target)| PEERS.iter().map(move |peer| (source, target, peer)))
        .chain(HOSTS[1..].iter().map(|source| (source, &HOSTS[0], &PLAIN)));
    cells
        .map(|(source, target, peer)| {
            let name = format!("matrix::from_{}_to_{}_with_peer_{}", source.0, target.0, peer.name);
            Test::new(name, || {
                for family in [Family::V4, Family::V6, Family::Mapped] {
                    // IPv6 has no smaller packets (RFC 8200 §5).
                    if family != Family::V6 || peer.mtu >= 1280 {
                        carry(source, target, peer, family);
                    }
                }
            })
        })
        .collect()
}

fn carry(source: &Sysctls, target: &Sysctls, peer: &Peer, family: Family) {
    let pair = Pair::new().unwrap();
    for host in [&pair.a, &pair.b] {
        host.namespace.rtnetlink().unwrap().set_mtu("eth0", peer.mtu).unwrap();
    }
    if !set_up(&pair.a, source.1) || !set_up(&pair.b, peer.sysctls) {
        return;
    }
    let mut ends = connect(pair, family, peer.receive_buffer);
    let before = exercise(&ends);
    let connection = ends.take();
    for name in source.1.iter().map(|(name, _)| name) {
        // Both hosts are one here, so the target has what the source had not changed.
        let fresh = Pair::new().unwrap();
        let path = format!("/proc/sys/net/ipv4/{name}");
        let value = fresh.a.run(|| std::fs::read_to_string(&path)).unwrap();
        ends.pair.a.run(|| std::fs::write(&path, value)).unwrap();
    }
    if !set_up(&ends.pair.a, target.1) {
        return;
    }
    let restored = ends.restore(&connection).unwrap();
    let report = restored.report().to_string();
    // Room for timestamps is counted by the sysctl of the host, whatever the connection has.
    let sizes = restored.report().get("snd_mss").unwrap().values().unwrap();
    assert!(sizes[0].abs_diff(sizes[1]) <= 12, "{family:?}: {report}");
    ends.resume(restored);
    // The segments of a busy machine differ: what is wrong with them stays wrong.
    let mut after = exercise(&ends);
    for _ in 1..5 {
        if !after.is_near(before) {
            after = exercise(&ends);
        }
    }
    assert!(after.is_near(before), "{family:?}: {after:?} instead of {before:?}\n{report}");
    ends.finish();
}

/// Settings that some of the kernels we support do not have.
const NEW: [&str; 1] = ["tcp_shrink_window"];

/// False where this kernel has not such a setting.
fn set_up(host: &Host, sysctls: &[(&str, &str)]) -> bool {
    sysctls.iter().all(|(name, value)| match host.run(|| sysctl(&format!("net/ipv4/{name}"), value)) {
        Err(error) if error.kind() == ErrorKind::NotFound && NEW.contains(name) => {
            soccr_lab::skip(format_args!("this kernel has no {name}"));
            false
        }
        set => set.map(|()| true).unwrap(),
    })
}

fn connect(pair: Pair, family: Family, receive_buffer: Option<usize>) -> Ends {
    let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, PORT))).unwrap();
    if let Some(size) = receive_buffer {
        set_socket_recv_buffer_size(&listener, size).unwrap();
    }
    let remote = pair.a.address_of(&pair.b, family, PORT);
    let ours = pair.a.run(|| unconnected(family));
    rustix::net::connect(&ours, &remote).unwrap();
    let (peer, _) = listener.accept().unwrap();
    wait_until("the peer is established", || info(&peer).state == State::Established);
    Ends::between(pair, ours, peer, remote)
}

/// What an exercise takes.
#[derive(Clone, Copy, Debug)]
struct Effort {
    /// Timers that ran out during requests and answers: none need wait for one.
    timers: u32,
    /// Bytes per segment to the peer, and to us.
    sizes: [usize; 2],
}

impl Effort {
    fn is_near(self, before: Self) -> bool {
        // Where the target counts less room for data than before, two segments that filled a tiny window may become four.
        self.timers <= before.timers + ECHOES / 2 && (0..2).all(|way| 3 * self.sizes[way] > before.sizes[way])
    }
}

/// Requests and answers, then much to the peer, then much from it.
fn exercise(ends: &Ends) -> Effort {
    let start = Instant::now();
    for end in [&ends.ours, &ends.peer] {
        end.set_read_timeout(Some(LIMIT)).unwrap();
        end.set_write_timeout(Some(LIMIT)).unwrap();
    }
    let (mut ours, mut peer) = (&ends.ours, &ends.peer);
    let mut answer = [0; 64];
    let before = timers(ends);
    for _ in 0..ECHOES {
        ours.write_all(&[1; 64]).unwrap();
        peer.read_exact(&mut answer).unwrap();
        peer.write_all(&answer).unwrap();
        ours.read_exact(&mut answer).unwrap();
    }
    let timers = timers(ends) - before;
    let sizes = [transfer(ours, peer, start), transfer(peer, ours, start)];
    wait_until("all has arrived", || [ours, peer].iter().all(|end| info(end).unacknowledged == 0));
    Effort { timers, sizes }
}

/// On one thread, so that a busy machine has none to wait for.
fn transfer(mut from: &TcpStream, mut to: &TcpStream, start: Instant) -> usize {
    let before = data_segments(from);
    let bytes = pattern(0, LENGTH);
    let mut buffer = vec![0; 64 << 10];
    let (mut written, mut read) = (0, 0);
    for end in [from, to] {
        end.set_nonblocking(true).unwrap();
    }
    while read < LENGTH {
        assert!(start.elapsed() < LIMIT, "{read} bytes of {LENGTH} after {LIMIT:?}");
        let mut ends = [PollFd::new(from, PollFlags::OUT), PollFd::new(to, PollFlags::IN)];
        let ends = if written < LENGTH { &mut ends[..] } else { &mut ends[1..] };
        poll(ends, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })).unwrap();
        written += progress(from.write(&bytes[written..]));
        let length = progress(to.read(&mut buffer));
        assert_same_bytes(&buffer[..length], &bytes[read..][..length]);
        read += length;
    }
    for end in [from, to] {
        end.set_nonblocking(false).unwrap();
    }
    LENGTH / (data_segments(from) - before) as usize
}

fn progress(moved: io::Result<usize>) -> usize {
    match moved {
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        moved => moved.unwrap(),
    }
}

/// So often a timer of the two hosts has run out: of acknowledgements, of retransmissions, of a closed window.
fn timers(ends: &Ends) -> u32 {
    let count = |host: &Host| {
        ["DelayedACKs", "TCPTimeouts", "TCPWinProbe"]
            .iter()
            .map(|name| host.namespace.counter(name))
            .sum::<u32>()
    };
    count(&ends.pair.a) + count(&ends.pair.b)
}

/// `tcpi_data_segs_out` (Linux 4.6).
fn data_segments(end: &TcpStream) -> u32 {
    u32::from_ne_bytes(*info_bytes(end)[156..].first_chunk().unwrap())
}
