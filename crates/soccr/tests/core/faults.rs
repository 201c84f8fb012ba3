//! Every system call of a save and of a restore fails once: what the caller is told, and what is left behind.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::thread;

use rustix::net::sockopt::{set_socket_oobinline, set_socket_send_buffer_size};
use soccr::bulk;
use soccr::connection::Connection;
use soccr::lock::{Locker, Mode};
use soccr::{Error, ErrorKind, Fidelity, Paused, Restored, pause};
use soccr_lab::{
    Call, Case, Family, Faults, Flags, Made, Pair, Sniffer, State, Supervisor, calls_of, option_of,
    supervised, wait_until,
};

use crate::ends::{
    Ends, PORT, assert_nothing_new, assert_same, comparable, has_peek_offset, info, option, set_option,
    small_window,
};

const TCP_REPAIR: i32 = 19;

const ERRNOS: [i32; 3] = [libc::EPERM, libc::ENOMEM, libc::EINVAL];

/// Runs `body` on a thread whose `calls` fail as `decide` says.
fn deciding<T: Send>(
    calls: &[i64],
    decide: impl Fn(Call) -> Option<i32>,
    body: impl FnOnce() -> T + Send,
) -> T {
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let thread = scope.spawn(move || {
            sender.send(Supervisor::of_this_thread(calls)).unwrap();
            body()
        });
        let supervisor = receiver.recv().unwrap().expect("seccomp");
        while supervisor.decide(&decide).unwrap().is_some() {}
        thread.join().unwrap()
    })
}

/// Runs `body` on a thread that can start no other one.
fn without_threads(body: impl FnOnce() + Send) {
    deciding(&[libc::SYS_clone, libc::SYS_clone3], |_| Some(libc::EAGAIN), body);
}

/// Linux before 5.14 locks a buffer whose size is set, and does not tell.
pub fn a_kernel_that_does_not_unlock_buffers_is_told_of() {
    const CALLS: [i64; 2] = [libc::SYS_getsockopt, libc::SYS_setsockopt];
    let has_none =
        |call| (option_of(call) == (libc::SOL_SOCKET, libc::SO_BUF_LOCK)).then_some(libc::ENOPROTOOPT);
    for received in [0, 50_000] {
        let mut ends = Ends::new(Family::V4);
        ends.receive(received);
        let mut connection = ends.take();
        let told = |restored: &Restored| {
            restored.report().strict().unwrap();
            let entry = restored.report().get("SO_BUF_LOCK");
            entry.map(|entry| (entry.fidelity(), entry.reason().contains("Linux 5.14")))
        };
        assert_eq!(told(&ends.restore(&connection).unwrap()), None);
        connection.buffers.as_mut().unwrap().receive = 400_000;
        let host = &ends.pair.a;
        let restored = deciding(&CALLS, has_none, || host.run(|| connection.restore()).unwrap());
        assert_eq!(told(&restored), Some((Fidelity::Missing, true)), "{}", restored.report());
        ends.resume(restored);
        ends.finish();
    }
}

pub fn without_threads_it_takes_longer() {
    let ends = Ends::new(Family::V4);
    let connection = ends.take();
    without_threads(move || {
        let mut count = 0;
        ends.pair.a.run(|| bulk::restore((0..50).map(|key| (key, connection.clone())), |_, _| count += 1));
        assert_eq!(count, 50);

        let locker = ends.pair.a.run(|| Locker::new(Mode::HOLD)).unwrap();
        let lock = locker.lock(&[connection.flow()]).unwrap();
        ends.connect_hosts();
        (&ends.peer).write_all(b"held").unwrap();
        wait_until("it is held", || !lock.take().unwrap()[0].packets.is_empty());
    });
}

/// Connection tracking is loaded on most machines, and used in few network namespaces.
pub fn a_save_opens_nothing_where_nothing_is_tracked() {
    let ends = Ends::new(Family::V4);
    let calls = &[libc::SYS_socket, libc::SYS_openat, libc::SYS_clone, libc::SYS_clone3];
    let opened = calls_of(calls, || {
        let paused = pause(&ends.ours).unwrap();
        paused.save().unwrap();
        paused.resume().unwrap();
    });
    assert!(opened.is_empty(), "{opened:?}");
    ends.finish();
}

