//! `--connect`: connections are relayed to a server that cannot have them.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use rustix::net::{RecvFlags, SendFlags, recv, send, sockopt};
use rustix::process::Pid;
use soccr::connection::State::{CloseWait, SynSent};
use soccr::diag::Diag;
use soccr::settings::Value;
use soccr_handover::foreign::Process;
use soccr_lab::{Side, State, TcpInfo, option, wait_until};

use crate::programs::{
    Program, SOCCR, Said, accept, ask, connect, descriptors, hear, installed, python, soccr,
};
use crate::transfer::Move;

crate::tests![
    clients_talk_to_a_server_that_never_had_their_connections,
    a_reset_is_passed_on_in_both_directions,
    urgent_bytes_hold_nothing_up,
    an_urgent_byte_that_nobody_has_read_moves_along,
    among_urgent_bytes_everything_keeps_its_place,
    what_the_old_program_has_set_for_itself_does_not_disturb,
    where_no_server_listens_they_stay,
    what_no_server_accepts_is_in_an_image_that_the_source_names,
    what_the_source_no_longer_hears_the_target_tells,
];

/// A server that knows the PROXY protocol, on port 9: it says back what it hears, and at the end whose connection that was. What
/// begins with "reset" it answers with a reset, what begins with "urgent" with an urgent byte in front; it prints what becomes of each connection.
const RELAYED: &str = r#"
import os, socket, struct, threading
listener = socket.create_server(("127.0.0.1", 9), backlog=64)
print("listens", flush=True)
def serve(connection):
    header = b""
    while not header.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            return
        header += byte
    try:
        while data := connection.recv(65536):
            if data.startswith(b"reset"):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
                return
            if data.startswith(b"urgent"):
                connection.send(b"?", socket.MSG_OOB)
            connection.sendall(data)
        connection.sendall(header)
        connection.close()
        os.write(1, b"end\n")
    except OSError as error:
        os.write(1, type(error).__name__.encode() + b"\n")
while True:
    threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()
"#;

/// Moves connections to host `b`, into a relay to a server there.
fn relayed(connections: usize) -> (Move, Program) {
    let moving = Move::new(connections);
    let mut server = moving.lab.b.run(|| Program::start(&mut python(RELAYED, &[])));
    assert_eq!(says(&mut server), "listens\n");
    assert_eq!(moving.try_send(&["--all", "--via", &receive(&moving)]), (0, String::new()));
    moving.lab.steer(Side::B).unwrap();
    (moving, server)
}

fn receive(moving: &Move) -> String {
    let pid = moving.beside.pid();
    format!("{SOCCR} receive --netns {pid} --connect 127.0.0.1:9 --proxy-protocol 1")
}

fn says(program: &mut Program) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        program.0.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn clients_talk_to_a_server_that_never_had_their_connections() {
    if !installed("python3") {
        return;
    }
    let (mut moving, mut server) = relayed(20);
    for client in &mut moving.clients {
        assert_eq!(ask(client, "more", ""), "more");
    }
    // One writes until nothing fits anywhere any more, and then reads.
    let mut sent: Vec<u8> = Vec::new();
    let mut client = &moving.clients[0];
    client.set_nonblocking(true).unwrap();
    let mut quiet = 0;
    wait_until("everything is full", || {
        let piece: Vec<u8> = (sent.len()..sent.len() + 65_536).map(|at| (at * 7 / 3) as u8).collect();
        match client.write(&piece) {
            Ok(written) => {
                sent.extend(&piece[..written]);
                quiet = 0;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                quiet += 1;
            }
        }
        quiet > 20
    });
    // The others are not held up.
    assert_eq!(ask(&mut moving.clients[1].try_clone().unwrap(), "and", ""), "and");
    client.set_nonblocking(false).unwrap();
    let mut heard = vec![0; sent.len()];
    client.read_exact(&mut heard).unwrap();
    assert!(heard == sent, "{} bytes came back changed", sent.len());
    // The end of one direction leaves the other open: the server says whose connection it was.
    for client in &moving.clients {
        let [source, destination] = [client.local_addr().unwrap(), client.peer_addr().unwrap()];
        client.shutdown(Shutdown::Write).unwrap();
        let mut rest = String::new();
        { client }.read_to_string(&mut rest).unwrap();
        let addresses = format!("{} {}", source.ip(), destination.ip());
        assert_eq!(rest, format!("PROXY TCP4 {addresses} {} {}\r\n", source.port(), destination.port()));
        assert_eq!(says(&mut server), "end\n");
    }
    moving.end();
}

fn a_reset_is_passed_on_in_both_directions() {
    if !installed("python3") {
        return;
    }
    let (mut moving, mut server) = relayed(2);
    // The one from the server, the other from the client.
    let client = &mut moving.clients[0];
    assert_eq!(ask(client, "more", ""), "more");
    client.write_all(b"reset").unwrap();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let mut client: TcpStream = moving.clients.pop().unwrap();
    assert_eq!(ask(&mut client, "more", ""), "more");
    sockopt::set_socket_linger(&client, Some(std::time::Duration::ZERO)).unwrap();
    drop(client);
    assert_eq!(says(&mut server), "ConnectionResetError\n");
    moving.end();
}

