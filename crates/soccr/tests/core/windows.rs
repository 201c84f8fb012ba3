//! Our receive window is closed, or nearly, and the peer has more to send: whoever ends repair mode, it hears of the new
//! window as soon as the application reads, and need not ask.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;

use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size, set_tcp_nodelay};
use soccr::connection::Connection;
use soccr::{Restore, Restored};
use soccr_lab::{Family, Segment, Sniffer, TcpInfo, Test, wait_until};

use crate::ends::{Ends, LIMIT, PORT, assert_same_bytes, info, pattern, probes, set_option, unconnected};

/// What waits at the peer, where its buffer is large enough.
const WAITING: usize = 1 << 20;

/// How the window came to be what it is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Window {
    /// Filled to the last byte.
    Closed,
    /// Less is left than a segment takes.
    NearlyClosed,
    /// The buffer was made smaller than what was on its way: the window is taken back, or, before Linux 6.6, segments are
    /// dropped without a word.
    Retracted,
    /// Small segments have taken the memory.
    Tiny,
}

/// How the connection is restored, and who ends repair mode.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Resumed,
    Released,
    /// In stages, without the sizes of the buffers, and the host ends repair mode: as CRIU does.
    Staged,
}

/// One test for each kind of window, size of the buffer, way and family; closed windows also after a pause.
pub fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for window in [Window::Closed, Window::NearlyClosed, Window::Retracted, Window::Tiny] {
        for buffer in [None, Some(16384), Some(2304)] {
            for way in [Way::Resumed, Way::Released, Way::Staged] {
                for family in [Family::V4, Family::V6] {
                    let size = buffer.map_or("default".to_owned(), |bytes: usize| bytes.to_string());
                    let name = format!("windows::{window:?}_{size}_{way:?}_{family:?}").to_lowercase();
                    if window == Window::Closed {
                        let name = format!("{name}_after_some_seconds");
                        tests.push(Test::new(name, move || goes_on(window, buffer, way, family, 4)));
                    }
                    tests.push(Test::new(name, move || goes_on(window, buffer, way, family, 0)));
                }
            }
        }
    }
    tests
}

/// Where this machine is busy, the timer of the peer may be first; not every time, since it takes twice as long each time.
fn goes_on(window: Window, buffer: Option<usize>, way: Way, family: Family, asked: u8) {
    const ATTEMPTS: u8 = 5;
    // What was on its way and is lost, its timer alone can repeat.
    let is_lost = window == Window::Retracted;
    let in_time = (asked..asked + ATTEMPTS).any(|asked| carry(window, buffer, way, family, asked) || is_lost);
    assert!(in_time, "the peer asks for the window each time");
}

/// True where the peer has not asked for the window before it used it. Before the restore it asks so many times.
fn carry(window: Window, buffer: Option<usize>, way: Way, family: Family, asked: u8) -> bool {
    let mut ends = fill(window, buffer, family);
    let connection = ends.take();
    if !matches!(window, Window::NearlyClosed | Window::Retracted) {
        wait_until("the peer has asked", || probes(&ends.peer) >= asked);
    }
    let restore = || {
        let restored = ends.restore(&connection).unwrap();
        assert_window(&restored, &connection);
        restored
    };
    let resume: Box<dyn FnOnce() -> TcpStream> = match way {
        Way::Resumed => {
            let restored = restore();
            Box::new(|| restored.resume().unwrap())
        }
        Way::Released => {
            let socket = restore().into_socket().into();
            Box::new(|| end_repair(socket))
        }
        Way::Staged => {
            let socket = ends.pair.a.run(|| in_stages(&connection));
            assert_window(&socket, &connection);
            Box::new(|| end_repair(socket))
        }
    };
    let left = info(&ends.peer).snd_wnd as usize;
    ends.connect_hosts();
    let mut wire = Sniffer::on(&ends.pair.a.namespace, "eth0").unwrap();
    ends.ours = resume();
    ends.ours.set_nonblocking(false).unwrap();
    ends.ours.set_read_timeout(Some(LIMIT)).unwrap();
    let mut read = vec![0; ends.to_us.len()];
    ends.ours.read_exact(&mut read).unwrap();
    assert_same_bytes(&read, &ends.to_us);
    ends.assert_no_reset();
    // Its timer sends a byte from before, or what fits into the rest of the window.
    let rcv_nxt = connection.control.rcv_nxt;
    let news = |segment: &&Segment| segment.payload_len > 0 || segment.seq == rcv_nxt.wrapping_sub(1);
    let segments = wire.segments().unwrap();
    let first = segments.iter().filter(|segment| segment.source.port() == PORT).find(news).unwrap();
    first.payload_len > left
}

