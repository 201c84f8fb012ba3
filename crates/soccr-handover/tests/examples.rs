//! The examples, run as their readers run them.

use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use soccr::steer::Steering;
use soccr_handover::Mover;
use soccr_lab::{Flags, LIMIT, Lab, Lan, Side, Sniffer, wait_until};

soccr_lab::tests![
    a_server_is_replaced_three_times,
    who_connects_while_a_server_is_replaced_is_served,
    what_has_come_before_a_predecessor_breaks_off_is_served,
    a_server_with_tls_is_replaced,
    a_chat_room_moves_while_everybody_talks,
    a_proxy_moves_between_two_answers,
    a_balancer_leaves_the_data_path,
    a_container_runtime_moves_what_its_process_has,
];

struct Example(Child);

impl Example {
    fn start(name: &str, arguments: &[&str]) -> Self {
        // Cargo does so by itself only where all tests of the package are asked for. An emulated machine takes what its host has built.
        if std::env::var_os("SOCCR_EMULATED").is_none() {
            let cargo = Command::new(env!("CARGO"))
                .args(["build", "--quiet", "-p", "soccr-handover", "--features", "foreign,tokio"])
                .args(["--example", name])
                .status();
            assert!(cargo.unwrap().success());
        }
        let path: PathBuf = std::env::current_exe().unwrap();
        let path = path.parent().unwrap().parent().unwrap().join("examples").join(name);
        let command = Command::new(&path).args(arguments).stdout(Stdio::piped()).spawn();
        Self(command.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    fn says(&mut self) -> String {
        let mut line = String::new();
        // Unbuffered, so that nothing is lost between two calls.
        let mut reader = BufReader::with_capacity(1, self.0.stdout.as_mut().unwrap());
        reader.read_line(&mut line).unwrap();
        line
    }

    fn ends(&mut self) {
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address.parse::<SocketAddr>().unwrap()).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

#[track_caller]
fn hears(mut stream: &TcpStream, expected: &str) {
    let mut bytes = vec![0; expected.len()];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), expected);
}

fn says(mut stream: &TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).unwrap();
}

fn a_server_is_replaced_three_times() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let arguments = ["127.0.0.1:7", path.to_str().unwrap()];
    let mut server = Example::start("replace", &arguments);
    assert_eq!(server.says(), "serving 0 clients\n");
    let (one, two) = (connect("127.0.0.1:7"), connect("127.0.0.1:7"));
    says(&one, "hello\nhalf");
    hears(&one, "1: hello\n");
    for round in 1..4 {
        says(&two, "x\n");
        hears(&two, &format!("{round}: x\n"));
        let successor = Example::start("replace", &arguments);
        let mut before = std::mem::replace(&mut server, successor);
        assert_eq!(server.says(), "serving 2 clients\n");
        assert_eq!(before.says(), "given away\n");
        before.ends();
    }
    says(&one, " a line\n");
    hears(&one, "2: half a line\n");
    // It serves new clients, too.
    let three = connect("127.0.0.1:7");
    says(&three, "new\n");
    hears(&three, "1: new\n");
}

fn who_connects_while_a_server_is_replaced_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let arguments = ["127.0.0.1:7", path.to_str().unwrap()];
    let mut server = Example::start("replace", &arguments);
    assert_eq!(server.says(), "serving 0 clients\n");
    let (is_over, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !is_over.load(SeqCst) {
                    let client = connect("127.0.0.1:7");
                    says(&client, "x\n");
                    hears(&client, "1: x\n");
                    served.fetch_add(1, SeqCst);
                }
            });
        }
        for _ in 0..5 {
            let before = served.load(SeqCst);
            wait_until("some are served", || served.load(SeqCst) > before + 20);
            let successor = Example::start("replace", &arguments);
            let mut before = std::mem::replace(&mut server, successor);
            assert!(server.says().starts_with("serving "));
            assert_eq!(before.says(), "given away\n");
            before.ends();
        }
        is_over.store(true, SeqCst);
    });
}

/// The predecessor is killed between two streams, and breaks the protocol in the second one.
fn what_has_come_before_a_predecessor_breaks_off_is_served() {
    let stream = || {
        let listener = std::net::TcpListener::bind("127.0.0.1:7").unwrap();
        let client = connect("127.0.0.1:7");
        (listener.accept().unwrap().0, client)
    };
    // With TCP, as chat and proxy have it.
    for (name, state, question, answer) in [
        ("chat", &b"Ada\n"[..], "hello\n", "Ada: hello\n"),
        ("proxy", &[], "GET / HTTP/1.1\r\nHost: here\r\n\r\n", "HTTP/1.1 200 OK\r\n"),
    ] {
        let control = std::net::TcpListener::bind("127.0.0.1:9").unwrap();
        let (ours, client) = stream();
        let mut successor = Example::start(name, &["127.0.0.1:7", "127.0.0.1:9", "take"]);
        let mut channel = control.accept().unwrap().0;
        drop(control);
        let mover = Mover::new().unwrap();
        assert!(mover.take(ours).unwrap().with_state(state).send(&mut channel).is_moved());
        channel.write_all(b"this is no stream").unwrap();
        drop(channel);
        assert!(successor.says().starts_with("1 "), "{name}");
        says(&client, question);
        hears(&client, answer);
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let control = UnixListener::bind(&path).unwrap();
    let (ours, client) = stream();
    let mut successor = Example::start("replace", &["127.0.0.1:7", path.to_str().unwrap()]);
    let mut channel = control.accept().unwrap().0;
    send_descriptor(&channel, ours.try_clone().unwrap());
    let mover = Mover::new().unwrap();
    assert!(mover.take(ours).unwrap().with_state(7u64.to_le_bytes()).send(&mut channel).is_moved());
    channel.write_all(b"this is no stream").unwrap();
    drop(channel);
    assert_eq!(successor.says(), "serving 1 clients\n");
    says(&client, "x\n");
    hears(&client, "8: x\n");
}

/// As a predecessor passes its listener on.
fn send_descriptor(channel: &UnixStream, descriptor: TcpStream) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    sendmsg(channel, &[IoSlice::new(b"L")], &mut control, SendFlags::empty()).unwrap();
}

