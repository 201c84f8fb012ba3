//! What is the only copy of a connection is not lost, and there is never a second one; and a process that is stopped notices nothing.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};

use soccr::lock::PersistentLock;
use soccr::settings::Value;
use soccr::{Connection, Flow};
use soccr_image::stream::{Message, Writer};
use soccr_lab::{Call, Namespace, Pair, State, TcpInfo, run_and_kill, run_and_watch, wait_until};

use crate::programs::{
    HEIR, Program, SOCCR, Said, ask, assert_runs, connect, descriptors, fail, hear, installed, json, python,
    server, server_at, soccr, succeed,
};

crate::tests![
    an_image_that_is_there_is_not_replaced,
    an_image_that_appears_meanwhile_is_not_replaced,
    what_nobody_reads_goes_back,
    a_killed_save_leaves_the_connection_or_an_image,
    a_save_killed_halfway_leaves_an_image_of_what_has_left,
    an_older_image_is_not_restored_instead_of_what_a_killed_save_has_left,
    what_a_killed_save_has_left_is_not_hidden_by_a_later_one,
    a_lock_leaves_alone_what_still_lives_in_its_network,
    a_stopped_process_waits_on,
    options_that_concern_more_than_the_connection_are_left_out,
    a_connection_that_is_bound_to_a_device_goes_on,
    the_walkthrough_goes_to_its_end,
];

/// A server, and two clients that it has answered.
fn two_connections(prefix: &str) -> (Program, [TcpStream; 2]) {
    let server = server(prefix, 2);
    let clients = [(); 2].map(|()| {
        let mut client = connect(([127, 0, 0, 1], 7));
        assert_eq!(ask(&mut client, "one", prefix), format!("{prefix}one"));
        client
    });
    (server, clients)
}

fn an_image_that_is_there_is_not_replaced() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image").display().to_string();
    let (server, _clients) = two_connections("");
    let [first, second] = descriptors(&server.pid()).try_into().unwrap();
    let save = |fd| ["save", "--pid", &server.pid(), "--fd", fd, "-o", &image].map(str::to_owned).to_vec();
    let run = |arguments: Vec<String>| soccr(&[]).args(arguments).stderr(Stdio::piped()).output().unwrap();
    assert!(run(save(&first)).status.success());
    let before = std::fs::read(&image).unwrap();
    let refused = run(save(&second));
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--force"), "{refused:?}");
    assert_eq!(std::fs::read(&image).unwrap(), before);
    let mut forced = save(&second);
    forced.push("--force".into());
    assert!(run(forced).status.success());
    assert_ne!(std::fs::read(&image).unwrap(), before);
}

fn an_image_that_appears_meanwhile_is_not_replaced() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image").display().to_string();
    // Where an empty file is there at the start, as from mktemp(1), and where nothing is.
    for is_there in [true, false] {
        let [mut first, mut second] = ["127.0.0.1", "127.0.0.2"].map(|address| {
            let server = server_at(address, "", 1);
            let mut client = connect((address.parse::<IpAddr>().unwrap(), 7));
            assert_eq!(ask(&mut client, "one", ""), "one");
            (server, client)
        });
        let save = |(server, _): &(Program, _)| {
            soccr(&["save", "--pid", &server.pid(), "--all", "-o", &image, "--with-local"])
        };
        if is_there {
            File::create(&image).unwrap();
        }
        let mut is_saved = false;
        let code = run_and_watch(&mut save(&first), |call| {
            // It has written the image, and is about to take the connection.
            if call.number == libc::SYS_fsync && !is_saved {
                is_saved = save(&second).status().unwrap().success();
            }
        });
        assert_eq!((code, is_saved), (Some(1), true));
        assert_runs(&first.0.pid());
        assert_eq!(ask(&mut first.1, "two", ""), "two");
        assert_eq!(names(directory.path()), ["image"]);
        let mut restore = soccr(&["restore", &image, "--", "python3", "-c", HEIR, "new "]);
        let _heir = Program::start(&mut restore);
        assert_eq!(ask(&mut second.1, "two", "new "), "new two");
        std::fs::remove_file(&image).unwrap();
    }
}

