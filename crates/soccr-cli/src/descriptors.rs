//! The limit on descriptors: every connection takes one here, and programs get the limit that this command was given.

use std::process::Command;
use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::sys;

/// As it was before.
static GIVEN: OnceLock<Rlimit> = OnceLock::new();

/// As many as this process may have.
pub(crate) fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let _ = GIVEN.set(limit);
    // Where it stays, the call that needs more says so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// A program that uses select(2) does not survive descriptors beyond 1023.
pub(crate) fn keep_limit_from(command: &mut Command) {
    if let Some(limit) = GIVEN.get() {
        sys::limit_descriptors(command, *limit);
    }
}
