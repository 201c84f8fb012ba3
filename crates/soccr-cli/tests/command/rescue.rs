//! What goes wrong when a connection is given to a program, and sockets that somebody has left paused.

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process};
use soccr::Connection;
use soccr_image::stream::{Message, Writer};
use soccr_lab::{Lab, Pair, Side, State, TcpInfo, let_fail, run_and_watch, wait_until};

use crate::programs::{
    HEIR, Program, SOCCR, ask, assert_unlocked, connect, descriptors, fail, hear, installed, json, python,
    receive, server, soccr, succeed,
};
use crate::transfer::Move;

crate::tests![
    a_restored_connection_is_rescued_from_a_program_that_cannot_start,
    the_descriptors_of_the_program_do_not_limit_the_rescue,
    an_image_whose_new_name_may_not_last_is_set_aside,
    a_restored_connection_is_rescued_from_a_dead_recipient,
    a_restored_connection_is_rescued_from_a_recipient_that_does_not_read,
    a_recipient_may_be_late,
    what_does_not_come_to_life_stays_in_its_image,
    a_received_connection_is_rescued_from_a_program_that_cannot_start,
    what_a_stuck_recipient_has_read_is_its_own_and_the_rest_is_rescued,
    a_lost_connection_is_no_success_of_the_others,
    a_file_that_grows_too_large_costs_no_other_connection,
    a_target_that_dies_while_it_rescues_has_not_given,
    the_source_tells_what_the_target_could_not_give_away,
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
    all_rescued(directory).next()
}

pub fn all_rescued(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    names.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("soccr-rescued-"))
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
    let aside = format!("{image}.consumed");
    assert!(complaint.contains(&aside), "{complaint}");
    assert!(
        fs::exists(&aside).unwrap() && !fs::exists(&image).unwrap(),
        "the old image still looks as if it counted"
    );
    assert_restores(directory, &mut client);
}

/// The program would get a limit that the command itself has exceeded by far.
fn the_descriptors_of_the_program_do_not_limit_the_rescue() {
    const CONNECTIONS: u16 = 8;
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let [_, hidden] = broken_programs(directory);
    let pair = Pair::new().unwrap();
    let mut connection = model(&pair);
    let image = directory.join("image");
    let mut writer = Writer::new(fs::File::create(&image).unwrap()).unwrap();
    for port in 1024..1024 + CONNECTIONS {
        connection.remote = nobody(port);
        writer.connection(u32::from(port), "", &connection).unwrap();
    }
    writer.finish().unwrap();
    let mut restore = Command::new("sh");
    let script = format!("ulimit -Sn 16; exec {SOCCR} restore image -- {hidden}");
    restore.args(["-c", &script]).current_dir(directory);
    let output = pair.a.run(|| restore.output()).unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(126), "{complaint}");
    assert_eq!(all_rescued(directory).count(), usize::from(CONNECTIONS), "{complaint}");
}

fn an_image_whose_new_name_may_not_last_is_set_aside() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let [_, hidden] = broken_programs(directory);
    let (first, client) = saved(directory);
    let restore = |image: &str| {
        let mut restore = soccr(&["restore", image, "--", &hidden]);
        restore.current_dir(directory);
        restore
    };
    let mut image = first;
    let mut synced = Vec::new();
    run_and_watch(restore(&image).stderr(Stdio::null()), |call| {
        if call.number == libc::SYS_fsync {
            synced.push(call.arguments[0] as u32);
        }
    });
    let aside = synced.pop().unwrap();
    assert!(!synced.contains(&aside), "{aside} {synced:?}");
    // Not every filesystem can make a name durable.
    for (errno, is_told) in [(libc::EIO, true), (libc::EINVAL, false)] {
        image = all_rescued(directory)
            .find(|path| path.extension().unwrap() == "soccr")
            .unwrap()
            .to_str()
            .unwrap()
            .into();
        let mut failing = restore(&image);
        let_fail(&mut failing, libc::SYS_fsync, aside, errno);
        let output = failing.output().unwrap();
        let complaint = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(126), "{complaint}");
        assert!(complaint.contains(&format!("{image}.consumed now")), "{complaint}");
        assert_eq!(complaint.contains("may not survive"), is_told, "{complaint}");
        assert!(!complaint.contains("cannot be renamed"), "{complaint}");
    }
    drop(client);
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

