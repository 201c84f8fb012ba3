//! Programs that the tests run.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Output, Stdio};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;
use soccr_lab::{LIMIT, wait_until};

/// A server that accepts connections one after the other, as many as its second argument says, and answers everything with
/// its first argument in front. What ends a connection it prints. With KTLS in its environment the kernel encrypts and decrypts
/// with these keys.
pub const SERVER: &str = r#"
import os, socket, sys, threading
address = sys.argv[3]
family = socket.AF_INET6 if ":" in address else socket.AF_INET
listener = socket.create_server((address, 7), family=family, backlog=64, dualstack_ipv6=address == "::")
keys = bytes.fromhex(os.environ.get("KTLS", ""))
def serve(connection):
    if keys:
        connection.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
        connection.setsockopt(282, 1, keys)
        connection.setsockopt(282, 2, keys)
    try:
        while data := connection.recv(65536):
            connection.sendall(sys.argv[1].encode() + data)
        os.write(1, b"end\n")
    except OSError as error:
        os.write(1, b"errno %d\n" % error.errno) # in one piece, beside other threads
threads = []
for _ in range(int(sys.argv[2])):
    threads.append(threading.Thread(target=serve, args=[listener.accept()[0]]))
    threads[-1].start()
for thread in threads:
    thread.join()
"#;

/// The program that takes connections over: it finds them as systemd passes them.
pub const HEIR: &str = r#"
import os, socket, sys, threading
assert os.environ["LISTEN_PID"] == str(os.getpid())
count = int(os.environ["LISTEN_FDS"])
assert os.environ["LISTEN_FDNAMES"].split(":") == ["connection"] * count
def serve(connection):
    while data := connection.recv(65536):
        connection.sendall(sys.argv[1].encode() + data)
for fd in range(3, 3 + count):
    threading.Thread(target=serve, args=[socket.socket(fileno=fd)]).start()
"#;

/// A process that ends with the test.
#[derive(Debug)]
pub struct Program(pub Child);

impl Program {
    pub fn start(command: &mut Command) -> Self {
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    pub fn pid(&self) -> String {
        self.0.id().to_string()
    }

    /// Waits for its end; what it has printed.
    pub fn output(mut self) -> String {
        let mut text = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        self.0.wait().unwrap();
        text
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What programs say goes into a file: a pipe would be open as long as the last of them lives.
#[derive(Debug)]
pub struct Said(File);

impl Said {
    pub fn new() -> Self {
        Self(tempfile::tempfile().unwrap())
    }

    pub fn output(&self) -> Stdio {
        self.0.try_clone().unwrap().into()
    }

    /// What has been said until now. It reads by a description of its own: the programs share their place in the file with this one, and
    /// would write where it reads.
    pub fn read(&self) -> String {
        let bytes = std::fs::read(format!("/proc/self/fd/{}", self.0.as_raw_fd())).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Whether a program is installed; says so loudly where it is not.
pub fn installed(program: &str) -> bool {
    let found =
        Command::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap().status.success();
    if !found {
        soccr_lab::skip(format_args!("{program} is not in PATH"));
    }
    found
}

pub fn python(script: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command.args(["-c", script]).args(arguments).stdout(Stdio::piped());
    command
}

/// Starts the server in the network of the calling thread.
pub fn server(prefix: &str, connections: usize) -> Program {
    server_at("", prefix, connections)
}

/// Starts the server with this address; `::` stands for both families.
pub fn server_at(address: &str, prefix: &str, connections: usize) -> Program {
    Program::start(&mut server_command(address, prefix, connections))
}

pub fn server_command(address: &str, prefix: &str, connections: usize) -> Command {
    python(SERVER, &[prefix, &connections.to_string(), address])
}

/// Connects, as soon as somebody listens.
pub fn connect(address: impl Into<SocketAddr>) -> TcpStream {
    let address = address.into();
    let mut stream = None;
    wait_until("the server listens", || {
        stream = TcpStream::connect(address).ok();
        stream.is_some()
    });
    let stream = stream.unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// The next connection to a listener.
pub fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let mut stream = None;
    wait_until("somebody connects", || {
        stream = listener.accept().ok();
        stream.is_some()
    });
    let (stream, _) = stream.unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Says something and returns the answer, which is longer by the prefix.
pub fn ask(stream: &mut TcpStream, text: &str, prefix: &str) -> String {
    stream.write_all(text.as_bytes()).unwrap();
    hear(stream, prefix.len() + text.len())
}

pub fn hear(stream: &mut TcpStream, length: usize) -> String {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

/// The lines and the connections of the next message that a recipient of descriptors gets.
pub fn receive(socket: &UnixStream) -> (String, Vec<TcpStream>) {
    const MOST: usize = 253; // SCM_MAX_FD
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut text = vec![0; 1 << 16];
    let message =
        recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    text.truncate(message.bytes);
    let descriptors = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
        _ => Vec::new(),
    });
    (String::from_utf8(text).unwrap(), descriptors.map(TcpStream::from).collect())
}

pub fn soccr(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_soccr"));
    command.args(arguments);
    command
}

/// The path of the command, for the shell.
pub const SOCCR: &str = env!("CARGO_BIN_EXE_soccr");

pub fn run(arguments: &[&str]) -> Output {
    soccr(arguments).output().unwrap()
}

/// What the command complains about. That a busy kernel has swallowed the packets by which the estimates come back is
/// nothing that these tests are about.
pub fn complaints(stderr: &[u8]) -> String {
    let is_estimate = |line: &&str| {
        let names = ["rtt", "rto", "rcv_ssthresh", "snd_cwnd", "snd_ssthresh"];
        names.iter().any(|name| line.contains(&format!("not brought back: {name}: ")))
    };
    String::from_utf8_lossy(stderr).split_inclusive('\n').filter(|line| !is_estimate(line)).collect()
}

/// Runs the command, which must succeed in silence; its standard output.
pub fn succeed(arguments: &[&str]) -> Vec<u8> {
    let output = run(arguments);
    let complaint = complaints(&output.stderr);
    assert!(output.status.success() && complaint.is_empty(), "{arguments:?}: {}: {complaint}", output.status);
    output.stdout
}

/// Runs the command, which must fail with this exit code; what it complains about.
pub fn fail(code: i32, arguments: &[&str]) -> String {
    let output = run(arguments);
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {complaint}");
    complaint
}

pub fn json(arguments: &[&str]) -> Vec<Value> {
    serde_json::from_slice(&succeed(arguments)).unwrap()
}

/// The descriptors of the connections that a process has.
pub fn descriptors(pid: &str) -> Vec<String> {
    let sockets = json(&["list", "--json", "--pid", pid]);
    let savable = sockets.iter().filter(|socket| socket["savable"] == true);
    savable.map(|socket| socket["processes"][0]["fd"].to_string()).collect()
}

/// Neither stopped nor traced, as soon as whoever did that has ended.
pub fn assert_runs(pid: &str) {
    wait_until("the process runs", || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let stopped = status.contains("State:\tT") || status.contains("State:\tt");
        status.contains("TracerPid:\t0\n") && !stopped
    });
}

/// No lock is left in the network of the calling thread.
pub fn assert_unlocked() {
    assert_eq!(soccr::lock::PersistentLock::list().unwrap(), []);
}
