//! Which connections of which processes `send` and `save` take.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Seek, Write};
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use soccr_lab::{Call, Lab, Pair, Side, attach_filter, run_and_watch, wait_until};

use crate::programs::{
    HEIR, Program, SERVER, SOCCR, ask, connect, fail, installed, json, python, run, soccr, succeed,
};

crate::tests![
    connections_are_chosen_by_process_and_by_peer,
    descendants_that_have_ended_or_hide_are_no_obstacle,
    a_name_that_is_no_text_is_no_obstacle,
    what_is_still_connecting_is_taken_too,
    what_was_reset_with_unread_bytes_is_taken_or_named,
    a_told_peer_is_that_of_one_forgotten_connection,
    what_a_process_leaves_to_its_child_meanwhile_is_taken_once,
];

/// A shell whose child has the connections.
fn parent(lab: &Lab) -> Program {
    let script = "python3 -c \"$0\" \"$@\" & wait";
    lab.a.run(|| {
        Program::start(
            Command::new("sh").args(["-c", script, SERVER, "old ", "2", ""]).stdout(Stdio::piped()),
        )
    })
}

fn connections_are_chosen_by_process_and_by_peer() {
    if !installed("python3") {
        return;
    }
    let lab = Lab::new().unwrap();
    let (parent, other) = (parent(&lab), lab.a.run(|| Program::start(Command::new("sleep").arg("1000"))));
    let mut clients = [(); 2].map(|()| lab.peer.run(|| connect((lab.a.v4, 7))));
    for client in &mut clients {
        assert_eq!(ask(client, "one", "old "), "old one");
    }
    let beside = lab.b.run(|| Program::start(Command::new("sleep").arg("1000")));
    let receive = format!("{SOCCR} receive --netns {} -- python3 -c '{HEIR}' 'new '", beside.pid());
    let [parent, other] = [&parent, &other].map(Program::pid);
    let network = format!("{}/24", lab.peer.v4);
    let send = |more: &[&str]| {
        let mut arguments = vec!["send", "--pid", &other, "--pid", &parent];
        arguments.extend(more);
        arguments.extend(["--via", &receive]);
        let output = run(&arguments);
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    for none in [
        &["--all"][..],
        &["--all", "--children", "--name", "sleep"],
        &["--children", "--peer", "203.0.113.0/24"],
        &["--children", "--peer", &network, "--port", "8"],
    ] {
        let (code, complaint) = send(none);
        assert!(code == 1 && complaint.contains("there is no such connection"), "{none:?}: {complaint}");
    }
    let chosen = ["--children", "--peer", "203.0.113.0/24", "--peer", &network, "--port", "8", "--port", "7"];
    let (code, complaint) = send(&chosen);
    assert_eq!(code, 0, "{complaint}");
    lab.steer(Side::B).unwrap();
    for client in &mut clients {
        assert_eq!(ask(client, "more", "new "), "new more");
    }
}

/// Has a name that the kernel cuts within a letter, and a child of the same name that has ended and is not waited for.
const CYRILLIC: &str = r#"
import os, signal, socket
with open("/proc/self/comm", "wb") as comm:
    comm.write("xxсерверы".encode())
listener = socket.create_server(("", 7))
if not os.fork():
    os._exit(0)
connection = listener.accept()[0]
while data := connection.recv(100):
    connection.sendall(b"old " + data)
signal.pause()
"#;

fn a_name_that_is_no_text_is_no_obstacle() {
    if !installed("python3") {
        return;
    }
    let server = Program::start(&mut python(CYRILLIC, &[]));
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", "old "), "old one");
    let bytes = std::fs::read(format!("/proc/{}/comm", server.pid())).unwrap();
    let bytes = bytes.trim_ascii_end();
    assert!(std::str::from_utf8(bytes).is_err(), "the kernel has cut it: {bytes:?}");
    let sockets = json(&["list", "--json", "--port", "7", "--state", "established"]);
    let shown = sockets
        .iter()
        .find_map(|socket| socket["processes"][0]["name"].as_str().filter(|name| name.starts_with('x')));
    let shown = shown.unwrap_or_else(|| panic!("{sockets:?}")).to_owned();
    assert!(shown.ends_with('\u{fffd}'), "{shown}");
    // Others who look for other names, or for children, meet it as well.
    assert!(
        fail(1, &["save", "--keep", "--all", "--name", "nobody"]).contains("there is no such connection")
    );
    for name in [OsStr::new(&shown), OsStr::from_bytes(bytes)] {
        for children in [&[][..], &["--children"]] {
            let mut save = soccr(&["save", "--keep", "--all", "--with-local"]);
            let output = save.arg("--name").arg(name).args(children).output().unwrap();
            let complaint = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && complaint.is_empty(), "{name:?} {children:?}: {complaint}");
            assert_eq!(ask(&mut client, "more", "old "), "old more");
        }
    }
}