/// The clients are openssl and curl, and the kernel of this machine encrypts for the server, which moves between processes and
/// between hosts.
fn a_server_with_tls_is_replaced() {
    let (probe, directory) =
        (std::net::TcpListener::bind("127.0.0.1:0").unwrap(), tempfile::tempdir().unwrap());
    let probe = TcpStream::connect(probe.local_addr().unwrap()).unwrap();
    if let Err(error) = soccr_lab::set_option(&probe, 6, 31, b"tls") {
        soccr_lab::skip(format_args!("the kernel has no TLS (modprobe tls): {error}"));
        return;
    }
    let certificate = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost \
                       -keyout key -out certificate";
    let mut openssl = Command::new("openssl");
    match openssl.current_dir(&directory).stderr(Stdio::null()).args(certificate.split(' ')).status() {
        Ok(status) => assert!(status.success()),
        Err(error) => return soccr_lab::skip(format_args!("openssl: {error}")),
    }
    let lab = Lab::new().unwrap();
    let mut resets = Sniffer::flagged(&lab.peer.namespace, "eth0", Flags::RST).unwrap();
    let path = |name| directory.path().join(name).to_str().unwrap().to_owned();
    let (address, socket) = (format!("{}:7", lab.a.v4), path("socket"));
    let arguments = [&address[..], &socket, &path("certificate"), &path("key")];
    let serve_on = |side: Side| lab.host(side).run(|| Example::start("replace", &arguments));
    let mut server = serve_on(Side::A);
    assert_eq!(server.says(), "serving 0 clients\n");
    let start = |command: &str| {
        let mut words = command.split(' ');
        let mut client = Command::new(words.next().unwrap());
        client.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        match lab.peer.run(|| client.spawn()) {
            Ok(client) => Some(Example(client)),
            Err(error) => {
                soccr_lab::skip(format_args!("{command}: {error}"));
                None
            }
        }
    };
    // What curl uploads comes back in numbered lines, for which it needs to know no more of HTTP than that there is an answer.
    let curl = format!("--http0.9 -sNk -H Expect: -T . https://{address}/");
    let mut clients: Vec<Example> = [
        format!("openssl s_client -quiet -tls1_2 -connect {address}"),
        format!("openssl s_client -quiet -tls1_3 -connect {address}"),
        format!("curl --tls-max 1.2 {curl}"),
        format!("curl --tlsv1.3 {curl}"),
    ]
    .iter()
    .filter_map(|command| start(command))
    .collect();
    let count = clients.len();
    let mut lines = vec![0; count];
    let mut talk = || {
        for (client, lines) in clients.iter_mut().zip(&mut lines) {
            writeln!(client.0.stdin.as_mut().unwrap(), "hello").unwrap();
            loop {
                *lines += 1;
                let answer = client.says();
                let line = answer.strip_prefix(&format!("{lines}: ")).expect("one line after the other");
                if line == "hello\n" {
                    break;
                }
            }
        }
    };
    talk();
    for side in [Side::A, Side::B, Side::B, Side::A] {
        let mut before = std::mem::replace(&mut server, serve_on(side));
        assert_eq!(server.says(), format!("serving {count} clients\n"));
        assert_eq!(before.says(), "given away\n");
        before.ends();
        lab.steer(side).unwrap();
        talk();
    }
    assert_eq!(resets.segments().unwrap().len(), 0);
}

fn a_container_runtime_moves_what_its_process_has() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let mut server = Example::start("replace", &["127.0.0.1:7", &path("replace")]);
    assert_eq!(server.says(), "serving 0 clients\n");
    let client = connect("127.0.0.1:7");
    says(&client, "hello\n");
    hears(&client, "1: hello\n");
    let (socket, pid) = (path("move"), server.0.id().to_string());
    let here = format!("/proc/{}/task/{}/ns/net", std::process::id(), rustix::thread::gettid());
    // Other shells know no descriptors of two digits.
    let echo = "exec cat <&$CONNECTIONS >&$CONNECTIONS";
    let mut taker = Example::start("container", &["take", &socket, &here, "bash", "-c", echo]);
    assert_eq!(taker.says(), "waiting\n");
    let mut giver = Example::start("container", &["give", &socket, &pid]);
    assert_eq!(giver.says(), "1 of 1 have moved\n");
    giver.ends();
    says(&client, "without a number\n");
    hears(&client, "without a number\n");
    // The server has noticed that this client is gone, and serves the next one.
    let next = connect("127.0.0.1:7");
    says(&next, "hello\n");
    hears(&next, "1: hello\n");
    drop(client);
    taker.ends();
}

