//! `list`, `save` and `restore`.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use soccr_lab::{Pair, let_fail, run_and_watch, wait_until};

use crate::programs::{
    HEIR, Program, SOCCR, Said, ask, assert_runs, assert_unlocked, complaints, connect, descriptors, fail,
    hear, installed, json, python, run, server, soccr, succeed,
};

crate::tests![
    a_list_says_whose_and_whether,
    a_list_stops_quietly_when_nobody_reads,
    a_connection_goes_to_another_program,
    a_connection_that_is_kept_goes_on,
    nothing_leaves_for_an_output_that_keeps_nothing,
    a_program_gets_it_as_standard_input_and_output,
    a_waiting_process_gets_the_descriptor,
    both_ends_move_to_other_addresses,
    an_interrupted_program_keeps_its_threads,
    what_fails_leaves_the_connection,
    an_image_whose_name_may_not_last_is_there,
    what_others_leave_behind_is_no_image,
    a_pipe_is_not_read_to_see_whether_it_is_an_image,
    an_image_ends_though_its_writer_stays,
    a_server_that_forks_is_saved,
];

fn a_list_says_whose_and_whether() {
    if !installed("python3") {
        return;
    }
    let server = server("", 1);
    let client = connect(([127, 0, 0, 1], 7));
    let mut sockets = Vec::new();
    wait_until("the connection is accepted", || {
        sockets = json(&["list", "--json", "--pid", &server.pid()]);
        sockets.len() == 2
    });
    let (listener, connection) = match sockets[0]["state"] == "LISTEN" {
        true => (&sockets[0], &sockets[1]),
        false => (&sockets[1], &sockets[0]),
    };
    assert_eq!(listener["savable"], false);
    assert_eq!(listener["why_not"], "listener: no connection");
    assert_eq!(connection["state"], "ESTABLISHED");
    assert_eq!(connection["savable"], true);
    assert_eq!(connection["remote"], client.local_addr().unwrap().to_string());
    assert_eq!(connection["processes"][0]["name"], "python3");
    assert_eq!(connection["processes"][0]["pid"].to_string(), server.pid());
    assert!(connection["mss"].as_u64().unwrap() > 500);
    let port = client.local_addr().unwrap().port().to_string();
    // Both ends are in this network: the other one belongs to this test.
    assert_eq!(json(&["list", "--json", "--port", &port]).len(), 2);
    let table = String::from_utf8(succeed(&["list", "--port", &port])).unwrap();
    assert!(table.contains("  SAVE\n") && table.contains("  yes\n") && !table.contains('\x1b'), "{table}");
}

fn a_list_stops_quietly_when_nobody_reads() {
    for arguments in [&["list"][..], &["list", "--json"], &["list", "--netns", "/proc/self/ns/net"]] {
        let (read, write) = std::io::pipe().unwrap();
        drop(read);
        let output = soccr(arguments)
            .stdout(write)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
            .wait_with_output()
            .unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }
}

fn a_connection_goes_to_another_program() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let image = image.to_str().unwrap();
    let pair = Pair::new().unwrap();
    let old = pair.b.run(|| server("old ", 1));
    let mut client = pair.a.run(|| connect((pair.b.v4, 7)));
    assert_eq!(ask(&mut client, "one", "old "), "old one");
    let fd = pair.b.run(|| descriptors(&old.pid())).remove(0);

    succeed(&["save", "--pid", &old.pid(), "--fd", &fd, "-o", image]);
    assert_eq!(old.output(), "errno 103\n", "ECONNABORTED");
    assert_eq!(std::fs::metadata(image).unwrap().permissions().mode() & 0o777, 0o600);
    // While nobody has it: the host is silent, and the peer sends again later.
    std::io::Write::write_all(&mut client, b"two").unwrap();

    let (new, _) = pair.b.run(|| {
        let heir = Program::start(
            soccr(&["restore", image, "--", "python3", "-c", HEIR, "new "]).stdout(Stdio::piped()),
        );
        (heir, ())
    });
    assert_eq!(hear(&mut client, 7), "new two");
    assert_eq!(ask(&mut client, "three", "new "), "new three");
    assert_runs(&new.pid());
    pair.b.run(assert_unlocked);
}

