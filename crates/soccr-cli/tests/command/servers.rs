//! Servers as they are installed: their clients move, by `--adopt`, to another of the same kind on another host. As root, on
//! Linux 6.9; skipped elsewhere, and where a server is not installed.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};

use soccr::connection::State;
use soccr::diag::{Diag, Socket};
use soccr_lab::{Lab, Side, sysctl, wait_until};
use tempfile::TempDir;

use crate::adopt::{adopt_all, adoption_works, wait_for_listener};
use crate::programs::{Program, SOCCR, connect, hear, installed, soccr};

crate::tests![
    idle_connections_move_from_nginx_to_nginx,
    clients_of_redis_get_another_redis,
    clients_of_memcached_get_another_memcached,
    clients_of_haproxy_get_another_haproxy,
    clients_of_node_get_another_node,
    clients_of_a_go_program_get_another_unless_it_speaks_mptcp,
];

/// A server on port 7 that answers with its name, and its files.
pub type Server = (Program, TempDir);

/// Moves clients from the server `old` on one host to the server `new` on another. `ask` returns who answers.
pub fn move_clients<C>(
    count: usize,
    start: impl Fn(&str) -> Server,
    connect: impl Fn(SocketAddr) -> C,
    ask: impl Fn(&mut C) -> String,
) {
    let lab = Lab::new().unwrap();
    for host in [&lab.a, &lab.b] {
        host.run(|| sysctl("net/core/somaxconn", "4096")).unwrap();
    }
    let (old, _old_files) = lab.a.run(|| start("old"));
    let mut clients: Vec<C> = (0..count).map(|_| lab.peer.run(|| connect((lab.a.v4, 7).into()))).collect();
    clients.iter_mut().for_each(|client| assert_eq!(ask(client), "old"));
    let ports = lab.peer.run(ports);
    assert_eq!(ports.len(), count);
    let (new, _new_files) = lab.b.run(|| start("new"));
    // A late acknowledgement would be answered with a reset by the new host, which does not know of the connections yet.
    wait_until("the clients have acknowledged everything", || lab.a.run(unacknowledged) == 0);
    lab.steer(Side::B).unwrap();
    lab.a.run(|| adopt_all(&old.pid(), &format!("--netns {}", new.pid())));
    clients.iter_mut().for_each(|client| assert_eq!(ask(client), "new"));
    assert_eq!(lab.peer.run(self::ports), ports, "a client has connected again");
}

/// Looks at each connection of this host.
fn visit(mut each: impl FnMut(&Socket<'_>)) {
    let established = |socket: &Socket<'_>| {
        if socket.state == State::Established {
            each(socket);
        }
    };
    Diag::open().unwrap().visit(established).unwrap();
}

/// From where clients are connected.
fn ports() -> Vec<u16> {
    let mut ports = Vec::new();
    visit(|socket| ports.push(socket.local.port()));
    ports.sort_unstable();
    ports
}

/// How many bytes the peers have not acknowledged.
fn unacknowledged() -> u32 {
    let mut bytes = 0;
    visit(|socket| bytes += socket.send_queue);
    bytes
}

/// Starts a server in the network of the calling thread, which listens when this returns.
fn start(command: &mut Command) -> Program {
    let server = Program::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
    wait_for_listener(true);
    server
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

const NGINX: &str = "daemon off; user root root; master_process off; pid nginx.pid; error_log stderr; worker_rlimit_nofile 8192; \
events { worker_connections 4096; } http { access_log off; keepalive_timeout 600; client_body_temp_path b; proxy_temp_path p; \
fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s; server { listen 7 backlog=4096; return 200 NAME; } }";

pub fn nginx(name: &str) -> Server {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("nginx.conf"), NGINX.replace("NAME", name)).unwrap();
    let prefix = directory.path().to_str().unwrap();
    (start(Command::new("nginx").args(["-p", prefix, "-c", "nginx.conf"])), directory)
}

fn idle_connections_move_from_nginx_to_nginx() {
    if !adoption_works() || !installed("nginx") {
        return;
    }
    move_clients(1000, nginx, connect, get);
}

pub fn redis(name: &str) -> Server {
    let arguments = ["--port", "7", "--save", "", "--appendonly", "no", "--protected-mode", "no"];
    let server = start(Command::new("redis-server").args(arguments));
    let mut client = connect(([127, 0, 0, 1], 7));
    client.write_all(format!("SET name {name}\r\n").as_bytes()).unwrap();
    assert_eq!(hear(&mut client, 5), "+OK\r\n");
    (server, tempfile::tempdir().unwrap())
}

