//! The examples, run as their readers run them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

soccr_lab::tests![a_restarted_server_goes_on];

struct Example(Child);

impl Example {
    fn start(name: &str, arguments: &[&str]) -> Self {
        // Cargo builds examples beside the tests.
        let path: PathBuf = std::env::current_exe().unwrap();
        let path = path.parent().unwrap().parent().unwrap().join("examples").join(name);
        if !path.exists() {
            // It does so only where all tests of the package are asked for.
            let cargo = Command::new(env!("CARGO"))
                .args(["build", "--quiet", "-p", "soccr", "--example", name])
                .status();
            assert!(cargo.unwrap().success());
        }
        let command =
            Command::new(&path).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        Self(command.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    fn says(&mut self) -> String {
        let mut line = String::new();
        // Unbuffered, so that nothing is lost between two calls.
        let mut reader = BufReader::with_capacity(1, self.0.stdout.as_mut().unwrap());
        reader.read_line(&mut line).unwrap();
        line
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address.parse::<SocketAddr>().unwrap()).unwrap();
    stream.set_read_timeout(Some(soccr_lab::LIMIT)).unwrap();
    stream
}

fn ask(stream: &mut TcpStream, text: &str, length: usize) -> String {
    stream.write_all(text.as_bytes()).unwrap();
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

fn a_restarted_server_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = ["127.0.0.1:7", directory.path().to_str().unwrap()];
    let mut server = Example::start("stop_and_start", &arguments);
    assert_eq!(server.says(), "serving, 0 connections restored\n");
    let (mut one, mut two) = (connect("127.0.0.1:7"), connect("127.0.0.1:7"));
    assert_eq!(ask(&mut one, "hello\n", 9), "1: hello\n");
    for round in 1..4 {
        assert_eq!(ask(&mut two, "x\n", 5), format!("{round}: x\n"));
        server.0.stdin.as_mut().unwrap().write_all(b"stop\n").unwrap();
        assert_eq!(server.says(), "stopped, 2 connections saved\n");
        assert!(server.0.wait().unwrap().success());
        server = Example::start("stop_and_start", &arguments);
        assert_eq!(server.says(), "serving, 2 connections restored\n");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
    assert_eq!(ask(&mut one, "again\n", 9), "2: again\n");
    assert_eq!(ask(&mut two, "x\n", 5), "4: x\n");
}
