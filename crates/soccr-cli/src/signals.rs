//! The signals by which people and service managers end a command, while that would destroy connections.

use crate::sys;

/// SIGHUP, SIGINT and SIGTERM are ignored as long as it lives.
#[derive(Debug)]
#[must_use = "dropping it heeds the signals at once"]
pub(crate) struct Deaf {
    before: [sys::Disposition; 3],
}

impl Deaf {
    /// To be called when connections are about to be in the memory of this process only.
    pub(crate) fn begin() -> Self {
        Self { before: sys::ENDING.map(sys::ignore) }
    }
}

impl Drop for Deaf {
    fn drop(&mut self) {
        for (signal, before) in sys::ENDING.into_iter().zip(self.before) {
            sys::heed(signal, before);
        }
    }
}
