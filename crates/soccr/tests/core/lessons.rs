//! What went wrong in systems before this one, each as what must hold.

use std::io::{ErrorKind as IoErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::mpsc::{TryRecvError, channel};
use std::thread;
use std::time::Duration;

use rustix::net::sockopt::{
    set_socket_recv_buffer_size, set_socket_reuseaddr, set_socket_send_buffer_size, socket_reuseaddr,
};
use rustix::net::{AddressFamily, SocketType, connect, socket};
use soccr::connection::{Buffers, Connection, QUEUE_LIMIT, Urgent, Window};
use soccr::settings::Value;
use soccr::{ErrorKind, Fidelity, Flow, Paused, pause};
use soccr_lab::{
    Case, Family, Flags, Namespace, Pair, Sniffer, State, VethEnd, supervised, veth, wait_until,
};

use crate::ends::{
    Ends, LIMIT, PORT, assert_same, assert_same_bytes, busy, has_peek_offset, info, option, pattern,
    set_deaf, set_option, unconnected,
};
use crate::refused::{assert_refused, save};
use crate::states::through_bytes;
use crate::sys;

/// Makes a connection contradict itself.
type Damage = fn(&mut Connection);

pub fn a_length_that_contradicts_another_is_refused_before_the_first_system_call() {
    let ends = busy();
    let connection = ends.take();
    let damage: [(&str, Damage); 26] = [
        ("unsq_len", |connection| connection.control.unsq_len = connection.control.outq_len + 1),
        ("outq_len", |connection| connection.control.outq_len += 1),
        ("outq_len", |connection| connection.control.outq_len = u32::MAX),
        ("inq_len", |connection| connection.control.inq_len += 1),
        ("inq_len", |connection| connection.receive_queue.clear()),
        ("inq_len is over 64 MiB", |connection| {
            connection.receive_queue = vec![0; QUEUE_LIMIT as usize + 1];
            connection.control.inq_len = QUEUE_LIMIT + 1;
        }),
        ("outq_len is over 64 MiB", |connection| {
            connection.send_queue = vec![0; QUEUE_LIMIT as usize + 1];
            connection.control.outq_len = QUEUE_LIMIT + 1;
        }),
        ("outq_len", |connection| connection.send_queue.clear()),
        ("fin_unsent", |connection| connection.control.fin_unsent = true),
        ("urgent", |connection| connection.urgent = Some(Urgent { offset: 5000, consumed: false })),
        ("rcv_wup", |connection| {
            edit(connection, |window, rcv_nxt| window.rcv_wup = rcv_nxt.wrapping_add(1))
        }),
        ("snd_wnd", |connection| edit(connection, |window, _| window.snd_wnd = window.max_window + 1)),
        ("famil", |connection| connection.remote = "[2001:db8::2]:5000".parse().unwrap()),
        ("port", |connection| connection.local.set_port(0)),
        // What the kernel would compute with.
        ("rcv_wnd", |connection| edit(connection, |window, _| window.rcv_wnd = 1 << 30)),
        ("max_window", |connection| edit(connection, |window, _| window.max_window = 1 << 30)),
        ("SO_SNDBUF", |connection| connection.buffers.as_mut().unwrap().send = u32::MAX),
        ("SO_RCVBUF", |connection| connection.buffers.as_mut().unwrap().receive = 1 << 31),
        ("SO_BUF_LOCK", |connection| connection.buffers.as_mut().unwrap().lock = 4),
        ("rtt ", |connection| connection.path.as_mut().unwrap().rtt = Duration::MAX),
        ("rttvar", |connection| connection.path.as_mut().unwrap().rttvar = Duration::from_secs(3601)),
        ("rto", |connection| connection.path.as_mut().unwrap().rto = Duration::MAX),
        ("snd_mss", |connection| connection.path.as_mut().unwrap().snd_mss = 1 << 16),
        ("snd_cwnd", |connection| connection.path.as_mut().unwrap().snd_cwnd = 1 << 31),
        ("snd_ssthresh", |connection| connection.path.as_mut().unwrap().snd_ssthresh = 1 << 31),
        ("rcv_ssthresh", |connection| connection.path.as_mut().unwrap().rcv_ssthresh = u32::MAX),
    ];
    supervised(|faults| {
        for (what, damage) in damage {
            let mut damaged = connection.clone();
            damage(&mut damaged);
            faults.arm(0, libc::EIO);
            let error = damaged.restore().unwrap_err();
            assert_eq!(faults.disarm(), None, "{error}");
            assert_eq!((error.kind(), error.step()), (ErrorKind::Invalid, "restore"), "{error}");
            assert!(error.what().contains(what), "{error}");
        }
    });
}

fn edit(connection: &mut Connection, change: fn(&mut Window, u32)) {
    let rcv_nxt = connection.control.rcv_nxt;
    change(connection.control.window.as_mut().unwrap(), rcv_nxt);
}

pub fn what_arrives_during_a_save_is_carried_whole_or_told() {
    const MEETINGS: u32 = 3;
    let ends = Ends::new(Family::V4);
    let (mut ours, mut peer) = (&ends.ours, &ends.peer);
    peer.set_nodelay(true).unwrap();
    peer.set_write_timeout(Some(LIMIT)).unwrap();
    let mut read = Vec::new();
    let sent = thread::scope(|scope| {
        let (goes_on, has_ended) = channel::<()>();
        let writer = scope.spawn(move || {
            let mut sent = Vec::new();
            while has_ended.try_recv() == Err(TryRecvError::Empty) {
                let piece = pattern(sent.len(), 40);
                peer.write_all(&piece).unwrap();
                sent.extend(piece);
            }
            sent
        });
        let mut meetings = 0;
        wait_until("bytes have arrived during some saves", || {
            let saved = save(ours);
            // Makes room for more.
            let start = read.len();
            read.resize(start + info(ours).unread, 0);
            ours.read_exact(&mut read[start..]).unwrap();
            match saved {
                Ok(saved) => {
                    let queue = saved.receive_queue;
                    assert_same_bytes(&read[start..][..queue.len()], &queue);
                    meetings += u32::from(read.len() - start > queue.len());
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Changed, "{error}");
                    assert!(error.remedy().contains("lock"), "{error}");
                    meetings += 1;
                }
            }
            meetings >= MEETINGS
        });
        drop(goes_on);
        writer.join().unwrap()
    });
    let start = read.len();
    read.resize(sent.len(), 0);
    ours.read_exact(&mut read[start..]).unwrap();
    assert_same_bytes(&read, &sent);
}

