//! Traffic over one connection while it moves, and the silence that it hears.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use soccr::Flow;
use soccr::lock::Locker;
use soccr_lab::Pair;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// The peer sends, the moved end reads.
    Upload,
    /// The moved end sends, the peer reads.
    Download,
    /// Both ends send and read.
    Both,
    /// The peer asks, the moved end answers: one short message each.
    Request,
}

impl Pattern {
    pub(crate) const ALL: [(Self, &'static str); 4] = [
        (Self::Upload, "peer to moved"),
        (Self::Download, "moved to peer"),
        (Self::Both, "both ways"),
        (Self::Request, "request/response"),
    ];

    fn moved_end_sends(self) -> bool {
        matches!(self, Self::Download | Self::Both)
    }
}

/// Bytes per second: a Gbit.
const RATE: f64 = 125e6;
/// What may be sent at once after a pause.
const BURST: f64 = 128e3;
/// Written and read at once: little enough that the traffic itself knows no silence, and that the first of many bytes
/// is heard before the last.
const CHUNK: usize = 8 << 10;
/// How long a sender waits for what it may send next.
const MOMENT: Duration = Duration::from_micros(20);
const MESSAGE: usize = 64;
/// Enough has flowed that a move meets a connection in full flight.
const SETTLED_BYTES: u64 = 2 << 20;
const SETTLED_MESSAGES: u64 = 20;
const SETTLED_SILENCE: Duration = Duration::from_millis(5);
/// Data flows again within this time, or the connection is lost.
const PATIENCE: Duration = Duration::from_secs(20);

/// When what was heard, by whoever has to hear: nanoseconds since the beginning.
#[derive(Debug, Default)]
struct Heard {
    bytes: AtomicU64,
    last: AtomicU64,
    longest: AtomicU64,
    stop: AtomicBool,
}

impl Heard {
    fn note(&self, time: u64, length: usize) {
        let silence = time.saturating_sub(self.last.swap(time, Relaxed));
        self.longest.fetch_max(silence, Relaxed);
        self.bytes.fetch_add(length as u64, Relaxed);
    }
}

/// A connection that carries a pattern: our end, which moves, and a thread that is the peer.
#[derive(Debug)]
pub(crate) struct Traffic {
    pattern: Pattern,
    stream: Option<TcpStream>,
    start: Instant,
    pace: Pace,
    buffer: Vec<u8>,
    heard: Arc<Heard>,
    peer: Option<JoinHandle<()>>,
    /// How long the last restore took.
    restoring: Duration,
}

/// How long a move took, as seen from both sides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Felt {
    /// The longest time without a new byte, or without an answer: at the peer, or where that only sends, at our end.
    pub(crate) silence: Duration,
}

impl Traffic {
    /// Starts it from `pair.b` to the calling thread's host, `pair.a`, with this congestion control at both ends.
    pub(crate) fn start(pair: &Pair, pattern: Pattern, congestion: &str) -> Result<Self> {
        let listener = TcpListener::bind((pair.a.v4, 0))?;
        let address = listener.local_addr()?;
        let peer = pair.b.run(|| TcpStream::connect(address))?;
        peer.set_nodelay(true)?;
        let (stream, _) = listener.accept()?;
        for socket in [&stream, &peer] {
            rustix::net::sockopt::set_tcp_congestion(socket, congestion).context("TCP_CONGESTION")?;
        }
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let (heard, start) = (Arc::new(Heard::default()), Instant::now());
        set_prompt_timers()?;
        let shared = Arc::clone(&heard);
        let peer = std::thread::spawn(move || be_peer(pattern, peer, &shared, start));
        let (pace, buffer) = (Pace::default(), vec![0; CHUNK]);
        Ok(Self {
            pattern,
            stream: Some(stream),
            start,
            pace,
            buffer,
            heard,
            peer: Some(peer),
            restoring: Duration::ZERO,
        })
    }

