//! `--adopt`: connections move into servers that know nothing of it. As root, on Linux 6.9; skipped elsewhere.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use soccr::adopt::Adopter;
use soccr::connection::State;
use soccr::diag::{Diag, Socket};
use soccr_lab::{Lab, Side, sysctl, wait_until};

use crate::programs::{
    Program, SOCCR, ask, connect, descriptors, fail, hear, installed, python, soccr, succeed,
};

crate::tests![
    connections_enter_another_server_on_the_same_port,
    a_saved_connection_enters_a_server,
    without_a_server_they_stay,
    idle_connections_move_from_nginx_to_nginx,
    clients_of_redis_get_another_redis,
    every_byte_arrives_while_clients_talk,
    the_demonstration_moves_between_servers,
];

/// A plain server: epoll, accept in a loop. Closes its listener after as many connections as its second argument says.
/// SIGUSR1 ends its work between two answers.
const EPOLL: &str = r#"
import select, signal, socket, sys
working = True
def end(number, frame):
    global working
    working = False
signal.signal(signal.SIGUSR1, end)
prefix, limit, address = sys.argv[1].encode(), int(sys.argv[2]), sys.argv[3]
family = socket.AF_INET6 if ":" in address else socket.AF_INET
listener = socket.create_server((address, 7), family=family, backlog=1000, dualstack_ipv6=address == "::")
listener.setblocking(False)
connections, poll = {}, select.epoll()
poll.register(listener, select.EPOLLIN)
while working:
    for fd, _ in poll.poll():
        if fd == listener.fileno():
            connection, _ = listener.accept()
            connections[connection.fileno()] = connection
            poll.register(connection, select.EPOLLIN)
            limit -= 1
            if limit == 0:
                poll.unregister(listener)
                listener.close()
            continue
        data = b""
        try:
            data = connections[fd].recv(65536)
        except OSError:
            pass
        if data:
            connections[fd].sendall(prefix + data)
        else:
            poll.unregister(fd)
            connections.pop(fd).close()
print("pausing", flush=True)
signal.pause()
"#;

fn epoll(address: &str, prefix: &str, connections: usize) -> Program {
    Program::start(&mut python(EPOLL, &[prefix, &connections.to_string(), address]))
}

/// Whether this user can put connections into accept queues. Says why, where not.
fn adoption_works() -> bool {
    match Adopter::new() {
        Ok(_) => installed("python3"),
        Err(error) => {
            eprintln!("\nSKIPPED: {error}\n");
            false
        }
    }
}

/// Waits until somebody listens on the port of the servers, or nobody does.
fn wait_for_listener(wanted: bool) {
    wait_until("a server listens, or listens no more", || {
        let mut found = false;
        let visit = |socket: &Socket<'_>| found |= socket.state == State::Listen && socket.local.port() == 7;
        Diag::open().unwrap().visit(visit).unwrap();
        found == wanted
    });
}

/// Sends all connections of a process into the queue of whoever listens on their port.
fn adopt_all(pid: &str, receive: &str) {
    let via = format!("{SOCCR} receive {receive} --adopt");
    let output = soccr(&["send", "--pid", pid, "--all", "--via", &via]).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && !complaint.contains("soccr: "), "{}: {complaint}", output.status);
}

fn connections_enter_another_server_on_the_same_port() {
    if !adoption_works() {
        return;
    }
    let lab = Lab::new().unwrap();
    for address in ["0.0.0.0", "::", "192.0.2.1"] {
        let count = 20;
        let old = lab.a.run(|| epoll(address, "old ", count));
        let mut clients: Vec<TcpStream> =
            (0..count).map(|_| lab.peer.run(|| connect((lab.a.v4, 7)))).collect();
        for client in &mut clients {
            assert_eq!(ask(client, "one", "old "), "old one");
        }
        lab.a.run(|| {
            wait_for_listener(false);
            let _new = epoll(address, "new ", count);
            wait_for_listener(true);
            adopt_all(&old.pid(), "");
            for client in &mut clients {
                assert_eq!(ask(client, "two", "new "), "new two");
            }
        });
    }
}

fn a_saved_connection_enters_a_server() {
    if !adoption_works() {
        return;
    }
    let lab = Lab::new().unwrap();
    let old = lab.a.run(|| epoll("", "old ", 1));
    let mut client = lab.peer.run(|| connect((lab.a.v4, 7)));
    assert_eq!(ask(&mut client, "one", "old "), "old one");
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let image = image.to_str().unwrap();
    lab.a.run(|| {
        let fd = descriptors(&old.pid()).remove(0);
        succeed(&["save", "--pid", &old.pid(), "--fd", &fd, "-o", image]);
        let complaint = fail(1, &["restore", image, "--adopt"]);
        assert!(complaint.contains("nobody listens on 192.0.2.1:7"), "{complaint}");
        let _new = epoll("", "new ", 1);
        wait_for_listener(true);
        succeed(&["restore", image, "--adopt"]);
        assert_eq!(ask(&mut client, "two", "new "), "new two");
    });
}

fn without_a_server_they_stay() {
    if !adoption_works() {
        return;
    }
    let lab = Lab::new().unwrap();
    let old = lab.a.run(|| epoll("", "old ", 2));
    let mut clients: Vec<TcpStream> = (0..2).map(|_| lab.peer.run(|| connect((lab.a.v4, 7)))).collect();
    for client in &mut clients {
        assert_eq!(ask(client, "one", "old "), "old one");
    }
    lab.a.run(|| {
        let via = format!("{SOCCR} receive --adopt");
        let output = soccr(&["send", "--pid", &old.pid(), "--all", "--via", &via]).output().unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{complaint}");
        assert!(complaint.contains("nobody listens on 192.0.2.1:7"), "{complaint}");
    });
    for client in &mut clients {
        assert_eq!(ask(client, "two", "old "), "old two");
    }
}

