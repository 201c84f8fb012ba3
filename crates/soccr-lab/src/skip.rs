//! Tests that cannot run here.

use std::fmt::Display;
use std::io::{self, Write};

/// Says that a test, or a part of it, is skipped, and why. The summary of `.ci/test` counts these lines.
pub fn skip(reason: impl Display) {
    // Written at once, so that no other thread's line comes between, and not by eprintln!, which libtest keeps to itself.
    let _ = io::stderr().write_all(format!("\nSKIPPED: {reason}\n\n").as_bytes());
}
