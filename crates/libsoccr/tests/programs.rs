//! The tests in C: each function of each program is one test, in a network of its own.

use std::path::Path;
use std::process::{Command, ExitCode};

use soccr_lab::{Test, harness};

mod common;
use common::{Library, build_library, compile, run};

/// The programs in `tests/c`.
const PROGRAMS: [&str; 3] = ["connections", "staged", "border"];

fn main() -> ExitCode {
    let libraries = build_library();
    let mut tests = Vec::new();
    for name in PROGRAMS {
        let program = compile(name, &[name, "kit"], &[], &Library::Static(&libraries));
        for function in functions(&program) {
            let program = program.clone();
            tests.push(Test::new(format!("{name}::{function}"), move || {
                run(Command::new(&program).arg(&function));
            }));
        }
    }
    harness(tests)
}

/// The names that a program tells.
fn functions(program: &Path) -> Vec<String> {
    run(&mut Command::new(program)).lines().map(str::to_owned).collect()
}
