//! `send` to targets that are late, silent, or refuse.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;
use rustix::process::{Pid, Signal, kill_process};
use soccr_image::stream::{Message, Reader, Writer};
use soccr_lab::{LIMIT, Side, run_and_watch, wait_until};

use crate::kill::keeper;
use crate::programs::{
    HEIR, Program, SOCCR, Said, ask, assert_runs, assert_unlocked, connect, descriptors, hear, installed,
    json, python, soccr, succeed,
};
use crate::transfer::Move;

crate::tests![
    a_connection_comes_back_however_it_was_bound,
    what_cannot_be_restored_behind_the_commit_comes_back,
    what_the_target_refuses_stays,
    text_from_elsewhere_does_not_turn,
    a_target_without_room_for_all_takes_none,
    one_that_fails_does_not_hurt_the_others,
    a_target_that_is_silent_changes_nothing,
    nothing_is_stopped_before_the_target_is_there,
    the_process_goes_on_when_the_target_is_late,
    the_process_goes_on_while_a_connection_is_in_doubt,
    a_target_that_says_too_much_is_not_listened_to,
    a_connection_that_is_taken_late_is_not_lost,
    what_comes_back_to_a_process_that_has_closed_it_is_in_an_image,
    what_comes_back_without_a_keeper_is_in_an_image,
    the_keeper_is_asked_about_the_right_socket,
    nobody_stands_still_for_a_reader_who_does_not_read,
];

/// What a target answers, in a file.
pub struct Answers(tempfile::NamedTempFile);

impl Answers {
    fn new(messages: &[Message]) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut answers = Writer::new(&file).unwrap();
        messages.iter().for_each(|message| answers.send(message).unwrap());
        // Whoever is to end properly says so by the last message of a second file.
        answers.flush().unwrap();
        Self(file)
    }

    pub fn refusing_behind_the_commit() -> Self {
        Self::new(&[
            Message::Ready { connection: 1 },
            Message::Refused { connection: 1, reason: "no room".into() },
        ])
    }

    fn path(&self) -> String {
        self.0.path().display().to_string()
    }

    /// A target that answers so, and reads to the end.
    pub fn command(&self) -> String {
        format!("cat {}; cat > /dev/null", self.path())
    }
}

/// Takes a connection to a listener on each kind of address, or makes one from a socket bound in each way, and echoes.
const BOUND: &str = r#"
import socket, sys
role, family, address, port, remote = sys.argv[1:]
family = socket.AF_INET6 if family == "6" else socket.AF_INET
if role == "listens":
    connection = socket.create_server((address, 7), family=family).accept()[0]
else:
    connection = socket.socket(family)
    if address:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.bind((address, int(port)))
    connection.connect((remote, 7))
try:
    while data := connection.recv(65536):
        connection.sendall(data)
except OSError as error:
    print("errno", error.errno, flush=True)
"#;

fn a_connection_comes_back_however_it_was_bound() {
    if !installed("python3") {
        return;
    }
    let ends = [("4", "127.0.0.1", "0.0.0.0"), ("6", "::1", "::")];
    for (family, loopback, any) in ends {
        let connects = [("", "0"), (any, "0"), (loopback, "0"), (any, "7007"), (loopback, "7008")];
        let listens = [(any, "7"), (loopback, "7")];
        let all = listens.map(|bound| ("listens", bound)).into_iter();
        for (role, (address, port)) in all.chain(connects.map(|bound| ("connects", bound))) {
            let case = format!("{role} {address} {port}");
            let run = || Program::start(&mut python(BOUND, &[role, family, address, port, loopback]));
            let end: std::net::IpAddr = loopback.parse().unwrap();
            let (old, mut client) = if role == "listens" {
                let old = run();
                (old, connect((end, 7)))
            } else {
                let listener = std::net::TcpListener::bind((end, 7)).unwrap();
                let old = run();
                (old, listener.accept().unwrap().0)
            };
            client.set_read_timeout(Some(LIMIT)).unwrap();
            assert_eq!(ask(&mut client, "one", ""), "one", "{case}");
            let fd = descriptors(&old.pid()).remove(0);
            let target = Answers::refusing_behind_the_commit();
            let complaint = crate::programs::fail(
                1,
                &["send", "--pid", &old.pid(), "--fd", &fd, "--via", &target.command()],
            );
            assert!(
                complaint.contains("stays: the target cannot restore it: no room"),
                "{case}: {complaint}"
            );
            assert_eq!(ask(&mut client, "more", ""), "more", "{case}");
        }
    }
}

