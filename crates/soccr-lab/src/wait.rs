//! Waiting for conditions instead of sleeping.

use std::thread;
use std::time::{Duration, Instant};

/// How long a test waits for what must come, also on a busy machine in emulation: a minute.
pub const LIMIT: Duration = Duration::from_secs(60);
const NAP: Duration = Duration::from_micros(200);

/// Waits until `condition` holds.
///
/// # Panics
/// Naming `what`, if that takes longer than [`LIMIT`].
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "after {LIMIT:?} still not true: {what}");
        thread::sleep(NAP);
    }
}
