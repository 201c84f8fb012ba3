//! `list`: which sockets, and what it says about them.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};

use soccr_lab::{sysctl, wait_until};

use crate::programs::{
    Program, ask, connect, descriptors, fail, installed, json, python, server, server_at, soccr, succeed,
};

crate::tests![
    filters_choose,
    what_matters_most_comes_first,
    what_the_kernel_waits_for_is_told,
    a_watched_list_comes_again,
    what_is_ipv4_on_the_wire_is_shown_as_that,
    a_connection_with_tls_of_the_kernel_cannot_be_saved,
    who_may_not_pause_is_told_so,
    processes_without_descriptors_are_explained,
    children_that_have_the_connections_are_named,
    a_tracer_is_named,
    what_urgent_data_hides_is_told,
    what_a_save_would_refuse_is_told,
];

fn filters_choose() {
    if !installed("python3") {
        return;
    }
    let server = server("", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", ""), "one");
    let count = |arguments: &[&str]| {
        let pid = server.pid();
        json(&[&["list", "--json", "--pid", &pid], arguments].concat()).len()
    };
    for (arguments, expected) in [
        (&["--state", "established"][..], 1),
        (&["--state", "LISTEN"], 1),
        (&["--state", "listen", "--state", "established"], 2),
        (&["--state", "close-wait"], 0),
        (&["--peer", "127.0.0.1"], 1),
        (&["--peer", "127.0.0.0/8", "--port", "7"], 1),
        (&["--peer", "192.0.2.0/24"], 0),
        (&["--idle", "0"], 1),
        (&["--idle", "86400"], 0),
        (&["--name", "python3"], 2),
        (&["--name", "python"], 0),
    ] {
        assert_eq!(count(arguments), expected, "{arguments:?}");
    }
    let socket = &json(&["list", "--json", "--pid", &server.pid(), "--state", "established"])[0];
    assert!(socket["congestion_control"].is_string(), "{socket}");
    assert_eq!((&socket["bytes_received"], &socket["retransmissions"]), (&3.into(), &0.into()));
    assert!(socket["idle_ms"].is_u64(), "{socket}");
    let table = String::from_utf8(succeed(&["list", "--pid", &server.pid()])).unwrap();
    assert!(
        table.contains("IDLE") && table.contains(socket["congestion_control"].as_str().unwrap()),
        "{table}"
    );
}

fn what_matters_most_comes_first() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let _pairs = [10, 1000, 100].map(|bytes| {
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.write_all(&vec![b'x'; bytes]).unwrap();
        (client, listener.accept().unwrap())
    });
    let port = listener.local_addr().unwrap().port().to_string();
    let numbers = |order: &str, number: &str| {
        let sockets = json(&["list", "--json", "--port", &port, "--sort", order]);
        let connections = sockets.iter().filter(|socket| socket["state"] == "ESTABLISHED");
        connections.map(|socket| socket.pointer(number).unwrap().as_u64().unwrap()).collect::<Vec<_>>()
    };
    let queues = || numbers("recv-q", "/receive_queue");
    wait_until("everything has arrived", || queues().iter().sum::<u64>() == 1110);
    assert_eq!(queues(), [1000, 100, 10, 0, 0, 0]);
    let descriptors = numbers("pid", "/processes/0/fd");
    assert!(descriptors.len() == 6 && descriptors.is_sorted(), "{descriptors:?}");
}

fn what_the_kernel_waits_for_is_told() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let kept = TcpStream::connect(address).unwrap();
    let (mut full, silent) = (TcpStream::connect(address).unwrap(), listener.accept().unwrap());
    rustix::net::sockopt::set_socket_keepalive(&kept, true).unwrap();
    let timer = |stream: &TcpStream| {
        let port = stream.local_addr().unwrap().port().to_string();
        let sockets = json(&["list", "--json", "--port", &port]);
        let ours = |socket: &&serde_json::Value| {
            socket["local"].as_str().unwrap() == stream.local_addr().unwrap().to_string()
        };
        sockets.iter().find(ours).unwrap()["timer"].clone()
    };
    let keepalive = timer(&kept);
    assert_eq!(keepalive["name"], "keepalive");
    let left = keepalive["expires_ms"].as_u64().unwrap();
    assert!(left > 7_000_000 && left <= 7_200_000, "{keepalive}");
    assert!(timer(&full).is_null());
    full.set_nonblocking(true).unwrap();
    while full.write(&[7; 1 << 16]).is_ok() {}
    wait_until("the window is closed", || timer(&full)["name"] == "persist");
    drop(silent);
}

fn a_watched_list_comes_again() {
    let mut list = soccr(&["list", "--watch", "1"]).stdout(Stdio::piped()).spawn().unwrap();
    let headings = BufReader::new(list.stdout.take().unwrap()).lines().map(Result::unwrap);
    let twice = headings.filter(|line| line.contains("LOCAL")).take(2).count();
    list.kill().unwrap();
    list.wait().unwrap();
    assert_eq!(twice, 2);
}