/// A command of the shell that waits until it is told to go on.
struct Gate(tempfile::TempDir);

impl Gate {
    fn new() -> Self {
        let gate = Self(tempfile::tempdir().unwrap());
        assert!(Command::new("mkfifo").arg(gate.path()).status().unwrap().success());
        gate
    }

    fn path(&self) -> std::path::PathBuf {
        self.0.path().join("gate")
    }

    fn command(&self) -> String {
        format!("read go < {}", self.path().display())
    }

    fn open(&self) {
        std::fs::write(self.path(), "go\n").unwrap();
    }
}

fn nothing_is_stopped_before_the_target_is_there() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(2);
    let gate = Gate::new();
    let started = gate.0.path().join("started");
    let via = format!("touch {}; {}; {}", started.display(), gate.command(), moving.receive());
    let mut send = moving.send(&["--all", "--via", &via]).spawn().unwrap();
    wait_until("the target starts", || started.exists());
    for client in &mut moving.clients {
        assert_eq!(ask(client, "meanwhile", "old "), "old meanwhile");
    }
    moving.lab.a.run(assert_unlocked);
    gate.open();
    assert_eq!(send.wait().unwrap().code(), Some(0));
    moving.assert_lives_at(Side::B, "new ");
    moving.end();
}

fn the_process_goes_on_when_the_target_is_late() {
    late(&[], 0, 1);
}

/// The target does not say whether it has taken the connection: only that one is waited for.
fn the_process_goes_on_while_a_connection_is_in_doubt() {
    late(&[Message::Ready { connection: 1 }], 1, 4);
}

/// A target that says no more than these answers. The clients behind the first `doubtful` go on; how the source ends.
fn late(answers: &[Message], doubtful: usize, code: i32) {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(2);
    let all = moving.lab.a.run(|| descriptors(&moving.old.pid()));
    // That of the first client.
    let fd = all.iter().min().unwrap();
    // It reads what it is told until the end.
    let (answers, gate) = (Answers::new(answers), Gate::new());
    let told = tempfile::NamedTempFile::new().unwrap();
    let via = format!("cat {}; cat > {}; {}", answers.path(), told.path().display(), gate.command());
    let limit = 30;
    let mut send =
        moving.send(&["--fd", fd, "--timeout", &limit.to_string(), "--via", &via]).spawn().unwrap();
    // It still waits for the last words of the target.
    wait_until("the source has said its last word", || {
        let told = std::fs::read(told.path()).unwrap();
        let Ok(mut told) = Reader::new(&told[..]) else { return false };
        loop {
            match told.receive() {
                Ok(Some(_)) => {}
                ended => return ended.is_ok(),
            }
        }
    });
    let start = std::time::Instant::now();
    for client in &mut moving.clients[doubtful..] {
        assert_eq!(ask(client, "more", "old "), "old more");
    }
    assert!(start.elapsed().as_secs() < limit, "they were stopped for as long again");
    gate.open();
    assert_eq!(send.wait().unwrap().code(), Some(code));
    if doubtful == 0 {
        moving.lab.a.run(assert_unlocked);
    }
}

fn a_target_that_says_too_much_is_not_listened_to() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(2);
    let refused = Message::Refused { connection: 1, reason: "no".into() };
    let note = Message::Note { text: "no".into(), failed: false };
    for (word, told) in [(refused, "says more than there is to say"), (note, "does not know its part")] {
        let (hello, answers) = (Answers::new(&[]), Answers::new(&vec![word; 100_000]));
        let record = format!("tail -c +17 {}", answers.path());
        let via = format!("cat {}; while {record}; do :; done", hello.path());
        let (code, complaint) = moving.try_send(&["--all", "--via", &via]);
        let last = complaint.lines().last();
        assert_eq!(code, 1, "{last:?}");
        assert!(complaint.contains(told) && complaint.lines().count() < 2000, "{last:?}");
    }
    // Nor to a word that would be longer than any: its end is not waited for.
    let long = Answers::new(&[Message::Held { connection: 1, packets: vec![vec![0; 5000]] }]);
    let via = format!("head -c 100 {}; cat > /dev/null", long.path());
    let (code, complaint) = moving.try_send(&["--all", "--via", &via]);
    assert_eq!(code, 1, "{complaint}");
    assert!(!complaint.contains("too late"), "{complaint}");
    moving.assert_lives_at(Side::A, "old ");
}