/// A connection whose window is closed, while the peer has more to send.
fn fill(window: Window, buffer: Option<usize>, family: Family) -> Ends {
    loop {
        let small = |ours: &TcpStream| {
            if let Some(bytes) = buffer {
                set_socket_recv_buffer_size(ours, bytes).unwrap();
            }
        };
        let mut ends = Ends::with(family, small, |_| {});
        set_socket_send_buffer_size(&ends.peer, 2 * WAITING).unwrap();
        set_tcp_nodelay(&ends.peer, window != Window::NearlyClosed).unwrap();
        if window == Window::Retracted {
            set_socket_recv_buffer_size(&ends.ours, 2304).unwrap();
        }
        ends.peer.set_nonblocking(true).unwrap();
        match window {
            Window::Tiny => write(&mut ends, 70),
            Window::NearlyClosed => approach(&mut ends),
            Window::Closed | Window::Retracted => {}
        }
        write(&mut ends, 64 << 10);
        let idle = |peer: TcpInfo| peer.unsent > 0 && peer.unsent == peer.unacknowledged;
        wait_until("the window is closed", || {
            let peer = info(&ends.peer);
            let least = if window == Window::NearlyClosed { peer.snd_mss } else { 1 };
            let dropped = window == Window::Retracted && peer.total_retrans > 1;
            dropped || peer.snd_wnd < least && (idle(peer) || window == Window::Retracted)
        });
        // A timer of the peer fills what is left of the window.
        if window != Window::NearlyClosed || info(&ends.peer).snd_wnd > 0 {
            return ends;
        }
    }
}

/// The peer writes until less than a segment is left of the window, but something is: not half of what it will be, from
/// where on the kernel does not tell of the rest.
fn approach(ends: &mut Ends) {
    loop {
        let peer = info(&ends.peer);
        if peer.snd_wnd < peer.snd_mss {
            return;
        }
        ends.receive((peer.snd_wnd - peer.snd_mss / 4).min(8 * peer.snd_mss) as usize);
    }
}

/// The peer writes pieces of this size until no more fits.
fn write(ends: &mut Ends, piece: usize) {
    while ends.to_us.len() < WAITING {
        let bytes = pattern(ends.to_us.len(), piece);
        match (&ends.peer).write(&bytes) {
            Ok(written) => ends.to_us.extend(&bytes[..written]),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                return;
            }
        }
    }
}

/// A restored socket, in repair mode, has the window that was saved. It is not peeked into: that sends an update.
fn assert_window(socket: impl AsFd, connection: &Connection) {
    const TCP_REPAIR_WINDOW: i32 = 29;
    let mut words = [0; 20];
    soccr_lab::option(socket, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, &mut words).unwrap();
    let window = connection.control.window.unwrap();
    assert_eq!(words[12..], [window.rcv_wnd, window.rcv_wup].map(u32::to_ne_bytes).concat());
}

fn in_stages(connection: &Connection) -> TcpStream {
    let family = if connection.local.is_ipv4() { Family::V4 } else { Family::V6 };
    let socket = unconnected(family);
    let mut steps = Restore::unbound(&socket, &connection.control, None).unwrap();
    steps.connect(connection.flow()).unwrap();
    steps.receive_queue(&connection.receive_queue, None).unwrap();
    steps.send_queue(&connection.send_queue).unwrap();
    let _: Restored<_> = steps.finish().unwrap();
    socket
}

/// As a host does who knows nothing of [`Restored::resume`].
fn end_repair(socket: TcpStream) -> TcpStream {
    const TCP_REPAIR: i32 = 19;
    set_option(&socket, libc::IPPROTO_TCP, TCP_REPAIR, 0);
    socket
}