/// What an error must name, after this call has failed. `None`: one of the many options that travel with a connection.
fn name(call: Call) -> Option<&'static str> {
    let name = match call.number {
        libc::SYS_getsockopt | libc::SYS_setsockopt => match option_of(call) {
            (libc::IPPROTO_TCP, 1) => "TCP_NODELAY",
            (libc::IPPROTO_TCP, 2) => "TCP_MAXSEG",
            (libc::IPPROTO_TCP, 10) => "TCP_WINDOW_CLAMP",
            (libc::IPPROTO_TCP, 11) => "TCP_INFO",
            (libc::IPPROTO_TCP, TCP_REPAIR) => "TCP_REPAIR",
            (libc::IPPROTO_TCP, 20) => "TCP_REPAIR_QUEUE",
            (libc::IPPROTO_TCP, 21) => "TCP_QUEUE_SEQ",
            (libc::IPPROTO_TCP, 22) => "TCP_REPAIR_OPTIONS",
            (libc::IPPROTO_TCP, 24) => "TCP_TIMESTAMP",
            (libc::IPPROTO_TCP, 25) => "TCP_NOTSENT_LOWAT",
            (libc::IPPROTO_TCP, 29) => "TCP_REPAIR_WINDOW",
            (libc::IPPROTO_TCP, 31) => "TCP_ULP",
            (libc::IPPROTO_TCP, 40) => "TCP_AO_INFO",
            (libc::IPPROTO_IP, libc::IP_OPTIONS) => "IP_OPTIONS",
            (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT) => "IP_BIND_ADDRESS_NO_PORT",
            (libc::IPPROTO_IP, 51) => "IP_LOCAL_PORT_RANGE",
            (libc::IPPROTO_IPV6, libc::IPV6_HOPOPTS) => "IPV6_HOPOPTS",
            (libc::IPPROTO_IPV6, libc::IPV6_RTHDR) => "IPV6_RTHDR",
            (libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS) => "IPV6_DSTOPTS",
            (libc::IPPROTO_IPV6, libc::IPV6_RTHDRDSTOPTS) => "IPV6_RTHDRDSTOPTS",
            (libc::IPPROTO_IPV6, 6) => "IPV6_2292PKTOPTIONS",
            (libc::SOL_SOCKET, libc::SO_REUSEADDR) => "SO_REUSEADDR",
            (libc::SOL_SOCKET, libc::SO_OOBINLINE) => "SO_OOBINLINE",
            (libc::SOL_SOCKET, libc::SO_PEEK_OFF) => "SO_PEEK_OFF",
            (libc::SOL_SOCKET, libc::SO_SNDBUF) => "SO_SNDBUF",
            (libc::SOL_SOCKET, libc::SO_SNDBUFFORCE) => "SO_SNDBUFFORCE",
            (libc::SOL_SOCKET, libc::SO_RCVBUF) => "SO_RCVBUF",
            (libc::SOL_SOCKET, libc::SO_RCVBUFFORCE) => "SO_RCVBUFFORCE",
            (libc::SOL_SOCKET, libc::SO_BUF_LOCK) => "SO_BUF_LOCK",
            (libc::SOL_SOCKET, libc::SO_MEMINFO) => "SO_MEMINFO",
            (libc::SOL_SOCKET, libc::SO_NETNS_COOKIE) => "SO_NETNS_COOKIE",
            _ => return None,
        },
        libc::SYS_ioctl => match call.arguments[1] {
            0x541B => "SIOCINQ",
            0x8905 => "SIOCATMARK",
            0x5411 => "SIOCOUTQ",
            0x894B => "SIOCOUTQNSD",
            0x8903 => "FIOGETOWN",
            other => panic!("an error about an ioctl {other:#x}"),
        },
        libc::SYS_socket => "socket",
        libc::SYS_bind => "bind",
        libc::SYS_connect => "connect",
        libc::SYS_shutdown => "shutdown",
        libc::SYS_getsockname => "getsockname",
        libc::SYS_getpeername => "getpeername",
        libc::SYS_sendto => "queue",
        libc::SYS_recvfrom => "recv",
        libc::SYS_fcntl => "fcntl",
        libc::SYS_poll | libc::SYS_ppoll => "poll",
        other => panic!("an error about a system call {other}"),
    };
    Some(name)
}

fn peeks_out_of_band(call: Call) -> bool {
    call.number == libc::SYS_recvfrom && call.arguments[3] as i32 & libc::MSG_OOB != 0
}

