//! What the demonstration and its programs tell each other through pipes: a line of JSON, and bytes behind it.

use std::io::{BufRead, Write};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// To a program.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Listen at this port of any address.
    Listen { port: u16 },
    /// Accept the connection and begin.
    Accept,
    /// Lock the traffic of a connection that is going to come here.
    Expect { local: std::net::SocketAddr, remote: std::net::SocketAddr },
    /// Lock, pause, save and let go of the connection.
    Release,
    /// Give the packets that were held, and end.
    GiveHeld,
    /// Restore the connection whose image follows, and the number of bytes that it has moved so far.
    Restore(Progress),
    /// Replay the held packets that follow, unlock, and begin.
    Go,
    /// Write no more, read what still comes, and end.
    Finish,
}

/// From a program.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// Done.
    Done,
    /// The connection is this one.
    Connected { mss: u32 },
    /// The connection has left; its image follows.
    Released { locked_at: u64, last_read_at: u64, progress: Progress, unread: u32, unacknowledged: u32 },
    /// The held packets follow.
    Held,
    /// The connection lives here.
    Going { unlocked_at: u64, mss: u32 },
    /// New bytes have arrived after the move, at this time.
    Heard { first_read_at: u64 },
    /// The stream is over.
    Finished { progress: Progress },
}

/// How far the program has come in its two streams.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Progress {
    pub(crate) read: u64,
    pub(crate) written: u64,
    /// Bytes that were not the expected ones.
    pub(crate) differences: u64,
}

/// Sends a message and the bytes that belong to it.
pub(crate) fn send(pipe: &mut impl Write, message: &impl Serialize, bytes: &[u8]) -> Result<()> {
    let mut frame = serde_json::to_vec(&(message, bytes.len()))?;
    frame.push(b'\n');
    frame.extend_from_slice(bytes);
    pipe.write_all(&frame)?;
    pipe.flush()?;
    Ok(())
}

/// Receives a message and its bytes.
pub(crate) fn receive<T: for<'de> Deserialize<'de>>(pipe: &mut impl BufRead) -> Result<(T, Vec<u8>)> {
    let mut line = String::new();
    if pipe.read_line(&mut line)? == 0 {
        bail!("the other process has ended");
    }
    let (message, length): (T, usize) =
        serde_json::from_str(&line).context("a message of another process")?;
    let mut bytes = vec![0; length];
    pipe.read_exact(&mut bytes)?;
    Ok((message, bytes))
}

/// Nanoseconds of a clock that all processes of this machine share.
pub(crate) fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
