//! What README.md and docs/ say holds: their shell blocks run, their links lead somewhere, the errors they explain exist.
//!
//! A block that begins with ```` ```sh ```` runs on a host where `$server` has connections; `ssh HOST` leads to another host with the same
//! address, or with one of its own on the same Ethernet where the block begins with ```` ```sh lan ````; and `./server` is a program that takes connections. ```` ```sh root ```` needs a root that may load BPF;
//! ```` ```sh ignore: REASON ```` does not run.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use soccr::adopt::Adopter;
use soccr_lab::{Host, Lab, Lan, Side, Test, obstacle_to_bpf};

use crate::programs::{Program, SOCCR, Said, ask, connect, hear, installed, json, python};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

pub fn tests() -> Vec<Test> {
    let blocks = pages().into_iter().map(|page| {
        let name = page.strip_prefix(ROOT).unwrap().display().to_string();
        Test::new(format!("documents::the_blocks_of_{name}_run"), move || run_blocks(&page))
    });
    let others = [
        Test::new("documents::links_lead_somewhere", links_lead_somewhere),
        Test::new("documents::explained_errors_exist", explained_errors_exist),
    ];
    blocks.chain(others).collect()
}

/// README.md and what lies in docs/.
fn pages() -> Vec<PathBuf> {
    let docs = fs::read_dir(Path::new(ROOT).join("docs")).unwrap();
    let docs = docs.map(|entry| entry.unwrap().path());
    docs.filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .chain([Path::new(ROOT).join("README.md")])
        .collect()
}

/// The shell blocks of a page: line, what follows `sh`, and the text.
fn blocks(page: &str) -> Vec<(usize, &str, String)> {
    let mut blocks = Vec::new();
    let mut lines = page.lines().zip(1..);
    while let Some((line, number)) = lines.next() {
        let Some(info) = line.strip_prefix("```") else { continue };
        let text: Vec<&str> =
            lines.by_ref().map(|(line, _)| line).take_while(|line| *line != "```").collect();
        if let Some(how) = info.strip_prefix("sh").filter(|how| how.is_empty() || how.starts_with(' ')) {
            blocks.push((number, how.trim(), text.join("\n")));
        }
    }
    blocks
}

fn run_blocks(page: &Path) {
    if !installed("python3") || !installed("nsenter") {
        return;
    }
    for (line, how, text) in blocks(&fs::read_to_string(page).unwrap()) {
        let place = format!("{}:{line}", page.file_name().unwrap().display());
        match how {
            "" => run_between_twins(&place, &text),
            "lan" => {
                let lan = Lan::new().unwrap();
                run_block(&place, &text, &lan.peer, [&lan.hosts[0], &lan.hosts[1]], || ());
            }
            "root" => match Adopter::new() {
                Ok(_) => run_between_twins(&place, &text),
                Err(error) => eprintln!("\nSKIPPED: {place}: {}\n", obstacle_to_bpf([6, 9], error)),
            },
            _ => {
                let reason = how.strip_prefix("ignore: ").unwrap_or_else(|| panic!("{place}: sh {how}?"));
                assert!(!reason.is_empty(), "{place}: why is it ignored?");
            }
        }
    }
}

/// Accepts connections for ever, and answers with its argument in front.
const OLD: &str = r#"
import socket, sys, threading
listener = socket.create_server(("", 443), backlog=64)
def serve(connection):
    try:
        while data := connection.recv(100):
            connection.sendall(sys.argv[1].encode() + data)
    except OSError:
        pass  # it has left
while True:
    threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()
"#;

/// Greets each connection that it is given, and ends.
const NEW: &str = r#"#!/usr/bin/env python3
import os, socket
for fd in range(3, 3 + int(os.environ["LISTEN_FDS"])):
    socket.socket(fileno=fd).sendall(b"new ")
"#;

/// Greets each connection that it accepts, and keeps it.
const GREETER: &str = r#"
import socket
listener, connections = socket.create_server(("", 443), backlog=64), []
while True:
    connections.append(listener.accept()[0])
    connections[-1].sendall(b"new ")
"#;

const SSH: &str = "#!/bin/sh\nshift\nexec nsenter --net=/proc/$HOST2/ns/net -- sh -c \"$*\"\n";

fn run_between_twins(place: &str, text: &str) {
    let lab = Lab::new().unwrap();
    let steer = || {
        if text.contains("host2") {
            lab.steer(Side::B).unwrap();
        }
    };
    run_block(place, text, &lab.peer, [&lab.a, &lab.b], steer);
}

