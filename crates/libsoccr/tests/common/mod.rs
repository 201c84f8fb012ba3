//! The library as a C program gets it, and the C compiler.

use std::path::{Path, PathBuf};
use std::process::Command;

/// How a program is linked.
pub enum Library<'a> {
    /// With `libsoccr.a` of this folder.
    Static(&'a Path),
    /// With `libsoccr.so` of this folder.
    Shared(&'a Path),
}

/// Builds both libraries and returns their folder: cargo builds none for the tests of its package.
pub fn build_library() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it is in the target folder");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--lib", "--package", "libsoccr", "--target-dir"]).arg(target);
    run(&mut cargo);
    target.join("debug")
}

/// Compiles C files of `tests/c` to a program.
pub fn compile(name: &str, files: &[&str], flags: &[&str], library: &Library<'_>) -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-D_GNU_SOURCE"])
        .args(flags);
    cc.arg("-I").arg(include()).arg("-o").arg(&program);
    cc.args(files.iter().map(|file| sources.join(file).with_extension("c")));
    match library {
        Library::Static(folder) => cc.arg(folder.join("libsoccr.a")),
        Library::Shared(folder) => {
            cc.arg(folder.join("libsoccr.so")).arg(format!("-Wl,-rpath,{}", folder.display()))
        }
    };
    run(&mut cc);
    program
}

/// The folder of the header.
pub fn include() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("include")
}

/// Runs a command that must succeed, and returns what it prints.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{printed}{errors}", output.status);
    printed
}
