//! Two hosts with a connection between them, of which one end moves.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_tcp_congestion;
use soccr::connection::{Buffers, Connection, Window};
use soccr::settings::Value;
use soccr::{Fidelity, Report, Restored, pause};
use soccr_lab::{Family, Host, Line, Pair, Shape, obstacle_to_bpf, wait_until};

/// How long a read or a write may take before its test fails, and how long a restore that nothing disturbs is waited for.
const LIMIT: Duration = Duration::from_secs(20);

pub struct Ends {
    pub pair: Pair,
    pub ours: TcpStream,
    pub peer: TcpStream,
    /// What was last taken from our socket.
    pub saved: Connection,
}

impl Ends {
    /// A connection over a line with a round-trip time of 20 ms.
    pub fn delayed(family: Family) -> Self {
        Self::prepared(family, |_| {})
    }

    pub fn prepared(family: Family, prepare: impl Fn(&Host)) -> Self {
        Self::over(Pair::shaped(&Shape::rtt(Duration::from_millis(20))).unwrap(), family, prepare)
    }

    /// A connection without a delay.
    pub fn near(family: Family) -> Self {
        Self::over(Pair::new().unwrap(), family, |_| {})
    }

    pub fn over(pair: Pair, family: Family, prepare: impl Fn(&Host)) -> Self {
        prepare(&pair.a);
        prepare(&pair.b);
        let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, 80))).unwrap();
        let ours = pair.a.run(|| TcpStream::connect(pair.a.address_of(&pair.b, family, 80))).unwrap();
        let (peer, _) = listener.accept().unwrap();
        for stream in [&ours, &peer] {
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.set_write_timeout(Some(LIMIT)).unwrap();
        }
        Self { pair, ours, peer, saved: Connection::empty() }
    }

    pub fn line(&self) -> &Line {
        self.pair.line.as_ref().unwrap()
    }

    /// Chooses the congestion control algorithm of both ends.
    pub fn choose(&self, algorithm: &str) {
        set_tcp_congestion(&self.ours, algorithm).unwrap();
        set_tcp_congestion(&self.peer, algorithm).unwrap();
    }

    /// Bytes go one way, then the other.
    pub fn transfer(&self) {
        carry(&self.ours, &self.peer);
        carry(&self.peer, &self.ours);
    }

    /// Transfers until the retransmission timeout is as short as the round-trip time allows. Where packets have waited for a processor
    /// it is longer, and a restore brings it back at the cost of the round-trip time.
    pub fn calm(&self) {
        const MARGIN: Duration = Duration::from_millis(220);
        wait_until("the path is calm", || {
            let paused = pause(&self.ours).unwrap();
            let path = paused.save().unwrap().path.unwrap();
            // `resume` sends a probe, whose answer might come when the connection has no socket, and draw a reset.
            paused.resume_silently().unwrap();
            let is_calm = path.rto <= path.rtt + MARGIN;
            if !is_calm {
                self.transfer();
            }
            is_calm
        });
    }

    /// What a save tells, without an end to the connection.
    pub fn save(&self) -> Connection {
        let paused = pause(&self.ours).unwrap();
        let connection = paused.save().unwrap();
        paused.resume().unwrap();
        connection
    }

    /// The windows of our socket, where they stand still.
    pub fn window(&self) -> Option<Window> {
        let paused = pause(&self.ours).unwrap();
        let saved = paused.save();
        paused.resume().unwrap();
        saved.ok()?.control.window
    }

    /// Takes the connection from our socket.
    pub fn take(&mut self) {
        let paused = pause(&self.ours).unwrap();
        self.saved = paused.save().unwrap();
        if self.saved.local.is_ipv6() && self.saved.local.ip().to_canonical().is_ipv6() {
            // Binding to an IPv6 address sets it for good; connecting does not.
            self.saved.settings.set("IPV6_V6ONLY", Value::Number(1));
        }
        paused.detach().unwrap();
    }

    /// Takes the connection from our socket and restores it.
    pub fn restored(&mut self) -> Restored {
        self.take();
        self.restore()
    }

    /// Restores what was taken: again, for a while, where other work of the machine has come between, and made a sample of
    /// the estimates longer. As long as packets wait for a processor, that is each time.
    pub fn restore(&self) -> Restored {
        self.restore_until(|report| !is_disturbed(report))
    }

    /// Restores what was taken until the estimates are good, or the limit is over.
    pub fn restore_until(&self, is_good: impl Fn(&Report) -> bool) -> Restored {
        let begin = Instant::now();
        loop {
            let restored = self.pair.a.run(|| self.saved.restore()).unwrap();
            if is_good(restored.report()) || begin.elapsed() > LIMIT {
                return restored;
            }
        }
    }

    pub fn resume(&mut self, restored: Restored) {
        self.ours = restored.resume().unwrap();
    }
}

/// A restore adds some tens of microseconds of its own to a round trip of as many.
fn is_disturbed(report: &Report) -> bool {
    report.iter().any(|entry| {
        let is_longer = entry.values().is_some_and(|[before, after]| after * 5 > before * 6 + 5000);
        ["rtt", "rto"].contains(&entry.name()) && entry.fidelity() == Fidelity::Approximate && is_longer
    })
}

fn carry(mut from: &TcpStream, mut to: &TcpStream) {
    let bytes: Vec<u8> =
        (0..300_000_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let mut read = vec![0; bytes.len()];
    thread::scope(|scope| {
        scope.spawn(|| from.write_all(&bytes).unwrap());
        to.read_exact(&mut read).unwrap();
    });
    assert!(read == bytes, "other bytes than were sent");
}

/// The kernel doubles what it is given.
pub fn even(buffers: Buffers) -> Buffers {
    Buffers { send: buffers.send & !1, receive: buffers.receive & !1, ..buffers }
}

/// Whether this user may load BPF programs into this kernel. Says so, once, where he may not.
pub fn bpf_is_allowed() -> bool {
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    *ALLOWED.get_or_init(|| {
        let mut ends = Ends::near(Family::V4);
        ends.take();
        ends.saved.path.as_mut().unwrap().snd_cwnd = 77;
        let restored = ends.restore();
        let entry = restored.report().get("snd_cwnd").unwrap();
        let allowed = entry.values() == Some([77, 77]);
        if !allowed {
            let obstacle = obstacle_to_bpf([6, 4], entry);
            eprintln!("\nSKIPPED: WHETHER cwnd, ssthresh AND ECN COME BACK: {obstacle}\n");
        }
        allowed
    })
}
