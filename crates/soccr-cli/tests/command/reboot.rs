//! All connections of a process in one file, while their host starts again.

use std::io::Write;
use std::net::TcpStream;
use std::process::Stdio;

use soccr_lab::Pair;

use crate::programs::{
    HEIR, Program, ask, assert_unlocked, connect, fail, hear, installed, json, python, server, soccr, succeed,
};

crate::tests![
    all_connections_survive_it,
    what_cannot_be_saved_stays_where_it_is,
    an_image_of_many_needs_a_program
];

fn clients(pair: &Pair, count: usize) -> Vec<TcpStream> {
    let clients: Vec<_> = (0..count).map(|_| pair.a.run(|| connect((pair.b.v4, 7)))).collect();
    for mut client in &clients {
        assert_eq!(ask(&mut client.try_clone().unwrap(), "one", "old "), "old one");
        client.flush().unwrap();
    }
    clients
}

fn all_connections_survive_it() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let image = image.to_str().unwrap();
    let pair = Pair::new().unwrap();
    let old = pair.b.run(|| server("old ", 5));
    let mut clients = clients(&pair, 5);
    succeed(&["save", "--pid", &old.pid(), "--all", "-o", image]);
    assert_eq!(old.output(), "errno 103\n".repeat(5));
    assert_eq!(json(&["inspect", "--json", image]).len(), 5);

    // The host forgets everything, and knows its connections before they know it.
    pair.b.run(|| succeed(&["unlock", "--all"]));
    pair.b.run(|| succeed(&["lock", "--image", image]));
    let locks = pair.b.run(|| json(&["lock", "--list", "--json"]));
    assert_eq!(locks[0]["connections"].as_array().unwrap().len(), 5);
    clients.iter_mut().for_each(|client| client.write_all(b"two").unwrap());

    let mut restore = soccr(&["restore", image, "--", "python3", "-c", HEIR, "new "]);
    let _new = pair.b.run(|| Program::start(restore.stdout(Stdio::piped())));
    for client in &mut clients {
        assert_eq!(hear(client, 7), "new two");
        assert_eq!(ask(client, "three", "new "), "new three");
    }
    pair.b.run(assert_unlocked);
}

/// A server whose second connection wants to know when its bytes are acknowledged, and does not look.
const CURIOUS: &str = r#"
import socket, threading
listener = socket.create_server(("", 7))
def serve(connection):
    while data := connection.recv(100):
        connection.sendall(b"old " + data)
for number in range(3):
    connection = listener.accept()[0]
    if number == 1:
        connection.setsockopt(socket.SOL_SOCKET, 37, 1 << 9 | 1 << 4) # SO_TIMESTAMPING: TX_ACK, SOFTWARE
    threading.Thread(target=serve, args=[connection]).start()
"#;

fn what_cannot_be_saved_stays_where_it_is() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let image = image.to_str().unwrap();
    let pair = Pair::new().unwrap();
    let old = pair.b.run(|| Program::start(&mut python(CURIOUS, &[])));
    let mut clients = clients(&pair, 3);
    let complaint = pair.b.run(|| fail(3, &["save", "--pid", &old.pid(), "--all", "-o", image]));
    assert!(
        complaint.contains(": save: a socket with a pending error or an unread error queue"),
        "{complaint}"
    );
    assert_eq!(json(&["inspect", "--json", image]).len(), 2);
    assert_eq!(ask(&mut clients[1], "two", "old "), "old two");
}

fn an_image_of_many_needs_a_program() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let image = image.to_str().unwrap();
    let pair = Pair::new().unwrap();
    let old = pair.b.run(|| server("old ", 2));
    let mut clients = clients(&pair, 2);
    pair.b.run(|| succeed(&["save", "--port", "7", "--pid", &old.pid(), "--keep", "-o", image]));
    clients.iter_mut().for_each(|client| assert_eq!(ask(client, "two", "old "), "old two"));
    let complaint = pair.b.run(|| fail(1, &["restore", image, "--stdio", "--", "cat"]));
    assert!(complaint.contains("2 connections: there is room for one"), "{complaint}");
    pair.b.run(assert_unlocked);
}
