//! The limit on descriptors: every connection takes one in this process, but the programs that it starts get the limit from before.

use std::process::Command;
use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::sys;

/// The limit from before.
static GIVEN: OnceLock<Rlimit> = OnceLock::new();

/// Raises the soft limit to the hard one.
pub(crate) fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let _ = GIVEN.set(limit);
    // If this fails, the call that needs more descriptors reports it.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Restores the limit for a program: select(2) does not work with descriptors beyond 1023.
pub(crate) fn keep_limit_from(command: &mut Command) {
    if let Some(limit) = GIVEN.get() {
        sys::limit_descriptors(command, *limit);
    }
}
