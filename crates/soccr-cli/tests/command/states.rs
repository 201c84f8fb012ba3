//! What programs send along with their connections reaches the program that gets them.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use soccr_handover::channel::{OneWay, Pair};
use soccr_handover::{Mover, Outcome};

use crate::programs::{Program, SOCCR, hear, installed, python, receive, soccr};

crate::tests![
    a_program_finds_the_state_beside_its_connection,
    a_recipient_gets_the_state_with_its_connection,
    what_cannot_go_with_its_state_stays,
    what_cannot_be_given_with_its_state_is_rescued_without,
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
    let mut target = soccr(&["receive"]);
    target.args(receive);
    send_to(&mut target)
}

fn send_to(target: &mut Command) -> ([TcpStream; 2], Vec<Outcome>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let clients = [(); 2].map(|()| TcpStream::connect(listener.local_addr().unwrap()).unwrap());
    let [first, second] = [(); 2].map(|()| listener.accept().unwrap().0);
    let mover = Mover::new().unwrap();
    let departing =
        [mover.take(first).unwrap(), mover.take(second).unwrap().with_critical_state("of the second")];
    let mut target = Program::start(target.stdin(Stdio::piped()).stdout(Stdio::piped()));
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

/// `soccr receive` under a limit of the shell.
fn limited(limit: &str, receive: &[&str]) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("ulimit {limit}; exec \"$@\""), "sh", SOCCR, "receive"]).args(receive);
    shell
}

/// The descriptors are enough for two connections, and not for a state; or a file may not be so large.
fn what_cannot_go_with_its_state_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let path = path.to_str().unwrap();
    let listener = UnixListener::bind(path).unwrap();
    // The first of the two arrives.
    std::thread::spawn(move || listener.incoming().for_each(|socket| drop(receive(&socket.unwrap()))));
    let (program, socket) = (["--", "true"], ["--send-fd", path]);
    for (limit, recipient) in [("-n 69", program), ("-n 66", socket), ("-f 0", program), ("-f 0", socket)] {
        let mut target = limited(limit, &recipient);
        let ([_, mut second], mut outcomes) = send_to(target.current_dir(&directory));
        let Some(Outcome::Stays(mut stays, error)) = outcomes.pop() else { panic!("{limit}") };
        assert!(error.to_string().contains("its state cannot be passed on"), "{limit}: {error}");
        stays.write_all(b"alive").unwrap();
        assert_eq!(hear(&mut second, 5), "alive");
    }
}

/// The source does not listen: both connections have left it.
fn what_cannot_be_given_with_its_state_is_rescued_without() {
    if !installed("python3") {
        return;
    }
    const GREETS: &str = "import os, socket
assert os.environ['LISTEN_FDS'] == '1', os.environ
socket.socket(fileno=3).sendall(b'alive')";
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut clients = [(); 2].map(|()| TcpStream::connect(listener.local_addr().unwrap()).unwrap());
    let [first, second] = [(); 2].map(|()| listener.accept().unwrap().0);
    let mover = Mover::new().unwrap();
    // Larger than a file may be there, unlike an image.
    let second = mover.take(second).unwrap().with_critical_state(vec![7; 100_000]);
    let stream = tempfile::NamedTempFile::new().unwrap();
    let sending = mover.sending([mover.take(first).unwrap(), second]).one_way();
    let outcomes = sending.through(&mut OneWay(stream.as_file()));
    assert!(outcomes.iter().all(Outcome::is_moved), "{outcomes:?}");
    drop((outcomes, mover));
    let mut target = limited("-f 20", &["--", "python3", "-c", GREETS]);
    target.current_dir(&directory).stdin(stream.reopen().unwrap());
    let output = target.output().unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(complaint.contains("saved in") && complaint.contains("is lost: no image has it"), "{complaint}");
    assert_eq!(crate::rescue::all_rescued(directory.path()).count(), 1, "{complaint}");
    assert_eq!(hear(&mut clients[0], 5), "alive");
}