fn what_is_ipv4_on_the_wire_is_shown_as_that() {
    if !installed("python3") {
        return;
    }
    let server = server_at("::", "", 1);
    let client = connect(([127, 0, 0, 1], 7));
    let mut sockets = Vec::new();
    wait_until("the connection is accepted", || {
        sockets = json(&["list", "--json", "--pid", &server.pid(), "--peer", "127.0.0.1"]);
        sockets.len() == 1
    });
    assert_eq!(sockets[0]["local"], "127.0.0.1:7");
    assert_eq!(sockets[0]["remote"], client.local_addr().unwrap().to_string());
}

/// A connection to itself, with TLS of the kernel on one end.
const TLS: &str = r#"
import signal, socket
listener = socket.create_server(("127.0.0.1", 7))
connection = socket.create_connection(("127.0.0.1", 7))
accepted = listener.accept()
try:
    connection.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
    print("tls", flush=True)
except OSError as error:
    print(error, flush=True)
signal.pause()
"#;

fn a_connection_with_tls_of_the_kernel_cannot_be_saved() {
    if !installed("python3") {
        return;
    }
    let mut program = Program::start(&mut python(TLS, &[]));
    let mut line = String::new();
    BufReader::new(program.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    if line != "tls\n" {
        soccr_lab::skip(format_args!("the kernel has no TLS: {line}"));
        return;
    }
    let sockets = json(&["list", "--json", "--pid", &program.pid(), "--state", "established"]);
    let reasons = sockets.iter().filter_map(|socket| socket["why_not"].as_str());
    assert_eq!(reasons.collect::<Vec<_>>(), ["kernel TLS without keys"]);
    assert_eq!(descriptors(&program.pid()).len(), 1);
}

fn who_may_not_pause_is_told_so() {
    if !installed("python3") || !installed("setpriv") {
        return;
    }
    sysctl("net/ipv4/ip_unprivileged_port_start", "0").unwrap();
    let without_rights = |program: &Command| {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", "-all", "--inh-caps", "-all", "--"]).arg(program.get_program());
        command.args(program.get_args()).stdout(Stdio::piped());
        command
    };
    let program =
        Program::start(&mut without_rights(&python(TLS.replace(r#"b"tls""#, r#"b"none""#).as_str(), &[])));
    wait_until("it listens", || json(&["list", "--json", "--port", "7"]).len() == 3);
    let list = soccr(&["list", "--json", "--pid", &program.pid(), "--state", "established"]);
    let output = without_rights(&list).output().unwrap();
    let sockets: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(sockets.len(), 2, "{output:?}");
    for socket in sockets {
        assert_eq!(socket["savable"], false);
        assert!(socket["why_not"].as_str().unwrap().contains("run as root"), "{socket}");
    }
}

fn processes_without_descriptors_are_explained() {
    if !installed("python3") {
        return;
    }
    let ended = Program::start(&mut Command::new("true"));
    let status = format!("/proc/{}/status", ended.pid());
    wait_until("it has ended", || std::fs::read_to_string(&status).unwrap().contains("State:\tZ"));
    let server = server("", 1);
    let _client = connect(([127, 0, 0, 1], 7));
    let mut thread = None;
    wait_until("it serves", || {
        let threads = std::fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
        let mut threads = threads.map(|thread| thread.unwrap().file_name().into_string().unwrap());
        thread = threads.find(|thread| *thread != server.pid());
        thread.is_some()
    });
    let gone = {
        let mut process = Command::new("true").spawn().unwrap();
        process.wait().unwrap();
        process.id().to_string()
    };
    let threads = format!("it is a thread: name its process, {}", server.pid());
    for (pid, reason) in [
        (gone, "there is no such process"),
        (ended.pid(), "it has ended"),
        (thread.unwrap(), threads.as_str()),
    ] {
        for arguments in [
            &["list", "--pid", &pid][..],
            &["list", "--netns", &pid],
            &["send", "--all", "--via", "true", "--pid", &pid],
        ] {
            let complaint = fail(1, arguments);
            assert!(complaint.contains(reason), "{arguments:?}: {complaint}");
        }
    }
    assert!(fail(1, &["list", "--netns", "blue"]).contains("/run/netns/blue"));
    // It is in the user namespace around that of the tests. An ordinary user does not even see its descriptors.
    let foreign = fail(1, &["list", "--netns", "1"]);
    assert!(foreign.contains("needs CAP_SYS_PTRACE over ") && foreign.contains("run as root"), "{foreign}");
}

fn children_that_have_the_connections_are_named() {
    if !installed("python3") {
        return;
    }
    // It waits for its child, and does something afterwards: so there are two processes.
    let parent = Program::start(Command::new("sh").args(["-c", "python3 -c \"$0\"; true", CHILD]));
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", ""), "one");
    let owner = &json(&["list", "--json", "--port", "7", "--state", "listen"])[0];
    let child = owner["processes"][0]["pid"].to_string();
    let complaint = fail(1, &["send", "--pid", &parent.pid(), "--all", "--via", "true"]);
    assert!(
        complaint.contains(&format!("has started have connections (--children takes them): {child}")),
        "{complaint}"
    );
}

/// Serves one connection.
const CHILD: &str = r#"
import socket
listener = socket.create_server(("", 7))
connection = listener.accept()[0]
while data := connection.recv(100):
    connection.sendall(data)
"#;

/// Traces (PTRACE_SEIZE) the process that its argument names, until it is killed.
const TRACER: &str = r#"
import ctypes, signal, sys
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
print(ptrace(0x4206, int(sys.argv[1]), None, None), flush=True)
signal.pause()
"#;

fn a_tracer_is_named() {
    if !installed("python3") {
        return;
    }
    let server = server("", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", ""), "one");
    let mut tracer = Program::start(&mut python(TRACER, &[&server.pid()]));
    let mut line = String::new();
    BufReader::new(tracer.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    if line != "0\n" {
        soccr_lab::skip(format_args!("this user may not trace: {line}"));
        return;
    }
    let fd = descriptors(&server.pid()).remove(0);
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image").display().to_string();
    let complaint = fail(1, &["save", "--pid", &server.pid(), "--fd", &fd, "-o", &image]);
    assert!(complaint.contains(&format!("pid {} (python3) traces it", tracer.pid())), "{complaint}");
}

/// Accepts a connection, and reads of it when it is told to.
const SLOW: &str = r#"
import socket, sys
connection = socket.create_server(("127.0.0.1", 7)).accept()[0]
sys.stdin.readline()
"#;

/// Whether it can be saved depends on the kernel; what is said of that does not.
fn what_urgent_data_hides_is_told() {
    if !installed("python3") {
        return;
    }
    let mut server = Program::start(python(SLOW, &[]).stdin(Stdio::piped()));
    let mut client = connect(([127, 0, 0, 1], 7));
    let list = ["list", "--json", "--state", "established", "--pid", &server.pid()];
    client.write_all(b"abc").unwrap();
    rustix::net::send(&client, b"X", rustix::net::SendFlags::OOB).unwrap();
    client.write_all(b"ghi").unwrap();
    wait_until("it has arrived", || json(&list).iter().any(|socket| socket["receive_queue"] == 7));
    let socket = &json(&list)[0];
    let fd = socket["processes"][0]["fd"].to_string();
    let save = soccr(&["save", "--keep", "--pid", &server.pid(), "--fd", &fd]).output().unwrap();
    let complaint = String::from_utf8(save.stderr).unwrap();
    assert_eq!(socket["savable"], save.status.success(), "{socket} {complaint}");
    if !save.status.success() {
        assert!(socket["why_not"].as_str().unwrap().contains("urgent"), "{socket}");
        assert!(complaint.contains("urgent"), "{complaint}");
    }
    drop(server.0.stdin.take());
}

/// Connections to itself: one has notices in its error queue, on another one the kernel decrypts into a small buffer.
const REFUSED: &str = r#"
import select, signal, socket, struct
listener = socket.create_server(("127.0.0.1", 7))
pairs = [(socket.create_connection(("127.0.0.1", 7)), listener.accept()[0]) for _ in range(2)]
noticed = pairs[0][0]
noticed.setsockopt(socket.SOL_SOCKET, 60, 1)
noticed.send(bytes(20000), 0x4000000)
poll = select.poll()
poll.register(noticed, 0)
poll.poll()
small = pairs[1][0]
small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
try:
    small.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
    small.setsockopt(282, 2, struct.pack("HH", 0x304, 51) + bytes(36))
    print(noticed.fileno(), small.fileno(), flush=True)
except OSError as error:
    print(noticed.fileno(), flush=True)
signal.pause()
"#;

fn what_a_save_would_refuse_is_told() {
    if !installed("python3") {
        return;
    }
    let mut program = Program::start(&mut python(REFUSED, &[]));
    let mut line = String::new();
    BufReader::new(program.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let refused: Vec<&str> = line.split_whitespace().collect();
    if refused.len() == 1 {
        soccr_lab::skip("the kernel has no TLS");
    }
    let sockets = json(&["list", "--json", "--pid", &program.pid(), "--state", "established"]);
    assert_eq!(sockets.len(), 4);
    let directory = tempfile::tempdir().unwrap();
    for socket in &sockets {
        let fd = socket["processes"][0]["fd"].to_string();
        let Some(at) = refused.iter().position(|refused| *refused == fd) else {
            assert_eq!(socket["savable"], true, "{socket}");
            continue;
        };
        let what =
            ["a socket with a pending error or an unread error queue", "kernel TLS with a receive buffer"]
                [at];
        let told = socket["why_not"].as_str().unwrap_or_default();
        assert!(socket["savable"] == false && told.starts_with(what), "{socket}");
        let image = directory.path().join("image");
        let complaint =
            fail(1, &["save", "--pid", &program.pid(), "--fd", &fd, "--keep", "-o", image.to_str().unwrap()]);
        assert!(complaint.contains(what), "{complaint}");
    }
}
