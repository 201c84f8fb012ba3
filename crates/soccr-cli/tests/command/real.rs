//! Programs as everybody runs them: nc, redis-server, nginx.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::programs::{Program, assert_runs, connect, descriptors, hear, installed, soccr, succeed};

crate::tests![nc_gives_its_connection_away, redis_gives_a_connection_away, nginx_gives_a_connection_away];

/// Answers everything with one line.
const ANSWERING: &str = r#"
import socket, sys
connection = socket.socket(fileno=3)
while data := connection.recv(65536):
    connection.sendall(sys.argv[1].encode())
"#;

/// Takes the one connection of a process, and gives it to a program that answers.
fn move_to_answering(pid: &str, answer: &str) -> (Program, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let image = image.to_str().unwrap();
    let fd = descriptors(pid).remove(0);
    succeed(&["save", "--pid", pid, "--fd", &fd, "-o", image]);
    let heir = Program::start(&mut soccr(&["restore", image, "--", "python3", "-c", ANSWERING, answer]));
    // The image lives as long as whoever reads it.
    (heir, directory)
}

fn nc_gives_its_connection_away() {
    if !installed("nc") || !installed("python3") {
        return;
    }
    let mut nc = Program::start(
        Command::new("nc").args(["-l", "-p", "7"]).stdin(Stdio::piped()).stdout(Stdio::piped()),
    );
    let mut client = connect(([127, 0, 0, 1], 7));
    client.write_all(b"to nc").unwrap();
    let mut bytes = [0; 5];
    nc.0.stdout.as_mut().unwrap().read_exact(&mut bytes).unwrap();
    nc.0.stdin.as_mut().unwrap().write_all(b"from nc").unwrap();
    assert_eq!((&bytes, hear(&mut client, 7).as_str()), (b"to nc", "from nc"));

    let _heir = move_to_answering(&nc.pid(), "from another");
    client.write_all(b"more").unwrap();
    assert_eq!(hear(&mut client, 12), "from another");
}

fn redis_gives_a_connection_away() {
    if !installed("redis-server") || !installed("python3") {
        return;
    }
    let redis = Program::start(
        Command::new("redis-server")
            .args(["--port", "7", "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"])
            .stdout(Stdio::null()),
    );
    let ping = |client: &mut TcpStream| {
        client.write_all(b"PING\r\n").unwrap();
        hear(client, 7)
    };
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ping(&mut client), "+PONG\r\n");
    let _heir = move_to_answering(&redis.pid(), "+HEIR\r\n");
    assert_eq!(ping(&mut client), "+HEIR\r\n");
    // It has lost one connection, and serves others.
    assert_runs(&redis.pid());
    assert_eq!(ping(&mut connect(([127, 0, 0, 1], 7))), "+PONG\r\n");
}

const NGINX: &str = "daemon off; user root root; master_process off; pid nginx.pid; error_log stderr; events {} \
http { access_log off; client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; \
scgi_temp_path s; server { listen 127.0.0.1:7; return 200 ok; } }";

fn nginx_gives_a_connection_away() {
    if !installed("nginx") || !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("nginx.conf"), NGINX).unwrap();
    let prefix = directory.path().to_str().unwrap();
    let nginx =
        Program::start(Command::new("nginx").args(["-p", prefix, "-c", "nginx.conf"]).stderr(Stdio::null()));
    let get = |client: &mut TcpStream| {
        client.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
        let mut answer = String::new();
        while !answer.ends_with("\r\n\r\nok") {
            answer += &hear(client, 1);
        }
        answer
    };
    let mut client = connect(([127, 0, 0, 1], 7));
    assert!(get(&mut client).contains("nginx"));
    // The connection is idle between two requests.
    let _heir = move_to_answering(&nginx.pid(), "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert!(!get(&mut client).contains("nginx"));
    assert_runs(&nginx.pid());
    assert!(get(&mut connect(([127, 0, 0, 1], 7))).contains("nginx"));
}