    /// Carries on until the connection is in full flight, without a silence of its own.
    pub(crate) fn settle(&mut self, rtt: Duration) -> Result<()> {
        let is_request = self.pattern == Pattern::Request;
        let goal = if is_request { SETTLED_MESSAGES * MESSAGE as u64 } else { SETTLED_BYTES };
        let least = Duration::from_millis(20) + 2 * rtt;
        let begin = Instant::now();
        loop {
            let (start, before) = (Instant::now(), self.heard.bytes.load(Relaxed));
            self.heard.longest.store(0, Relaxed);
            self.carry(|heard| heard.bytes.load(Relaxed) - before >= goal && start.elapsed() > least)?;
            let silence = Duration::from_nanos(self.heard.longest.load(Relaxed));
            if is_request || silence < SETTLED_SILENCE || begin.elapsed() > PATIENCE {
                break;
            }
        }
        // The traffic may pause by itself just now. That is no part of what a move costs.
        let before = self.heard.bytes.load(Relaxed);
        self.carry(|heard| heard.bytes.load(Relaxed) != before)
    }

    /// Runs the traffic for this time, and notes how many bytes had been heard at each moment.
    pub(crate) fn watch(&mut self, time: Duration, notes: &mut Vec<(Instant, u64)>) -> Result<()> {
        let begin = Instant::now();
        self.carry(|heard| {
            notes.push((Instant::now(), heard.bytes.load(Relaxed)));
            begin.elapsed() > time
        })
    }

    /// The longest silence in this time, and until something is heard again, without a move.
    pub(crate) fn leave_alone(&mut self, time: Duration) -> Result<Duration> {
        self.heard.longest.store(0, Relaxed);
        let end = self.now() + time.as_nanos() as u64;
        self.carry(|heard| heard.last.load(Relaxed) > end)?;
        Ok(Duration::from_nanos(self.heard.longest.load(Relaxed)))
    }

