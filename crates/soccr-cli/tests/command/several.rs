//! Several images, or streams, one behind the other.

use std::fs::{self, File};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::programs::{
    HEIR, Program, SOCCR, ask, assert_unlocked, complaints, connect, descriptors, fail, installed, json,
    server, soccr, succeed,
};

crate::tests![
    images_from_cat_go_to_one_program,
    junk_behind_an_image_is_an_error_before_anything_is_restored,
    streams_without_answers_go_to_one_program,
];

const COUNT: usize = 3;

/// A server and its clients.
fn clients() -> (Program, Vec<TcpStream>) {
    let server = server("old ", COUNT);
    let mut clients: Vec<TcpStream> = (0..COUNT).map(|_| connect(([127, 0, 0, 1], 7))).collect();
    clients.iter_mut().for_each(|client| assert_eq!(ask(client, "one", "old "), "old one"));
    (server, clients)
}

/// Images of one connection each, all in one file.
fn joined(directory: &Path, server: &Program) -> String {
    let mut all = Vec::new();
    for (number, fd) in descriptors(&server.pid()).iter().enumerate() {
        let image = directory.join(number.to_string());
        succeed(&["save", "--pid", &server.pid(), "--fd", fd, "-o", image.to_str().unwrap()]);
        all.extend(fs::read(image).unwrap());
    }
    let path = directory.join("all").to_str().unwrap().to_owned();
    fs::write(&path, all).unwrap();
    path
}

fn assert_answer(clients: &mut [TcpStream]) {
    clients.iter_mut().for_each(|client| assert_eq!(ask(client, "two", "new "), "new two"));
    assert_unlocked();
}

fn images_from_cat_go_to_one_program() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (server, mut clients) = clients();
    let all = joined(directory.path(), &server);
    let mut shown: Vec<String> =
        json(&["inspect", "--json", &all]).iter().map(|shown| shown["remote"].to_string()).collect();
    let mut expected: Vec<String> =
        clients.iter().map(|client| format!("\"{}\"", client.local_addr().unwrap())).collect();
    shown.sort_unstable();
    expected.sort_unstable();
    assert_eq!(shown, expected);
    assert!(fail(1, &["restore", &all, "--stdio", "--", "cat"]).contains("3 connections"));
    let mut restore = soccr(&["restore", "--", "python3", "-c", HEIR, "new "]);
    let _heir = Program::start(restore.stdin(File::open(&all).unwrap()).stdout(Stdio::null()));
    assert_answer(&mut clients);
}

fn junk_behind_an_image_is_an_error_before_anything_is_restored() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (server, mut clients) = clients();
    let all = joined(directory.path(), &server);
    let good = fs::read(&all).unwrap();
    let cut = good[..good.len() - 1].to_vec();
    for (bytes, words) in
        [([&good[..], b"\n"].concat(), "behind the end of an image"), (cut, "ends too early")]
    {
        fs::write(&all, bytes).unwrap();
        let complaint = fail(1, &["restore", &all, "--", "true"]);
        assert!(complaint.contains(words), "{complaint}");
        assert!(fail(3, &["inspect", &all]).contains(words));
    }
    fs::write(&all, good).unwrap();
    let mut restore = soccr(&["restore", &all, "--", "python3", "-c", HEIR, "new "]);
    let _heir = Program::start(restore.stdout(Stdio::null()));
    assert_answer(&mut clients);
}

/// Nobody could tell the later sources that their connections are not wanted.
fn streams_without_answers_go_to_one_program() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (server, mut clients) = clients();
    let streams = directory.path().join("streams");
    for fd in descriptors(&server.pid()) {
        let mut send = soccr(&["send", "--pid", &server.pid(), "--fd", &fd]);
        let streams = File::options().append(true).create(true).open(&streams).unwrap();
        assert!(send.stdout(streams).status().unwrap().success());
    }
    // Not even one whose channel stays open, as some relays leave it.
    let (read, write) = std::io::pipe().unwrap();
    let mut cat = Command::new("cat").arg(&streams).stdout(write.try_clone().unwrap()).spawn().unwrap();
    let line = format!("exec {SOCCR} receive -- python3 -c '{HEIR}' 'new '");
    let mut receive = Command::new("sh");
    let said = tempfile::NamedTempFile::new().unwrap();
    receive.args(["-c", &line]).stdin(read).stdout(Stdio::null()).stderr(said.reopen().unwrap());
    let _heir = Program::start(&mut receive);
    assert_answer(&mut clients);
    assert!(cat.wait().unwrap().success());
    assert_eq!(complaints(&fs::read(said.path()).unwrap()), "");
    drop(write);
}