fn what_cannot_be_restored_behind_the_commit_comes_back() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::to(Side::A, 1);
    let target = Answers::refusing_behind_the_commit();
    let (code, complaint) = moving.try_send(&["--all", "--via", &target.command()]);
    assert_eq!(code, 1, "{complaint}");
    assert!(complaint.contains("stays: the target cannot restore it: no room"), "{complaint}");
    assert_runs(&moving.old.pid());
    moving.lab.a.run(assert_unlocked);
    moving.assert_lives_at(Side::A, "old ");
}

fn one_that_fails_does_not_hurt_the_others() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(4);
    // --stdio takes one: the others stay.
    let receive = format!("{SOCCR} receive --netns {} --stdio -- cat", moving.beside.pid());
    let (code, complaint) = moving.try_send(&["--all", "--via", &receive]);
    assert_eq!(code, 3, "{complaint}");
    assert_eq!(complaint.matches("stays: the target refuses it: ").count(), 3, "{complaint}");
    assert_runs(&moving.old.pid());
    let mut moved = 0;
    for client in &mut moving.clients {
        client.write_all(b"more").unwrap();
        // Either host answers; packets go to `a` first, which is silent about what has left it.
    }
    for (index, client) in moving.clients.iter_mut().enumerate() {
        client.set_nonblocking(true).unwrap();
        let mut bytes = [0; 8];
        moving.lab.steer(Side::A).unwrap();
        wait_until("somebody answers", || {
            let answered = client.peek(&mut bytes).is_ok();
            if !answered {
                // The one that has moved.
                moving.lab.steer(Side::B).unwrap();
            }
            answered
        });
        client.set_nonblocking(false).unwrap();
        let first = hear(client, 4);
        if first == "more" {
            moved += 1;
        } else {
            assert_eq!(first + &hear(client, 4), "old more", "connection {index}");
        }
    }
    assert_eq!(moved, 1);
    moving.lab.steer(Side::B).unwrap();
    moving.end();
}

fn what_the_target_refuses_stays() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    // A network where the address does not exist: that of this test.
    let receive = format!("{SOCCR} receive -- true");
    let (code, complaint) = moving.try_send(&["--all", "--via", &receive]);
    assert_eq!(code, 1, "{complaint}");
    assert!(
        complaint.contains("stays: the target refuses it") && complaint.contains("EADDRNOTAVAIL"),
        "{complaint}"
    );
    assert_runs(&moving.old.pid());
    moving.assert_lives_at(Side::A, "old ");
}

/// Characters that turn the direction of text make a terminal show something else than what is said.
fn text_from_elsewhere_does_not_turn() {
    if !installed("python3") {
        return;
    }
    let moving = Move::new(1);
    let reason = "no \u{202e}moor".to_owned();
    let target = Answers::new(&[Message::Refused { connection: 1, reason }]);
    let (code, complaint) = moving.try_send(&["--all", "--via", &target.command()]);
    assert_eq!(code, 1, "{complaint}");
    assert!(complaint.contains("the target refuses it: no ?moor"), "{complaint}");

    let connection = moving.saved();
    let mut image = Writer::new(tempfile::NamedTempFile::new().unwrap()).unwrap();
    image.connection(1, "\u{2066}pid 1 fd 3", &connection).unwrap();
    let image = image.finish().unwrap();
    let shown = succeed(&["inspect", image.path().to_str().unwrap()]);
    let shown = String::from_utf8(shown).unwrap();
    assert!(shown.contains("?pid 1 fd 3") && !shown.contains('\u{2066}'), "{shown}");
}

fn a_target_without_room_for_all_takes_none() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(40);
    // Enough to have them, too few to give them away.
    let receive = format!("ulimit -n 143; {}", moving.receive());
    let (code, complaint) = moving.try_send(&["--all", "--via", &receive]);
    assert_eq!(code, 1, "{complaint}");
    assert!(complaint.contains("144 descriptors for a program: 143 are allowed"), "{complaint}");
    assert_runs(&moving.old.pid());
    moving.assert_lives_at(Side::A, "old ");
    let receive = format!("ulimit -n 144; {}", moving.receive());
    assert_eq!(moving.try_send(&["--all", "--via", &receive]), (0, String::new()));
    moving.assert_lives_at(Side::B, "new ");
    moving.end();
}