fn clients_of_redis_get_another_redis() {
    if !adoption_works() || !installed("redis-server") {
        return;
    }
    let name = |client: &mut TcpStream| {
        client.write_all(b"GET name\r\n").unwrap();
        hear(client, "$3\r\nold\r\n".len())[4..7].to_owned()
    };
    move_clients(10, redis, connect, name);
}

pub fn memcached(name: &str) -> Server {
    let server = start(Command::new("memcached").args(["-u", "root", "-p", "7", "-U", "0"]));
    let mut client = connect(([127, 0, 0, 1], 7));
    client.write_all(format!("set name 0 0 3\r\n{name}\r\n").as_bytes()).unwrap();
    assert_eq!(hear(&mut client, 8), "STORED\r\n");
    (server, tempfile::tempdir().unwrap())
}

fn clients_of_memcached_get_another_memcached() {
    if !adoption_works() || !installed("memcached") {
        return;
    }
    let name = |client: &mut TcpStream| {
        client.write_all(b"get name\r\n").unwrap();
        hear(client, "VALUE name 0 3\r\nold\r\nEND\r\n".len())[16..19].to_owned()
    };
    move_clients(10, memcached, connect, name);
}

const HAPROXY: &str = "defaults\n mode http\n timeout client 600s\n timeout http-keep-alive 600s\n\
frontend all\n bind :7\n http-request return status 200 content-type text/plain string NAME\n";

fn clients_of_haproxy_get_another_haproxy() {
    if !adoption_works() || !installed("haproxy") {
        return;
    }
    let haproxy = |name: &str| {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("haproxy.cfg");
        fs::write(&file, HAPROXY.replace("NAME", name)).unwrap();
        (start(Command::new("haproxy").arg("-db").arg("-f").arg(file)), directory)
    };
    move_clients(10, haproxy, connect, get);
}

const NODE: &str = r#"const server = require("http").createServer((_, answer) => answer.end(process.argv[1]));
server.keepAliveTimeout = 600000; server.listen(7);"#;

fn clients_of_node_get_another_node() {
    if !adoption_works() || !installed("node") {
        return;
    }
    let node =
        |name: &str| (start(Command::new("node").args(["-e", NODE, name])), tempfile::tempdir().unwrap());
    move_clients(10, node, connect, get);
}

const GO: &str = r#"package main
import ("bufio"; "net"; "os")
func main() {
	listener, err := net.Listen("tcp", ":7")
	if err != nil { panic(err) }
	for {
		connection, err := listener.Accept()
		if err != nil { panic(err) }
		go func() {
			for lines := bufio.NewScanner(connection); lines.Scan(); { connection.Write([]byte(os.Args[1])) }
		}()
	}
}
"#;

/// Whether its programs listen by MPTCP unless something else is said.
fn speaks_mptcp() -> bool {
    let version = Command::new("go").args(["env", "GOVERSION"]).output().unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    let minor =
        version.trim().strip_prefix("go1.").and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
    minor.and_then(|minor| minor.parse::<u32>().ok()).is_none_or(|minor| minor >= 24)
}

fn clients_of_a_go_program_get_another_unless_it_speaks_mptcp() {
    if !adoption_works() || !installed("go") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (source, program) = (directory.path().join("server.go"), directory.path().join("server"));
    fs::write(&source, GO).unwrap();
    let mut build = Command::new("go");
    build.args(["build", "-o"]).args([&program, &source]);
    assert!(build.status().unwrap().success());
    let go = |debug: &str, name: &str| {
        (start(Command::new(&program).arg(name).env("GODEBUG", debug)), tempfile::tempdir().unwrap())
    };
    let ask = |client: &mut TcpStream| {
        client.write_all(b"who?\n").unwrap();
        hear(client, 3)
    };
    move_clients(10, |name| go("multipathtcp=0", name), connect, ask);

    if !speaks_mptcp() {
        soccr_lab::skip("programs of this Go do not listen by MPTCP (Go 1.24)");
        return;
    }
    let lab = Lab::new().unwrap();
    if lab.a.run(|| sysctl("net/mptcp/enabled", "1")).is_err() {
        soccr_lab::skip("this kernel has no MPTCP");
        return;
    }
    let (old, _old_files) = lab.a.run(|| go("", "old"));
    let mut client = lab.peer.run(|| connect((lab.a.v4, 7)));
    assert_eq!(ask(&mut client), "old");
    let (new, _new_files) = lab.b.run(|| go("", "new"));
    let via = format!("{SOCCR} receive --netns {} --adopt", new.pid());
    let output =
        lab.a.run(|| soccr(&["send", "--pid", &old.pid(), "--all", "--via", &via]).output()).unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && complaint.contains("speaks MPTCP"), "{complaint}");
    assert!(complaint.contains("GODEBUG=multipathtcp=0"), "{complaint}");
    assert_eq!(ask(&mut client), "old");
}