/// Nobody can give it to another process: so it is told, and never silently lost.
pub fn what_a_socket_has_of_its_process_is_told() {
    let mut ends = Ends::new(Family::V4);
    sys::ask_for_signals(&ends.ours).unwrap();
    let mut connection = ends.take();
    connection.settings.note_process("self");
    // Where no hierarchy is mounted, a process has none.
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    assert_eq!(
        connection.settings.get("cgroup").is_some(),
        ["0::", "net_cls"].iter().any(|kind| cgroups.contains(kind))
    );
    connection.settings.set("label", Value::Bytes(b"of another".to_vec()));
    let connection = through_bytes(connection, true);
    let restored = ends.restore(&connection).unwrap();
    let report = restored.report();
    let told = |name: &str| report.get(name).map(|entry| (entry.fidelity(), entry.reason().to_owned()));
    for name in ["O_ASYNC", "F_SETOWN", "F_SETSIG"] {
        let (fidelity, reason) = told(name).unwrap();
        assert!(fidelity == Fidelity::Missing && reason.contains("signals belong"), "{report}");
    }
    let (fidelity, reason) = told("label").unwrap();
    assert!(fidelity == Fidelity::Approximate && reason.contains("of another"), "{report}");
    // That of the same process.
    assert_eq!(told("cgroup"), None);
    assert!(report.strict().unwrap_err().to_string().contains("O_ASYNC"));
    ends.resume(restored);
    ends.finish();
}