const NGINX: &str = "daemon off; user root root; master_process off; pid nginx.pid; error_log stderr; worker_rlimit_nofile 8192; \
events { worker_connections 4096; } http { access_log off; keepalive_timeout 600; client_body_temp_path b; proxy_temp_path p; \
fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s; server { listen 7 backlog=4096; return 200 NAME; } }";

/// Starts nginx in the network of the calling thread; it answers with its name.
fn nginx(name: &str) -> (Program, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("nginx.conf"), NGINX.replace("NAME", name)).unwrap();
    let prefix = directory.path().to_str().unwrap();
    let nginx =
        Program::start(Command::new("nginx").args(["-p", prefix, "-c", "nginx.conf"]).stderr(Stdio::null()));
    wait_for_listener(true);
    (nginx, directory)
}

/// One request over a connection that stays open, and the three letters of the answer.
fn get(client: &mut TcpStream) -> String {
    client.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    hear(client, 3)
}

fn idle_connections_move_from_nginx_to_nginx() {
    if !adoption_works() || !installed("nginx") {
        return;
    }
    let count = 1000;
    let lab = Lab::new().unwrap();
    lab.a.run(|| sysctl("net/core/somaxconn", "4096")).unwrap();
    lab.b.run(|| sysctl("net/core/somaxconn", "4096")).unwrap();
    let (old, _old_files) = lab.a.run(|| nginx("old"));
    let mut clients: Vec<TcpStream> = (0..count).map(|_| lab.peer.run(|| connect((lab.a.v4, 7)))).collect();
    for client in &mut clients {
        assert_eq!(get(client), "old");
    }
    let (new, _new_files) = lab.b.run(|| nginx("new"));
    lab.steer(Side::B).unwrap();
    lab.a.run(|| adopt_all(&old.pid(), &format!("--netns {}", new.pid())));
    for client in &mut clients {
        assert_eq!(get(client), "new");
    }
}

fn clients_of_redis_get_another_redis() {
    if !adoption_works() || !installed("redis-server") {
        return;
    }
    let lab = Lab::new().unwrap();
    let redis = |name: &str| {
        let server = Program::start(
            Command::new("redis-server")
                .args(["--port", "7", "--save", "", "--appendonly", "no", "--protected-mode", "no"])
                .stdout(Stdio::null()),
        );
        wait_for_listener(true);
        let mut client = connect(([127, 0, 0, 1], 7));
        client.write_all(format!("SET name {name}\r\n").as_bytes()).unwrap();
        assert_eq!(hear(&mut client, 5), "+OK\r\n");
        server
    };
    let name = |client: &mut TcpStream| {
        client.write_all(b"GET name\r\n").unwrap();
        hear(client, "$3\r\nold\r\n".len())
    };
    let old = lab.a.run(|| redis("old"));
    let new = lab.b.run(|| redis("new"));
    let mut clients: Vec<TcpStream> = (0..10).map(|_| lab.peer.run(|| connect((lab.a.v4, 7)))).collect();
    clients.iter_mut().for_each(|client| assert_eq!(name(client), "$3\r\nold\r\n"));
    lab.steer(Side::B).unwrap();
    lab.a.run(|| adopt_all(&old.pid(), &format!("--netns {}", new.pid())));
    clients.iter_mut().for_each(|client| assert_eq!(name(client), "$3\r\nnew\r\n"));
}

/// Ends a conversation, also where an assertion fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn the_demonstration_moves_between_servers() {
    if !adoption_works() {
        return;
    }
    let output = succeed(&["demo", "--servers", "--moves", "2", "--json"]);
    let account: serde_json::Value = serde_json::from_slice(&output).unwrap();
    assert_eq!(account, serde_json::json!({ "moves": 2, "answers": 6, "resets": 0 }));
}

/// The byte of a long conversation at this place.
fn byte(place: usize) -> u8 {
    (place.wrapping_mul(2_654_435_761) >> 11) as u8
}

fn every_byte_arrives_while_clients_talk() {
    if !adoption_works() {
        return;
    }
    let lab = Lab::new().unwrap();
    let start = || {
        let mut server = epoll("", "", 1);
        let stdout = BufReader::new(server.0.stdout.take().unwrap());
        (server, stdout)
    };
    let mut old = lab.a.run(start);
    let client = lab.peer.run(|| connect((lab.a.v4, 7)));
    let moves = 10;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let talk = scope.spawn(|| {
            let mut client = &client;
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                let bytes: Vec<u8> = (sent..sent + 4096).map(byte).collect();
                client.write_all(&bytes).unwrap();
                sent += bytes.len();
            }
            client.shutdown(Shutdown::Write).unwrap();
            sent
        });
        let listen = scope.spawn(|| {
            let mut bytes = Vec::new();
            (&client).read_to_end(&mut bytes).unwrap();
            bytes
        });
        let end = End(&stop);
        let _last = lab.a.run(move || {
            for _ in 0..moves {
                wait_for_listener(false);
                // What the old server has read and not answered would go with it.
                let (server, mut stdout) = old;
                Command::new("kill").args(["-USR1", &server.pid()]).status().unwrap();
                let mut line = String::new();
                stdout.read_line(&mut line).unwrap();
                assert_eq!(line, "pausing\n");
                let new = start();
                wait_for_listener(true);
                adopt_all(&server.pid(), "");
                old = new;
            }
            old
        });
        drop(end);
        let (sent, heard) = (talk.join().unwrap(), listen.join().unwrap());
        assert_eq!(heard.len(), sent);
        assert!(heard.iter().enumerate().all(|(place, heard)| *heard == byte(place)), "other bytes");
    });
}
