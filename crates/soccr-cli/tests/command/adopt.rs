//! `--adopt`: connections move into servers that know nothing of it. As root, on Linux 6.9; skipped elsewhere.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use soccr::adopt::Adopter;
use soccr::connection::State;
use soccr::diag::{Diag, Socket};
use soccr::lock::PersistentLock;
use soccr_lab::{Family, Lab, TcpInfo, obstacle_to_bpf, programs_on_lo, run_and_kill, sysctl, wait_until};

use crate::programs::{Program, SOCCR, ask, connect, descriptors, fail, installed, python, soccr, succeed};

crate::tests![
    connections_enter_another_server_on_the_same_port,
    a_saved_connection_enters_a_server,
    a_server_at_another_address_gets_what_is_mapped,
    what_the_server_does_not_accept_is_told_and_lives,
    without_a_server_they_stay,
    what_a_full_queue_does_not_take_is_saved_and_told,
    servers_that_share_a_port_share_what_comes,
    every_byte_arrives_while_an_ipv4_client_talks,
    every_byte_arrives_while_an_ipv6_client_talks,
    a_killed_soccr_leaves_no_client_in_silence,
    the_demonstration_moves_between_servers,
];

/// A plain server: epoll, accept in a loop. Closes its listener after as many connections as its second argument says.
/// SIGUSR1 ends its work between two answers. What it has not answered stays in the queue, where the kernel sees it.
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
            data = connections[fd].recv(65536, socket.MSG_PEEK)
        except OSError:
            pass
        if data:
            connections[fd].sendall(prefix + data)
            connections[fd].recv(len(data))
        else:
            poll.unregister(fd)
            connections.pop(fd).close()
print("pausing", flush=True)
signal.pause()
"#;

pub fn epoll(address: &str, prefix: &str, connections: usize) -> Program {
    Program::start(&mut python(EPOLL, &[prefix, &connections.to_string(), address]))
}

/// Whether this user can put connections into accept queues. Says why, where not.
pub fn adoption_works() -> bool {
    match Adopter::new() {
        Ok(_) => installed("python3"),
        Err(error) => {
            eprintln!("\nSKIPPED: {}\n", obstacle_to_bpf([6, 9], error));
            false
        }
    }
}

/// Waits until somebody listens on the port of the servers, or nobody does.
pub fn wait_for_listener(wanted: bool) {
    wait_until("a server listens, or listens no more", || {
        let mut found = false;
        let visit = |socket: &Socket<'_>| found |= socket.state == State::Listen && socket.local.port() == 7;
        Diag::open().unwrap().visit(visit).unwrap();
        found == wanted
    });
}

/// Sends all connections of a process into the queue of whoever listens on their port.
pub fn adopt_all(pid: &str, receive: &str) {
    let via = format!("{SOCCR} receive {receive} --adopt");
    // Those with a peer on this host, too.
    let send = ["send", "--pid", pid, "--all", "--with-local", "--via", &via];
    let output = soccr(&send).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    let complains =
        complaint.lines().any(|line| line.contains("soccr: ") && !line.contains("not brought back"));
    assert!(output.status.success() && !complains, "{}: {complaint}", output.status);
}