/// The byte that came out of band, as soon as it is here.
fn urgent(stream: &TcpStream) -> u8 {
    let mut byte = [0];
    wait_until("the urgent byte is here", || recv(stream, &mut byte, RecvFlags::OOB).is_ok());
    byte[0]
}

fn urgent_bytes_hold_nothing_up() {
    if !installed("python3") {
        return;
    }
    let (mut moving, mut server) = relayed(1);
    let client = &mut moving.clients[0];
    for round in 0..3 {
        send(&*client, b"!", SendFlags::OOB).unwrap();
        assert_eq!(ask(client, "more", ""), "more", "{round}");
        client.write_all(b"urgent").unwrap();
        assert_eq!(urgent(client), b'?');
        assert_eq!(hear(client, 6), "urgent", "{round}");
    }
    // Nothing else comes behind it.
    send(&*client, b"!", SendFlags::OOB).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert!(rest.starts_with("PROXY TCP4 "), "{rest}");
    assert_eq!(says(&mut server), "end\n");
    moving.end();
}

/// A connection that is relayed out of an image: its peer, the relay, and the end that the server has. Before it was saved, its peer
/// has said this, which has brought it into this state. `None` where the kernel cannot read what is unread.
fn restored(say: impl FnOnce(&mut TcpStream), state: State) -> Option<(TcpStream, Program, TcpStream)> {
    restored_with(&[], say, state)
}

/// With socket options of the old program.
fn restored_with(
    settings: &[(&str, Value)],
    say: impl FnOnce(&mut TcpStream),
    state: State,
) -> Option<(TcpStream, Program, TcpStream)> {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let listener = TcpListener::bind("127.0.0.1:7").unwrap();
    let mut client = connect(([127, 0, 0, 1], 7));
    let ours = accept(&listener);
    drop(listener);
    say(&mut client);
    wait_until("all is there", || TcpInfo::of(&ours).unwrap().state == state);
    let paused = soccr::pause(&ours).unwrap();
    match paused.save() {
        Ok(mut connection) => {
            settings.iter().for_each(|(name, value)| connection.settings.set(name, value.clone()));
            soccr_image::save_file(&image, &connection).unwrap();
        }
        Err(error) if error.what() == "urgent data behind other unread bytes" => {
            soccr_lab::skip(error);
            return None;
        }
        Err(error) => panic!("{error}"),
    }
    paused.detach().unwrap();
    let server = TcpListener::bind("127.0.0.1:9").unwrap();
    let mut relay = soccr(&["restore", image.to_str().unwrap(), "--connect", "127.0.0.1:9"]);
    let relay = Program::start(relay.current_dir(directory.path()));
    // The first only asks whether the server is there.
    drop(accept(&server));
    Some((client, relay, accept(&server)))
}

fn an_urgent_byte_that_nobody_has_read_moves_along() {
    let say = |client: &mut TcpStream| {
        client.write_all(b"before").unwrap();
        send(&*client, b"!", SendFlags::OOB).unwrap();
        client.write_all(b"behind").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        // While the connection is nowhere, the host would answer what is sent again with a reset.
        wait_until("all is acknowledged", || TcpInfo::of(&*client).unwrap().state == State::FinWait2);
    };
    let Some((mut client, mut relay, mut stream)) = restored(say, State::CloseWait) else { return };
    assert_eq!(hear(&mut stream, 6), "before");
    assert_eq!(urgent(&stream), b'!');
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "behind");
    send(&stream, b"?", SendFlags::OOB).unwrap();
    stream.write_all(b"answer").unwrap();
    drop(stream);
    assert_eq!(urgent(&client), b'?');
    client.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "behindanswer");
    assert!(relay.0.wait().unwrap().success());
}

fn among_urgent_bytes_everything_keeps_its_place() {
    const PIECES: usize = 200;
    let (client, mut relay, mut stream) = restored(|_| {}, State::Established).unwrap();
    // Urgent bytes are read where they are.
    sockopt::set_socket_oobinline(&stream, true).unwrap();
    let piece = |number: usize| vec![number as u8; 40_000];
    let writing = std::thread::spawn(move || {
        for number in 0..PIECES {
            { &client }.write_all(&piece(number)).unwrap();
            send(&client, b"!", SendFlags::OOB).unwrap();
        }
        client
    });
    // Nothing fits anywhere any more.
    let mut before = 0;
    wait_until("the way is full", || {
        let now = rustix::io::ioctl_fionread(&stream).unwrap();
        let is_full = now > 0 && now == before;
        before = now;
        is_full
    });
    for number in 0..PIECES {
        let mut heard = vec![0; 40_001];
        stream.read_exact(&mut heard).unwrap();
        assert!(heard == [piece(number), b"!".to_vec()].concat(), "piece {number}");
    }
    drop(writing.join().unwrap());
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    drop(stream);
    assert!(relay.0.wait().unwrap().success());
}