fn a_chat_room_moves_while_everybody_talks() {
    const LINES: usize = 6000;
    let addresses = ["127.0.0.1:7", "127.0.0.1:9"];
    let mut room = Example::start("chat", &addresses);
    assert_eq!(room.says(), "0 talk\n");
    let ada = connect("127.0.0.1:7");
    says(&ada, "Ada\nhello\n");
    hears(&ada, "Ada: hello\n");
    let bob = connect("127.0.0.1:7");
    says(&bob, "Bob\nhi\n");
    hears(&bob, "Bob: hi\n");
    hears(&ada, "Bob: hi\n");
    let line = |number: usize| format!("{number} {}\n", "x".repeat(1000));
    let mut successor = None;
    thread::scope(|scope| {
        // Half a line is always under way.
        scope.spawn(|| (0..LINES).for_each(|number| says(&ada, &line(number))));
        for number in 0..LINES {
            hears(&ada, &format!("Ada: {}", line(number)));
            if number == LINES / 3 {
                successor = Some(Example::start("chat", &[&addresses[..], &["take"]].concat()));
            }
        }
    });
    assert_eq!(room.says(), "moved\n");
    room.ends();
    assert_eq!(successor.as_mut().unwrap().says(), "2 talk\n");
    // Bob has not listened: most of it has never been in a socket of the first room.
    (0..LINES).for_each(|number| hears(&bob, &format!("Ada: {}", line(number))));
    says(&bob, "bye\n");
    hears(&bob, "Bob: bye\n");
    hears(&ada, "Bob: bye\n");
}

fn a_proxy_moves_between_two_answers() {
    let addresses = ["127.0.0.1:7", "127.0.0.1:9"];
    let answers = |proxy: &Example, client: &TcpStream| {
        let body = format!("process {}\n", proxy.0.id());
        hears(client, &format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n", body.len()));
        let mut rest = Vec::new();
        while !rest.ends_with(body.as_bytes()) {
            let mut byte = [0];
            { client }.read_exact(&mut byte).unwrap();
            rest.push(byte[0]);
        }
    };
    let mut proxy = Example::start("proxy", &addresses);
    assert_eq!(proxy.says(), "0 connections\n");
    let clients: Vec<TcpStream> = (0..10).map(|_| connect("127.0.0.1:7")).collect();
    for client in &clients {
        says(client, "GET / HTTP/1.1\r\nHost: here\r\n\r\n");
        answers(&proxy, client);
    }
    for moves in 1..4 {
        // Half a request each, read or not.
        clients.iter().for_each(|client| says(client, "GET / HTTP/1.1\r\nHo"));
        let mut successor = Example::start("proxy", &[&addresses[..], &["take"]].concat());
        assert_eq!(successor.says(), "10 connections\n", "move {moves}");
        assert_eq!(proxy.says(), "moved\n");
        proxy.ends();
        proxy = successor;
        for client in &clients {
            says(client, "st: there\r\n\r\n");
            answers(&proxy, client);
        }
    }
}

fn a_balancer_leaves_the_data_path() {
    let lan = Lan::new().unwrap();
    let mut resets = Sniffer::flagged(&lan.peer.namespace, "eth0", Flags::RST).unwrap();
    let on = |host: usize, arguments: &[&str]| {
        let mut program = lan.hosts[host].run(|| Example::start("offload", arguments));
        assert_eq!(program.says(), "ready\n");
        program
    };
    let _a = on(1, &["backend", "a", "192.0.2.2", "192.0.2.1:9000"]);
    let _b = on(2, &["backend", "b", "192.0.2.3", "192.0.2.1:9000"]);
    let _front = on(0, &["front", "192.0.2.1:80", "192.0.2.1:9000", "192.0.2.2", "192.0.2.3"]);
    let mut client = lan.peer.run(|| connect("192.0.2.1:80"));
    // To the one, to the other by way of the front, and back.
    for (backend, length) in [("a", 10), ("a", 300_000), ("b", 4096), ("b", 0), ("a", 1_000_000)] {
        write!(client, "GET /{backend}/{length} HTTP/1.1\r\n\r\n").unwrap();
        hears(&client, &format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{}", "x".repeat(length)));
        // Who answers is seen: where the connection is.
        let host = if backend == "a" { 1 } else { 2 };
        let steered = lan.hosts[0].run(|| Steering::list().unwrap()[0].contents().unwrap());
        assert_eq!(steered.len(), 1);
        assert_eq!(steered[0].next_hop, std::net::IpAddr::from(lan.hosts[host].v4));
    }
    assert_eq!(resets.segments().unwrap().len(), 0);
}