/// Has one child that has ended and is not waited for, one that hides, and one that serves a connection.
const FAMILY: &str = r#"
import ctypes, os, signal, socket
ended = os.fork()
if not ended:
    os._exit(0)
os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
if not os.fork():
    prctl = ctypes.CDLL(None).prctl
    prctl(1, signal.SIGKILL) # PR_SET_PDEATHSIG
    prctl(4, 0) # PR_SET_DUMPABLE
    print(os.getpid(), flush=True)
    signal.pause()
listener = socket.create_server(("", 7))
if not os.fork():
    connection = listener.accept()[0]
    while data := connection.recv(100):
        connection.sendall(b"old " + data)
listener.close()
signal.pause()
"#;

/// The same command without the right to look into processes that hide. An ordinary user cannot look into one that has ended, either.
fn without_tracing(command: &Command) -> Command {
    let mut less = Command::new("setpriv");
    less.args(["--inh-caps=-sys_ptrace", "--bounding-set=-sys_ptrace", "--"]);
    less.arg(command.get_program()).args(command.get_args());
    less
}

fn descendants_that_have_ended_or_hide_are_no_obstacle() {
    if !installed("python3") || !installed("setpriv") {
        return;
    }
    let mut family =
        Program::start(without_tracing(&python(FAMILY, &[])).stdout(Stdio::piped()).stderr(Stdio::null()));
    let mut hidden = String::new();
    BufReader::new(family.0.stdout.take().unwrap()).read_line(&mut hidden).unwrap();
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", "old "), "old one");
    let mut stream = tempfile::tempfile().unwrap();
    let mut send =
        without_tracing(&soccr(&["send", "--pid", &family.pid(), "--children", "--all", "--with-local"]));
    let output = send.stdout(stream.try_clone().unwrap()).output().unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    let refused = format!("pid {}: its descriptors cannot be seen", hidden.trim_end());
    assert!(complaint.contains(&refused) && complaint.lines().count() == 1, "{complaint}");
    assert_eq!(output.status.code(), Some(3), "{complaint}");
    stream.rewind().unwrap();
    let _heir = Program::start(
        soccr(&["receive", "--", "python3", "-c", HEIR, "new "]).stdin(stream).stderr(Stdio::null()),
    );
    assert_eq!(ask(&mut client, "more", "new "), "new more");
}

/// Has a connection to port 7, and connects two sockets to port 8, which takes long; to one of them it has given a port.
const CONNECTING: &str = r#"
import signal, socket, sys
established = socket.create_connection((sys.argv[1], 7))
connecting = [socket.socket(), socket.socket()]
connecting[1].bind(("", 5000))
for one in connecting:
    one.setblocking(False)
    one.connect_ex((sys.argv[1], 8))
    one.setblocking(True)
signal.pause()
"#;

/// The connections of a process: their ends and their states.
fn connections(pid: &str) -> Vec<[String; 3]> {
    let sockets = json(&["list", "--json", "--pid", pid]);
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let mut connections: Vec<_> =
        sockets.iter().map(|socket| ["local", "remote", "state"].map(|field| text(&socket[field]))).collect();
    connections.sort_by_key(|[local, remote, _]| (remote.clone(), local.clone()));
    connections
}

/// Lets a listener hear nothing, or everything.
fn set_hearing(listener: &TcpListener, hears: bool) {
    let bytes = if hears { u32::MAX } else { 0 };
    let code = (libc::BPF_RET | libc::BPF_K) as u16;
    attach_filter(listener, &[libc::sock_filter { code, jt: 0, jf: 0, k: bytes }]).unwrap();
}