fn a_connection_that_is_kept_goes_on() {
    if !installed("python3") {
        return;
    }
    let server = server("", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", ""), "one");
    let fd = descriptors(&server.pid()).remove(0);
    let save = ["save", "--keep", "--pid", &server.pid(), "--fd", &fd];
    let idle = run(&[&save[..], &["--forgotten-peer", "203.0.113.9:9"]].concat());
    assert!(String::from_utf8_lossy(&idle.stderr).contains("still has its peer"), "{idle:?}");
    for text in ["two", "three"] {
        let image = succeed(&save);
        let connection = soccr_image::read(&image[..]).unwrap();
        assert_eq!(connection.remote, client.local_addr().unwrap());
        assert_eq!(ask(&mut client, text, ""), text);
    }
    assert_unlocked();
}

/// The Rust runtime opens `/dev/null` where standard output is closed.
fn nothing_leaves_for_an_output_that_keeps_nothing() {
    if !installed("python3") {
        return;
    }
    let server = server("", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", ""), "one");
    for output in [">&-", ">/dev/null", ">/dev/zero"] {
        for command in ["save", "send"] {
            let line = format!("exec {SOCCR} {command} --pid {} --all --with-local {output}", server.pid());
            let output = Command::new("sh").args(["-c", &line]).output().unwrap();
            let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{line}: {complaint}");
            assert!(complaint.contains("standard output is closed"), "{line}: {complaint}");
            assert_eq!(ask(&mut client, "more", ""), "more");
        }
    }
    // What stays is not lost, and what has another way does not need this one.
    let all = ["--pid", &server.pid(), "--all", "--with-local"];
    let mut save = soccr(&[&["save", "--keep"], &all[..]].concat());
    assert!(save.stdout(Stdio::null()).status().unwrap().success());
    assert_eq!(ask(&mut client, "kept", ""), "kept");
    let via = format!("{SOCCR} receive --stdio -- cat");
    let mut send = soccr(&[&["send", "--via", &via], &all[..]].concat());
    assert!(send.stdout(Stdio::null()).status().unwrap().success());
    assert_eq!(ask(&mut client, "two", ""), "two");
}

fn a_program_gets_it_as_standard_input_and_output() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let image = image.to_str().unwrap();
    let server = server("old ", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", "old "), "old one");
    let fd = descriptors(&server.pid()).remove(0);
    succeed(&["save", "--pid", &server.pid(), "--fd", &fd, "-o", image]);
    let maps = ["--map", "203.0.113.9=203.0.113.10", "--map", "203.0.113.9=203.0.113.11"];
    assert!(fail(2, &[&["restore", image], &maps[..], &["--", "cat"]].concat()).contains("is named twice"));
    let said = Said::new();
    let mut restore = soccr(&[&["restore", image], &maps[..2], &["--stdio", "--", "cat"]].concat());
    let _cat = Program::start(restore.stderr(said.output()));
    assert_eq!(ask(&mut client, "two", ""), "two");
    assert_eq!(
        complaints(said.read().as_bytes()),
        "soccr: --map 203.0.113.9=203.0.113.10: no connection has that address\n"
    );
}

const WAITING: &str = r#"
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1] + ".new")
listener.listen()
os.rename(sys.argv[1] + ".new", sys.argv[1])
(text, fds, _, _) = socket.recv_fds(listener.accept()[0], int(sys.argv[2]), 253)
print(text.decode(), end="", flush=True)
connection = socket.socket(fileno=fds[0])
while data := connection.recv(100):
    connection.sendall(b"waiting " + data)
"#;

fn a_waiting_process_gets_the_descriptor() {
    if !installed("python3") {
        return;
    }
    // One that does not care for the text reads a part of it, and closes the socket.
    for most in [4096, 1] {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name).to_str().unwrap().to_owned();
        let (image, socket) = (path("image"), path("socket"));
        let server = server("old ", 1);
        let mut client = connect(([127, 0, 0, 1], 7));
        assert_eq!(ask(&mut client, "one", "old "), "old one");
        let fd = descriptors(&server.pid()).remove(0);
        succeed(&["save", "--pid", &server.pid(), "--fd", &fd, "-o", &image]);
        let waiting = Program::start(&mut python(WAITING, &[&socket, &most.to_string()]));
        wait_until("it listens", || std::fs::exists(&socket).unwrap());
        succeed(&["restore", &image, "--send-fd", &socket]);
        assert_eq!(ask(&mut client, "two", "waiting "), "waiting two");
        let text = format!("127.0.0.1:7 {}\n", client.local_addr().unwrap());
        drop(client);
        assert_eq!(waiting.output(), text[..most.min(text.len())]);
    }
}

