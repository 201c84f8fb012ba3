//! Two ends of a connection on two hosts, brought into the state that a test is about.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;

use rustix::net::sockopt::set_socket_recv_buffer_size;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socket_with};
use soccr::connection::{Connection, Path, State as Saved, Window};
use soccr::settings::Value;
use soccr::{Restored, pause};
use soccr_lab::{
    Case, Family, Flags, Made, OnCpu, Pair, Sniffer, State, TcpInfo, attach_filter, detach_filter, wait_until,
};

/// The port of the peer.
pub const PORT: u16 = 5000;

/// The Ethernet addresses of host `a`, and of none.
const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const NOBODY: [u8; 6] = [2, 0, 0, 0, 0, 99];

/// How long a read or a write may take before its test fails.
pub const LIMIT: Duration = Duration::from_secs(20);

/// A connection from host `a`, which is ours to move, to host `b`.
#[derive(Debug)]
pub struct Ends {
    pub pair: Pair,
    pub ours: TcpStream,
    pub peer: TcpStream,
    /// The address of the peer, as our socket names it.
    pub remote: SocketAddr,
    /// Our address, as it is in packets.
    local: IpAddr,
    /// Everything our end has written and the peer has not read.
    pub to_peer: Vec<u8>,
    /// Everything the peer has written and our end has not read.
    pub to_us: Vec<u8>,
    /// FINs and resets on the wire.
    closing: Sniffer,
    /// The ports of those that have not sent a FIN.
    open: Vec<u16>,
}

impl Ends {
    /// An ESTABLISHED connection, nothing on its way.
    pub fn new(family: Family) -> Self {
        Self::with(family, |_| {}, |_| {})
    }