fn what_is_still_connecting_is_taken_too() {
    if !installed("python3") {
        return;
    }
    let pair = Pair::new().unwrap();
    let [listener, deaf] = [7, 8].map(|port| pair.b.run(|| TcpListener::bind((pair.b.v4, port)).unwrap()));
    set_hearing(&deaf, false);
    let client = pair.a.run(|| Program::start(&mut python(CONNECTING, &[&pair.b.v4.to_string()])));
    let pid = client.pid();
    let mut first = listener.accept().unwrap().0;
    wait_until("it connects", || connections(&pid).len() == 3);
    let before: [_; 3] = connections(&pid).try_into().unwrap();
    assert_eq!(before.each_ref().map(|connection| &connection[2]), ["ESTABLISHED", "SYN_SENT", "SYN_SENT"]);
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    // From another network; and by its port, of which only that network knows.
    succeed(&["save", "--keep", "--pid", &pid, "--port", "5000", "-o", &path("one")]);
    assert_eq!(soccr_image::load_file(path("one")).unwrap().remote.port(), 8);
    assert_eq!(connections(&pid), before);
    succeed(&["save", "--pid", &pid, "--all", "-o", &path("all")]);
    let heir = pair.a.run(|| {
        let arguments = ["restore", &path("all"), "--", "python3", "-c", HEIR, "new "];
        Program::start(soccr(&arguments).stderr(Stdio::null()))
    });
    assert_eq!(ask(&mut first, "more", "new "), "new more");
    assert_eq!(connections(&heir.pid()), before);
    set_hearing(&deaf, true);
    deaf.set_nonblocking(true).unwrap();
    let mut others = Vec::new();
    wait_until("they are connected", || {
        others.extend(deaf.accept().ok());
        others.len() == 2
    });
    others.sort_by_key(|(_, address)| address.to_string());
    for ((mut other, address), before) in others.into_iter().zip(&before[1..]) {
        assert_eq!(address.to_string(), before[0]);
        other.set_nonblocking(false).unwrap();
        assert_eq!(ask(&mut other, "more", "new "), "new more");
    }
}

/// Accepts two connections, waits until the second is reset, and reads of the first. It also has sockets that are not connected, one of
/// which nobody wanted to connect to.
const RESET: &str = r#"
import select, socket
listener = socket.create_server(("", 7))
first, second = listener.accept()[0], listener.accept()[0]
sockets = [socket.socket(), socket.socket()]
sockets[1].connect_ex(("127.0.0.1", 9))
poll = select.poll()
poll.register(second, 0)
poll.poll()
print(second.fileno(), flush=True)
while data := first.recv(100):
    first.sendall(b"old " + data)
"#;

/// Tells what it can read of the connection that was reset, and how that ends; then it serves the other one.
const READER: &str = r#"
import socket
for fd in (3, 4):
    connection = socket.socket(fileno=fd)
    try:
        connection.getpeername()
        other = connection
    except OSError:
        reset = connection
print(reset.recv(100), flush=True)
try:
    reset.recv(100)
except OSError as error:
    print(error.errno, flush=True)
other.sendall(b"new " + other.recv(100))
"#;

fn what_was_reset_with_unread_bytes_is_taken_or_named() {
    if !installed("python3") {
        return;
    }
    let mut server = Program::start(python(RESET, &[]).stderr(Stdio::null()));
    let pid = server.pid();
    let mut first = connect(([127, 0, 0, 1], 7));
    let mut second = connect(([127, 0, 0, 1], 7));
    let peer = second.local_addr().unwrap().to_string();
    second.write_all(b"unread").unwrap();
    rustix::net::sockopt::set_socket_linger(&second, Some(Duration::ZERO)).unwrap();
    drop(second);
    let mut fd = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut fd).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let named = format!("soccr: pid {pid} fd {}: it is not connected (", fd.trim_end());
    for which in [&["--all"][..], &["--port", "7"]] {
        let save = ["save", "--keep", "--pid", &pid, "--with-local", "-o", &path("first"), "--force"];
        let complaint = fail(3, &[&save, which].concat());
        assert!(complaint.starts_with(&named) && complaint.lines().count() == 1, "{complaint}");
        assert_eq!(soccr_image::load_file(path("first")).unwrap().remote, first.local_addr().unwrap());
    }
    let asked = run(&[
        "send",
        "--pid",
        &pid,
        "--all",
        "--with-local",
        "--dry-run",
        "--via",
        &format!("{SOCCR} receive -- true"),
    ]);
    assert_eq!(asked.status.code(), Some(3), "{asked:?}");
    assert!(String::from_utf8_lossy(&asked.stdout).contains("1 of 1 would move"), "{asked:?}");
    let save =
        ["save", "--pid", &pid, "--all", "--with-local", "-o", &path("both"), "--forgotten-peer", &peer];
    succeed(&save);
    let arguments = ["restore", &path("both"), "--", "python3", "-c", READER];
    let heir = Program::start(soccr(&arguments).stdout(Stdio::piped()).stderr(Stdio::null()));
    assert_eq!(ask(&mut first, "more", "new "), "new more");
    assert_eq!(heir.output(), "b'unread'\n104\n");
}

/// Connects to port 8, which takes long, and accepts two connections, which are reset. Prints the descriptors of all three.
const FORGETFUL: &str = r#"
import select, signal, socket
listener = socket.create_server(("", 7))
connecting = socket.socket()
connecting.setblocking(False)
connecting.connect_ex(("127.0.0.1", 8))
reset = [listener.accept()[0] for _ in range(2)]
for one in reset:
    poll = select.poll()
    poll.register(one, 0)
    poll.poll()
