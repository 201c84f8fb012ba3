//! A server of OpenSSL whose session the kernel has: its connection goes on in this process, and its client, another OpenSSL,
//! notices nothing.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open};
use soccr::Flow;
use soccr::tls::Cipher;
use soccr_lab::wait_until;
use tempfile::TempDir;

use crate::ends::{LIMIT, leave, settle_and_lock};

const MOVES: usize = 20;

pub const CIPHERS: [(&str, Cipher); 4] = [
    ("ECDHE-ECDSA-AES128-GCM-SHA256", Cipher::AesGcm128),
    ("ECDHE-ECDSA-AES256-GCM-SHA384", Cipher::AesGcm256),
    ("ECDHE-ECDSA-AES128-CCM", Cipher::AesCcm128),
    ("ECDHE-ECDSA-CHACHA20-POLY1305", Cipher::ChaCha20Poly1305),
];

pub const CONFIGURATION: &str = "openssl_conf = init
[init]
ssl_conf = ssl
[ssl]
system_default = defaults
[defaults]
Options = KTLS
";

pub fn openssl(directory: &Path, arguments: &str) -> Command {
    let mut command = Command::new("openssl");
    command.args(arguments.split(' ')).current_dir(directory).env("OPENSSL_CONF", "configuration");
    command
}

/// A program that ends with the test.
pub struct Program(pub Child);

impl Program {
    pub fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    /// It gets this to send.
    pub fn say(&mut self, text: &str) {
        self.0.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// What it has received.
    #[track_caller]
    fn assert_heard(&mut self, text: &str) {
        let mut heard = vec![0; text.len()];
        self.0.stdout.as_mut().unwrap().read_exact(&mut heard).unwrap();
        assert_eq!(String::from_utf8_lossy(&heard), text);
    }

    pub fn complaints(mut self) -> String {
        let mut text = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder with certificate, key and configuration; `None` where OpenSSL or kernel TLS is not there.
pub fn make_certificate() -> Option<TempDir> {
    if Command::new("openssl").arg("version").output().is_err() {
        soccr_lab::skip("openssl is not installed");
        return None;
    }
    crate::ends::Ends::plain()?;
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("configuration"), CONFIGURATION).unwrap();
    let request = "req -x509 -config configuration -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
                   -keyout key -out certificate -days 1 -subj /CN=localhost";
    assert!(openssl(directory.path(), request).stderr(Stdio::null()).status().unwrap().success());
    Some(directory)
}

pub fn a_session_of_openssl_goes_on_here() {
    let Some(directory) = make_certificate() else { return };
    for (port, (name, cipher)) in (4433..).zip(CIPHERS) {
        go_on(directory.path(), port, name, cipher);
    }
}

fn go_on(directory: &Path, port: u16, name: &str, cipher: Cipher) {
    let flags = format!("-quiet -tls1_2 -cipher {name}");
    let server = format!("s_server {flags} -cert certificate -key key -accept 127.0.0.1:{port}");
    let client = format!("s_client {flags} -connect 127.0.0.1:{port}");
    let mut server = Program::start(&mut openssl(directory, &server));
    wait_for_listener(port);
    let mut client = Program::start(&mut openssl(directory, &client));
    client.say("to the server\n");
    server.assert_heard("to the server\n");
    server.say("to the client\n");
    client.assert_heard("to the client\n");

    let socket = socket_of(server.pid(), port);
    kill_process(server.pid(), Signal::STOP).unwrap();
    client.say("unread\n");
    let lock = settle_and_lock(&socket);
    let connection = leave(TcpStream::from(socket));
    let tls = connection.tls.as_ref().unwrap();
    assert_eq!((tls.cipher, tls.transmit.is_some(), tls.receive.is_some()), (cipher, true, true));
    // In repair mode its end is silent.
    drop(server);
    let restored = connection.restore().unwrap();
    lock.release().unwrap();
    let mut ours = restored.resume().unwrap();
    ours.set_nonblocking(false).unwrap();
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    hear(&mut ours, "unread\n");
    for number in 0..MOVES {
        let long = format!("{number} {}\n", "all work and no play ".repeat(number * number));
        client.say(&long);
        ours.write_all(long.as_bytes()).unwrap();
        let lock = settle_and_lock(&ours);
        let connection = leave(ours);
        let restored = connection.restore().unwrap();
        lock.release().unwrap();
        ours = restored.resume().unwrap();
        ours.set_read_timeout(Some(LIMIT)).unwrap();
        client.assert_heard(&long);
        hear(&mut ours, &long);
    }
    drop(ours);
    let complaints = client.complaints();
    assert!(!complaints.contains("alert") && !complaints.contains("bad record"), "{complaints}");
}

#[track_caller]
fn hear(stream: &mut TcpStream, text: &str) {
    let mut heard = vec![0; text.len()];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(String::from_utf8_lossy(&heard), text);
}

pub fn wait_for_listener(port: u16) {
    wait_until("the server listens", || {
        let mut listens = false;
        soccr::diag::Diag::open().unwrap().visit(|socket| listens |= socket.local.port() == port).unwrap();
        listens
    });
}

/// The end of the connection that the server has.
pub fn socket_of(pid: Pid, port: u16) -> OwnedFd {
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let connected = |socket: &OwnedFd| {
        let fd = socket.as_fd();
        rustix::net::getpeername(fd).is_ok() && Flow::of(&fd).is_ok_and(|flow| flow.local.port() == port)
    };
    let sockets = (3..32).filter_map(|number| pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).ok());
    sockets.into_iter().find(connected).expect("the server has a connection")
}
