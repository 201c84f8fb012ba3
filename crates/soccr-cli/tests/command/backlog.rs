//! `send --listener`: what a server has not accepted yet.

use std::io::Write;
use std::net::TcpStream;
use std::process::{Command, Output, Stdio};

use soccr::connection::State;
use soccr::diag::{Diag, Socket};
use soccr_lab::{Lab, Side, wait_until};

use crate::adopt::adoption_works;
use crate::programs::{Program, SOCCR, ask, assert_runs, connect, hear, installed, python, soccr};

crate::tests![
    what_waits_moves_along_in_its_order,
    what_waits_moves_alone,
    what_is_refused_returns_to_the_queue,
    a_target_that_does_not_start_leaves_the_queue_as_it_was,
    where_nothing_waits_there_is_nothing_to_send,
];

/// Accepts one connection and answers it; all others, one after the other, when it gets SIGUSR1.
const SLOW: &str = r#"
import signal, socket, threading
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
listener = socket.create_server(("", 7), backlog=64)
def answer(connection):
    while data := connection.recv(100):
        connection.sendall(b"old " + data)
threading.Thread(target=answer, args=[listener.accept()[0]], daemon=True).start()
signal.sigwait({signal.SIGUSR1})
while True:
    answer(listener.accept()[0])
"#;

/// Answers each connection once, with its number in the order in which they are given.
const IN_ORDER: &str = r#"
import os, socket
for number in range(int(os.environ["LISTEN_FDS"])):
    connection = socket.socket(fileno=3 + number)
    connection.sendall(b"%02d " % number + connection.recv(100))
    connection.recv(100)
"#;

/// A server, a client that it has accepted, and clients that wait with something to say.
struct Queue {
    lab: Lab,
    server: Program,
    accepted: TcpStream,
    waiting: Vec<TcpStream>,
    beside: Program,
}

const WAITING: usize = 20;

impl Queue {
    fn new() -> Self {
        let lab = Lab::new().unwrap();
        let server = lab.a.run(|| Program::start(python(SLOW, &[]).stderr(Stdio::null())));
        let mut accepted = lab.peer.run(|| connect((lab.a.v4, 7)));
        assert_eq!(ask(&mut accepted, "one", "old "), "old one");
        let waiting = (0..WAITING).map(|number| {
            let mut client = lab.peer.run(|| connect((lab.a.v4, 7)));
            client.write_all(format!("{number:02}").as_bytes()).unwrap();
            client
        });
        let waiting = waiting.collect();
        let beside = lab.b.run(|| Program::start(Command::new("sleep").arg("1000").stdout(Stdio::null())));
        let queue = Self { lab, server, accepted, waiting, beside };
        queue.wait_for(WAITING);
        queue
    }

    /// Waits until the queue is so long.
    fn wait_for(&self, length: usize) {
        wait_until("the queue is as long", || {
            let mut found = 0;
            let visit = |socket: &Socket<'_>| {
                if socket.state == State::Listen && socket.local.port() == 7 {
                    found = socket.receive_queue as usize;
                }
            };
            self.lab.a.run(|| Diag::open().unwrap().visit(visit).unwrap());
            found == length
        });
    }

    fn send(&self, what: &[&str], receive: &str) -> Output {
        let via = format!("exec {SOCCR} receive --netns {} {receive}", self.beside.pid());
        let mut send = soccr(&["send", "--pid", &self.server.pid()]);
        send.args(what).args(["--via", &via]);
        self.lab.a.run(|| send.output()).unwrap()
    }

    /// The server goes on to accept, and each client gets its answer from it.
    fn assert_answered_by_the_old_one(mut self) {
        assert_runs(&self.server.pid());
        self.wait_for(WAITING);
        Command::new("kill").args(["-USR1", &self.server.pid()]).status().unwrap();
        for (number, mut client) in self.waiting.into_iter().enumerate() {
            assert_eq!(hear(&mut client, 6), format!("old {number:02}"));
        }
        assert_eq!(ask(&mut self.accepted, "two", "old "), "old two");
    }
}

/// What the command complains about; not what its target does, where that is still running.
fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn what_waits_moves_along_in_its_order() {
    if !installed("python3") {
        return;
    }
    let queue = Queue::new();
    let output = queue.send(&["--all", "--listener"], &format!("-- python3 -c '{IN_ORDER}' 2> /dev/null"));
    assert!(output.status.success(), "{}", text(&output));
    queue.lab.steer(Side::B).unwrap();
    queue.wait_for(0);
    let Queue { mut accepted, waiting, .. } = queue;
    assert_eq!(ask(&mut accepted, "me", "00 "), "00 me");
    drop(accepted);
    for (number, mut client) in waiting.into_iter().enumerate() {
        assert_eq!(hear(&mut client, 5), format!("{:02} {number:02}", number + 1));
    }
}

fn what_waits_moves_alone() {
    if !installed("python3") {
        return;
    }
    let mut queue = Queue::new();
    let output = queue.send(&["--listener"], &format!("-- python3 -c '{IN_ORDER}' 2> /dev/null"));
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(ask(&mut queue.accepted, "two", "old "), "old two");
    queue.lab.steer(Side::B).unwrap();
    for (number, client) in queue.waiting.into_iter().enumerate() {
        assert_eq!(hear(&mut { client }, 5), format!("{number:02} {number:02}"));
    }
}

fn what_is_refused_returns_to_the_queue() {
    if !adoption_works() {
        return;
    }
    let queue = Queue::new();
    let output = queue.send(&["--all", "--listener"], "--adopt");
    let complaint = text(&output);
    assert!(complaint.contains("nobody listens on 192.0.2.1:7"), "{complaint}");
    assert!(!output.status.success() && !complaint.contains("saved in"), "{}: {complaint}", output.status);
    queue.assert_answered_by_the_old_one();
}

fn a_target_that_does_not_start_leaves_the_queue_as_it_was() {
    if !adoption_works() {
        return;
    }
    let queue = Queue::new();
    let output = queue.send(&["--listener"], "-- no-such-program");
    let complaint = text(&output);
    assert!(!output.status.success() && !complaint.contains("saved in"), "{}: {complaint}", output.status);
    queue.assert_answered_by_the_old_one();
}

fn where_nothing_waits_there_is_nothing_to_send() {
    if !installed("python3") {
        return;
    }
    let lab = Lab::new().unwrap();
    let server = lab.a.run(|| Program::start(python(SLOW, &[]).stderr(Stdio::null())));
    let mut client = lab.peer.run(|| connect((lab.a.v4, 7)));
    assert_eq!(ask(&mut client, "one", "old "), "old one");
    let output =
        lab.a.run(|| soccr(&["send", "--pid", &server.pid(), "--listener", "--via", "cat"]).output());
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("none waits to be accepted"), "{}", text(&output));
    assert_eq!(ask(&mut client, "two", "old "), "old two");
}