pub fn one_connection_restores_twice() {
    let mut ends = busy();
    let connection = ends.take();
    let copy = connection.clone();
    for _ in 0..3 {
        let restored = ends.restore(&connection).unwrap();
        let paused = Paused::take_over(restored.as_fd()).unwrap();
        assert_same(&connection, &paused.save().unwrap());
        paused.leave_paused();
    }
    assert_eq!(connection, copy);
    ends.restore_and_resume(&connection);
    ends.finish();
}

pub fn a_listener_on_the_port_is_no_hindrance() {
    let mut ends = busy();
    let connection = ends.take();
    let listener = ends.pair.a.run(|| TcpListener::bind(connection.local)).unwrap();
    ends.restore_and_resume(&connection);
    drop(listener);
    ends.finish();
}

pub fn a_save_consumes_nothing() {
    let ends = busy();
    let first = save(&ends.ours).unwrap();
    assert_same(&first, &save(&ends.ours).unwrap());
    ends.finish();
}

pub fn a_fin_that_cannot_arrive_is_an_error() {
    for family in [Family::V4, Family::V6, Family::Mapped] {
        let mut ends = Ends::of(Case { family, state: State::CloseWait, received: 3000, sent: 0, unsent: 0 });
        let connection = ends.take();
        let mut control = ends.pair.a.namespace.rtnetlink().unwrap();
        control.down("lo").unwrap();
        let mut wire = Sniffer::on(&ends.pair.b.namespace, "eth0").unwrap();
        assert_refused(ends.restore(&connection), "restore", "did not arrive", "bring `lo` up");
        assert_eq!(wire.segments().unwrap(), []);
        control.up("lo").unwrap();
        ends.restore_and_resume(&connection);
        ends.finish();
    }
}

pub fn the_first_send_after_close_wait_reaches_the_peer_at_once() {
    for family in Family::ALL {
        let mut ends = Ends::of(Case { family, state: State::CloseWait, received: 0, sent: 0, unsent: 0 });
        let window = info(&ends.ours).snd_wnd;
        ends.move_once();
        assert_eq!(info(&ends.ours).snd_wnd, window);
        ends.send(8000);
        // A window that seems closed would keep it here until a timer runs.
        assert_eq!(info(&ends.ours).unsent, 0, "{family:?}");
        wait_until("it has arrived", || info(&ends.ours).unacknowledged == 0);
        assert_eq!(info(&ends.ours).total_retrans, 0, "{family:?}");
        ends.finish();
    }
}

pub fn an_address_that_only_looks_mapped_is_ipv6() {
    let pair = Pair::new().unwrap();
    let addresses: [IpAddr; 2] = ["fd00::ffff:1:1", "fd00::ffff:1:2"].map(|text| text.parse().unwrap());
    for (host, address) in [&pair.a, &pair.b].into_iter().zip(addresses) {
        host.namespace.rtnetlink().unwrap().add_address("eth0", address, 64).unwrap();
    }
    let remote = SocketAddr::from((addresses[1], PORT));
    let listener = pair.b.run(|| TcpListener::bind(remote)).unwrap();
    let ours = pair.a.run(|| TcpStream::connect(remote)).unwrap();
    let mut ends = Ends::between(pair, ours, listener.accept().unwrap().0, remote);
    ends.receive(3000);
    ends.peer.shutdown(Shutdown::Write).unwrap();
    wait_until("the FIN has arrived", || info(&ends.ours).state == State::CloseWait);
    ends.move_once();
    assert_eq!(info(&ends.ours).state, State::CloseWait);
    ends.finish();
}

