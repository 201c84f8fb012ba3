//! Connections that their peers have reset, among others, on their way to a recipient: the others do not suffer for it.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};
use soccr::Connection;
use soccr_image::stream::Writer;
use soccr_lab::{State, TcpInfo, attach_filter, wait_until};

use crate::programs::{Program, accept, hear, receive, soccr};

crate::tests![
    a_recipient_of_descriptors_gets_them_with_the_others,
    no_recipient_gets_them_and_nothing_is_lost,
    what_its_peer_has_ended_is_not_called_lost,
    a_relay_serves_the_others,
    a_relay_tells_the_server_whose_they_were,
];

/// Four connections in one image: the second has been reset by its peer, behind some last words; the last waits for the answer of a
/// peer that is deaf.
struct Saved {
    image: String,
    /// The peers of the first and the third.
    clients: [TcpStream; 2],
    /// Lines `LOCAL REMOTE`.
    names: Vec<String>,
    deaf: TcpListener,
}

fn saved(directory: &Path) -> Saved {
    let listener = TcpListener::bind("127.0.0.1:7").unwrap();
    let mut pairs: Vec<_> = (0..3)
        .map(|_| {
            let client = TcpStream::connect("127.0.0.1:7").unwrap();
            (client, listener.accept().unwrap().0)
        })
        .collect();
    drop(listener);
    let (mut resetting, ours) = pairs.remove(1);
    let reset_by = resetting.local_addr().unwrap();
    resetting.write_all(b"last words").unwrap();
    sockopt::set_socket_linger(&resetting, Some(Duration::ZERO)).unwrap();
    drop(resetting);
    wait_until("the reset has arrived", || TcpInfo::of(&ours).unwrap().state == State::Close);
    let deaf = TcpListener::bind("127.0.0.1:8").unwrap();
    attach_filter(&deaf, &[libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0 }]).unwrap();
    let waiting = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
    let goal = deaf.local_addr().unwrap();
    connect(&waiting, &goal).unwrap_err();
    let [(first, one), (third, three)] = <[_; 2]>::try_from(pairs).unwrap();
    let peers = [first.local_addr().unwrap(), reset_by, third.local_addr().unwrap(), goal];
    let mut writer = Writer::new(Vec::new()).unwrap();
    let mut names = Vec::new();
    for ((number, socket), peer) in (1..).zip([one, ours, three, waiting.into()]).zip(peers) {
        let paused = soccr::pause(&socket).unwrap().with_peer(peer);
        let connection = paused.save().unwrap();
        paused.detach().unwrap();
        writer.connection(number, "", &connection).unwrap();
        names.push(format!("{} {}", connection.local, connection.remote));
    }
    let image = directory.join("image").to_str().unwrap().to_owned();
    fs::write(&image, writer.finish().unwrap()).unwrap();
    Saved { image, clients: [first, third], names, deaf }
}

/// Runs a command in this directory; its exit code and what it complains about.
fn run(directory: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let output = soccr(arguments).current_dir(directory).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// What the peer had said before it reset the connection is heard first.
fn assert_tells_the_reset(stream: &mut TcpStream) {
    assert_eq!(hear(stream, 10), "last words");
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

fn a_recipient_of_descriptors_gets_them_with_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let Saved { image, mut clients, names, deaf: _deaf } = saved(directory.path());
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let recipient = std::thread::spawn(move || receive(&listener.accept().unwrap().0));
    let (code, complaint) = run(directory.path(), &["restore", &image, "--send-fd", path.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{complaint}");
    let (text, mut streams) = recipient.join().unwrap();
    assert_eq!(text.lines().collect::<Vec<_>>(), names);
    assert_tells_the_reset(&mut streams[1]);
    for (client, stream) in clients.iter_mut().zip([0, 2]) {
        client.write_all(b"more").unwrap();
        assert_eq!(hear(&mut streams[stream], 4), "more");
    }
    assert_eq!(TcpInfo::of(&streams[3]).unwrap().state, State::SynSent);
}

fn no_recipient_gets_them_and_nothing_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let Saved { image, names, deaf: _deaf, clients: _clients } = saved(directory.path());
    let [_, hidden] = crate::rescue::broken_programs(directory.path());
    let (code, complaint) = run(directory.path(), &["restore", &image, "--", &hidden]);
    assert_eq!(code, Some(126), "{complaint}");
    assert!(complaint.contains("no connection is lost: each is saved"), "{complaint}");
    let rescued = crate::rescue::all_rescued(directory.path());
    let rescued: Vec<Connection> = rescued.map(|path| soccr_image::load_file(path).unwrap()).collect();
    for (number, name) in names.iter().enumerate() {
        let named = |of: &&Connection| format!("{} {}", of.local, of.remote) == *name;
        let connection = rescued.iter().find(named).unwrap();
        assert_eq!(connection.control.reset, number == 1);
        assert_eq!(connection.receive_queue, if number == 1 { b"last words" } else { &b""[..] });
    }
}

fn what_its_peer_has_ended_is_not_called_lost() {
    let directory = tempfile::tempdir().unwrap();
    let Saved { image, names, deaf: _deaf, clients: _clients } = saved(directory.path());
    let [_, hidden] = crate::rescue::broken_programs(directory.path());
    // Nobody can write there.
    let output = soccr(&["restore", &image, "--", &hidden])
        .current_dir("/proc")
        .env("TMPDIR", "/proc")
        .output()
        .unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{complaint}");
    assert!(complaint.contains("3 of 4 connections are lost"), "{complaint}");
    for (number, name) in names.iter().enumerate() {
        let what = if number == 1 { "it has ended, and cannot be saved" } else { "it is lost" };
        assert!(complaint.contains(&format!("{name}: {what}: ")), "{complaint}");
    }
}

fn a_relay_serves_the_others() {
    relays(&[], |_| String::new());
}

fn a_relay_tells_the_server_whose_they_were() {
    relays(&["--proxy-protocol", "1"], |name| {
        let ends: Vec<SocketAddr> = name.split(' ').map(|end| end.parse().unwrap()).collect();
        let [local, remote] = ends[..] else { panic!("{name}") };
        format!("PROXY TCP4 {} {} {} {}\r\n", remote.ip(), local.ip(), remote.port(), local.port())
    });
}

fn relays(protocol: &[&str], header: impl Fn(&str) -> String) {
    let directory = tempfile::tempdir().unwrap();
    let Saved { image, mut clients, names, deaf: _deaf } = saved(directory.path());
    let server = TcpListener::bind("127.0.0.1:9").unwrap();
    let mut relay = soccr(&["restore", &image, "--connect", "127.0.0.1:9"]);
    let mut relay = Program::start(relay.args(protocol).current_dir(directory.path()));
    // The first only asks whether the server is there.
    drop(accept(&server));
    let mut streams: Vec<TcpStream> = names.iter().map(|_| accept(&server)).collect();
    for (stream, name) in streams.iter_mut().zip(&names) {
        let header = header(name);
        assert_eq!(hear(stream, header.len()), header);
    }
    assert_tells_the_reset(&mut streams[1]);
    for (client, stream) in clients.iter_mut().zip([0, 2]) {
        client.write_all(b"more").unwrap();
        assert_eq!(hear(&mut streams[stream], 4), "more");
        streams[stream].write_all(b"yes").unwrap();
        assert_eq!(hear(client, 3), "yes");
    }
    assert!(relay.0.try_wait().unwrap().is_none(), "it relays the last one still");
}
