//! The peer: it stays where it is, reads and writes without end, and notices every silence.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use soccr_lab::Host;

use super::pattern::{CHUNK, Direction, Pattern, TICK, allowance};
use super::wire::now;

/// How many bytes must flow each way between two moves.
const BETWEEN_MOVES: u64 = 4 << 20;

/// If no data flows within this time, the connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// The end of the connection that never moves.
#[derive(Debug)]
pub(crate) struct Peer {
    stream: TcpStream,
    shared: Arc<Shared>,
    reader: JoinHandle<Result<()>>,
    writer: JoinHandle<Result<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    read: AtomicU64,
    written: AtomicU64,
    differences: AtomicU64,
    last_read_at: AtomicU64,
    longest_silence: AtomicU64,
    finish: AtomicBool,
}

/// What the peer has counted in the end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counts {
    pub(crate) read: u64,
    pub(crate) written: u64,
    pub(crate) differences: u64,
}

impl Peer {
    /// Connects from the peer's host and starts the two streams.
    pub(crate) fn connect(host: &Host, address: SocketAddr) -> Result<Self> {
        let stream = host.run(|| TcpStream::connect(address)).context("the peer connects")?;
        let shared = Arc::new(Shared::default());
        let (input, output) = (stream.try_clone()?, stream.try_clone()?);
        let reader = std::thread::spawn({
            let shared = shared.clone();
            move || shared.read_all(input)
        });
        let writer = std::thread::spawn({
            let shared = shared.clone();
            move || shared.write_all(output)
        });
        Ok(Self { stream, shared, reader, writer })
    }

    /// The peer's own address.
    pub(crate) fn address(&self) -> Result<SocketAddr> {
        Ok(self.stream.local_addr()?)
    }

    /// Waits until enough bytes have flowed both ways since the call. Returns the longest silence meanwhile.
    pub(crate) fn wait_for_traffic(&self) -> Result<Duration> {
        self.watch();
        let goals = [&self.shared.read, &self.shared.written]
            .map(|count| (count, count.load(Relaxed) + BETWEEN_MOVES));
        let deadline = Instant::now() + PATIENCE;
        while goals.iter().any(|(count, goal)| count.load(Relaxed) < *goal) {
            if self.reader.is_finished() || self.writer.is_finished() {
                bail!("the peer's connection has ended: {}", self.ending());
            }
            if Instant::now() > deadline {
                bail!("the peer has heard nothing for {} s", PATIENCE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(self.longest_silence())
    }

    /// Waits until the peer has read something after this time.
    pub(crate) fn wait_for_byte(&self, after: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.shared.last_read_at.load(Relaxed) <= after {
            if self.reader.is_finished() || Instant::now() > deadline {
                bail!("the peer has heard nothing since the move: {}", self.ending());
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    /// Forgets the silences so far.
    pub(crate) fn watch(&self) {
        self.shared.longest_silence.store(0, Relaxed);
    }

    /// The longest time without a byte for the peer since [`watch`](Self::watch).
    pub(crate) fn longest_silence(&self) -> Duration {
        let open = now().saturating_sub(self.shared.last_read_at.load(Relaxed));
        Duration::from_nanos(self.shared.longest_silence.load(Relaxed).max(open))
    }

    /// Stops writing; the program reads the end of the stream.
    pub(crate) fn stop_writing(&self) {
        self.shared.finish.store(true, Relaxed);
    }

    /// Waits for the end of both streams.
    pub(crate) fn finish(self) -> Result<Counts> {
        for thread in [self.reader, self.writer] {
            thread.join().map_err(|_| anyhow::anyhow!("a thread of the peer has panicked"))??;
        }
        let Shared { read, written, differences, .. } = &*self.shared;
        let [read, written, differences] = [read, written, differences].map(|count| count.load(Relaxed));
        Ok(Counts { read, written, differences })
    }

    fn ending(&self) -> String {
        match self.stream.take_error() {
            Ok(Some(error)) => error.to_string(),
            _ => "by the end of the stream".into(),
        }
    }
}

impl Shared {
    fn read_all(&self, mut stream: TcpStream) -> Result<()> {
        let pattern = Pattern::new(Direction::ToPeer);
        let mut buffer = vec![0; 256 << 10];
        self.last_read_at.store(now(), Relaxed);
        loop {
            let length = match stream.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => other.context("the peer reads")?,
            };
            let (offset, time) = (self.read.load(Relaxed), now());
            let silence = time - self.last_read_at.swap(time, Relaxed);
            self.longest_silence.fetch_max(silence, Relaxed);
            self.differences.fetch_add(pattern.differences(offset, &buffer[..length]), Relaxed);
            self.read.store(offset + length as u64, Relaxed);
        }
    }

    fn write_all(&self, mut stream: TcpStream) -> Result<()> {
        let pattern = Pattern::new(Direction::ToProgram);
        let start = Instant::now();
        while !self.finish.load(Relaxed) {
            let offset = self.written.load(Relaxed);
            if offset > allowance(start) {
                std::thread::sleep(TICK);
                continue;
            }
            let length = match stream.write(&pattern.at(offset)[..CHUNK]) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => other.context("the peer writes")?,
            };
            self.written.store(offset + length as u64, Relaxed);
        }
        Ok(stream.shutdown(Shutdown::Write)?)
    }
}