/// A connection on its way to a socket that nobody has accepted: the kernel has taken the message, or is about to.
struct Waiting {
    restore: Program,
    listener: UnixListener,
    client: TcpStream,
}

fn waiting(directory: &Path) -> Waiting {
    let (image, client) = saved(directory);
    let socket = directory.join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut restore = soccr(&["restore", &image, "--send-fd", socket.to_str().unwrap()]);
    let restore = Program::start(restore.current_dir(directory).stderr(Stdio::piped()));
    let pid = restore.pid();
    wait_until("it is restored", || {
        json(&["list", "--json", "--pid", &pid]).iter().any(|socket| socket["savable"] == true)
    });
    Waiting { restore, listener, client }
}

fn a_restored_connection_is_rescued_from_a_recipient_that_does_not_read() {
    if !installed("python3") {
        return;
    }
    for goes in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let Waiting { mut restore, listener, mut client } = waiting(directory.path());
        let listener = (!goes).then_some(listener);
        let mut complaint = String::new();
        restore.0.stderr.take().unwrap().read_to_string(&mut complaint).unwrap();
        assert_eq!(restore.0.wait().unwrap().code(), Some(1), "{complaint}");
        assert!(complaint.contains("no connection is lost"), "{complaint}");
        if let Some(listener) = listener {
            assert!(complaint.contains("has not read what was sent"), "{complaint}");
            // What it reads too late is no connection.
            let late = receive(&listener.accept().unwrap().0).1.remove(0);
            assert_eq!(TcpInfo::of(&late).unwrap().state, State::Close);
        }
        assert_restores(directory.path(), &mut client);
    }
}

fn a_recipient_may_be_late() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let Waiting { mut restore, listener, mut client } = waiting(directory.path());
    assert!(restore.0.try_wait().unwrap().is_none(), "it has ended before anybody has read");
    let mut given = receive(&listener.accept().unwrap().0).1.remove(0);
    assert_eq!(restore.0.wait().unwrap().code(), Some(0));
    given.write_all(b"alive").unwrap();
    assert_eq!(hear(&mut client, 5), "alive");
    assert_eq!(rescued(directory.path()), None);
}

fn what_does_not_come_to_life_stays_in_its_image() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let [_, hidden] = broken_programs(directory);
    let (image, mut client) = saved(directory);
    let connection = soccr_image::load_file(&image).unwrap();
    let mut unreachable = connection.clone();
    unreachable.control.state = soccr::connection::State::SynSent;
    unreachable.local.set_port(1024);
    unreachable.remote = "198.51.100.9:9".parse().unwrap();
    let write = |connections: &[&Connection]| {
        let mut writer = Writer::new(fs::File::create(&image).unwrap()).unwrap();
        for connection in connections {
            writer.connection(1, "", connection).unwrap();
        }
        writer.finish().unwrap();
    };
    write(&[&unreachable]);
    assert!(fail(1, &["restore", &image, "--", "true"]).contains("ENETUNREACH"));
    write(&[&unreachable, &connection]);
    // It is the only one of the first, although the second is in a newer one.
    let output = soccr(&["restore", &image, "--", &hidden]).current_dir(directory).output().unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(complaint.contains("ENETUNREACH") && complaint.contains("saved in"), "{complaint}");
    assert!(fs::exists(&image).unwrap());
    fs::remove_file(rescued(directory).unwrap()).unwrap();
    let socket = directory.join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut restore = soccr(&["restore", &image, "--send-fd", socket.to_str().unwrap()]);
    let mut restore = Program::start(restore.stderr(Stdio::piped()));
    let mut given = receive(&listener.accept().unwrap().0).1.remove(0);
    assert_eq!(restore.0.wait().unwrap().code(), Some(3));
    given.write_all(b"alive").unwrap();
    client.set_nonblocking(false).unwrap();
    assert_eq!(hear(&mut client, 5), "alive");
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
    // It has left, and the program has not started.
    assert_eq!(code, 3, "{complaint}");
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

/// As many descriptors as the command sends at once.
const BATCH: usize = 253;

/// A connection of the first host, which has ended.
fn model(pair: &Pair) -> Connection {
    let server = pair.b.run(|| TcpListener::bind((pair.b.v6, 7))).unwrap();
    let ours = pair.a.run(|| TcpStream::connect((pair.b.v6, 7))).unwrap();
    let model = soccr::pause(&ours).unwrap().save().unwrap();
    drop(server);
    model
}

