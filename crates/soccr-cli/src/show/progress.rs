//! Progress of long work, shown on a terminal only, and only after a while.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::exit;

const INTERVAL: Duration = Duration::from_millis(100);

/// Counts steps, and shows count and rate on standard error.
#[derive(Debug)]
pub(crate) struct Progress {
    what: &'static str,
    total: usize,
    count: usize,
    start: Instant,
    shown: Option<Instant>,
    terminal: bool,
}

impl Progress {
    pub(crate) fn new(what: &'static str, total: usize) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { what, total, count: 0, start: Instant::now(), shown: None, terminal }
    }

    pub(crate) fn step(&mut self) {
        self.count += 1;
        if self.terminal && !exit::is_quiet() && self.shown.unwrap_or(self.start).elapsed() > INTERVAL {
            self.shown = Some(Instant::now());
            let rate = self.count as f64 / self.start.elapsed().as_secs_f64();
            self.show(&format!("{} {} of {}, {rate:.0}/s", self.what, self.count, self.total));
        }
    }

    fn show(&self, text: &str) {
        // If standard error is closed, only the progress is lost.
        let _ = write!(std::io::stderr(), "\r\x1b[K{text}");
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown.is_some() {
            self.show("");
        }
    }
}