/// The error says at which step what went wrong, and how.
fn assert_told(error: &Error, step: &[&str], call: Call, errno: i32) {
    assert!(step.contains(&error.step()), "{error}, for {call:?}");
    let named = match name(call) {
        Some(name) => error.what().contains(name),
        // One of the options that travel.
        None => {
            call.number == libc::SYS_getsockopt
                && ["SO_", "TCP_", "IP_", "IPV6_"].iter().any(|level| error.what().starts_with(level))
        }
    };
    // Whichever of the calls by which an entry is asked for and made.
    let told = named || ["netfilter socket", "conntrack"].contains(&error.what());
    assert!(told, "{error}, for {call:?}");
    assert_eq!((error.kind(), error.errno()), (ErrorKind::System, Some(errno)), "{error}, for {call:?}");
    assert!(error.to_string().contains(error.what()), "{error}");
    if errno != libc::EINVAL {
        assert!(!error.remedy().is_empty(), "{error}");
    }
}

/// Connections of many kinds, so that every branch is taken: queues with an urgent mark, unsent bytes, FINs.
fn connections() -> Vec<(&'static str, Ends)> {
    let established = || {
        let mut ends = Ends::new(Family::V4);
        // Where a mark can be read past, it lies in the middle.
        if has_peek_offset(&ends.ours) {
            ends.receive(50_000);
        }
        ends.receive_urgent();
        ends.receive(1000);
        ends.deafen();
        ends.send(40_000);
        // Some of it is in flight, the rest exceeds the congestion window.
        wait_until("some is sent", || info(&ends.ours).unsent < 40_000);
        ends
    };
    let half_closed = || {
        let mut ends =
            Ends::with(Family::V6, |ours| set_socket_send_buffer_size(ours, 30_000).unwrap(), small_window);
        ends.receive(5000);
        ends.fill_peer();
        ends.peer.shutdown(Shutdown::Write).unwrap();
        wait_until("the FIN has arrived and is acknowledged", || info(&ends.peer).state == State::FinWait2);
        ends.ours.shutdown(Shutdown::Write).unwrap();
        ends.deafen();
        ends
    };
    let finished = || {
        let mut ends = Ends::new(Family::Mapped);
        ends.receive(5000);
        ends.ours.shutdown(Shutdown::Write).unwrap();
        wait_until("our FIN is acknowledged", || info(&ends.ours).state == State::FinWait2);
        ends
    };
    vec![("ESTABLISHED", established()), ("LAST_ACK", half_closed()), ("FIN_WAIT2", finished())]
}

/// The options that a save changes for a moment.
const PUT_BACK: [(i32, i32); 2] =
    [(libc::SOL_SOCKET, libc::SO_OOBINLINE), (libc::SOL_SOCKET, libc::SO_PEEK_OFF)];

/// Those, and what repair mode changes.
const CHANGED: [(i32, i32); 4] =
    [PUT_BACK[0], PUT_BACK[1], (libc::SOL_SOCKET, libc::SO_REUSEADDR), (libc::IPPROTO_TCP, TCP_REPAIR)];

/// A save, and the call that has failed. The guard resumes with a kernel that works again.
fn save_with(faults: &Faults, socket: &TcpStream) -> (soccr::Result<Connection>, Option<Call>) {
    match pause(socket) {
        Ok(paused) => (paused.save(), faults.disarm()),
        Err(error) => (Err(error), faults.disarm()),
    }
}

