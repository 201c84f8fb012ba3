//! A target whose source says what it should not, and a source whose target does.

use std::io::{BufReader, Write};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use soccr_image::stream::{Message, Place, Reader, Writer};
use soccr_lab::Side;

use crate::programs::{
    Program, SOCCR, ask, assert_runs, connect, descriptors, fail, installed, server, soccr, succeed,
};
use crate::transfer::Move;

crate::tests![
    a_connection_with_a_damaged_record_is_not_committed,
    a_connection_with_a_critical_field_of_a_newer_version_is_not_committed,
    what_is_in_use_here_is_refused_before_it_is_locked,
    a_source_that_never_commits_is_refused,
    held_packets_take_limited_memory,
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
        let fd = moving.lab.a.run(|| descriptors(&moving.old.pid())).remove(0);
        let image = succeed(&["save", "--keep", "--pid", &moving.old.pid(), "--fd", &fd]);
        let connection = soccr_image::read(&image[..]).unwrap();
        let mut command = soccr(&["receive", "--netns", netns]);
        command.args(arguments).args(["--", "sleep", "1000"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut program = Program::start(&mut command);
        let (mut to, from) = (program.0.stdin.take().unwrap(), program.0.stdout.take().unwrap());
        let mut stream = Writer::new(Vec::new()).unwrap();
        let place = Some(Place { host: [7; 16], namespace: [1, 2] });
        stream
            .send(&Message::Begin { connections: 1, answers: true, notes: false, place, steered: None })
            .unwrap();
        stream.connection(1, "victim", &connection).unwrap();
        to.write_all(&std::mem::take(stream.get_mut())).unwrap();
        let mut answers = Reader::new(BufReader::new(from)).unwrap();
        assert!(matches!(answers.receive(), Ok(Some(Message::Here { .. }))));
        let answer = answers.receive().unwrap().unwrap();
        (Self { program, to: Some(to), answers }, stream, answer)
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
    let status = format!("/proc/{}/status", victim.program.pid());
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