fn what_nobody_reads_goes_back() {
    if !installed("python3") {
        return;
    }
    let server = server("", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", ""), "one");
    let fd = descriptors(&server.pid()).remove(0);
    let mut save = soccr(&["save", "--pid", &server.pid(), "--fd", &fd]);
    let mut save = save.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut reader = save.stdout.take().unwrap();
    // The image is in the pipe, but for its end maybe.
    wait_until("it is written", || rustix::io::ioctl_fionread(&reader).unwrap() > 300);
    reader.read_exact(&mut [0; 8]).unwrap();
    drop(reader);
    assert_eq!(save.wait().unwrap().code(), Some(1));
    assert_runs(&server.pid());
    assert_eq!(ask(&mut client, "more", ""), "more");
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[cfg(not(target_arch = "aarch64"))]
use libc::SYS_rename as SYS_RENAME;
#[cfg(target_arch = "aarch64")]
use libc::SYS_renameat as SYS_RENAME;

fn a_killed_save_leaves_the_connection_or_an_image() {
    if !installed("python3") {
        return;
    }
    for (call, left) in [(libc::SYS_connect, false), (libc::SYS_renameat2, true)] {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image").display().to_string();
        let server = server("", 1);
        let mut client = connect(([127, 0, 0, 1], 7));
        assert_eq!(ask(&mut client, "one", ""), "one");
        let fd = descriptors(&server.pid()).remove(0);
        let mut save = soccr(&["save", "--pid", &server.pid(), "--fd", &fd, "-o", &image]);
        // It takes a connection from its socket by connecting that to nowhere.
        assert!(run_and_kill(&mut save, |entered| entered.number == call), "it was killed");
        if left {
            // What a save has left that still runs is not complete.
            let left = directory.path().join(names(directory.path()).remove(0));
            let running = directory.path().join(format!(".image.{}.tmp", std::process::id()));
            std::fs::rename(&left, &running).unwrap();
            let _writer = File::open(&running).unwrap();
            assert!(fail(1, &["restore", &image, "--", "true"]).contains("No such file"));
            std::fs::rename(&running, &left).unwrap();
            let mut restore = soccr(&["restore", &image, "--", "python3", "-c", HEIR, "new "]);
            let _heir = Program::start(restore.stderr(Stdio::null()));
            assert_eq!(ask(&mut client, "two", "new "), "new two");
        } else {
            assert_runs(&server.pid());
            assert_eq!(ask(&mut client, "two", ""), "two");
            wait_until("no file is left", || names(directory.path()).is_empty());
        }
    }
}

fn a_save_killed_halfway_leaves_an_image_of_what_has_left() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image").display().to_string();
    let (server, mut clients) = two_connections("old ");
    let mut save = soccr(&["save", "--pid", &server.pid(), "--all", "--with-local", "-o", &image]);
    let mut taken = 0;
    let second = |entered: &Call| {
        taken += usize::from(entered.number == libc::SYS_connect);
        taken == 2
    };
    assert!(run_and_kill(&mut save, second), "it was killed");
    assert_runs(&server.pid());
    let mut restore = soccr(&["restore", &image, "--", "python3", "-c", HEIR, "new "]);
    let _heir = Program::start(restore.stderr(Stdio::null()));
    let mut answers = clients.each_mut().map(|client| ask(client, "two", "new "));
    answers.sort();
    assert_eq!(answers, ["new two", "old two"]);
}

fn an_older_image_is_not_restored_instead_of_what_a_killed_save_has_left() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image").display().to_string();
    let (server, mut clients) = two_connections("old ");
    // The list has an order of its own.
    let sockets = json(&["list", "--json", "--pid", &server.pid()]);
    let [first, second] = clients.each_ref().map(|client| {
        let remote = client.local_addr().unwrap().to_string();
        sockets.iter().find(|socket| socket["remote"] == remote).unwrap()["processes"][0]["fd"].to_string()
    });
    succeed(&["save", "--pid", &server.pid(), "--fd", &first, "-o", &image]);
    let mut save = soccr(&["save", "--pid", &server.pid(), "--fd", &second, "-o", &image, "--force"]);
    assert!(run_and_kill(&mut save, |entered| entered.number == SYS_RENAME), "it was killed");
    assert!(fail(1, &["restore", &image, "--", "true"]).contains("a later `soccr save` was killed"));
    let older = format!("{image}.older");
    std::fs::rename(&image, &older).unwrap();
    for (image, client) in [older, image].into_iter().zip(&mut clients) {
        let mut restore = soccr(&["restore", &image, "--", "python3", "-c", HEIR, "new "]);
        let _heir = Program::start(restore.stderr(Stdio::null()));
        assert_eq!(ask(client, "two", "new "), "new two");
    }
}