/// A peer that is not there.
fn nobody(port: u16) -> SocketAddr {
    SocketAddr::new("2001:db8::aaaa:bbbb:cccc:dddd".parse().unwrap(), port)
}

/// A stream of connections to peers that are not there, each with another port, and already let go of.
fn stream_to_nobody(model: &Connection, ports: impl ExactSizeIterator<Item = u16>) -> Vec<u8> {
    const WINDOW: usize = 256;
    let mut stream = Writer::new(Vec::new()).unwrap();
    let begin = Message::Begin {
        connections: ports.len() as u32,
        answers: false,
        notes: false,
        place: None,
        steered: None,
    };
    stream.send(&begin).unwrap();
    let mut connection = model.clone();
    let numbered: Vec<_> = (1..).zip(ports).collect();
    for window in numbered.chunks(WINDOW) {
        for (number, port) in window {
            connection.remote = nobody(*port);
            stream.connection(*number, "", &connection).unwrap();
        }
        for (number, _) in window {
            stream.send(&Message::Commit { connection: *number }).unwrap();
        }
    }
    stream.finish().unwrap()
}

/// The ports of the connections in the next message, which all live.
fn receive_batch(socket: &UnixStream) -> Vec<u16> {
    let (_, connections) = receive(socket);
    connections
        .iter()
        .map(|connection| {
            assert_eq!(TcpInfo::of(connection).unwrap().state, State::Established);
            connection.peer_addr().unwrap().port()
        })
        .collect()
}

fn what_a_stuck_recipient_has_read_is_its_own_and_the_rest_is_rescued() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let path = directory.join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    // One message is read, one is sent, and one is not.
    let ports = 1024..1024 + 3 * BATCH as u16;
    if getrlimit(Resource::Nofile).maximum.is_some_and(|limit| limit < 3 * ports.len() as u64) {
        soccr_lab::skip(format_args!("{} descriptors in one process", 3 * ports.len()));
        return;
    }
    let pair = Pair::new().unwrap();
    let model = model(&pair);
    let image = directory.join("stream");
    fs::write(&image, stream_to_nobody(&model, ports.clone())).unwrap();
    let mut command: Command = soccr(&["receive", "--send-fd", path.to_str().unwrap()]);
    command.current_dir(directory).stdin(fs::File::open(image).unwrap()).stderr(Stdio::null());
    let mut command = pair.a.run(|| Program::start(&mut command));
    let recipient = listener.accept().unwrap().0;
    let given = receive_batch(&recipient);
    wait_until("the next are sent", || rustix::io::ioctl_fionread(&recipient).unwrap() > 0);
    // It is deaf to this: it alone has the connections.
    kill_process(Pid::from_child(&command.0), Signal::TERM).unwrap();
    wait_until("it does not wait any longer", || command.0.try_wait().unwrap().is_some());
    assert_eq!(command.0.wait().unwrap().code(), Some(1));
    let (_, late) = receive(&recipient);
    assert!(late.iter().all(|socket| TcpInfo::of(socket).unwrap().state == State::Close));
    assert_eq!((given.len(), late.len()), (BATCH, BATCH));
    let mut seen: HashSet<u16> = given.into_iter().collect();
    for image in all_rescued(directory) {
        let port = soccr_image::load_file(image).unwrap().remote.port();
        assert!(seen.insert(port), "port {port} was given, and rescued as well");
    }
    assert_eq!(seen.len(), ports.len());
}

fn a_lost_connection_is_no_success_of_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let pair = Pair::new().unwrap();
    let image = directory.path().join("stream");
    // There cannot be two with the same addresses.
    fs::write(&image, stream_to_nobody(&model(&pair), [1024, 1024].into_iter())).unwrap();
    let mut command: Command = soccr(&["receive", "--send-fd", path.to_str().unwrap()]);
    command.stdin(fs::File::open(image).unwrap()).stderr(Stdio::piped());
    let mut command = pair.a.run(|| Program::start(&mut command));
    assert_eq!(receive_batch(&listener.accept().unwrap().0), [1024]);
    let mut complaint = String::new();
    command.0.stderr.take().unwrap().read_to_string(&mut complaint).unwrap();
    assert!(complaint.contains("connection 2: lost: "), "{complaint}");
    assert_eq!(command.0.wait().unwrap().code(), Some(3), "{complaint}");
}