    /// The same between sockets that are prepared before they connect and listen.
    pub fn with(
        family: Family,
        prepare_ours: impl FnOnce(&TcpStream),
        prepare_peer: impl FnOnce(&TcpListener),
    ) -> Self {
        let pair = Pair::new().unwrap();
        let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, PORT))).unwrap();
        prepare_peer(&listener);
        let ours = pair.a.run(|| unconnected(family));
        prepare_ours(&ours);
        let remote = pair.a.address_of(&pair.b, family, PORT);
        rustix::net::connect(&ours, &remote).unwrap();
        let (peer, _) = listener.accept().unwrap();
        wait_until("the peer is established", || info(&peer).state == State::Established);
        Self::between(pair, ours, peer, remote)
    }

    /// A connection in any state that a socket can have once it is connected.
    pub fn of(case: Case) -> Self {
        let pair = Pair::new().unwrap();
        let Made { socket, remote, peer, incoming, outgoing, .. } = case.make(&pair.a, &pair.b);
        let ends = Self::between(pair, socket, peer.into_stream().unwrap(), remote);
        Self { to_us: incoming, to_peer: outgoing, ..ends }
    }

    /// What there is between two hosts, with nothing in its queues.
    pub fn between(pair: Pair, ours: TcpStream, peer: TcpStream, remote: SocketAddr) -> Self {
        peer.set_read_timeout(Some(LIMIT)).unwrap();
        peer.set_write_timeout(Some(LIMIT)).unwrap();
        let closing = Sniffer::flagged(&pair.b.namespace, "eth0", Flags::FIN | Flags::RST).unwrap();
        let open = [(&ours, ours.local_addr().unwrap().port()), (&peer, remote.port())]
            .into_iter()
            .filter(|(end, _)| matches!(info(end).state, State::Established | State::CloseWait))
            .map(|(_, port)| port)
            .collect();
        let local = ours.local_addr().unwrap().ip().to_canonical();
        Self { pair, ours, peer, remote, local, to_peer: Vec::new(), to_us: Vec::new(), closing, open }
    }

    /// The peer writes, and all of it lies in our receive queue.
    pub fn receive(&mut self, length: usize) {
        let bytes = pattern(self.to_us.len(), length);
        self.peer.write_all(&bytes).unwrap();
        self.to_us.extend(bytes);
        wait_until("all has arrived", || info(&self.peer).unacknowledged == 0);
    }

    /// The peer writes one urgent byte, and it lies in our receive queue.
    pub fn receive_urgent(&mut self) {
        let byte = pattern(self.to_us.len(), 1);
        assert_eq!(send(&self.peer, &byte, SendFlags::OOB), Ok(1));
        self.to_us.extend(byte);
        wait_until("the urgent byte has arrived", || info(&self.peer).unacknowledged == 0);
    }

    /// We write, and the peer, who must be [deaf](Self::deafen), does not acknowledge.
    pub fn send(&mut self, length: usize) {
        let bytes = pattern(self.to_peer.len(), length);
        assert_eq!(send(&self.ours, &bytes, SendFlags::DONTWAIT), Ok(length), "it must fit into the buffer");
        self.to_peer.extend(bytes);
    }

    /// We write until the peer's window is closed, so that everything in our send queue is unsent.
    pub fn fill_peer(&mut self) {
        self.ours.set_nonblocking(true).unwrap();
        // Shortly after the last acknowledgement there may be room for more.
        wait_until("the peer's window is closed", || {
            let bytes = pattern(self.to_peer.len(), 64 << 10);
            if let Ok(written) = self.ours.write(&bytes) {
                self.to_peer.extend(&bytes[..written]);
            }
            let info = info(&self.ours);
            info.unsent > 0 && info.unsent == info.unacknowledged && info.snd_wnd == 0
        });
        self.ours.set_nonblocking(false).unwrap();
    }

    /// From now on the peer hears nothing.
    pub fn deafen(&self) {
        set_deaf(&self.peer, true).unwrap();
    }

    /// The peer hears again, if it did not.
    pub fn undeafen(&self) {
        match set_deaf(&self.peer, false) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            other => other.unwrap(),
        }
    }

    /// Saves the connection and makes our socket forget it. From now on nothing reaches our host, which would reset the
    /// peer, until [`resume`](Self::resume); what our host sends reaches the peer.
    pub fn take(&self) -> Connection {
        self.disconnect_hosts();
        self.settle();
        let paused = pause(&self.ours).unwrap().with_peer(self.remote);
        let connection = paused.save().unwrap();
        paused.detach().unwrap();
        connection
    }

    /// What the peer's host has sent before has arrived: on each processor packets stay in order, and one behind all others has.
    fn settle(&self) {
        // What goes to all hosts asks for no neighbour.
        let here = self.pair.a.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
        let there = self.pair.b.run(|| UdpSocket::bind((self.pair.b.v4, 0))).unwrap();
        let to = ("224.0.0.1", here.local_addr().unwrap().port());
        for nth in 0..thread::available_parallelism().map_or(1, usize::from) {
            let _cpu = OnCpu::stay(nth);
            there.send_to(&[1], to).unwrap();
            here.recv(&mut [0]).unwrap();
        }
    }

    /// Restores a connection on our host.
    pub fn restore(&self, connection: &Connection) -> soccr::Result<Restored> {
        self.pair.a.run(|| connection.restore())
    }

    /// Goes on with a restored connection.
    pub fn resume(&mut self, restored: Restored) {
        self.connect_hosts();
        self.ours = restored.resume().unwrap();
    }

    /// Restores a connection and goes on with it.
    pub fn restore_and_resume(&mut self, connection: &Connection) {
        self.resume(self.restore(connection).unwrap());
    }

    /// What the peer sends reaches no host.
    pub fn disconnect_hosts(&self) {
        self.name_neighbour(NOBODY);
    }

    /// What the peer sends reaches our host again.
    pub fn connect_hosts(&self) {
        self.name_neighbour(OUR_MAC);
    }

    /// Tells the peer's host to which Ethernet address to send what is for us.
    fn name_neighbour(&self, mac: [u8; 6]) {
        self.pair.b.namespace.rtnetlink().unwrap().neighbour("eth0", self.local, mac).unwrap();
    }

    /// Moves the connection to another socket of our host.
    pub fn move_once(&mut self) -> Connection {
        let connection = self.take();
        self.restore_and_resume(&connection);
        connection
    }

    /// Whatever is still possible happens: each end writes, ends, and reads to the end of the other. All bytes are
    /// equal, both ends are closed, and no reset was seen.
    pub fn finish(mut self) {
        self.undeafen();
        let rest = |end: &TcpStream, written: &[u8]| {
            let open = matches!(info(end).state, State::Established | State::CloseWait);
            if open { pattern(written.len(), 3000) } else { Vec::new() }
        };
        let our_rest = rest(&self.ours, &self.to_peer);
        let peer_rest = rest(&self.peer, &self.to_us);
        self.to_peer.extend(&our_rest);
        self.to_us.extend(&peer_rest);
        self.ours.set_nonblocking(false).unwrap();
        self.ours.set_read_timeout(Some(LIMIT)).unwrap();
        self.ours.set_write_timeout(Some(LIMIT)).unwrap();
        thread::scope(|scope| {
            for (mut end, rest) in [(&self.ours, our_rest), (&self.peer, peer_rest)] {
                if !rest.is_empty() {
                    scope.spawn(move || {
                        end.write_all(&rest).unwrap();
                        end.shutdown(Shutdown::Write).unwrap();
                    });
                }
            }
            for (mut end, expected) in [(&self.ours, &self.to_us), (&self.peer, &self.to_peer)] {
                scope.spawn(move || {
                    let mut read = Vec::new();
                    end.read_to_end(&mut read).unwrap();
                    assert_same_bytes(&read, expected);
                });
            }
        });
        let closed = |end: &TcpStream| info(end).state == State::Close;
        wait_until("both ends are closed", || closed(&self.ours) && closed(&self.peer));
        self.assert_no_reset();
    }

    /// No reset has been on the wire. Once both ends have sent their FIN, an ACK that two processors have put behind the
    /// last one may meet no socket, whose host then answers so.
    pub fn assert_no_reset(&mut self) {
        let segments = self.closing.segments().unwrap();
        for segment in &segments {
            if segment.flags.contains(Flags::FIN) {
                self.open.retain(|port| *port != segment.source.port());
            } else {
                assert!(self.open.is_empty() && segment.flags == Flags::RST, "{segment:?} of {segments:?}");
            }
        }
    }
}