fn what_a_killed_save_has_left_is_not_hidden_by_a_later_one() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image").display().to_string();
    let (server, mut clients) = two_connections("old ");
    let save = ["save", "--pid", &server.pid(), "--all", "--with-local", "-o", &image, "--force"];
    let unforced = &save[..save.len() - 1];
    let mut taken = 0;
    let second = |entered: &Call| {
        taken += usize::from(entered.number == libc::SYS_connect);
        taken == 2
    };
    assert!(run_and_kill(&mut soccr(unforced), second), "it was killed");
    assert_runs(&server.pid());
    let left = directory.path().join(names(directory.path()).remove(0)).display().to_string();
    let complaint = fail(1, unforced);
    assert!(complaint.contains(&left) && complaint.contains("--force"), "{complaint}");
    succeed(&save);
    let restore = || {
        let complaints = tempfile::NamedTempFile::new().unwrap();
        let mut restore = soccr(&["restore", &image, "--", "python3", "-c", HEIR, "new "]);
        (Program::start(restore.stderr(complaints.reopen().unwrap())), complaints)
    };
    let (_first, complaints) = restore();
    let mut answer = [0; 7];
    for client in &mut clients {
        client.write_all(b"two").unwrap();
        client.set_nonblocking(true).unwrap();
    }
    let mut answered = None;
    wait_until("one is restored", || {
        answered = clients.iter().position(|client| client.peek(&mut [0]).is_ok_and(|bytes| bytes > 0));
        answered.is_some()
    });
    let answered = answered.unwrap();
    clients.iter().for_each(|client| client.set_nonblocking(false).unwrap());
    clients[answered].read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"new two");
    let complaint = std::fs::read_to_string(complaints.path()).unwrap();
    assert!(complaint.contains(&format!("not in this image: 1 in {left}")), "{complaint}");
    std::fs::remove_file(&image).unwrap();
    // Which of several is to be restored is for people to say.
    let other = directory.path().join(".image.4194305.tmp");
    std::fs::copy(&left, &other).unwrap();
    let complaint = fail(1, &["restore", &image, "--", "true"]);
    assert!(complaint.contains(&left) && complaint.contains(other.to_str().unwrap()), "{complaint}");
    std::fs::remove_file(other).unwrap();
    let (_second, _) = restore();
    assert_eq!(hear(&mut clients[1 - answered], 7), "new two");
}

fn a_lock_leaves_alone_what_still_lives_in_its_network() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let network = Namespace::new().unwrap();
    let (server, _client, living) = network.run(|| {
        let server = server("", 1);
        let mut client = connect(([127, 0, 0, 1], 7));
        assert_eq!(ask(&mut client, "one", ""), "one");
        let image = succeed(&["save", "--keep", "--pid", &server.pid(), "--all", "--with-local"]);
        (server, client, soccr_image::read(&image[..]).unwrap())
    });
    let mut gone = living.clone();
    gone.remote.set_port(1);
    // The number is above all that processes have.
    let left = File::create(directory.path().join(".image.4194305.tmp")).unwrap();
    let mut writer = Writer::new(left).unwrap();
    writer.connection(1, "", &living).unwrap();
    writer.connection(2, "", &gone).unwrap();
    writer.finish().unwrap();
    let netns = format!("/proc/{}/ns/net", server.pid());
    let lock =
        soccr(&["lock", "--image", "image", "--netns", &netns]).current_dir(&directory).output().unwrap();
    let complaint = String::from_utf8(lock.stderr).unwrap();
    assert!(lock.status.success(), "{complaint}");
    let named = format!("{} {}: it still is in its process", living.local, living.remote);
    assert!(complaint.contains(&named), "{complaint}");
    let locks = network.run(PersistentLock::list).unwrap();
    let locked: Vec<Flow> = locks.into_iter().flat_map(|lock| lock.flows).collect();
    assert_eq!(locked, [gone.flow()]);
}