const CLIENT: &str = r#"
import socket, sys
connection = socket.create_connection(("127.0.0.1", 7))
connection.sendall(b"unread")
print(connection.getsockname()[1], flush=True)
connection.recv(1)
"#;

/// Says something, and hears out the other: an end that closes earlier answers what still comes with a reset.
const TALKER: &str = r#"
import socket
connection = socket.socket(fileno=3)
connection.sendall(b"hello")
heard = b""
while not heard.endswith(b"hello") and (data := connection.recv(100)):
    heard += data
print(heard.decode(), flush=True)
"#;

fn both_ends_move_to_other_addresses() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name| directory.path().join(name).to_str().unwrap().to_owned();
    // The peer of the client only accepts and sleeps: a kernel that answers is enough.
    let listener = std::net::TcpListener::bind("127.0.0.1:7").unwrap();
    let mut client = Program::start(&mut python(CLIENT, &[]));
    let accepted = listener.accept().unwrap().0;
    let mut port = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(client.0.stdout.as_mut().unwrap()), &mut port)
        .unwrap();
    let port = port.trim();
    let mut end = soccr::pause(&accepted).unwrap().save().unwrap();
    // Ours is saved by the library; that of the process by the command.
    wait_until("its bytes are here", || {
        end = soccr::pause(&accepted).unwrap().save().unwrap();
        end.control.inq_len == 6
    });
    soccr_image::save_file(path("server"), &end).unwrap();
    let fd = descriptors(&client.pid()).remove(0);
    succeed(&["save", "--pid", &client.pid(), "--fd", &fd, "-o", &path("client")]);

    let pair = Pair::new().unwrap();
    let rules = ["127.0.0.1:7=192.0.2.2:7".to_owned(), format!("127.0.0.1:{port}=192.0.2.1:{port}")];
    // Whichever end is back first speaks to a host that does not know the connection yet.
    let silent =
        |end: &soccr_lab::Host, flow: String| end.run(|| succeed(&["lock", "--name", "coming", &flow]));
    silent(&pair.a, format!("192.0.2.1:{port}-192.0.2.2:7"));
    silent(&pair.b, format!("192.0.2.2:7-192.0.2.1:{port}"));
    let restore = |image: String| {
        let mut command = soccr(&["restore", &image, "--map", &rules[0], "--map", &rules[1]]);
        command.args(["--", "python3", "-c", TALKER]).stdout(Stdio::piped());
        command
    };
    let a = pair.a.run(|| Program::start(&mut restore(path("client"))));
    let b = pair.b.run(|| Program::start(&mut restore(path("server"))));
    // A lock that people have made is theirs.
    for host in [&pair.a, &pair.b] {
        wait_until("it is restored", || {
            let sockets = host.run(|| json(&["list", "--json"]));
            sockets
                .iter()
                .any(|socket| socket["state"] != "CLOSE" && socket["why_not"] != "paused: soccr resume")
        });
    }
    for host in [&pair.a, &pair.b] {
        host.run(|| succeed(&["unlock", "coming"]));
    }
    assert_eq!([a.output(), b.output()], ["hello\n", "unreadhello\n"]);
}

const THREADS: &str = r#"
import socket, sys, threading, time
counters = [0] * 20
def count(i):
    while True:
        counters[i] += 1
        time.sleep(0.001)
for i in range(20):
    threading.Thread(target=count, args=[i], daemon=True).start()
connection = socket.create_server(("", 7)).accept()[0]
while data := connection.recv(100):
    before = list(counters)
    while not all(a < b for a, b in zip(before, counters)):
        time.sleep(0.001)
    connection.sendall(b"all run")
"#;

