//! Why a call failed, as the line of text that the log and `libsoccr_last_error` give.

use std::fmt;

/// The result of a call, before the border turns it into −1 or null.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// One line: step, option, errno, remedy.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl Failure {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Names the argument that is null.
    pub(crate) fn null(argument: &str) -> Self {
        Self(format!("{argument} is NULL"))
    }
}

impl From<soccr_core::Error> for Failure {
    fn from(error: soccr_core::Error) -> Self {
        // Only values that were given for a restore are checked outside of a step.
        let step = if error.step().is_empty() { "restore: " } else { "" };
        Self(format!("{step}{error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
