//! `--connect`: connections are relayed to a server that cannot have them.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};

use soccr_lab::{Side, wait_until};

use crate::programs::{Program, SOCCR, ask, installed, python};
use crate::transfer::Move;

crate::tests![
    clients_talk_to_a_server_that_never_had_their_connections,
    a_reset_is_passed_on_in_both_directions,
    where_no_server_listens_they_stay,
];

/// A server that knows the PROXY protocol, on port 9: it says back what it hears, and at the end whose connection that was. What
/// begins with "reset" it answers with a reset; it prints what becomes of each connection.
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
    rustix::net::sockopt::set_socket_linger(&client, Some(std::time::Duration::ZERO)).unwrap();
    drop(client);
    assert_eq!(says(&mut server), "ConnectionResetError\n");
    moving.end();
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