/// Waits for events and bytes as simple C programs do, which end at EINTR.
const SIMPLE: &str = r#"
import ctypes, os, socket, struct, threading
libc = ctypes.CDLL(None, use_errno=True)
listener = socket.create_server(("", 7), backlog=64)
def polls(connection):
    poll = libc.epoll_create1(0)
    event = struct.pack("=IQ", 1, 0)
    assert libc.epoll_ctl(poll, 1, connection.fileno(), event) == 0
    events = ctypes.create_string_buffer(12)
    while libc.epoll_wait(poll, events, 1, 60000) == 1:
        connection.sendall(b"polls " + os.read(connection.fileno(), 100))
    print("errno", ctypes.get_errno(), flush=True)
    os._exit(1)
def receives(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("=qq", 60, 0))
    bytes = ctypes.create_string_buffer(100)
    while (count := libc.recv(connection.fileno(), bytes, 100, 0)) > 0:
        connection.sendall(b"hears " + bytes.raw[:count])
    print("errno", ctypes.get_errno(), flush=True)
    os._exit(1)
threads = [threading.Thread(target=serve, args=[listener.accept()[0]]) for serve in (polls, receives)]
for thread in threads:
    thread.start()
"#;

fn a_stopped_process_waits_on() {
    if !installed("python3") {
        return;
    }
    if !cfg!(target_arch = "x86_64") {
        return soccr_lab::skip("only on x86-64 are waits begun again");
    }
    let server = Program::start(&mut python(SIMPLE, &[]));
    let mut clients = [(); 2].map(|()| connect(([127, 0, 0, 1], 7)));
    for round in 0..5 {
        let text = format!("round {round}");
        for (client, prefix) in clients.iter_mut().zip(["polls ", "hears "]) {
            assert_eq!(ask(client, &text, prefix), format!("{prefix}{text}"));
        }
        let fd = descriptors(&server.pid()).remove(0);
        succeed(&["save", "--keep", "--pid", &server.pid(), "--fd", &fd]);
        let refused = ["send", "--pid", &server.pid(), "--fd", &fd, "--timeout", "1", "--via", "false"];
        fail(1, &refused);
    }
}

/// A file with a stream that does not listen.
fn given_away(connection: &Connection) -> File {
    let mut stream = Writer::new(tempfile::tempfile().unwrap()).unwrap();
    let begin = Message::Begin { connections: 1, answers: false, notes: false, place: None, steered: None };
    stream.send(&begin).unwrap();
    stream.connection(1, "", connection).unwrap();
    stream.send(&Message::Commit { connection: 1 }).unwrap();
    let mut file = stream.finish().unwrap();
    file.rewind().unwrap();
    file
}