/// A TCP socket of this family that is not connected.
pub fn unconnected(family: Family) -> TcpStream {
    let family = if family == Family::V4 { AddressFamily::INET } else { AddressFamily::INET6 };
    socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap().into()
}

/// A listener whose connections have a small receive buffer, so that their window closes soon.
pub fn small_window(listener: &TcpListener) {
    set_socket_recv_buffer_size(listener, 4096).unwrap();
}

/// Bytes that differ wherever they are taken from the stream.
pub fn pattern(start: usize, length: usize) -> Vec<u8> {
    // A prime number of them, so that no power of two is a period.
    const PERIOD: usize = 65_521;
    static BYTES: LazyLock<Vec<u8>> =
        LazyLock::new(|| (0..PERIOD).map(|index| (index.wrapping_mul(2_654_435_761) >> 11) as u8).collect());
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        let at = (start + bytes.len()) % PERIOD;
        bytes.extend(&BYTES[at..PERIOD.min(at + length - bytes.len())]);
    }
    bytes
}

/// Fails with where two streams differ, not with both of them.
#[track_caller]
pub fn assert_same_bytes(left: &[u8], right: &[u8]) {
    if left == right {
        return;
    }
    let same = left.iter().zip(right).take_while(|(left, right)| left == right).count();
    panic!("{} bytes, {} expected; equal until {same}", left.len(), right.len());
}

/// What the kernel tells of a connection.
pub fn info(end: &TcpStream) -> TcpInfo {
    TcpInfo::of(end).unwrap()
}

/// Drops every segment that arrives for this socket, before the kernel has looked at it, or none.
pub fn set_deaf(socket: impl AsFd, deaf: bool) -> io::Result<()> {
    const NOTHING: libc::sock_filter =
        libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
    if deaf { attach_filter(socket, &[NOTHING]) } else { detach_filter(socket) }
}