fn connections_enter_another_server_on_the_same_port() {
    if !adoption_works() {
        return;
    }
    let lab = Lab::new().unwrap();
    let (near, far) = (SocketAddr::from(([127, 0, 0, 1], 7)), SocketAddr::from((lab.a.v4, 7)));
    let from = [("0.0.0.0", far), ("::", far), ("192.0.2.1", far), ("127.0.0.1", near), ("::", near)];
    for (address, server) in from {
        let count = 20;
        let old = lab.a.run(|| epoll(address, "old ", count));
        let host = if server == near { &lab.a } else { &lab.peer };
        let mut clients: Vec<TcpStream> = (0..count).map(|_| host.run(|| connect(server))).collect();
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

fn a_server_at_another_address_gets_what_is_mapped() {
    if !adoption_works() {
        return;
    }
    let (lab, client, old, directory) = saved_unread();
    let image = directory.path().join("image");
    let listener = lab.a.run(|| TcpListener::bind((lab.a.v4, 8))).unwrap();
    let accepting = thread::spawn(move || listener.accept().unwrap());
    // Nothing translates here, so the peer is one that nobody is.
    let client = client.local_addr().unwrap();
    let nobody = SocketAddr::new([198, 51, 100, 77].into(), client.port());
    let maps = [format!("{0}:7={0}:8", lab.a.v4), format!("{client}={nobody}")];
    let command = ["restore", image.to_str().unwrap(), "--adopt", "--map", &maps[0], "--map", &maps[1]];
    lab.a.run(|| succeed(&command));
    let (mut there, peer) = accepting.join().unwrap();
    assert_eq!((there.local_addr().unwrap(), peer), ((lab.a.v4, 8).into(), nobody));
    let mut unread = [0; 6];
    there.read_exact(&mut unread).unwrap();
    assert_eq!(&unread, b"unread");
    drop(old);
}

fn what_the_server_does_not_accept_is_told_and_lives() {
    if !adoption_works() {
        return;
    }
    let (lab, mut client, old, directory) = saved_unread();
    let image = directory.path().join("image");
    let listener = lab.a.run(|| TcpListener::bind((lab.a.v4, 7))).unwrap();
    let output = lab.a.run(|| soccr(&["restore", image.to_str().unwrap(), "--adopt"]).output()).unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{complaint}");
    assert!(complaint.contains("it stays there, alive, until the server accepts it"), "{complaint}");
    client.write_all(b", more").unwrap();
    let (mut there, _) = listener.accept().unwrap();
    let mut read = [0; 12];
    there.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"unread, more");
    there.write_all(b"answer").unwrap();
    client.read_exact(&mut read[..6]).unwrap();
    assert_eq!(&read[..6], b"answer");
    drop(old);
}

/// A connection with bytes that its server had not read, in a file; its server, stopped.
fn saved_unread() -> (Lab, TcpStream, Program, tempfile::TempDir) {
    let lab = Lab::new().unwrap();
    let old = lab.a.run(|| epoll("", "old ", 1));
    let mut client = lab.peer.run(|| connect((lab.a.v4, 7)));
    wait_until("it is accepted", || !descriptors(&old.pid()).is_empty());
    let pid = Pid::from_raw(old.pid().parse().unwrap()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    client.write_all(b"unread").unwrap();
    wait_until("it has arrived", || TcpInfo::of(&client).unwrap().unacknowledged == 0);
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    lab.a.run(|| {
        let fd = descriptors(&old.pid()).remove(0);
        succeed(&["save", "--pid", &old.pid(), "--fd", &fd, "-o", image.to_str().unwrap()]);
    });
    (lab, client, old, directory)
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

/// Killed at one system call after the other, from when the connection is in a socket of soccr's to the end.
fn a_killed_soccr_leaves_no_client_in_silence() {
    /// Not each of some hundred calls has a meaning of its own.
    const STRIDE: usize = 5;
    if !adoption_works() {
        return;
    }
    let lab = Lab::new().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let old = lab.a.run(|| TcpListener::bind(("0.0.0.0", 7))).unwrap();
    let total = 1000;
    let mut clients: Vec<(TcpStream, TcpStream)> = Vec::new();
    for _ in 0..total / STRIDE {
        clients.push((lab.peer.run(|| connect((lab.a.v4, 7))), old.accept().unwrap().0));
    }
    drop(old);
    let _new = lab.a.run(|| epoll("", "new ", total));
    let (mut answered, mut ended) = (0, 0);
    for (step, (mut client, ours)) in (0..).step_by(STRIDE).zip(clients) {
        client.write_all(b"two").unwrap();
        wait_until("it is there", || TcpInfo::of(&ours).unwrap().unread == 3);
        let killed = lab.a.run(|| {
            wait_for_listener(true);
            let paused = soccr::pause(&ours).unwrap();
            soccr_image::save_file(&image, &paused.save().unwrap()).unwrap();
            paused.detach().unwrap();
            let (mut repairs, mut calls) = (0, 0);
            let mut restore = soccr(&["restore", image.to_str().unwrap(), "--adopt"]);
            let killed = run_and_kill(restore.stderr(Stdio::null()), |call| {
                let option = [libc::SOL_TCP as u64, libc::TCP_REPAIR as u64];
                // On for the restore, and off again.
                calls += usize::from(repairs >= 2);
                repairs += usize::from(call.number == libc::SYS_setsockopt && call.arguments[1..3] == option);
                calls > step
            });
            wait_until("nothing is left", || {
                programs_on_lo().unwrap() == 0 && PersistentLock::list().unwrap().is_empty()
            });
            killed
        });
        // Nobody may be left who hears nothing, whatever he says.
        let _ = client.write_all(b"!");
        let (mut answer, mut byte) = (Vec::new(), [0]);
        while !answer.ends_with(b"!") {
            match client.read(&mut byte) {
                Ok(1..) => answer.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("silence after {step} calls"),
                _ => break,
            }
        }
        match &answer[..] {
            // In one piece, or in two.
            b"new two!" | b"new twonew !" => answered += 1,
            b"" if killed => ended += 1,
            other => panic!("{other:?} after {step} calls"),
        }
        if !killed {
            assert!(ended > 0 && answered > 1, "{ended} of {} ended", ended + answered);
            return;
        }
    }
    panic!("it makes more than {total} calls");
}

/// Listens, and accepts nothing.
const IDLER: &str = r#"
import signal, socket
listener = socket.create_server(("", 7), backlog=1)
signal.pause()
"#;

fn what_a_full_queue_does_not_take_is_saved_and_told() {
    if !adoption_works() {
        return;
    }
    let lab = Lab::new().unwrap();
    let count = 5;
    let old = lab.a.run(|| epoll("", "old ", count));
    let mut clients: Vec<TcpStream> = (0..count).map(|_| lab.peer.run(|| connect((lab.a.v4, 7)))).collect();
    clients.iter_mut().for_each(|client| assert_eq!(ask(client, "one", "old "), "old one"));
    let directory = tempfile::tempdir().unwrap();
    let output = lab.a.run(|| {
        wait_for_listener(false);
        let _new = Program::start(&mut python(IDLER, &[]));
        wait_for_listener(true);
        let via = format!("{SOCCR} receive --adopt");
        let mut send = soccr(&["send", "--pid", &old.pid(), "--all", "--via", &via]);
        send.current_dir(directory.path()).output().unwrap()
    });
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{complaint}");
    assert!(complaint.contains("is full") && complaint.contains("no connection is lost"), "{complaint}");
    // The kernel lets one more in than the backlog says.
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), count - 2, "{complaint}");
}

/// Two processes listen on one port by SO_REUSEPORT: each names itself in its answers.
const SHARED: &str = r#"
import select, socket, sys
listener = socket.create_server(("", 7), backlog=100, reuse_port=True)
poll, connections = select.epoll(), {}
poll.register(listener, select.EPOLLIN)
while True:
    for fd, _ in poll.poll():
        if fd == listener.fileno():
            connection, _ = listener.accept()
            connections[connection.fileno()] = connection
            poll.register(connection, select.EPOLLIN)
        elif data := connections[fd].recv(100):
            connections[fd].sendall(sys.argv[1].encode() + data)
        else:
            poll.unregister(fd)
            del connections[fd]
"#;

fn servers_that_share_a_port_share_what_comes() {
    if !adoption_works() {
        return;
    }
    let count = 20;
    let lab = Lab::new().unwrap();
    let old = lab.a.run(|| epoll("", "old ", count));
    let mut clients: Vec<TcpStream> = (0..count).map(|_| lab.peer.run(|| connect((lab.a.v4, 7)))).collect();
    clients.iter_mut().for_each(|client| assert_eq!(ask(client, "one", "old "), "old one"));
    lab.a.run(|| {
        wait_for_listener(false);
        let listeners = || {
            let mut found = 0;
            let visit = |socket: &Socket<'_>| {
                found += usize::from(socket.state == State::Listen && socket.local.port() == 7);
            };
            Diag::open().unwrap().visit(visit).unwrap();
            found
        };
        let _servers = ["one ", "two "].map(|name| Program::start(&mut python(SHARED, &[name])));
        wait_until("both listen", || listeners() == 2);
        let via = format!("{SOCCR} receive --adopt");
        let output = soccr(&["send", "--pid", &old.pid(), "--all", "--via", &via]).output().unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{complaint}");
        assert!(complaint.contains("several processes listen on 192.0.2.1:7"), "{complaint}");
        let mut names: Vec<String> =
            clients.iter_mut().map(|client| ask(client, "two", "one ")[..4].to_owned()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names, ["one ", "two "], "all {count} to one of them");
    });
}