/// `moved` is called when the block has ended.
fn run_block(place: &str, text: &str, peer: &Host, [a, b]: [&Host; 2], moved: impl FnOnce()) {
    let old = a.run(|| Program::start(&mut python(OLD, &["old "])));
    let mut clients: Vec<TcpStream> = (0..3).map(|_| peer.run(|| connect((a.v4, 443)))).collect();
    for client in &mut clients {
        assert_eq!(ask(client, "hello", "old "), "old hello");
    }
    let host2 = b.run(|| Program::start(&mut python(GREETER, &[])));
    b.run(|| {
        connect(([127, 0, 0, 1], 443));
    });
    let directory = tempfile::tempdir().unwrap();
    let bin = directory.path().join("bin");
    fs::create_dir(&bin).unwrap();
    for (path, script) in [(bin.join("ssh"), SSH), (directory.path().join("server"), NEW)] {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o755).open(path).unwrap();
        file.write_all(script.as_bytes()).unwrap();
    }
    let commands = Path::new(SOCCR).parent().unwrap();
    let path = format!("{}:{}:{}", bin.display(), commands.display(), std::env::var("PATH").unwrap());
    // Programs that go on in the background keep it open.
    let said = Said::new();
    let mut shell = Command::new("timeout");
    shell.args(["60", "sh", "-euc", text]).current_dir(&directory).stdin(Stdio::null());
    shell.env("PATH", path).env("server", old.pid()).env("HOST2", host2.pid());
    let status = a.run(|| shell.stdout(said.output()).stderr(said.output()).status().unwrap());
    let output = said.read();
    assert!(status.success(), "{place}: {status}\n{text}\n{output}");

    let stay = a.run(|| json(&["list", "--json", "--pid", &old.pid()]));
    moved();
    for client in &mut clients {
        let address = client.local_addr().unwrap().to_string();
        if stay.iter().any(|socket| socket["remote"] == *address && socket["state"] == "ESTABLISHED") {
            assert_eq!(ask(client, "again", "old "), "old again", "{place}: {address}");
        } else {
            assert_eq!(hear(client, 4), "new ", "{place}: {address}");
        }
    }
}

/// The targets of the links of a page.
fn links(page: &str) -> impl Iterator<Item = &str> {
    page.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(target, _)| target))
}

/// As the hosting sites make them.
fn anchor(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect::<String>().replace(' ', "-")
}

fn links_lead_somewhere() {
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for link in links(&text).filter(|link| !link.contains("://")) {
            let (file, wanted) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: {link}", page.display());
            if !wanted.is_empty() {
                let text = fs::read_to_string(target).unwrap();
                let found = text.lines().any(|line| line.starts_with('#') && anchor(line) == wanted);
                assert!(found, "{}: {link}", page.display());
            }
        }
    }
}

/// The sources of all crates, with string literals in one piece.
fn sources(folder: &Path, text: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let mut continued = false;
            for line in fs::read_to_string(path).unwrap().lines() {
                let line = if continued { line.trim_start() } else { line };
                continued = line.ends_with('\\');
                text.push_str(line.trim_end_matches('\\'));
                if !continued {
                    text.push('\n');
                }
            }
        }
    }
}

/// How far apart the pieces of one message are in the sources, where an argument or a line is between them.
const NEAR: usize = 200;

/// Whether the pieces follow each other somewhere.
fn follow(text: &str, pieces: &[&str]) -> bool {
    let [first, rest @ ..] = pieces else { return true };
    text.match_indices(first).any(|(at, _)| {
        let mut end = at + first.len();
        rest.iter().all(|piece| {
            let behind = text[end..].find(piece).filter(|distance| *distance < NEAR);
            end += behind.map_or(0, |distance| distance + piece.len());
            behind.is_some()
        })
    })
}

fn explained_errors_exist() {
    let mut text = String::new();
    for folder in fs::read_dir(Path::new(ROOT).join("crates")).unwrap() {
        sources(&folder.unwrap().path().join("src"), &mut text);
    }
    let page = fs::read_to_string(Path::new(ROOT).join("docs/troubleshooting.md")).unwrap();
    let errors: Vec<&str> =
        page.lines().filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`')).collect();
    assert!(errors.len() > 10, "{errors:?}");
    for error in errors {
        let pieces: Vec<&str> = error.split('…').map(str::trim).filter(|piece| !piece.is_empty()).collect();
        assert!(follow(&text, &pieces), "no source says: {error}");
    }
}