fn options_that_concern_more_than_the_connection_are_left_out() {
    if !installed("python3") {
        return;
    }
    const MARK: &str = r#"
import socket
connection = socket.socket(fileno=3)
connection.sendall(b"mark %d nodelay %d" % (connection.getsockopt(1, 36), connection.getsockopt(6, 1)))
"#;
    for (command, arguments, mark, answer) in [
        ("restore", &["--settings", "all"][..], 7, "mark 7 nodelay 1"),
        ("restore", &[], 7, "mark 7 nodelay 1"),
        ("restore", &[], 0xc114, "mark 0 nodelay 1"),
        ("restore", &["--settings", "safe"], 7, "mark 0 nodelay 1"),
        ("receive", &["--settings", "all"], 7, "mark 7 nodelay 1"),
        ("receive", &["--settings", "all"], 0xc114, "mark 0 nodelay 1"),
        ("receive", &[], 7, "mark 0 nodelay 1"),
        // Without SO_REUSEADDR nobody listens behind it for a while.
        ("restore", &["--settings", "none"], 7, "mark 0 nodelay 0"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image").display().to_string();
        let server = server("", 1);
        let mut client = connect(([127, 0, 0, 1], 7));
        assert_eq!(ask(&mut client, "one", ""), "one");
        let fd = descriptors(&server.pid()).remove(0);
        succeed(&["save", "--pid", &server.pid(), "--fd", &fd, "-o", &image]);
        let mut connection = soccr_image::load_file(&image).unwrap();
        connection.settings.set("SO_MARK", Value::Number(mark));
        connection.settings.set("TCP_NODELAY", Value::Number(1));
        let mut restore = soccr(&[command]);
        if command == "restore" {
            soccr_image::save_file(&image, &connection).unwrap();
            restore.arg(image);
        } else {
            restore.stdin(given_away(&connection));
        }
        restore.args(arguments).args(["--", "python3", "-c", MARK]).stderr(Stdio::piped());
        let output = restore.spawn().unwrap();
        assert_eq!(hear(&mut client, answer.len()), answer, "{command} {arguments:?}");
        let output = output.wait_with_output().unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert_eq!(complaint.contains("SO_MARK"), answer.contains("mark 0"), "{arguments:?}: {complaint}");
    }
}

/// Answers through one device alone.
const BOUND: &str = r#"
import signal, socket
connection = socket.create_server(("", 7)).accept()[0]
connection.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
try:
    while data := connection.recv(100):
        connection.sendall(b"old " + data)
    signal.pause()
except OSError:
    pass # the connection has left
"#;

const BOUND_HEIR: &str = r#"
import socket
connection = socket.socket(fileno=3)
device = connection.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")
connection.sendall(b"by " + device)
while data := connection.recv(100):
    connection.sendall(b"new " + data)
connection.sendall(b" end")
"#;

/// What plays the peer comes from `lo`, also where a FIN of it has to be received again.
fn a_connection_that_is_bound_to_a_device_goes_on() {
    if !installed("python3") {
        return;
    }
    for is_half_closed in [false, true] {
        let pair = Pair::new().unwrap();
        let (here, there) = (&pair.b, &pair.a);
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image").display().to_string();
        let server = here.run(|| Program::start(&mut python(BOUND, &[])));
        let mut client = there.run(|| connect((here.v4, 7)));
        assert_eq!(ask(&mut client, "one", "old "), "old one");
        if is_half_closed {
            client.shutdown(Shutdown::Write).unwrap();
            wait_until("the FIN has arrived", || TcpInfo::of(&client).unwrap().state == State::FinWait2);
        }
        let fd = here.run(|| descriptors(&server.pid())).remove(0);
        here.run(|| succeed(&["save", "--pid", &server.pid(), "--fd", &fd, "-o", &image]));
        let _heir =
            here.run(|| Program::start(&mut soccr(&["restore", &image, "--", "python3", "-c", BOUND_HEIR])));
        assert_eq!(hear(&mut client, 7), "by eth0");
        if !is_half_closed {
            assert_eq!(ask(&mut client, "two", "new "), "new two");
            client.shutdown(Shutdown::Write).unwrap();
        }
        assert_eq!(hear(&mut client, 4), " end");
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }
}

fn the_walkthrough_goes_to_its_end() {
    if !installed("python3") || !installed("ip") {
        return;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/walkthrough.sh");
    let path = format!("{}:{}", Path::new(SOCCR).parent().unwrap().display(), std::env::var("PATH").unwrap());
    let complaints = Said::new();
    let mut command = Command::new("timeout");
    let directory = tempfile::tempdir().unwrap();
    command.args(["60", "sh", script]).env("PATH", path).env("TMPDIR", directory.path());
    command.stderr(complaints.output());
    // Its output ends when its last program does.
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(text.ends_with("\nfirst server: hello\nsecond server: again\n"), "{text}");
    assert_eq!((complaints.read().as_str(), names(directory.path())), ("", Vec::new()));
    let mut without = Command::new("/bin/sh");
    let output = without.arg(script).env("PATH", "/nonexistent").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "soccr is not in PATH\n");
}
