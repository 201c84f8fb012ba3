//! What programs send along with their connections reaches the program that gets them.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;

use soccr_handover::channel::Pair;
use soccr_handover::{Mover, Outcome};

use crate::programs::{Program, hear, installed, python, soccr};

crate::tests![
    a_program_finds_the_state_beside_its_connection,
    a_recipient_gets_the_state_with_its_connection,
];

/// Says to the second client what its state is, once it has found that nobody can change it.
const HEIR: &str = r#"
import os, socket
assert os.environ["LISTEN_FDS"] == "3", os.environ
assert os.environ["LISTEN_FDNAMES"] == "connection:connection:state-4", os.environ
try:
    os.pwrite(5, b"x", 0)
except PermissionError:
    socket.socket(fileno=4).sendall(os.read(5, 100))
"#;

/// The same of what comes through a UNIX socket.
const RECIPIENT: &str = r#"
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("listening", flush=True)
text, fds, _, _ = socket.recv_fds(listener.accept()[0], 65536, 253)
first, second, rest = text.decode().split("\n")
assert len(first.split()) == 2 and second.split()[2] == "state" and len(fds) == 3 and not rest, text
socket.socket(fileno=fds[1]).sendall(os.read(fds[2], 100))
"#;

/// Sends two connections to `soccr receive`, the second with a state; their clients, and what becomes of them.
fn send(receive: &[&str]) -> ([TcpStream; 2], Vec<Outcome>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let clients = [(); 2].map(|()| TcpStream::connect(listener.local_addr().unwrap()).unwrap());
    let [first, second] = [(); 2].map(|()| listener.accept().unwrap().0);
    let mover = Mover::new().unwrap();
    let departing =
        [mover.take(first).unwrap(), mover.take(second).unwrap().with_critical_state("of the second")];
    let mut target = soccr(&["receive"]);
    target.args(receive).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut target = Program::start(&mut target);
    let (write, read) = (target.0.stdin.take().unwrap(), target.0.stdout.take().unwrap());
    let outcomes = mover.send_all(departing, &mut Pair { read, write });
    target.0.wait().unwrap();
    (clients, outcomes)
}

fn a_program_finds_the_state_beside_its_connection() {
    if !installed("python3") {
        return;
    }
    let ([_, mut second], outcomes) = send(&["--", "python3", "-c", HEIR]);
    assert!(outcomes.iter().all(Outcome::is_moved), "{outcomes:?}");
    assert_eq!(hear(&mut second, 13), "of the second");
}

fn a_recipient_gets_the_state_with_its_connection() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let path = path.to_str().unwrap();
    let mut recipient = Program::start(&mut python(RECIPIENT, &[path]));
    BufReader::new(recipient.0.stdout.as_mut().unwrap()).read_line(&mut String::new()).unwrap();
    let ([_, mut second], outcomes) = send(&["--send-fd", path]);
    assert!(outcomes.iter().all(Outcome::is_moved), "{outcomes:?}");
    assert_eq!(hear(&mut second, 13), "of the second");
}
