//! A target whose source says what it should not, and a source whose target does.

use std::io::{BufReader, Write};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process};
use soccr::Connection;
use soccr::connection::State;
use soccr::settings::Value;
use soccr_image::stream::{Message, Place, Reader, Writer};
use soccr_lab::Side;

use crate::kill::children;
use crate::programs::{
    Program, SOCCR, ask, assert_runs, connect, descriptors, fail, installed, server, soccr,
};
use crate::transfer::Move;

crate::tests![
    a_connection_with_a_damaged_record_is_not_committed,
    a_connection_with_a_critical_field_of_a_newer_version_is_not_committed,
    what_is_in_use_here_is_refused_before_it_is_locked,
    a_source_that_never_commits_is_refused,
    a_target_that_is_asked_to_end_refuses_what_is_not_committed,
    held_packets_take_limited_memory,
    more_than_may_wait_is_refused,
    a_handshake_from_a_port_that_services_trust_is_refused,
    the_address_of_another_host_is_refused,
    a_connection_to_the_host_itself_does_not_leave_its_network,
    connections_to_the_host_itself_are_left_out,
];

/// `soccr receive` on the other host, with the test as its source.
struct Victim {
    program: Program,
    to: Option<ChildStdin>,
    answers: Reader<BufReader<ChildStdout>>,
}

impl Victim {
    /// Says BEGIN and CONNECTION 1, and hears whether that is ready.
    fn new(moving: &Move, netns: &str, arguments: &[&str]) -> (Self, Writer<Vec<u8>>, Message) {
        let (mut victim, stream) = Self::offered(netns, arguments, &[moving.saved()]);
        let answer = victim.hear().unwrap();
        (victim, stream, answer)
    }

    /// Says BEGIN and these connections, from 1 on.
    fn offered(netns: &str, arguments: &[&str], connections: &[Connection]) -> (Self, Writer<Vec<u8>>) {
        // What runs in the background of a shell ignores SIGINT.
        let mut command = Command::new("env");
        command.args(["--default-signal=INT,HUP,TERM", SOCCR, "receive", "--netns", netns]);
        command.args(arguments).args(["--", "sleep", "1000"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut program = Program::start(&mut command);
        let (mut to, from) = (program.0.stdin.take().unwrap(), program.0.stdout.take().unwrap());
        let mut stream = Writer::new(Vec::new()).unwrap();
        let place = Some(Place { host: [7; 16], namespace: [1, 2] });
        let count = connections.len() as u32;
        stream
            .send(&Message::Begin { connections: count, answers: true, notes: false, place, steered: None })
            .unwrap();
        for (number, connection) in (1..).zip(connections) {
            stream.connection(number, "victim", connection).unwrap();
        }
        to.write_all(&std::mem::take(stream.get_mut())).unwrap();
        let answers = Reader::new(BufReader::new(from)).unwrap();
        (Self { program, to: Some(to), answers }, stream)
    }

    /// The process that receives: the one that was started waits for it.
    fn target(&self) -> u32 {
        children(self.program.0.id())[0]
    }

    fn hear(&mut self) -> Option<Message> {
        self.answers.receive().unwrap()
    }

    fn say(&mut self, stream: &mut Writer<Vec<u8>>) {
        self.to.as_mut().unwrap().write_all(&std::mem::take(stream.get_mut())).unwrap();
    }

    /// It refuses the connection, does not obey the COMMIT, and gives nothing to its program.
    fn assert_refuses(mut self, stream: Writer<Vec<u8>>, damaged: &[u8]) {
        let to = self.to.as_mut().unwrap();
        to.write_all(damaged).unwrap();
        let answer = self.answers.receive().unwrap();
        assert!(matches!(answer, Some(Message::Refused { connection: 1, .. })), "{answer:?}");
        let mut rest = stream;
        rest.send(&Message::Commit { connection: 1 }).unwrap();
        to.write_all(&rest.finish().unwrap()).unwrap();
        self.to = None;
        assert_eq!(self.answers.receive().unwrap(), None);
        assert_eq!(self.program.0.wait().unwrap().code(), Some(1));
    }
}

fn held() -> Message {
    Message::Held { connection: 1, packets: vec![vec![1; 40]] }
}

fn a_connection_with_a_damaged_record_is_not_committed() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    let (victim, mut stream, answer) = Victim::new(&moving, &moving.beside.pid(), &[]);
    assert_eq!(answer, Message::Ready { connection: 1 });
    stream.send(&held()).unwrap();
    let mut record = std::mem::take(stream.get_mut());
    record[30] ^= 1;
    victim.assert_refuses(stream, &record);
    moving.assert_lives_at(Side::A, "old ");
}

fn a_connection_with_a_critical_field_of_a_newer_version_is_not_committed() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    let (victim, mut stream, answer) = Victim::new(&moving, &moving.beside.pid(), &[]);
    assert_eq!(answer, Message::Ready { connection: 1 });
    stream.send(&held()).unwrap();
    let mut record = std::mem::take(stream.get_mut());
    // The tag of its only field: critical, and known to nobody.
    record[16..18].copy_from_slice(&0xfff0u16.to_le_bytes());
    let end = record.len() - 4;
    let check = crc32(&record[..end]);
    record[end..].copy_from_slice(&check.to_le_bytes());
    victim.assert_refuses(stream, &record);
    moving.assert_lives_at(Side::A, "old ");
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

fn what_is_in_use_here_is_refused_before_it_is_locked() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    // Where the connection lives, and from a source that is elsewhere.
    let (mut victim, _stream, answer) = Victim::new(&moving, &moving.old.pid(), &[]);
    match answer {
        Message::Refused { connection: 1, reason } => assert!(reason.contains("in use here"), "{reason}"),
        other => panic!("{other:?}"),
    }
    // The pipe is still open.
    moving.assert_lives_at(Side::A, "old ");
    victim.to = None;
    assert_eq!(victim.program.0.wait().unwrap().code(), Some(1));
}