fn an_interrupted_program_keeps_its_threads() {
    if !installed("python3") {
        return;
    }
    let program = Program::start(&mut python(THREADS, &[]));
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "?", "......"), "all run");
    let fd = descriptors(&program.pid()).remove(0);
    for _ in 0..20 {
        succeed(&["save", "--keep", "--pid", &program.pid(), "--fd", &fd]);
        assert_runs(&program.pid());
    }
    assert_eq!(ask(&mut client, "?", "......"), "all run");
}

fn what_fails_leaves_the_connection() {
    if !installed("python3") {
        return;
    }
    let server = server("", 1);
    let pid = server.pid();
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", ""), "one");
    let fd = descriptors(&pid).remove(0);
    let listener = (0..10).map(|fd| fd.to_string()).find(|fd| {
        let link = std::fs::read_link(format!("/proc/{pid}/fd/{fd}"));
        link.is_ok_and(|link| link.to_str().unwrap().starts_with("socket:"))
    });
    let listener = listener.unwrap();
    assert!(fail(1, &["save", "--pid", &pid, "--fd", &listener]).contains("not connected"));
    assert!(
        fail(1, &["save", "--pid", &pid, "--fd", "0", "-o", "/dev/null/x"])
            .contains("fd 0: it is no TCP socket")
    );
    assert!(
        fail(1, &["save", "--pid", &pid, "--fd", "99", "-o", "/dev/null/x"]).contains("no descriptor 99")
    );
    assert!(fail(1, &["save", "--pid", "999999999", "--fd", "1"]).contains("no such process"));
    match soccr(&["save", "--port", "9"]).uid(65534).gid(65534).output() {
        Ok(output) => {
            let complaint = String::from_utf8_lossy(&output.stderr);
            assert!(
                complaint.contains("no such connection") && complaint.contains("run as root"),
                "{complaint}"
            );
        }
        Err(error) => soccr_lab::skip(format_args!("the command cannot be run as another user: {error}")),
    }
    // The image cannot be written.
    assert!(
        fail(1, &["save", "--pid", &pid, "--fd", &fd, "-o", "/nonexistent/x"]).contains("/nonexistent/x")
    );
    let (read, write) = std::io::pipe().unwrap();
    drop(read);
    let broken = soccr(&["save", "--pid", &pid, "--fd", &fd]).stdout(write).status().unwrap();
    assert_eq!(broken.code(), Some(1), "an image that nobody has read is none");
    // Nobody to give it to.
    assert!(fail(127, &["restore", "/dev/null", "--", "no-such-program"]).contains("no-such-program"));
    assert!(fail(126, &["restore", "/dev/null", "--", "/etc/passwd"]).contains("/etc/passwd"));
    assert_eq!(run(&["restore", "/dev/null"]).status.code(), Some(2));
    assert_runs(&pid);
    assert_unlocked();
    assert_eq!(ask(&mut client, "two", ""), "two");
}

