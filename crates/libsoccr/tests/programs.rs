//! The tests in C: each function of each program is one test, in a network of its own.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use soccr_lab::{Family, Pair, Shape, Test, harness, sysctl};

mod common;
use common::{include, installed, run};

/// The programs in `tests/c`.
const PROGRAMS: [&str; 10] =
    ["connections", "staged", "border", "handles", "lessons", "host", "image", "grown", "path", "tls"];

fn main() -> ExitCode {
    // An emulated machine takes what its host has built: there compilers and valgrind take minutes.
    let is_built = std::env::var_os("SOCCR_EMULATED").is_some();
    let libraries = if is_built { PathBuf::new() } else { build_library() };
    let has_valgrind = !is_built && installed("valgrind");
    let mut tests = Vec::new();
    for name in PROGRAMS {
        let program = match is_built {
            true => Path::new(env!("CARGO_TARGET_TMPDIR")).join(name),
            false => compile(name, &libraries.join("libsoccr.a")),
        };
        for function in functions(&program) {
            if function.starts_with("memory_") && has_valgrind {
                tests.push(memory_test(&program, name, &function));
            }
            if name == "path" {
                tests.extend(path_tests(&program, &function));
                continue;
            }
            if function == "a_file_for_others" {
                tests.push(file_test(&program, &function));
                continue;
            }
            let program = program.clone();
            tests.push(Test::new(format!("{name}::{function}"), move || {
                run(Command::new(&program).arg(&function));
            }));
        }
    }
    harness(tests)
}

/// Builds the library and returns its folder: cargo builds none for the tests of its package.
fn build_library() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it is in the target folder");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--lib", "--package", "libsoccr", "--target-dir"]).arg(target);
    run(&mut cargo);
    target.join("debug")
}

fn compile(name: &str, library: &Path) -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-D_GNU_SOURCE"]);
    cc.arg("-I").arg(include()).arg("-o").arg(&program);
    cc.args([name, "kit"].map(|file| sources.join(file).with_extension("c")));
    run(cc.arg(library));
    program
}

/// The names that a program tells.
fn functions(program: &Path) -> Vec<String> {
    run(&mut Command::new(program)).lines().map(str::to_owned).collect()
}

/// What C writes is what Rust reads, and so does the command.
fn file_test(program: &Path, function: &str) -> Test {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("written.soccr");
    let mut writer = Command::new(program);
    writer.arg(function).env("IMAGE", &path);
    Test::new("image::rust_reads_what_c_writes", move || {
        run(&mut writer);
        let connection = soccr_image::load_file(&path).unwrap();
        assert_eq!(connection.receive_queue, b"unread");
        assert!(connection.path.is_some() && connection.buffers.is_some());
    })
}

/// The test once for each family and length of the path to the other host.
fn path_tests(program: &Path, function: &str) -> Vec<Test> {
    let test = |(family, delay): (Family, u64)| {
        let program = program.to_owned();
        let name = format!("path::{function}_over_{family:?}_and_{delay}_ms").to_lowercase();
        let function = function.to_owned();
        Test::new(name, move || {
            let shape = Shape::rtt(Duration::from_millis(delay));
            let pair = if delay == 0 { Pair::new() } else { Pair::shaped(&shape) }.unwrap();
            for host in [&pair.a, &pair.b] {
                host.run(|| sysctl("net/ipv4/tcp_ecn", "1")).unwrap();
            }
            let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, 0))).unwrap();
            let port = listener.local_addr().unwrap().port();
            let peer = pair.a.address_of(&pair.b, family, port).ip();
            thread::spawn(move || listener.incoming().map_while(Result::ok).for_each(send_back));
            let mut command = Command::new(program);
            command.arg(function).env("PEER", peer.to_string()).env("PORT", port.to_string());
            pair.a.run(|| run(&mut command));
        })
    };
    [(Family::V4, 0), (Family::V6, 0), (Family::Mapped, 0), (Family::V4, 20), (Family::V6, 20)]
        .map(test)
        .into()
}

/// Sends back what comes, until the other end is closed.
fn send_back(stream: TcpStream) {
    let _ = io::copy(&mut &stream, &mut &stream);
}

/// The test once more under valgrind: no byte lost, none freed twice.
fn memory_test(program: &Path, name: &str, function: &str) -> Test {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--quiet", "--leak-check=full", "--errors-for-leak-kinds=definite", "--error-exitcode=9"]);
    valgrind.arg(program).arg(function);
    Test::new(format!("{name}::{function}_under_valgrind"), move || {
        run(&mut valgrind);
    })
}