print(connecting.fileno(), *(one.fileno() for one in reset), flush=True)
signal.pause()
"#;

fn a_told_peer_is_that_of_one_forgotten_connection() {
    if !installed("python3") {
        return;
    }
    let deaf = TcpListener::bind("127.0.0.1:8").unwrap();
    set_hearing(&deaf, false);
    let mut server = Program::start(&mut python(FORGETFUL, &[]));
    let pid = server.pid();
    let peers = [(); 2].map(|()| {
        let mut client = connect(([127, 0, 0, 1], 7));
        client.write_all(b"unread").unwrap();
        rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
        client.local_addr().unwrap().to_string()
    });
    let mut fds = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut fds).unwrap();
    let fds: Vec<&str> = fds.split_whitespace().collect();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let peers_in = |name: &str| {
        let remote = |value: serde_json::Value| value["remote"].as_str().unwrap().to_owned();
        json(&["inspect", "--json", &path(name)]).into_iter().map(remote).collect::<Vec<_>>()
    };
    let all = ["save", "--pid", &pid, "--all", "--with-local", "-o"];
    for which in [&["--all", "--with-local"][..], &["--fd", fds[1], "--fd", fds[2]]] {
        let save = ["save", "--pid", &pid, "-o", &path("none"), "--forgotten-peer", &peers[0]];
        let complaint = fail(1, &[&save, which].concat());
        let named = format!("pid {pid} fd {}, pid {pid} fd {}: --forgotten-peer", fds[1], fds[2]);
        assert!(complaint.contains(&named), "{complaint}");
    }
    let first = ["--fd", fds[0], "--fd", fds[1], "--forgotten-peer", &peers[0]];
    let save = ["save", "--keep", "--pid", &pid, "-o", &path("both")];
    succeed(&[&save[..], &first].concat());
    assert_eq!(peers_in("both"), ["127.0.0.1:8", &peers[0]]);
    succeed(&["save", "--pid", &pid, "--fd", fds[1], "--forgotten-peer", &peers[0], "-o", &path("first")]);
    succeed(&[&all[..], &[&path("rest"), "--forgotten-peer", &peers[1]]].concat());
    assert_eq!(peers_in("rest"), ["127.0.0.1:8", &peers[1]]);
}

/// Accepts two connections. A child gets both, at once or `late`: when a line comes, and the parent closes the first. Or its number
/// becomes another one of the second connection.
const LEAVING: &str = r#"
import os, signal, socket, sys
listener = socket.create_server(("", 7))
connections = [listener.accept()[0] for _ in range(2)]
listener.close()
def fork():
    if not os.fork():
        connections[0].recv(1) # until the client has gone
        os._exit(0)
if sys.argv[1] != "late":
    fork()
print(connections[0].fileno(), flush=True)
sys.stdin.readline()
if sys.argv[1] == "late":
    fork()
if sys.argv[1] == "reused":
    os.dup2(connections[1].fileno(), connections[0].fileno())
else:
    connections[0].close()
print("left", flush=True)
signal.pause()
"#;

fn what_a_process_leaves_to_its_child_meanwhile_is_taken_once() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    for when in ["early", "late", "reused"] {
        let mut server = Program::start(python(LEAVING, &[when]).stdin(Stdio::piped()));
        let clients = [(); 2].map(|()| connect(([127, 0, 0, 1], 7)));
        let mut output = BufReader::new(server.0.stdout.take().unwrap());
        let mut line = || {
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            line.trim_end().to_owned()
        };
        let fd: u64 = line().parse().unwrap();
        let mut input = server.0.stdin.take();
        let (pid, image) = (server.pid(), path(when));
        let mut save =
            soccr(&["save", "--keep", "--pid", &pid, "--children", "--all", "--with-local", "-o", &image]);
        let code = run_and_watch(&mut save, |call: &Call| {
            // The command has read which descriptors there are.
            if call.number == libc::SYS_pidfd_getfd
                && call.arguments[1] == fd
                && let Some(mut input) = input.take()
            {
                input.write_all(b"\n").unwrap();
                assert_eq!(line(), "left");
            }
        });
        assert_eq!(code, Some(0), "{when}");
        assert!(input.is_none(), "{when}: nobody has asked for the descriptor");
        let mut peers: Vec<_> = json(&["inspect", "--json", &image])
            .iter()
            .map(|connection| connection["remote"].as_str().unwrap().to_owned())
            .collect();
        let mut wanted = clients.each_ref().map(|client| client.local_addr().unwrap().to_string());
        peers.sort();
        wanted.sort();
        assert_eq!(peers, wanted, "{when}");
    }
}