fn a_target_that_is_silent_changes_nothing() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    let (code, complaint) = moving.try_send(&["--all", "--timeout", "1", "--via", "cat >/dev/null"]);
    assert_eq!(code, 1, "{complaint}");
    assert!(complaint.contains("stays:"), "{complaint}");
    moving.assert_lives_at(Side::A, "old ");
}

fn a_connection_that_is_taken_late_is_not_lost() {
    if !installed("python3") {
        return;
    }
    let moving = Move::new(1);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("answers");
    let mut answers = Writer::new(std::fs::File::create(&path).unwrap()).unwrap();
    answers.send(&Message::Ready { connection: 1 }).unwrap();
    let ready = std::fs::metadata(&path).unwrap().len();
    answers.send(&Message::Taken { connection: 1 }).unwrap();
    answers.finish().unwrap();
    let path = path.display();
    let target = format!("head -c {ready} {path}; sleep 1.5; tail -c +{} {path}; cat > /dev/null", ready + 1);
    assert_eq!(moving.try_send(&["--all", "--timeout", "1", "--via", &target]), (0, String::new()));
}

/// Closes its connection when that has an error, and goes on.
const CLOSES: &str = r#"
import signal, socket
connection = socket.create_server(("", 7)).accept()[0]
try:
    while data := connection.recv(65536):
        connection.sendall(b"old " + data)
except OSError:
    connection.close()
signal.pause()
"#;

/// A target that says READY, and refuses behind the COMMIT, when its gate is opened.
struct RefusesLate {
    ready: Answers,
    all: Answers,
    gate: Gate,
}

impl RefusesLate {
    fn new() -> Self {
        Self::behind(vec![Message::Ready { connection: 1 }], 1)
    }

    /// It says something else before, and refuses the connection with this number.
    fn behind(mut messages: Vec<Message>, connection: u32) -> Self {
        let ready = Answers::new(&messages);
        messages.push(Message::Refused { connection, reason: "no room".into() });
        Self { ready, all: Answers::new(&messages), gate: Gate::new() }
    }

    fn via(&self) -> String {
        let rest = self.ready.0.as_file().metadata().unwrap().len() + 1;
        let refuses = format!("{}; tail -c +{rest} {}", self.gate.command(), self.all.path());
        format!("cat {}; {refuses}; cat > /dev/null", self.ready.path())
    }
}

/// The process goes on while its connection is in doubt, and has closed its socket when the target refuses that.
fn what_comes_back_to_a_process_that_has_closed_it_is_in_an_image() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut moving = Move::of(&mut python(CLOSES, &[]), Side::B, 1, |_| {});
    moving.directory = directory.path().into();
    let refusing = RefusesLate::new();
    let via = refusing.via();
    let (code, complaints) = std::thread::scope(|scope| {
        let send = scope.spawn(|| moving.try_send(&["--all", "--timeout", "5", "--via", &via]));
        wait_until_closed(&moving.old);
        refusing.gate.open();
        send.join().unwrap()
    });
    assert_eq!(code, 1, "{complaints}");
    assert_is_rescued(&mut moving, &complaints);
}

/// The process goes on without the keeper, too, long before END.
fn what_comes_back_without_a_keeper_is_in_an_image() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut moving = Move::of(&mut python(CLOSES, &[]), Side::B, 1, |_| {});
    moving.directory = directory.path().into();
    let refusing = RefusesLate::new();
    let via = refusing.via();
    let said = Said::new();
    let mut send = moving.send(&["--all", "--via", &via]);
    let mut send = Program::start(send.stderr(said.output()));
    wait_until("it has left", || {
        json(&["list", "--json", "--netns", &moving.old.pid()])
            .iter()
            .all(|socket| socket["state"] != "ESTABLISHED")
    });
    kill_process(Pid::from_raw(keeper(send.0.id()) as i32).unwrap(), Signal::KILL).unwrap();
    wait_until_closed(&moving.old);
    refusing.gate.open();
    assert_eq!(send.0.wait().unwrap().code(), Some(1), "{}", said.read());
    assert_is_rescued(&mut moving, &said.read());
}

/// Closes its first and its third connection when they have an error, and keeps the second in any case.
const KEEPS_THE_SECOND: &str = r#"
import signal, socket, threading
listener = socket.create_server(("", 7))
def serve(connection, number):
    try:
        while data := connection.recv(65536):
            connection.sendall(b"old " + data)
    except OSError:
        if number == 1:
            threading.Event().wait()
    connection.close()