fn an_image_whose_name_may_not_last_is_there() {
    if !installed("python3") {
        return;
    }
    let server = server("", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", ""), "one");
    let directory = tempfile::tempdir().unwrap();
    let image = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let save = |image: &str| {
        soccr(&["save", "--keep", "--pid", &server.pid(), "--all", "--with-local", "-o", image])
    };
    let mut synced = Vec::new();
    let code = run_and_watch(&mut save(&image("first")), |call| {
        if call.number == libc::SYS_fsync {
            synced.push(call.arguments[0]);
        }
    });
    // The last is the directory, after the file is in its place. The file is durable before anything is let go, and with its end.
    let directory = synced.pop().unwrap();
    assert!(code == Some(0) && !synced.contains(&directory), "{synced:?}");
    assert!(synced.len() == 2 && synced[0] == synced[1], "{synced:?}");
    // Not every filesystem can make a name durable.
    for (name, errno, is_told) in [("second", libc::EIO, true), ("third", libc::EINVAL, false)] {
        let mut failing = save(&image(name));
        let_fail(&mut failing, libc::SYS_fsync, directory as u32, errno);
        let output = failing.output().unwrap();
        let complaint = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{complaint}");
        let tells = complaint.contains("in place, though its name may not survive");
        assert_eq!(tells, is_told, "{complaint}");
        succeed(&["inspect", &image(name)]);
    }
}

/// In a directory such as /tmp anybody may put anything beside an image.
fn what_others_leave_behind_is_no_image() {
    if !installed("python3") {
        return;
    }
    let server = server("", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", ""), "one");
    let directory = tempfile::tempdir().unwrap();
    let image = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let save = ["save", "--keep", "--pid", &server.pid(), "--all", "--with-local", "-o"];
    let save = |image: &str| soccr(&[&save[..], &[image]].concat());
    // As a `soccr save` leaves it that was killed; no process ever has this number.
    let left = |name: &str| image(&format!(".{name}.4194304.tmp"));
    // It would wait for a writer.
    assert!(Command::new("mkfifo").arg(left("first")).status().unwrap().success());
    let mut saving = Program::start(&mut save(&image("first")));
    wait_until("it is saved", || saving.0.try_wait().unwrap().is_some());
    assert_eq!(saving.0.wait().unwrap().code(), Some(0));
    let left = left("second");
    std::fs::copy(image("first"), &left).unwrap();
    assert_eq!(save(&image("second")).stderr(Stdio::null()).status().unwrap().code(), Some(1));
    if let Err(error) = std::os::unix::fs::lchown(&left, Some(65533), None) {
        soccr_lab::skip(format_args!("this user may give no file away: {error}"));
        return;
    }
    assert_eq!(save(&image("second")).status().unwrap().code(), Some(0));
}

/// `soccr save -o /dev/stdout | …` would wait for itself.
fn a_pipe_is_not_read_to_see_whether_it_is_an_image() {
    if !installed("python3") {
        return;
    }
    let server = server("", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", ""), "one");
    let mut save =
        soccr(&["save", "--keep", "--pid", &server.pid(), "--all", "--with-local", "-o", "/dev/stdout"]);
    let mut save = Program::start(save.stdout(Stdio::piped()).stderr(Stdio::piped()));
    wait_until("it has ended", || save.0.try_wait().unwrap().is_some());
    let mut complaint = String::new();
    save.0.stderr.take().unwrap().read_to_string(&mut complaint).unwrap();
    assert!(complaint.contains("leave -o out"), "{complaint}");
}

/// A parent may keep the pipe open.
fn an_image_ends_though_its_writer_stays() {
    if !installed("python3") {
        return;
    }
    let server = server("old ", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", "old "), "old one");
    let image = succeed(&["save", "--pid", &server.pid(), "--all", "--with-local"]);
    let start = |arguments: &[&str]| {
        let mut command = soccr(arguments);
        let mut program = Program::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let mut writer = program.0.stdin.take().unwrap();
        std::io::Write::write_all(&mut writer, &image).unwrap();
        (program, writer)
    };
    let (mut inspect, _writer) = start(&["inspect", "--json", "-"]);
    wait_until("it has ended", || inspect.0.try_wait().unwrap().is_some());
    assert!(inspect.output().contains(&client.local_addr().unwrap().to_string()));
    let (_heir, _writer) = start(&["restore", "--", "python3", "-c", HEIR, "new "]);
    assert_eq!(ask(&mut client, "two", "new "), "new two");
}

/// Answers, and starts processes all the time, of which four run. They send nothing, which is an error while the connection is read.
const FORKING: &str = r#"
import os, select, socket, time
connection = socket.create_server(("127.0.0.1", 7)).accept()[0]
children = 0
while True:
    if os.fork() == 0:
        end = time.monotonic() + 0.01
        while time.monotonic() < end:
            connection.send(b"")
        os._exit(0)
    children += 1
    if select.select([connection], [], [], 0)[0]:
        data = connection.recv(65536)
        if not data:
            break
        connection.sendall(data)
    if children == 4:
        if os.wait()[1] != 0:
            break
        children -= 1
"#;

fn a_server_that_forks_is_saved() {
    if !installed("python3") {
        return;
    }
    let server = Program::start(&mut python(FORKING, &[]));
    let mut client = connect(([127, 0, 0, 1], 7));
    for _ in 0..20 {
        assert_eq!(ask(&mut client, "one", ""), "one");
        succeed(&["save", "--keep", "--pid", &server.pid(), "--all", "--with-local"]);
    }
    assert_eq!(ask(&mut client, "two", ""), "two");
}