pub fn a_link_local_address_without_its_link_is_refused() {
    let ends = Ends::new(Family::LinkLocal);
    let mut connection = ends.take();
    for address in [&mut connection.local, &mut connection.remote] {
        let SocketAddr::V6(address) = address else { panic!("{address}") };
        assert_eq!(address.scope_id(), ends.pair.a.scope);
        address.set_scope_id(0);
    }
    assert_eq!(ends.restore(&connection).unwrap_err().kind(), ErrorKind::Invalid);
}

/// The number of a link is another one on each host.
pub fn a_link_local_connection_comes_back_on_the_link_of_its_name() {
    let ends = Ends::new(Family::LinkLocal);
    let connection = ends.take();
    let there = Namespace::new().unwrap();
    let mut control = there.rtnetlink().unwrap();
    let mut link = |name: &str, other: &str| {
        let end = |name, mac| VethEnd { namespace: &there, name, mac: [2, 0, 0, 0, 2, mac] };
        veth(&mut control, [end(other, 1), end(name, 2)], 1500).unwrap();
        control.add_address(name, connection.local.ip(), 64).unwrap();
        control.index(name).unwrap()
    };
    let same = link("other", "far");
    assert_eq!(same, ends.pair.a.scope, "the test needs a link with this number");
    let error = there.run(|| connection.restore()).unwrap_err();
    assert!(error.errno() == Some(libc::ENODEV) && error.remedy().contains("eth0"), "{error}");

    let right = link("eth0", "farther");
    let restored = there.run(|| connection.restore()).unwrap();
    let flow = Flow::of(&restored).unwrap();
    for end in [flow.local, flow.remote] {
        assert!(matches!(end, SocketAddr::V6(end) if end.scope_id() == right), "{end}, not {right}");
    }
    restored.resume().unwrap();
}

pub fn the_segment_size_comes_back() {
    for family in Family::ALL {
        let mut ends = Ends::new(family);
        let mss = info(&ends.ours).snd_mss;
        for _ in 0..3 {
            ends.move_once();
            assert_eq!(info(&ends.ours).snd_mss, mss, "{family:?}");
        }
        let mut wire = Sniffer::on(&ends.pair.b.namespace, "eth0").unwrap();
        ends.send(3 * mss as usize);
        wait_until("it has arrived", || info(&ends.ours).unacknowledged == 0);
        // Several may travel as one, which is a multiple of it.
        let full = |length: usize| length > 0 && length.is_multiple_of(mss as usize);
        let lengths: Vec<_> = wire.segments().unwrap().iter().map(|segment| segment.payload_len).collect();
        assert!(lengths.iter().any(|length| full(*length)), "{family:?}: {lengths:?}, not {mss}");
        ends.finish();
    }
}

pub fn reuse_address_survives() {
    for on in [false, true] {
        let mut ends = Ends::new(Family::V6);
        set_socket_reuseaddr(&ends.ours, on).unwrap();
        pause(&ends.ours).unwrap().resume().unwrap();
        assert_eq!(socket_reuseaddr(&ends.ours), Ok(on), "after resume()");
        drop(pause(&ends.ours).unwrap());
        assert_eq!(socket_reuseaddr(&ends.ours), Ok(on), "after drop");
        ends.move_once();
        assert_eq!(socket_reuseaddr(&ends.ours), Ok(on), "after a restore");
        ends.finish();
    }
}

