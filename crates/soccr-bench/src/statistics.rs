//! Samples, and what is said about them.

use std::time::{Duration, Instant};

/// Durations of the same thing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<Duration>);

impl Samples {
    pub(crate) fn push(&mut self, sample: Duration) {
        self.0.push(sample);
    }

    /// Measures `work`.
    pub(crate) fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.push(start.elapsed());
        result
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn median(&self) -> Duration {
        self.quantile(0.5)
    }

    pub(crate) fn p99(&self) -> Duration {
        self.quantile(0.99)
    }

    pub(crate) fn max(&self) -> Duration {
        self.quantile(1.0)
    }

    /// The smallest sample that so large a part of all does not exceed (nearest rank).
    fn quantile(&self, part: f64) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (part * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
    }
}

/// What all threads of this process have used of the processors: the same on a busy machine as on an idle one.
pub(crate) fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Runs `round` again and again, until the time is over: at least `least` times.
pub(crate) fn repeat<E>(
    budget: Duration,
    least: usize,
    mut round: impl FnMut(usize) -> Result<(), E>,
) -> Result<(), E> {
    let start = Instant::now();
    let mut count = 0;
    while count < least || start.elapsed() < budget {
        round(count)?;
        count += 1;
    }
    Ok(())
}
