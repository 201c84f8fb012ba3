//! What goes wrong when a connection is given to a program, and sockets that somebody has left paused.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use soccr_lab::{Side, wait_until};

use crate::programs::{
    HEIR, Program, SOCCR, ask, assert_unlocked, connect, descriptors, fail, installed, json, python, server,
    soccr, succeed,
};
use crate::transfer::Move;

crate::tests![
    a_restored_connection_is_rescued_from_a_program_that_cannot_start,
    a_restored_connection_is_rescued_from_a_dead_recipient,
    a_received_connection_is_rescued_from_a_program_that_cannot_start,
    a_paused_socket_is_shown_and_resumed,
];

/// A script whose interpreter does not exist, and one whose interpreter is the former: only the kernel finds out.
pub fn broken_programs(directory: &Path) -> [String; 2] {
    let script = |name: &str, interpreter: &str| {
        let path = directory.join(name);
        fs::write(&path, format!("#!{interpreter}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let evident = script("evident", "/no/such/interpreter");
    let hidden = script("hidden", &evident);
    [evident, hidden]
}

fn rescued(directory: &Path) -> Option<PathBuf> {
    let mut names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    names.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with("soccr-rescued-"))
}

/// The peer has got neither FIN nor RST.
fn assert_open(client: &mut TcpStream) {
    client.set_nonblocking(true).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    client.set_nonblocking(false).unwrap();
}

/// A connection in the image `saved`, and its peer.
fn saved(directory: &Path) -> (String, TcpStream) {
    let image = directory.join("saved").to_str().unwrap().to_owned();
    let server = server("old ", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", "old "), "old one");
    let fd = descriptors(&server.pid()).remove(0);
    succeed(&["save", "--pid", &server.pid(), "--fd", &fd, "-o", &image]);
    (image, client)
}

fn assert_restores(directory: &Path, client: &mut TcpStream) {
    assert_open(client);
    let image = rescued(directory).unwrap();
    assert_eq!(fs::metadata(&image).unwrap().permissions().mode() & 0o777, 0o600);
    let mut restore = soccr(&["restore", image.to_str().unwrap(), "--", "python3", "-c", HEIR, "new "]);
    let _heir = Program::start(&mut restore);
    assert_eq!(ask(client, "two", "new "), "new two");
    assert_unlocked();
}

fn a_restored_connection_is_rescued_from_a_program_that_cannot_start() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let [evident, hidden] = broken_programs(directory);
    let (image, mut client) = saved(directory);
    let complaint = fail(126, &["restore", &image, "--", &evident]);
    assert!(complaint.contains("/no/such/interpreter"), "{complaint}");
    assert_eq!(rescued(directory), None, "nothing has been touched");
    let output = soccr(&["restore", &image, "--", &hidden]).current_dir(directory).output().unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(126), "{complaint}");
    assert!(complaint.contains(rescued(directory).unwrap().to_str().unwrap()), "{complaint}");
    assert_restores(directory, &mut client);
}

fn a_restored_connection_is_rescued_from_a_dead_recipient() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let (image, mut client) = saved(directory);
    let socket = directory.join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut restore = soccr(&["restore", "--send-fd", socket.to_str().unwrap()]);
    let mut restore = Program::start(restore.current_dir(directory).stdin(Stdio::piped()));
    // It is connected, and dies while the image is awaited.
    drop(listener.accept().unwrap());
    drop(listener);
    restore.0.stdin.take().unwrap().write_all(&fs::read(image).unwrap()).unwrap();
    assert_eq!(restore.0.wait().unwrap().code(), Some(1));
    assert_restores(directory, &mut client);
}

fn a_received_connection_is_rescued_from_a_program_that_cannot_start() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let [evident, hidden] = broken_programs(directory);
    let mut moving = Move::new(1);
    let beside = moving.beside.pid();
    let receive =
        |program| format!("cd {} && exec {SOCCR} receive --netns {beside} -- {program}", directory.display());
    let (code, complaint) = moving.try_send(&["--all", "--via", &receive(evident)]);
    assert_eq!(code, 1, "{complaint}");
    assert!(complaint.contains("/no/such/interpreter") && complaint.contains("stays"), "{complaint}");
    moving.assert_lives_at(Side::A, "old ");
    let (code, complaint) = moving.try_send(&["--all", "--via", &receive(hidden)]);
    assert_eq!(code, 0, "{complaint}");
    wait_until("it is rescued", || rescued(directory).is_some());
    assert_open(&mut moving.clients[0]);
    let image = rescued(directory).unwrap();
    wait_until("the target has ended", || {
        json(&["list", "--json", "--netns", &beside]).iter().all(|socket| socket["savable"] == false)
    });
    let mut restore = soccr(&["restore", image.to_str().unwrap(), "--netns", &beside]);
    let _heir = Program::start(restore.args(["--", "python3", "-c", HEIR, "new "]));
    moving.assert_lives_at(Side::B, "new ");
    moving.end();
}

/// Does to itself what a program does that is killed between pause and resume. `TCP_REPAIR` is 19.
const PAUSED: &str = r#"
import socket, sys
connection = socket.create_server(("", 7)).accept()[0]
connection.setsockopt(socket.IPPROTO_TCP, 19, 1)
print("paused", flush=True)
sys.stdin.readline()
while data := connection.recv(100):
    connection.sendall(b"again " + data)
"#;

fn a_paused_socket_is_shown_and_resumed() {
    if !installed("python3") {
        return;
    }
    let mut program = Program::start(python(PAUSED, &[]).stdin(Stdio::piped()));
    let mut client = connect(([127, 0, 0, 1], 7));
    let mut line = String::new();
    BufReader::new(program.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let pid = program.pid();
    let sockets = json(&["list", "--json", "--pid", &pid]);
    let paused = sockets.iter().find(|socket| socket["state"] == "ESTABLISHED").unwrap();
    assert_eq!(paused["why_not"], "paused: soccr resume");
    let fd = paused["processes"][0]["fd"].to_string();
    assert!(fail(1, &["save", "--pid", &pid, "--fd", &fd, "-o", "/tmp/x"]).contains("`soccr resume`"));
    succeed(&["resume", "--pid", &pid, "--fd", &fd]);
    assert!(fail(1, &["resume", "--pid", &pid, "--fd", &fd]).contains("not in repair mode"));
    assert_eq!(descriptors(&pid), [fd]);
    program.0.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert_eq!(ask(&mut client, "one", "again "), "again one");
}
