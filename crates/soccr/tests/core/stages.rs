//! The staged form, on sockets that the caller has bound and connected.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustix::net::sockopt::set_socket_recv_buffer_size;
use soccr::connection::{Connection, Flow};
use soccr::{ErrorKind, Restore, Restored};
use soccr_lab::{Case, Family, State, sysctl, wait_until};

use crate::ends::{Ends, info, info_bytes, option, probes, unconnected};

/// Restores onto `socket` by stages; the caller connects it as `actual`.
fn restore<'fd>(
    socket: &'fd TcpStream,
    connection: &Connection,
    actual: Flow,
) -> soccr::Result<Restored<BorrowedFd<'fd>>> {
    let mut steps = Restore::unbound(socket, &connection.control, None)?;
    rustix::net::bind(socket, &actual.local).unwrap();
    rustix::net::connect(socket, &actual.remote).unwrap();
    steps.connected(Some(connection.flow()))?;
    steps.receive_queue(&connection.receive_queue, connection.urgent)?;
    steps.send_queue(&connection.send_queue)?;
    steps.finish()
}

pub fn a_socket_with_other_addresses_is_refused() {
    for family in Family::ALL {
        let mut ends = Ends::new(family);
        let connection = ends.take();
        let Flow { mut local, mut remote } = connection.flow();
        local.set_port(local.port() ^ 1);
        remote.set_port(remote.port() + 1);
        for actual in [Flow { local, ..connection.flow() }, Flow { remote, ..connection.flow() }] {
            let socket = ends.pair.a.run(|| unconnected(family));
            let error = restore(&socket, &connection, actual).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
            assert!(error.to_string().contains(&actual.local.to_string()), "{error}");
        }
        ends.restore_and_resume(&connection);
        ends.finish();
    }
}

/// Nothing locks the connection, and the peer has not heard that its FIN has arrived.
pub fn a_fin_that_the_peer_repeats_need_not_be_played() {
    for family in Family::ALL {
        let mut ends = Ends::new(family);
        ends.receive(1000);
        ends.deafen();
        ends.peer.shutdown(Shutdown::Write).unwrap();
        wait_until("the FIN has arrived", || info(&ends.ours).state == State::CloseWait);
        let connection = ends.take();
        let socket = ends.pair.a.run(|| unconnected(family));
        let Flow { local, remote } = connection.flow();
        let mut steps = Restore::unbound(&socket, &connection.control, None).unwrap();
        rustix::net::bind(&socket, &local).unwrap();
        rustix::net::connect(&socket, &remote).unwrap();
        steps.connected(None).unwrap();
        steps.receive_queue(&connection.receive_queue, None).unwrap();
        ends.connect_hosts();
        wait_until("it arrives again", || info(&socket).state == State::CloseWait);
        ends.disconnect_hosts();
        steps.send_queue(&connection.send_queue).unwrap();
        let restored = steps.finish().unwrap();
        ends.connect_hosts();
        restored.resume().unwrap();
        ends.ours = socket;
        ends.finish();
    }
}

/// connect() limits the receive window for good where the local sysctl knows no scaling.
pub fn the_receive_window_is_not_limited_by_the_local_sysctl() {
    let large = |ours: &TcpStream| set_socket_recv_buffer_size(ours, 1 << 21).unwrap();
    let mut ends = Ends::with(Family::V4, large, |_| {});
    // It opens as data comes.
    while info(&ends.peer).snd_wnd <= 65535 && ends.to_us.len() < 300_000 {
        ends.receive(20_000);
    }
    let connection = ends.take();
    let window = connection.control.window.unwrap().rcv_wnd;
    assert!(window > 65535, "{window}");
    ends.pair.a.run(|| sysctl("net/ipv4/tcp_window_scaling", "0")).unwrap();
    let socket = ends.pair.a.run(|| unconnected(Family::V4));
    let restored = restore(&socket, &connection, connection.flow()).unwrap();
    let limit = option(&restored, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP).unwrap() as u32;
    assert!(limit >= window, "{limit} of {window}");
    ends.connect_hosts();
    restored.resume().unwrap();
    ends.ours = socket;
    ends.finish();
}

/// Nobody knows how long a caller waits between two stages, or a processor with a restore.
pub fn a_timer_that_runs_out_between_the_stages_does_no_harm() {
    /// Where `struct tcp_info` has its `tcpi_total_retrans`.
    const TOTAL_RETRANS: Range<usize> = 100..104;
    for (sent, unsent) in [(3000, 0), (0, 20_000), (3000, 20_000)] {
        let case = Case { family: Family::V4, state: State::Established, received: 0, sent, unsent };
        let mut ends = Ends::of(case);
        let connection = ends.take();
        let socket = ends.pair.a.run(|| unconnected(Family::V4));
        let steps = Restore::unbound(&socket, &connection.control, None).unwrap();
        // The timers run for as long as they did.
        let mut steps = steps.path(connection.path.unwrap()).unwrap();
        steps.connect(connection.flow()).unwrap();
        steps.send_queue(&connection.send_queue).unwrap();
        wait_until("the kernel repeats a segment, or probes a window", || {
            let repeated = &info_bytes(&socket)[TOTAL_RETRANS];
            probes(&socket) > 0 || *repeated != [0; 4]
        });
        let restored = steps.finish().unwrap();
        ends.connect_hosts();
        restored.resume().unwrap();
        ends.ours = socket;
        ends.finish();
    }
}

/// Nobody has locked the connection: what reaches the new socket too early, the comparison in the end tells.
pub fn what_the_peer_says_between_the_stages_is_told() {
    for (sent, unsent) in [(0, 0), (3000, 0), (0, 20_000)] {
        let case = Case { family: Family::V4, state: State::Established, received: 0, sent, unsent };
        let mut ends = Ends::of(case);
        let connection = ends.take();
        let socket = ends.pair.a.run(|| unconnected(Family::V4));
        let mut steps = Restore::unbound(&socket, &connection.control, None).unwrap();
        steps.connect(connection.flow()).unwrap();
        steps.send_queue(&connection.send_queue).unwrap();
        ends.connect_hosts();
        match (sent, unsent) {
            (0, 0) => {
                ends.peer.write_all(b"early").unwrap();
                wait_until("data comes", || info(&socket).unread > 0);
            }
            (_, 0) => {
                ends.undeafen();
                wait_until("an acknowledgement comes", || info(&socket).unacknowledged == 0);
            }
            _ => {
                // Of what is sent then it hears nothing.
                ends.deafen();
                ends.peer.set_nonblocking(true).unwrap();
                wait_until("the window opens, and lets go of what was never sent", || {
                    let _ = ends.peer.read(&mut [0; 1 << 16]);
                    info(&socket).unsent < unsent
                });
            }
        }
        let error = steps.finish().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{sent} sent, {unsent} unsent: {error}");
        assert!(error.to_string().contains("lock the traffic first"), "{error}");
    }
}

pub fn unsent_bytes_come_back_where_little_may_wait_unsent() {
    let case = Case { family: Family::V4, state: State::Established, received: 0, sent: 0, unsent: 20_000 };
    let mut ends = Ends::of(case);
    let connection = ends.take();
    ends.pair.a.run(|| sysctl("net/ipv4/tcp_notsent_lowat", "1")).unwrap();
    ends.restore_and_resume(&connection);
    ends.finish();
}
