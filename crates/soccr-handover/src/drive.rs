//! Drives one end of a hand-over: bytes go out and come in, and time passes.

use std::io::{self, Write};
use std::time::Instant;

use crate::channel::{Channel, Exchanged};

/// One end of a hand-over. It does what has to be done here, and leaves reading, writing and waiting to the driver.
pub(crate) trait Engine {
    /// Does what can be done without waiting for the other end.
    fn advance(&mut self);
    /// The bytes to be written.
    fn output(&mut self) -> &mut Outbox;
    /// Takes in what has been read.
    fn feed(&mut self, bytes: &[u8]);
    /// The other end has closed the channel; it may be proven to have ended without any connection.
    fn ended(&mut self, proven: bool);
    /// Whether such a proof would change anything.
    fn wants_proof(&self) -> bool {
        false
    }
    /// Writing or reading has failed.
    fn broken(&mut self, error: io::Error);
    /// Nothing more is to begin.
    fn stop(&mut self, reason: String);
    /// Until when to wait.
    fn deadline(&self) -> Option<Instant>;
    /// The deadline is over.
    fn late(&mut self);
    /// The last word has been written.
    fn has_said_all(&self) -> bool {
        false
    }
    /// Everything is settled.
    fn is_over(&self) -> bool;
}

/// How much is read at once.
pub(crate) const PIECE: usize = 64 << 10;

/// Bytes that wait to be written.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outbox {
    bytes: Vec<u8>,
    /// How many of them are written.
    written: usize,
    /// How many may have been written without our knowledge.
    doubtful: usize,
    /// How many bytes of the stream came before the buffer.
    before: u64,
    /// Set when no more is taken: how much the other end may have read.
    cut: Option<u64>,
}

impl Outbox {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[self.written..]
    }

    /// For a channel that does not tell how much it has passed on.
    pub(crate) fn doubt(&mut self) {
        self.doubtful = self.bytes.len();
    }

    pub(crate) fn wrote(&mut self, count: usize) {
        if self.cut.is_some() {
            // A thread has written it meanwhile: it counts as passed on already.
            return;
        }
        self.written += count;
        if self.written == self.bytes.len() {
            self.before += self.written as u64;
            self.bytes.clear();
            (self.written, self.doubtful) = (0, 0);
        }
    }

    /// Long enough to be written before more is made.
    pub(crate) fn is_long(&self) -> bool {
        self.bytes().len() >= 1 << 20
    }

    /// How many bytes of the stream there are.
    pub(crate) fn end(&self) -> u64 {
        self.before + self.bytes.len() as u64
    }

    /// How many bytes of the stream the other end may have read.
    pub(crate) fn passed_on(&self) -> u64 {
        self.cut.unwrap_or(self.before + self.written.max(self.doubtful) as u64)
    }

    /// Whether no more is taken.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.is_some()
    }

    /// Throws away what is not written, now and later.
    pub(crate) fn cut(&mut self) {
        self.cut = Some(self.passed_on());
        self.bytes.truncate(self.written);
    }
}

impl Write for Outbox {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.cut.is_none() {
            self.bytes.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Drives one end until everything is settled.
pub(crate) fn run(engine: &mut impl Engine, channel: &mut impl Channel) {
    let mut input = vec![0; PIECE];
    let mut is_open = true;
    loop {
        engine.advance();
        if engine.is_over() && engine.output().bytes().is_empty() {
            break;
        }
        if engine.has_said_all() && engine.output().bytes().is_empty() {
            channel.has_said_all();
        }
        step(engine, channel, &mut input, &mut is_open);
    }
}

/// Writes, reads or waits once.
pub(crate) fn step(
    engine: &mut impl Engine,
    channel: &mut impl Channel,
    input: &mut [u8],
    is_open: &mut bool,
) {
    let deadline = engine.deadline();
    if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
        return engine.late();
    }
    if channel.hides_writes() {
        engine.output().doubt();
    }
    let output = engine.output().bytes();
    match channel.exchange(output, if *is_open { input } else { &mut [] }, deadline) {
        Ok(Exchanged { written, read }) => {
            if written > 0 {
                engine.output().wrote(written);
            }
            match read {
                Some(0) => {
                    *is_open = false;
                    let proven = engine.wants_proof() && channel.has_ended(deadline);
                    engine.ended(proven);
                }
                Some(length) => engine.feed(&input[..length]),
                None => {}
            }
        }
        Err(error) if error.kind() == io::ErrorKind::Interrupted => engine.stop(error.to_string()),
        Err(error) => engine.broken(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_as_written_after_the_cut_counts_no_more() {
        let mut outbox = Outbox::default();
        outbox.write_all(b"before").unwrap();
        outbox.wrote(6);
        outbox.write_all(b"passed on").unwrap();
        outbox.doubt();
        outbox.cut();
        outbox.wrote(9);
        assert!(outbox.bytes().is_empty());
        assert_eq!(outbox.passed_on(), 15);
    }
}
