//! What a thread does with signals.

use std::path::Path;
use std::{fs, io};

/// The signals that a thread blocks, which is named by its folder in `/proc`, such as `/proc/thread-self`: bit 0 stands for
/// signal 1.
///
/// # Errors
/// The thread is gone.
pub fn blocked_signals(task: &Path) -> io::Result<u64> {
    let status = fs::read_to_string(task.join("status"))?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}