    /// Moves the connection within its host, and keeps it locked for this time: saves it at the beginning, restores it
    /// at the end, or as long before as that took the last time.
    pub(crate) fn move_once(&mut self, locker: &Locker, time: Duration, rtt: Duration) -> Result<Felt> {
        let stream = self.stream.take().context("no connection")?;
        let flow = Flow::of(&stream)?;
        self.heard.longest.store(0, Relaxed);
        let locked = Instant::now();
        let lock = locker.lock(&[flow])?;
        let paused = soccr::pause(&stream)?;
        let connection = paused.save()?;
        paused.detach()?;
        wait_until(locked + time.saturating_sub(self.restoring));
        let waited = Instant::now();
        let restored = connection.restore()?;
        self.restoring = waited.elapsed();
        lock.release_into(&[&restored])?;
        self.stream = Some(restored.resume()?);
        let resumed = self.now();

        // What was in the queue before is no news.
        let news = self.heard.bytes.load(Relaxed) + u64::from(connection.control.inq_len);
        let last = self.heard.last.load(Relaxed);
        let mut first = None;
        let upload = self.pattern == Pattern::Upload;
        self.carry(|heard| {
            if upload {
                first = (heard.bytes.load(Relaxed) > news).then(|| heard.last.load(Relaxed));
                first.is_some()
            } else {
                // What was on its way before has arrived by then.
                heard.last.load(Relaxed) > resumed + rtt.as_nanos() as u64
            }
        })?;
        let silence = match first {
            Some(first) => first - last,
            None => self.heard.longest.load(Relaxed),
        };
        Ok(Felt { silence: Duration::from_nanos(silence) })
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    fn carry(&mut self, mut enough: impl FnMut(&Heard) -> bool) -> Result<()> {
        let begin = Instant::now();
        while !enough(&self.heard) {
            if begin.elapsed() > PATIENCE {
                bail!("nothing has been heard for {PATIENCE:?}");
            }
            self.turn()?;
        }
        Ok(())
    }

    /// Does what can be done now, or waits for a moment.
    fn turn(&mut self) -> Result<()> {
        let now = self.now();
        let stream = self.stream.as_mut().context("no connection")?;
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, self.pattern != Pattern::Download);
        wanted.set(PollFlags::OUT, self.pattern.moved_end_sends() && self.pace.allows(now));
        let wait = Timespec { tv_sec: 0, tv_nsec: MOMENT.as_nanos() as _ };
        let mut polled = [PollFd::new(stream, wanted)];
        if poll(&mut polled, Some(&wait))? == 0 {
            return Ok(());
        }
        if wanted.contains(PollFlags::OUT)
            && let Some(length) = some(stream.write(&self.buffer))?
        {
            self.pace.spend(length);
        }
        if !wanted.contains(PollFlags::IN) {
            return Ok(());
        }
        let Some(length) = some(stream.read(&mut self.buffer))? else { return Ok(()) };
        if length == 0 {
            bail!("the peer has ended the connection");
        }
        match self.pattern {
            Pattern::Upload => self.heard.note(self.start.elapsed().as_nanos() as u64, length),
            // Messages are short: the kernel takes each as a whole.
            Pattern::Request => stream.write_all(&self.buffer[..length])?,
            Pattern::Both | Pattern::Download => {}
        }
        Ok(())
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.heard.stop.store(true, Relaxed);
        if let Some(stream) = &self.stream {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.stream = None;
        self.peer.take().map(JoinHandle::join);
    }
}

/// Plays the peer until the connection ends, in whatever way.
fn be_peer(pattern: Pattern, mut stream: TcpStream, heard: &Heard, start: Instant) {
    let now = || start.elapsed().as_nanos() as u64;
    if set_prompt_timers().is_err() {
        return;
    }
    heard.last.store(now(), Relaxed);
    match (pattern, stream.try_clone()) {
        (Pattern::Upload, _) => send(&mut stream, heard, now),
        (Pattern::Both, Ok(mut other)) => std::thread::scope(|scope| {
            scope.spawn(|| set_prompt_timers().map(|()| send(&mut other, heard, now)));
            listen(&mut stream, heard, now);
        }),
        (Pattern::Download | Pattern::Both, _) => listen(&mut stream, heard, now),
        (Pattern::Request, _) => {
            let mut message = [0; MESSAGE];
            while !heard.stop.load(Relaxed) {
                if stream.write_all(&message).and_then(|()| stream.read_exact(&mut message)).is_err() {
                    return;
                }
                heard.note(now(), MESSAGE);
            }
        }
    }
}

fn send(stream: &mut TcpStream, heard: &Heard, now: impl Fn() -> u64) {
    let mut pace = Pace::default();
    while !heard.stop.load(Relaxed) {
        if !pace.allows(now()) {
            std::thread::sleep(MOMENT);
            continue;
        }
        match stream.write(&[0; CHUNK]) {
            Ok(length) => pace.spend(length),
            Err(_) => return,
        }
    }
}

fn listen(stream: &mut TcpStream, heard: &Heard, now: impl Fn() -> u64) {
    let mut buffer = [0; CHUNK];
    while !heard.stop.load(Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(length) => heard.note(now(), length),
        }
    }
}

/// Sleeps, but for the last moment: a sleeper wakes up late.
fn wait_until(time: Instant) {
    const LATE: Duration = Duration::from_micros(200);
    std::thread::sleep(time.saturating_duration_since(Instant::now()).saturating_sub(LATE));
    while Instant::now() < time {
        std::hint::spin_loop();
    }
}

/// The default slack of timers, 50 µs, would be added to every wait of this thread.
fn set_prompt_timers() -> std::io::Result<()> {
    Ok(rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?)
}

fn some(result: std::io::Result<usize>) -> Result<Option<usize>> {
    match result {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        other => Ok(Some(other?)),
    }
}

/// A token bucket.
#[derive(Debug, Default)]
struct Pace {
    tokens: f64,
    last: u64,
}

impl Pace {
    fn allows(&mut self, now: u64) -> bool {
        self.tokens = (self.tokens + (now - self.last) as f64 * 1e-9 * RATE).min(BURST);
        self.last = now;
        self.tokens > 0.0
    }

    fn spend(&mut self, bytes: usize) {
        self.tokens -= bytes as f64;
    }
}