/// Ends a conversation, also where an assertion fails.
pub struct End<'a>(pub &'a AtomicBool);

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

fn every_byte_arrives_while_an_ipv4_client_talks() {
    talk_while_moving(Family::V4, moves(10));
}

fn every_byte_arrives_while_an_ipv6_client_talks() {
    talk_while_moving(Family::V6, moves(10));
}

/// How often a connection moves. `SOCCR_MOVES=1000` makes a test long.
pub fn moves(few: usize) -> usize {
    std::env::var("SOCCR_MOVES").map_or(few, |number| number.parse().unwrap())
}

fn talk_while_moving(family: Family, moves: usize) {
    if !adoption_works() {
        return;
    }
    let lab = Lab::new().unwrap();
    let address = if family == Family::V4 { "0.0.0.0" } else { "::" };
    let start = || {
        let mut server = epoll(address, "", 1);
        let stdout = BufReader::new(server.0.stdout.take().unwrap());
        (server, stdout)
    };
    // With the kernel's own limit a flood fills buffers of 33 MB, which take longer to move than a client waits.
    lab.a.run(|| sysctl("net/ipv4/tcp_rmem", "4096 131072 1048576")).unwrap();
    let mut old = lab.a.run(start);
    let client = lab.peer.run(|| connect(lab.a.address(family, 7)));
    // A busy machine may take long for a few moves in a row, between which a server answers nothing.
    client.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
    // Said over and over.
    let bytes: Vec<u8> =
        (0..1 << 20).map(|place: usize| (place.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let talk = scope.spawn(|| {
            let (mut client, mut sent) = (&client, 0);
            for chunk in bytes.chunks(4096).cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
                client.write_all(chunk).unwrap();
                sent += chunk.len();
            }
            client.shutdown(Shutdown::Write).unwrap();
            sent
        });
        let listen = scope.spawn(|| {
            let (mut buffer, mut heard) = (vec![0; 65536], 0);
            loop {
                // As far as the bytes go before they begin anew.
                let expected = &bytes[heard % bytes.len()..];
                let room = expected.len().min(buffer.len());
                match (&client).read(&mut buffer[..room]).unwrap() {
                    0 => return heard,
                    count => {
                        assert!(buffer[..count] == expected[..count], "other bytes behind {heard}");
                        heard += count;
                    }
                }
            }
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
        eprintln!("{moves} moves, {sent} bytes");
        assert_eq!(heard, sent);
    });
}