/// Reads an integer option.
pub fn option(fd: impl AsFd, level: i32, name: i32) -> io::Result<i32> {
    let mut value = [0; 4];
    soccr_lab::option(fd, level, name, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

/// Sets an integer option.
pub fn set_option(fd: impl AsFd, level: i32, name: i32, value: i32) {
    soccr_lab::set_option(fd, level, name, &value.to_ne_bytes()).unwrap();
}

/// The two saves differ in nothing but in what time changes.
#[track_caller]
pub fn assert_same(first: &Connection, second: &Connection) {
    assert_eq!(comparable(first), comparable(second));
    if let (Some(before), Some(after)) = (first.control.window, second.control.window) {
        let edge = |window: &Window| window.rcv_wup.wrapping_add(window.rcv_wnd);
        // A delayed acknowledgement may have told the peer a new window in between, but never less.
        let told = after.rcv_wup.wrapping_sub(before.rcv_wup);
        let gained = edge(&after).wrapping_sub(edge(&before));
        // Behind the FIN of the peer nothing comes; before Linux 6.6 the window opens as it arrives.
        let ended = matches!(first.control.state, Saved::CloseWait | Saved::LastAck | Saved::Closing);
        assert!(
            if told == 0 && !ended { gained == 0 } else { gained < 1 << 30 },
            "{before:?}, then {after:?}"
        );
    }
    assert_same_bytes(&second.receive_queue, &first.receive_queue);
    assert_same_bytes(&second.send_queue, &first.send_queue);
    if let (Some(before), Some(after)) = (first.control.options.timestamps, second.control.options.timestamps)
    {
        assert!(after.wrapping_sub(before) < u32::MAX / 2, "the clock went back from {before} to {after}");
    }
}

/// A connection without its bytes, its clock and its measurements.
pub fn comparable(connection: &Connection) -> Connection {
    let mut same = Connection { receive_queue: Vec::new(), send_queue: Vec::new(), ..connection.clone() };
    same.control.options.timestamps = connection.control.options.timestamps.map(|_| 0);
    if let Some(window) = &mut same.control.window {
        // The segment that last changed the window may be an injected one.
        window.snd_wl1 = 0;
        (window.rcv_wup, window.rcv_wnd) = (0, 0);
    }
    if connection.local.is_ipv6() && connection.local.ip().to_canonical().is_ipv6() {
        // Binding to an IPv6 address sets it for good; connecting does not.
        same.settings.set("IPV6_V6ONLY", Value::Number(1));
    }
    same.path = connection.path.map(|path| Path { snd_mss: path.snd_mss, ..Default::default() });
    same
}

pub fn info_bytes(end: &TcpStream) -> [u8; 512] {
    let mut info = [0; 512];
    soccr_lab::option(end, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info).unwrap();
    info
}

/// `tcpi_rto`: how long the retransmission timer runs now.
pub fn rto(end: &TcpStream) -> Duration {
    Duration::from_micros(u32::from_ne_bytes(*info_bytes(end)[8..].first_chunk().unwrap()).into())
}

/// Whether the kernel reads from the middle of a queue of this family (`SO_PEEK_OFF`, Linux 6.9; with IPv6 6.12).
pub fn has_peek_offset(end: &TcpStream) -> bool {
    option(end, libc::SOL_SOCKET, libc::SO_PEEK_OFF).is_ok()
}

/// `tcpi_probes`: how often it has asked in vain for a window.
pub fn probes(end: &TcpStream) -> u8 {
    info_bytes(end)[3]
}

/// `tcpi_total_rto`: how often that timer has run out (Linux 6.7).
pub fn timeouts(end: &TcpStream) -> u16 {
    u16::from_ne_bytes(*info_bytes(end)[240..].first_chunk().unwrap())
}

/// Our end has sent nothing but what it had sent before: acknowledgements, as the kernel answers an injected segment, and
/// what its timers repeat. No reset above all.
#[track_caller]
pub fn assert_nothing_new(wire: &mut Sniffer, connection: &Connection, when: &str) {
    let local = SocketAddr::new(connection.local.ip().to_canonical(), connection.local.port());
    for segment in wire.segments().unwrap().iter().filter(|segment| segment.source == local) {
        let length = segment.payload_len as u32 + u32::from(segment.flags.contains(Flags::FIN));
        let ahead = segment.seq.wrapping_add(length).wrapping_sub(connection.control.snd_nxt());
        let reset = segment.flags.contains(Flags::RST) || segment.flags.contains(Flags::SYN);
        assert!(!reset && (ahead as i32) <= 0, "{when}: {segment:?}");
    }
}

/// An ESTABLISHED connection with something in each queue.
pub fn busy() -> Ends {
    Ends::of(Case { family: Family::V4, state: State::Established, received: 5000, sent: 5000, unsent: 3000 })
}
