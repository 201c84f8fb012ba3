//! The bytes that flow: each tells its place in the stream, so that a lost, doubled or changed one is noticed.

use std::time::{Duration, Instant};

/// A prime, so that no buffer or window size divides it.
const PERIOD: usize = 1_000_003;

/// Bytes per second in each direction: half a Gbit/s, which leaves the processor time to move the connection.
const RATE: f64 = 64e6;

/// Bytes of one write.
pub(crate) const CHUNK: usize = 64 << 10;

/// How long a writer sleeps when it is ahead of the rate.
pub(crate) const TICK: Duration = Duration::from_millis(1);

/// How many bytes a stream that began at `start` may have sent by now.
pub(crate) fn allowance(start: Instant) -> u64 {
    (start.elapsed().as_secs_f64() * RATE) as u64
}

/// The two directions.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Direction {
    /// From the peer to the program that moves.
    ToProgram,
    /// From the program to the peer.
    ToPeer,
}

/// An endless stream of bytes.
#[derive(Debug)]
pub(crate) struct Pattern {
    // Twice the period, so that up to a period can be read from any place in it.
    bytes: Vec<u8>,
}

impl Pattern {
    pub(crate) fn new(direction: Direction) -> Self {
        let mut state: u64 = match direction {
            Direction::ToProgram => 0x9e37_79b9_7f4a_7c15,
            Direction::ToPeer => 0xd1b5_4a32_d192_ed03,
        };
        let mut bytes: Vec<u8> = (0..PERIOD)
            .map(|_| {
                // Knuth's linear congruential generator.
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .collect();
        bytes.extend_from_within(..);
        Self { bytes }
    }

    /// The bytes from `offset` on: one period of them.
    pub(crate) fn at(&self, offset: u64) -> &[u8] {
        let start = (offset % PERIOD as u64) as usize;
        &self.bytes[start..start + PERIOD]
    }

    /// How many of `bytes` differ from the pattern at `offset`.
    pub(crate) fn differences(&self, offset: u64, bytes: &[u8]) -> u64 {
        let expected = &self.at(offset)[..bytes.len()];
        if expected == bytes {
            return 0;
        }
        expected.iter().zip(bytes).filter(|(expected, byte)| expected != byte).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shifted_stream_differs() {
        let pattern = Pattern::new(Direction::ToPeer);
        let offset = 3 * PERIOD as u64 - 7;
        let bytes = pattern.at(offset)[..5000].to_vec();
        assert_eq!(pattern.differences(offset, &bytes), 0);
        assert!(pattern.differences(offset + 1, &bytes) > 4000);
        assert!(Pattern::new(Direction::ToProgram).differences(offset, &bytes) > 4000);
    }
}