/// A server that reads no more than the first words.
const UNREAD: &str = r#"
import signal, socket
listener = socket.create_server(("", 7))
connections = [listener.accept()[0] for _ in range(2)]
for connection in connections:
    connection.sendall(b"old " + connection.recv(3))
signal.pause()
"#;

/// By default SIGXFSZ would end the target with all connections.
fn a_file_that_grows_too_large_costs_no_other_connection() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [_, hidden] = broken_programs(directory.path());
    let lab = Lab::new().unwrap();
    let old = lab.a.run(|| Program::start(&mut python(UNREAD, &[])));
    let mut clients = [(); 2].map(|()| lab.peer.run(|| connect((lab.a.v4, 7))));
    for client in &mut clients {
        assert_eq!(ask(client, "one", "old "), "old one");
    }
    clients[0].write_all(&[7; 100_000]).unwrap();
    let beside = lab.b.run(|| Program::start(Command::new("sleep").arg("1000")));
    let via = format!(
        "cd {}; export TMPDIR=.; ulimit -f 20; exec {SOCCR} receive --netns {} -- {hidden}",
        directory.path().display(),
        beside.pid()
    );
    let output = soccr(&["send", "--pid", &old.pid(), "--all", "--via", &via]).output().unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{complaint}");
    assert!(complaint.contains("File too large"), "{complaint}");
    assert!(complaint.contains("1 of 2 connections are lost"), "{complaint}");
    assert_eq!(all_rescued(directory.path()).count(), 1);
    assert_open(&mut clients[1]);
}

/// It cannot say any more that it has failed.
fn a_target_that_dies_while_it_rescues_has_not_given() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [_, hidden] = broken_programs(directory.path());
    let pid = directory.path().join("pid");
    let moving = Move::new(100);
    let via = format!(
        "cd {}; echo $$ > pid; exec {SOCCR} receive --netns {} -- {hidden}",
        directory.path().display(),
        moving.beside.pid()
    );
    let (code, complaint) = std::thread::scope(|scope| {
        let send = scope.spawn(|| moving.try_send(&["--all", "--via", &via]));
        wait_until("it has begun", || rescued(directory.path()).is_some());
        let starter: i32 = fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        // Unless it was faster, and has said that it has failed.
        let list = fs::read_to_string(format!("/proc/{starter}/task/{starter}/children")).unwrap_or_default();
        if let Some(target) = list.split_whitespace().next() {
            let _ = kill_process(Pid::from_raw(target.parse().unwrap()).unwrap(), Signal::KILL);
        }
        send.join().unwrap()
    });
    assert_eq!(code, 3, "{complaint}");
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

/// The target is behind a relay, which passes on neither standard error nor how it has ended.
fn the_source_tells_what_the_target_could_not_give_away() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut moving = Move::new(1);
    let [socket, gone] = ["socket", "gone"].map(|name| directory.join(name));
    let listener = UnixListener::bind(&socket).unwrap();
    let via = format!(
        "cd {}; {{ until [ -e {} ]; do sleep 0.01; done; cat; }} | env -u SOCCR_LIFELINE {SOCCR} receive --netns {} --send-fd {} \
         2>/dev/null | cat",
        directory.display(),
        gone.display(),
        moving.beside.pid(),
        socket.display()
    );
    let recipient = std::thread::spawn(move || {
        drop(listener.accept().unwrap());
        fs::write(gone, "").unwrap();
    });
    let (code, complaint) = moving.try_send(&["--all", "--via", &via]);
    recipient.join().unwrap();
    assert_eq!(code, 3, "{complaint}");
    assert_eq!(complaint.matches("soccr-rescued").count(), 1, "{complaint}");
    assert_eq!(complaint.matches("no connection is lost").count(), 1, "{complaint}");
    moving.lab.steer(Side::B).unwrap();
    assert_open(&mut moving.clients[0]);
    assert!(rescued(directory).is_some());
}

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
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image").display().to_string();
    assert!(fail(1, &["save", "--pid", &pid, "--fd", &fd, "-o", &image]).contains("`soccr resume`"));
    succeed(&["resume", "--pid", &pid, "--fd", &fd]);
    assert!(fail(1, &["resume", "--pid", &pid, "--fd", &fd]).contains("it is not paused"));
    assert_eq!(descriptors(&pid), [fd]);
    program.0.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert_eq!(ask(&mut client, "one", "again "), "again one");
}
