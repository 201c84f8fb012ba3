//! The library as a C program gets it.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder of the header.
pub fn include() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("include")
}

/// Whether a program is here that a C compiler does not bring along; says so where it is not.
pub fn installed(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        soccr_lab::skip(format_args!("{program} is not installed"));
    }
    found
}

/// Runs a command that must succeed, and returns what it prints.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{printed}{errors}", output.status);
    errors.lines().filter_map(|line| line.strip_prefix("SKIPPED: ")).for_each(soccr_lab::skip);
    printed
}