fn what_the_old_program_has_set_for_itself_does_not_disturb() {
    let bytes = |numbers: [i32; 2]| Value::Bytes(numbers.map(i32::to_ne_bytes).concat());
    // Each byte that is sent makes two notices.
    const NOTICES: i32 = 1 << 1 | 1 << 4 | 1 << 8;
    let settings = [
        ("SO_RCVLOWAT", Value::Number(1000)),
        ("SO_LINGER", bytes([1, 0])),
        ("SO_TIMESTAMPING", bytes([NOTICES, 0])),
        ("IP_RECVERR", Value::Number(1)),
        ("TCP_CORK", Value::Number(1)),
    ];
    let (mut client, mut relay, mut stream) = restored_with(&settings, |_| {}, State::Established).unwrap();
    client.write_all(b"few").unwrap();
    assert_eq!(hear(&mut stream, 3), "few");
    let process = Process::open(Pid::from_raw(relay.0.id() as i32).unwrap()).unwrap();
    let ours = descriptors(&relay.pid())
        .into_iter()
        .filter_map(|number| process.duplicate(number.parse().ok()?).ok())
        .find(|fd| soccr::Flow::of(fd).is_ok_and(|flow| flow.local == client.peer_addr().unwrap()))
        .unwrap();
    // Not only how long it takes tells.
    assert_eq!(sockopt::socket_linger(&ours).unwrap(), None);
    assert!(sockopt::tcp_nodelay(&ours).unwrap() && !sockopt::tcp_cork(&ours).unwrap());
    let mut number = [0; 4];
    option(&ours, libc::IPPROTO_IP, libc::IP_RECVERR, &mut number).unwrap();
    assert_eq!(i32::from_ne_bytes(number), 0);
    drop((ours, process));
    for _ in 0..2000 {
        stream.write_all(b"!").unwrap();
        assert_eq!(hear(&mut client, 1), "!");
    }
    // There is room for more than a few bytes.
    let long = vec![b'?'; 1 << 20];
    let mut heard = vec![0; long.len()];
    std::thread::scope(|scope| {
        scope.spawn(|| { &client }.write_all(&long).unwrap());
        stream.read_exact(&mut heard).unwrap();
    });
    assert!(heard == long, "other bytes than were sent");
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    stream.write_all(&long).unwrap();
    drop(stream);
    assert!(relay.0.wait().unwrap().success());
    heard.clear();
    client.read_to_end(&mut heard).unwrap();
    assert!(heard == long, "{} bytes are missing", long.len() - heard.len());
}

fn where_no_server_listens_they_stay() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    let (code, complaints) = moving.try_send(&["--all", "--via", &receive(&moving)]);
    assert_eq!(code, 1, "{complaints}");
    assert!(complaints.contains("--connect 127.0.0.1:9"), "{complaints}");
    moving.assert_lives_at(Side::A, "old ");
}

/// A server on port 9 that is there and accepts nothing: what asks whether it is there fills its queue.
const FULL: &str = r#"
import signal, socket
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", 9))
listener.listen(0)
print("listens", flush=True)
signal.pause()
"#;

/// Moves a connection to host `b`, whose server accepts nothing.
fn full(directory: &tempfile::TempDir) -> (Move, Program) {
    let mut moving = Move::new(1);
    moving.directory = directory.path().into();
    let mut server = moving.lab.b.run(|| Program::start(&mut python(FULL, &[])));
    assert_eq!(says(&mut server), "listens\n");
    (moving, server)
}

/// The target gives up much later than an answer may take.
fn what_no_server_accepts_is_in_an_image_that_the_source_names() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (moving, _server) = full(&directory);
    let (code, complaints) = moving.try_send(&["--all", "--timeout", "1", "--via", &receive(&moving)]);
    assert_eq!(code, 3, "{complaints}");
    let saved = complaints.split("saved in ").nth(1).and_then(|text| text.split(": see").next());
    assert!(std::fs::exists(saved.unwrap()).unwrap(), "{complaints}");
    assert!(complaints.contains("no connection is lost"), "{complaints}");
}

fn what_the_source_no_longer_hears_the_target_tells() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (moving, _server) = full(&directory);
    let said = Said::new();
    let mut send = moving.send(&["--all", "--via", &receive(&moving)]);
    let mut source = send.stderr(said.output()).spawn().unwrap();
    let has = |state: soccr::connection::State| {
        let mut has = false;
        moving.lab.b.run(|| Diag::open().unwrap().visit(|socket| has |= socket.state == state).unwrap());
        has
    };
    // What asked before is on its way for a moment, too, and there is nothing to tell yet.
    wait_until("the target has asked whether the server is there", || has(CloseWait));
    wait_until("the target asks the server to accept it", || has(SynSent));
    source.kill().unwrap();
    source.wait().unwrap();
    let mut told = String::new();
    wait_until("the target tells it", || {
        told = said.read();
        told.contains("no connection is lost")
    });
    let saved = told.split("saved in ").nth(1).and_then(|text| text.split(": see").next());
    assert!(std::fs::exists(saved.unwrap()).unwrap(), "{told}");
}