for number in range(3):
    threading.Thread(target=serve, args=[listener.accept()[0], number], daemon=True).start()
listener.close()
signal.pause()
"#;

/// The first of three connections ends when the keeper has been started and before anything is locked. The third comes back to a process
/// that has closed its socket, but still has that of the second. If it cannot be saved either, it is lost.
fn the_keeper_is_asked_about_the_right_socket() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for (place, code, fate) in [(directory.path(), 3, "saved in"), ("/proc".as_ref(), 4, "it is lost")] {
        let mut moving = Move::of(&mut python(KEEPS_THE_SECOND, &[]), Side::B, 3, |_| {});
        moving.directory = place.into();
        let [ready, second] = [1, 2].map(|connection| Message::Ready { connection });
        let refusing = RefusesLate::behind(vec![ready, second, Message::Taken { connection: 1 }], 2);
        let mut send = moving.send(&["--all", "--timeout", "3", "--via", &refusing.via()]);
        let said = Said::new();
        send.env("TMPDIR", place).stderr(said.output());
        let mut first = Some(moving.clients.remove(0));
        let old = &moving.old;
        let status = std::thread::scope(|scope| {
            scope.spawn(|| {
                wait_until("it has closed two", || sockets(old) == 1);
                refusing.gate.open();
            });
            // The pipe to the target is the first that is made larger.
            run_and_watch(&mut send, |call| {
                let enlarges =
                    call.number == libc::SYS_fcntl && call.arguments[1] == libc::F_SETPIPE_SZ as u64;
                if let (true, Some(client)) = (enlarges, &first) {
                    set_socket_linger(client, Some(Duration::ZERO)).unwrap();
                    first = None;
                    wait_until("it has ended", || sockets(old) == 2);
                }
            })
        });
        let said = said.read();
        assert_eq!(status, Some(code), "{said}");
        assert!(said.contains("its process has lost it") && said.contains(fate), "{said}");
    }
    assert_eq!(crate::rescue::all_rescued(directory.path()).count(), 1);
}

/// Like a terminal after Ctrl-S.
fn nobody_stands_still_for_a_reader_who_does_not_read() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    // More than a pipe holds.
    let note = Message::Note { text: "x".repeat(2000), failed: false };
    let answers = Answers::new(&vec![note; 100]);
    let mut send = moving.send(&["--all", "--timeout", "2", "--via", &answers.command()]);
    let mut send = Program::start(send.stderr(Stdio::piped()));
    let status = format!("/proc/{}/status", moving.old.pid());
    let traced = || !std::fs::read_to_string(&status).unwrap().contains("TracerPid:\t0\n");
    wait_until("it stands still, or is done", || traced() || send.0.try_wait().unwrap().is_some());
    assert_eq!(ask(&mut moving.clients[0], "more", "old "), "old more");
    let mut complaints = String::new();
    send.0.stderr.take().unwrap().read_to_string(&mut complaints).unwrap();
    assert_eq!(send.0.wait().unwrap().code(), Some(1));
    assert_eq!(complaints.matches(&"x".repeat(2000)).count(), 100);
}

/// How many sockets a process has.
fn sockets(process: &Program) -> usize {
    let is_socket = |fd: &std::io::Result<std::fs::DirEntry>| {
        let target = fd.as_ref().map(|fd| std::fs::read_link(fd.path()));
        target.is_ok_and(|target| target.is_ok_and(|target| target.to_string_lossy().starts_with("socket:")))
    };
    std::fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap().filter(is_socket).count()
}

fn wait_until_closed(process: &Program) {
    wait_until("the process has closed it", || sockets(process) == 0);
}

fn assert_is_rescued(moving: &mut Move, complaints: &str) {
    let why = "its process has lost it: the target cannot restore it: no room";
    assert!(complaints.contains(why) && !complaints.contains("stays"), "{complaints}");
    let image = complaints.split("saved in ").nth(1).and_then(|text| text.split(": see").next()).unwrap();
    let restore = ["restore", image, "--netns", &moving.old.pid(), "--", "python3", "-c", HEIR, "new "];
    let heir = Program::start(&mut soccr(&restore));
    moving.assert_lives_at(Side::A, "new ");
    drop(heir);
}