pub fn every_fault_of_a_save_is_told_and_harmless() {
    for (text, ends) in connections() {
        set_option(&ends.ours, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
        let has_peek_offset = has_peek_offset(&ends.ours);
        if has_peek_offset {
            set_option(&ends.ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 7);
        }
        let options = || CHANGED.map(|(level, name)| option(&ends.ours, level, name).ok());
        let reference = pause(&ends.ours).unwrap().save().unwrap();
        let before = options();
        supervised(|faults| {
            for errno in ERRNOS {
                for left in 0.. {
                    faults.arm(left, errno);
                    let (saved, failed) = save_with(faults, &ends.ours);
                    if failed.is_some_and(|call| {
                        call.number == libc::SYS_setsockopt && PUT_BACK.contains(&option_of(call))
                    }) {
                        // Where putting it back fails, there is nothing left but to say so.
                        PUT_BACK
                            .iter()
                            .zip(&before)
                            .filter_map(|(option, value)| Some((option, (*value)?)))
                            .for_each(|(&(level, name), value)| set_option(&ends.ours, level, name, value));
                    }
                    assert_eq!(options(), before, "{text}: after {failed:?}");
                    let Some(call) = failed else { break };
                    match saved {
                        Err(error) => assert_told(&error, &["pause", "save"], call, errno),
                        // So the kernel says that the urgent byte has been read.
                        Ok(_) if errno == libc::EINVAL && peeks_out_of_band(call) => {}
                        // So the kernel says that a socket has no such option.
                        Ok(saved) => assert_harmless(&reference, &saved, errno == libc::EINVAL, call),
                    }
                }
            }
        });
        if has_peek_offset {
            set_option(&ends.ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1);
        }
        // An urgent byte is a byte of the stream, too.
        set_socket_oobinline(&ends.ours, true).unwrap();
        ends.finish();
    }
}

/// A call failed, and what came of it is nevertheless complete, but for a setting that could not be read or set.
fn assert_harmless(reference: &Connection, result: &Connection, skipped: bool, call: Call) {
    let mut result = result.clone();
    if comparable(&result).settings != comparable(reference).settings {
        let option = [libc::SYS_getsockopt, libc::SYS_setsockopt].contains(&call.number);
        let (result, reference) = (&result.settings, &reference.settings);
        assert!(skipped && option, "{result:?} instead of {reference:?} after {call:?}");
    }
    result.settings = reference.settings.clone();
    assert_same(reference, &result);
}

pub fn every_fault_of_a_restore_is_told_and_silent() {
    for (text, mut ends) in connections() {
        let connection = ends.take();
        let mut wire = Sniffer::on(&ends.pair.b.namespace, "eth0").unwrap();
        let host = &ends.pair.a;
        supervised(|faults| {
            for errno in ERRNOS {
                for left in 0.. {
                    faults.arm(left, errno);
                    let result = host.run(|| connection.restore());
                    let Some(call) = faults.disarm() else { break };
                    match result {
                        Err(error) => assert_told(&error, &["restore"], call, errno),
                        Ok(restored) => {
                            let paused = Paused::take_over(restored.as_fd()).unwrap();
                            let saved = paused.save().unwrap();
                            paused.leave_paused();
                            assert_harmless(&connection, &saved, restored.report().strict().is_err(), call);
                        }
                    }
                    assert_nothing_new(&mut wire, &connection, &format!("{text}, after {call:?}"));
                }
            }
        });
        ends.restore_and_resume(&connection);
        // An urgent byte is a byte of the stream, too.
        set_socket_oobinline(&ends.ours, true).unwrap();
        ends.finish();
    }
}

pub fn every_fault_of_a_resume_is_told_and_silent() {
    for (text, mut ends) in connections() {
        set_option(&ends.ours, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
        let connection = ends.take();
        let mut wire = Sniffer::flagged(&ends.pair.b.namespace, "eth0", Flags::FIN | Flags::RST).unwrap();
        let host = &ends.pair.a;
        let mut resumed = None;
        supervised(|faults| {
            for left in 0.. {
                let restored = host.run(|| connection.restore()).unwrap();
                faults.arm_for_good(left, libc::ENOMEM);
                let result = restored.resume();
                let failed = faults.disarm();
                match (result, failed) {
                    (Err(error), Some(call)) => assert_told(&error, &["resume"], call, libc::ENOMEM),
                    // The last ACK is a courtesy.
                    (Ok(stream), _) => {
                        resumed = Some(stream);
                        break;
                    }
                    (Err(error), None) => panic!("{error}"),
                }
                let closed = wire.segments().unwrap();
                let closed: Vec<_> =
                    closed.iter().filter(|segment| segment.destination.port() == PORT).collect();
                assert!(closed.is_empty(), "{text}: {closed:?} after {failed:?}");
            }
        });
        ends.ours = resumed.unwrap();
        ends.connect_hosts();
        set_socket_oobinline(&ends.ours, true).unwrap();
        ends.finish();
    }
}

/// It may be all that is left of the connection.
pub fn a_resume_that_fails_once_is_made_again() {
    for (text, mut ends) in connections() {
        let connection = ends.take();
        let host = &ends.pair.a;
        let mut resumed = None;
        supervised(|faults| {
            for left in 0.. {
                let restored = host.run(|| connection.restore()).unwrap();
                faults.arm(left, libc::ENOMEM);
                let result = restored.resume();
                let failed = faults.disarm();
                let stream = result.unwrap_or_else(|error| panic!("{text}: {error}, for {failed:?}"));
                if failed.is_none() {
                    resumed = Some(stream);
                    break;
                }
                pause(&stream).unwrap().leave_paused();
            }
        });
        ends.ours = resumed.unwrap();
        ends.connect_hosts();
        set_socket_oobinline(&ends.ours, true).unwrap();
        ends.finish();
    }
}

/// In repair mode connect(2) sends nothing, and passes for a handshake that is over.
pub fn a_handshake_that_fails_once_is_begun_again() {
    let pair = Pair::new().unwrap();
    let case = Case { family: Family::V4, state: State::SynSent, received: 0, sent: 0, unsent: 0 };
    let Made { socket, remote, peer, .. } = case.make(&pair.a, &pair.b);
    let paused = pause(&socket).unwrap().with_peer(remote);
    let connection = paused.save().unwrap();
    paused.detach().unwrap();
    let restored = pair.a.run(|| connection.restore()).unwrap();
    let mut resumed = None;
    supervised(|faults| {
        faults.arm_among(&[libc::SYS_connect], 0, libc::ENOBUFS);
        resumed = Some(restored.resume());
        assert!(faults.disarm().is_some());
    });
    let ours = resumed.unwrap().unwrap();
    assert_eq!(info(&ours).state, State::SynSent);
    peer.unblock().unwrap();
    let peer = peer.into_stream().unwrap();
    wait_until("the handshake is over", || info(&ours).state == State::Established);
    Ends::between(pair, ours, peer, remote).finish();
}

pub fn a_resume_or_detach_that_fails_can_be_tried_again() {
    let mut ends = Ends::new(Family::V4);
    ends.receive(5000);
    let reference = pause(&ends.ours).unwrap().save().unwrap();
    supervised(|faults| {
        let paused = pause(&ends.ours).unwrap();
        faults.arm(0, libc::EPERM);
        let error = paused.resume().unwrap_err();
        assert_told(&error, &["resume"], faults.disarm().unwrap(), libc::EPERM);
        Paused::take_over(ends.ours.as_fd()).unwrap().resume().unwrap();

        let paused = pause(&ends.ours).unwrap();
        faults.arm(0, libc::EPERM);
        let error = paused.detach().unwrap_err();
        assert_told(&error, &["detach"], faults.disarm().unwrap(), libc::EPERM);
        // It goes on.
        assert_same(&reference, &pause(&ends.ours).unwrap().save().unwrap());
    });
    ends.finish();
}

pub fn a_detach_fails_only_where_the_connection_stays() {
    supervised(|faults| {
        for left in 0.. {
            let ends = Ends::new(Family::V4);
            let paused = pause(&ends.ours).unwrap();
            paused.save().unwrap();
            faults.arm(left, libc::EPERM);
            let detached = paused.detach();
            let failed = faults.disarm();
            assert_eq!(detached.is_ok(), ends.ours.peer_addr().is_err(), "{detached:?} after {failed:?}");
            if failed.is_none() {
                break;
            }
        }
    });
}

/// The calls that a signal may interrupt: a traced process, or one with timers, sees it every day.
const INTERRUPTIBLE: [i64; 4] = [libc::SYS_sendto, libc::SYS_recvfrom, libc::SYS_poll, libc::SYS_ppoll];

pub fn an_interrupted_call_is_made_again() {
    for (text, ends) in connections() {
        supervised(move |faults| {
            let reference = pause(&ends.ours).unwrap().save().unwrap();
            for left in 0.. {
                faults.arm_among(&INTERRUPTIBLE, left, libc::EINTR);
                let (saved, failed) = save_with(faults, &ends.ours);
                let saved = saved.unwrap_or_else(|error| panic!("{text}: {error}, for {failed:?}"));
                assert_same(&reference, &saved);
                if failed.is_none() {
                    break;
                }
            }
            let connection = ends.take();
            for left in 0.. {
                faults.arm_among(&INTERRUPTIBLE, left, libc::EINTR);
                let restored = ends.pair.a.run(|| connection.restore());
                let failed = faults.disarm();
                let restored = restored.unwrap_or_else(|error| panic!("{text}: {error}, for {failed:?}"));
                let paused = Paused::take_over(restored.as_fd()).unwrap();
                let saved = paused.save().unwrap();
                paused.leave_paused();
                assert_same(&connection, &saved);
                if failed.is_none() {
                    break;
                }
            }
        });
    }
}