pub fn the_offset_of_a_peek_survives() {
    let mut ends = busy();
    if !has_peek_offset(&ends.ours) {
        return soccr_lab::skip("THE OFFSET OF A PEEK: this kernel has none for TCP (Linux 6.9, IPv6 6.12)");
    }
    for offset in [0, 1000] {
        set_option(&ends.ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset);
        let connection = save(&ends.ours).unwrap();
        assert_eq!(option(&ends.ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap(), offset);
        assert_eq!(connection.receive_queue, ends.to_us);
    }
    ends.move_once();
    assert_eq!(option(&ends.ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap(), 1000);
    let mut byte = [0];
    ends.ours.peek(&mut byte).unwrap();
    assert_eq!(byte[0], ends.to_us[1000]);
    ends.finish();
}

pub fn a_descriptor_waits_as_before() {
    for nonblocking in [false, true] {
        let mut ends = Ends::new(Family::V4);
        ends.ours.set_nonblocking(nonblocking).unwrap();
        ends.move_once();
        let flags = rustix::fs::fcntl_getfl(&ends.ours).unwrap();
        assert_eq!(flags.contains(rustix::fs::OFlags::NONBLOCK), nonblocking);
        if nonblocking {
            assert_eq!((&ends.ours).read(&mut [0]).unwrap_err().kind(), IoErrorKind::WouldBlock);
        }
        ends.finish();
    }
}

/// A connection whose buffers are as small as the kernel allows, and full of as much as fits, in both directions.
fn tiny(fix: impl Fn(&TcpStream)) -> Ends {
    let mut ends = Ends::with(Family::V4, fix, |listener| set_socket_recv_buffer_size(listener, 1).unwrap());
    ends.ours.set_nonblocking(true).unwrap();
    ends.peer.set_nonblocking(true).unwrap();
    for (mut end, bytes) in [(&ends.ours, &mut ends.to_peer), (&ends.peer, &mut ends.to_us)] {
        wait_until("no more fits", || {
            let piece = pattern(bytes.len(), 512);
            match end.write(&piece) {
                Ok(written) => bytes.extend(&piece[..written]),
                Err(error) => return error.kind() == IoErrorKind::WouldBlock && info(end).snd_wnd < 2048,
            }
            false
        });
    }
    ends.ours.set_nonblocking(false).unwrap();
    ends.peer.set_nonblocking(false).unwrap();
    ends
}

pub fn a_blocking_socket_with_tiny_buffers_does_not_hang() {
    let mut ends = tiny(|ours| {
        set_socket_send_buffer_size(ours, 1).unwrap();
        set_socket_recv_buffer_size(ours, 1).unwrap();
    });
    let connection = ends.move_once();
    assert!(connection.control.inq_len > 0 && connection.control.outq_len > 0, "{connection:?}");
    ends.finish();
}

pub fn tuning_of_the_buffers_goes_on() {
    const BOTH: u32 = 3;
    let fixed = |ours: &TcpStream| {
        set_socket_send_buffer_size(ours, 50_000).unwrap();
        set_socket_recv_buffer_size(ours, 50_000).unwrap();
    };
    for (lock, prepare) in [(0, (|_| {}) as fn(&TcpStream)), (BOTH, fixed)] {
        let mut ends = Ends::with(Family::V4, prepare, |_| {});
        ends.receive(20_000);
        let first = ends.move_once();
        assert_eq!(first.buffers.map(|buffers| buffers.lock), Some(lock));
        if lock == BOTH {
            assert_eq!(first.buffers, Some(Buffers { send: 100_000, receive: 100_000, lock }));
        }
        assert_eq!(save(&ends.ours).unwrap().buffers, first.buffers);
        ends.finish();
    }
}

pub fn a_blocked_connect_goes_on() {
    let pair = Pair::new().unwrap();
    let mut wire = Sniffer::flagged(&pair.b.namespace, "eth0", Flags::SYN).unwrap();
    let listener = pair.b.run(|| TcpListener::bind(pair.b.address(Family::V4, PORT))).unwrap();
    set_deaf(&listener, true).unwrap();
    let remote = pair.a.address_of(&pair.b, Family::V4, PORT);
    let socket = pair.a.run(|| unconnected(Family::V4));
    set_socket_recv_buffer_size(&socket, 8000).unwrap();
    let connection = thread::scope(|scope| {
        let blocked = scope.spawn(|| connect(&socket, &remote));
        wait_until("the SYN is lost", || !wire.segments().unwrap().is_empty());
        let paused = pause(&socket).unwrap().with_peer(remote);
        let connection = paused.save().unwrap();
        paused.detach().unwrap();
        blocked.join().unwrap().unwrap_err();
        connection
    });
    let restored = pair.a.run(|| connection.restore()).unwrap();
    // Nobody answers, and nobody waits for that.
    let ours = restored.resume().unwrap();
    assert_eq!(info(&ours).state, State::SynSent);
    assert!(!rustix::fs::fcntl_getfl(&ours).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
    // The window scale in its SYN depends on them.
    let again = pause(&ours).unwrap().with_peer(remote);
    assert_eq!(again.save().unwrap().buffers, connection.buffers);
    again.resume().unwrap();
    set_deaf(&listener, false).unwrap();
    wait_until("the handshake is over", || info(&ours).state == State::Established);
    let (peer, _) = listener.accept().unwrap();
    Ends::between(pair, ours, peer, remote).finish();
}

pub fn a_detached_socket_is_silent_for_ever() {
    let mut ends = busy();
    let mut wire = Sniffer::flagged(&ends.pair.b.namespace, "eth0", Flags::FIN | Flags::RST).unwrap();
    let connection = ends.take();
    let old = ends.ours.try_clone().unwrap();
    ends.restore_and_resume(&connection);
    (&old).write(b"nobody").unwrap_err();
    let _ = old.shutdown(Shutdown::Both);
    drop(old);
    assert_eq!(wire.segments().unwrap(), []);
    ends.finish();
}

pub fn a_restored_socket_that_is_dropped_is_silent() {
    for state in [State::Established, State::CloseWait, State::FinWait1, State::LastAck, State::Closing] {
        let mut ends = Ends::of(Case { family: Family::V4, state, received: 3000, sent: 3000, unsent: 3000 });
        let connection = ends.take();
        let mut wire = Sniffer::flagged(&ends.pair.b.namespace, "eth0", Flags::FIN | Flags::RST).unwrap();
        drop(ends.restore(&connection).unwrap());
        let from_us = |segment: &soccr_lab::Segment| segment.source == connection.local;
        assert!(!wire.segments().unwrap().iter().any(from_us), "{state:?}");
        ends.restore_and_resume(&connection);
        ends.finish();
    }
}

pub fn what_has_arrived_since_the_save_stops_the_detach() {
    let mut ends =
        Ends::of(Case { family: Family::V4, state: State::Established, received: 0, sent: 0, unsent: 0 });
    let paused = pause(&ends.ours).unwrap();
    paused.save().unwrap();
    (&ends.peer).write_all(b"late").unwrap();
    wait_until("it has been acknowledged", || info(&ends.peer).unacknowledged == 0);
    let error = paused.detach().unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Changed, "detach"), "{error}");
    assert!(error.what().contains("changes while it is read") && error.remedy().contains("lock"), "{error}");
    ends.to_us.extend_from_slice(b"late");
    ends.finish();
}

pub fn a_blocked_connect_goes_on_though_the_old_socket_holds_its_port() {
    let pair = Pair::new().unwrap();
    let (local, remote) = (pair.a.address(Family::V4, PORT), pair.a.address_of(&pair.b, Family::V4, PORT));
    let old = pair.a.run(|| socket(AddressFamily::INET, SocketType::STREAM, None)).unwrap();
    rustix::net::bind(&old, &local).unwrap();
    rustix::io::ioctl_fionbio(&old, true).unwrap();
    let listener = pair.b.run(|| TcpListener::bind(remote)).unwrap();
    set_deaf(&listener, true).unwrap();
    let _ = connect(&old, &remote);
    let paused = pause(&old).unwrap();
    let connection = paused.save().unwrap();
    paused.detach().unwrap();
    let restored = pair.a.run(|| connection.restore()).unwrap();
    let ours = restored.resume().unwrap();
    set_deaf(&listener, false).unwrap();
    wait_until("the handshake is over", || info(&ours).state == State::Established);
    let (peer, _) = listener.accept().unwrap();
    drop(old);
    Ends::between(pair, ours, peer, remote).finish();
}