fn a_source_that_never_commits_is_refused() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    let (mut victim, mut stream, answer) = Victim::new(&moving, &moving.beside.pid(), &["--timeout", "1"]);
    assert_eq!(answer, Message::Ready { connection: 1 });
    // Something is always said.
    stream.send(&held()).unwrap();
    victim.say(&mut stream);
    match victim.hear() {
        Some(Message::Refused { connection: 1, reason }) => {
            assert!(reason.contains("does not say COMMIT in time"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(victim.program.0.wait().unwrap().code(), Some(1));
    moving.assert_lives_at(Side::A, "old ");
}

fn a_target_that_is_asked_to_end_refuses_what_is_not_committed() {
    if !installed("python3") {
        return;
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut moving = Move::new(1);
        let (mut victim, _stream, answer) = Victim::new(&moving, &moving.beside.pid(), &[]);
        assert_eq!(answer, Message::Ready { connection: 1 });
        kill_process(Pid::from_raw(victim.target() as i32).unwrap(), signal).unwrap();
        match victim.hear() {
            Some(Message::Refused { connection: 1, reason }) => {
                assert!(reason.contains("asked to end"), "{reason}")
            }
            other => panic!("{other:?}"),
        }
        // The pipe is still open.
        assert_eq!(victim.program.0.wait().unwrap().code(), Some(1));
        moving.assert_lives_at(Side::A, "old ");
    }
}

fn more_than_may_wait_is_refused() {
    if !installed("python3") {
        return;
    }
    const MOST: usize = 1024;
    const MORE: usize = 6;
    if getrlimit(Resource::Nofile).maximum.is_some_and(|limit| limit < 4 * MOST as u64) {
        soccr_lab::skip(format_args!("{} descriptors in one process", 4 * MOST));
        return;
    }
    let moving = Move::new(1);
    let mut connection = moving.saved();
    let all: Vec<Connection> = (0..MOST + MORE)
        .map(|number| {
            connection.remote.set_port(10_000 + number as u16);
            connection.clone()
        })
        .collect();
    let (mut victim, _stream) = Victim::offered(&moving.beside.pid(), &[], &all);
    let (mut ready, mut refused) = (0, 0);
    while ready + refused < all.len() {
        match victim.hear().unwrap() {
            Message::Ready { .. } => ready += 1,
            Message::Refused { reason, .. } => {
                assert!(reason.contains("than there is room for"), "{reason}");
                refused += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((ready, refused), (MOST, MORE));
}

fn a_handshake_from_a_port_that_services_trust_is_refused() {
    if !installed("python3") {
        return;
    }
    let moving = Move::new(1);
    let mut connection = moving.saved();
    connection.control.state = State::SynSent;
    for (port, settings, is_taken) in
        [(1023, &[][..], false), (1023, &["--settings", "all"], true), (1024, &[], true)]
    {
        connection.local.set_port(port);
        let netns = moving.beside.pid();
        let (mut victim, _stream) = Victim::offered(&netns, settings, std::slice::from_ref(&connection));
        match victim.hear() {
            Some(Message::Ready { .. }) if is_taken => {}
            Some(Message::Refused { reason, .. }) if !is_taken => {
                assert!(reason.contains("a port that services trust"), "{reason}")
            }
            other => panic!("port {port} {settings:?}: {other:?}"),
        }
    }
}

fn the_address_of_another_host_is_refused() {
    if !installed("python3") {
        return;
    }
    let moving = Move::new(1);
    let mut connection = moving.saved();
    connection.local = "203.0.113.66:22".parse().unwrap();
    for name in ["IP_TRANSPARENT", "IP_FREEBIND"] {
        connection.settings.set(name, Value::Number(1));
    }
    let offer = [connection];
    for (settings, is_taken) in [(&[][..], false), (&["--settings", "all"], true)] {
        let (mut victim, _stream) = Victim::offered(&moving.beside.pid(), settings, &offer);
        match victim.hear() {
            Some(Message::Ready { .. }) if is_taken => {}
            Some(Message::Refused { reason, .. }) if !is_taken => {
                assert!(reason.contains("EADDRNOTAVAIL"), "{reason}")
            }
            other => panic!("{settings:?}: {other:?}"),
        }
    }
}

fn held_packets_take_limited_memory() {
    if !installed("python3") {
        return;
    }
    let moving = Move::new(1);
    let (mut victim, mut stream, answer) = Victim::new(&moving, &moving.beside.pid(), &[]);
    assert_eq!(answer, Message::Ready { connection: 1 });
    for _ in 0..40 {
        let packets = vec![vec![1; 20]; 100_000];
        stream.send(&Message::Held { connection: 1, packets }).unwrap();
        victim.say(&mut stream);
    }
    // It is answered when all of them have been read.
    stream.send(&Message::Commit { connection: 1 }).unwrap();
    victim.say(&mut stream);
    assert_eq!(victim.hear(), Some(Message::Taken { connection: 1 }));
    let status = format!("/proc/{}/status", victim.target());
    let peak = || -> u64 {
        let status = std::fs::read_to_string(&status).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let peak = peak();
    assert!(peak < 128 << 10, "{peak} KiB");
    victim.to = None;
}

fn a_connection_to_the_host_itself_does_not_leave_its_network() {
    if !installed("python3") {
        return;
    }
    let lab = soccr_lab::Lab::new().unwrap();
    let old = lab.a.run(|| server("old ", 1));
    let mut client = lab.a.run(|| connect(([127, 0, 0, 1], 7)));
    assert_eq!(ask(&mut client, "one", "old "), "old one");
    let fd = lab.a.run(|| descriptors(&old.pid())).remove(0);
    let receive = format!("{SOCCR} receive -- true");
    let complaint = fail(1, &["send", "--pid", &old.pid(), "--fd", &fd, "--via", &receive]);
    assert!(complaint.contains("another network namespace of this host"), "{complaint}");
    assert!(
        complaint.contains("stays: the target refuses it") && complaint.contains("--netns"),
        "{complaint}"
    );
    assert_runs(&old.pid());
    assert_eq!(ask(&mut client, "more", "old "), "old more");
}

fn connections_to_the_host_itself_are_left_out() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    let own = moving.lab.a.v4;
    let old =
        moving.lab.a.run(|| Program::start(Command::new("python3").args(["-c", BOTH]).stdout(Stdio::null())));
    let mut local = moving.lab.a.run(|| connect((own, 8)));
    let mut remote = moving.lab.peer.run(|| connect((own, 8)));
    for client in [&mut local, &mut remote] {
        assert_eq!(ask(client, "one", "old "), "old one");
    }
    let receive = moving.receive();
    let send = |via: &str, arguments: &[&str]| {
        let mut command = soccr(&["send", "--pid", &old.pid(), "--all", "--via", via]);
        command.args(arguments);
        let output = tempfile::NamedTempFile::new().unwrap();
        let status = command.stderr(output.reopen().unwrap()).status().unwrap();
        (status.code().unwrap(), std::fs::read_to_string(output.path()).unwrap())
    };
    let (code, complaint) = send("false", &["--with-local"]);
    assert_eq!((code, complaint.matches(": stays: ").count()), (1, 2), "{complaint}");
    let (code, complaint) = send(&receive, &[]);
    assert_eq!(code, 0, "{complaint}");
    assert_eq!(complaint.matches("left out: its peer is this host itself").count(), 1, "{complaint}");
    let (code, complaint) = send(&receive, &[]);
    assert_eq!(code, 1, "{complaint}");
    assert!(complaint.contains("there is no other connection"), "{complaint}");
    assert_eq!(ask(&mut local, "more", "old "), "old more");
    moving.lab.steer(Side::B).unwrap();
    assert_eq!(ask(&mut remote, "more", "new "), "new more");
    drop(remote);
    moving.end();
}

/// Serves two connections.
const BOTH: &str = r#"
import socket, threading
listener = socket.create_server(("", 8), backlog=64)
def serve(connection):
    try:
        while data := connection.recv(65536):
            connection.sendall(b"old " + data)
    except OSError:
        pass
for _ in range(2):
    threading.Thread(target=serve, args=[listener.accept()[0]]).start()
"#;
