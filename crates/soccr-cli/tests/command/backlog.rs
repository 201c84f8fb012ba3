//! `send --listener`: what a server has not accepted yet.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use soccr::connection::State;
use soccr::diag::{Diag, Socket};
use soccr_lab::{Lab, Side, let_fail, wait_until};

use crate::adopt::adoption_works;
use crate::programs::{Program, SOCCR, Said, ask, assert_runs, connect, hear, installed, python, soccr};

crate::tests![
    what_waits_moves_along_in_its_order,
    what_waits_moves_alone,
    what_is_refused_returns_to_the_queue,
    a_target_that_does_not_start_leaves_the_queue_as_it_was,
    a_request_to_end_leaves_the_queue_as_it_was,
    clients_of_the_queue_see_that_soccr_was_killed,
    where_nothing_waits_there_is_nothing_to_send,
    what_waits_stays_where_the_others_cannot_be_chosen,
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

impl Queue {
    /// Sends a signal to soccr while what has waited is in its sockets; how it ends, and what it says.
    fn send_and_signal(&self, signal: Signal) -> (ExitStatus, String) {
        let directory = tempfile::tempdir().unwrap();
        let accepted = directory.path().join("accepted");
        // A target that is never ready.
        let via = format!("touch {}; exec sleep 1000", accepted.display());
        // What runs in the background of a shell ignores SIGINT, and soccr would, too.
        let mut send = Command::new("env");
        send.args(["--default-signal=INT,HUP,TERM", SOCCR, "send", "--pid", &self.server.pid()]);
        send.args(["--listener", "--timeout", "500", "--via", &via]);
        // The target may outlive soccr, and has its standard error.
        let complaints = Said::new();
        send.stdout(Stdio::null()).stderr(complaints.output()).process_group(0);
        let mut sending = self.lab.a.run(|| send.spawn()).unwrap();
        let group = Pid::from_child(&sending);
        wait_until("the target has started", || accepted.exists());
        self.wait_for(0);
        kill_process(group, signal).unwrap();
        let status = sending.wait().unwrap();
        let _ = kill_process_group(group, Signal::KILL);
        (status, complaints.read())
    }
}

fn a_request_to_end_leaves_the_queue_as_it_was() {
    if !adoption_works() {
        return;
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let queue = Queue::new();
        let (status, complaint) = queue.send_and_signal(signal);
        assert_eq!(status.code(), Some(1), "{complaint}");
        assert!(complaint.contains("asked to end") && !complaint.contains("saved in"), "{complaint}");
        queue.assert_answered_by_the_old_one();
    }
}

fn clients_of_the_queue_see_that_soccr_was_killed() {
    if !installed("python3") {
        return;
    }
    let mut queue = Queue::new();
    queue.send_and_signal(Signal::KILL);
    for mut client in queue.waiting {
        let error = client.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    assert_eq!(ask(&mut queue.accepted, "two", "old "), "old two");
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

fn what_waits_stays_where_the_others_cannot_be_chosen() {
    if !installed("python3") {
        return;
    }
    let queue = Queue::new();
    let pid = queue.server.pid();
    let mut send = soccr(&["send", "--pid", &pid, "--all", "--listener", "--via", "cat"]);
    // The command asks beside the connections which of their peers are local.
    let_fail(&mut send, libc::SYS_socketpair, libc::AF_UNIX as u32, libc::EMFILE);
    let output = queue.lab.a.run(|| send.output()).unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    let named = format!("soccr: pid {pid} fd ");
    assert!(complaint.starts_with(&named) && complaint.contains("socketpair"), "{complaint}");
    assert_eq!((output.status.code(), complaint.lines().count()), (Some(1), 1), "{complaint}");
    queue.assert_answered_by_the_old_one();
}
