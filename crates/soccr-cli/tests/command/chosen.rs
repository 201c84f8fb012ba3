//! Which connections of which processes `send` moves.

use std::io::{BufRead, BufReader, Seek};
use std::process::{Command, Stdio};

use soccr_lab::{Lab, Side};

use crate::programs::{HEIR, Program, SERVER, SOCCR, ask, connect, installed, python, run, soccr};

crate::tests![
    connections_are_chosen_by_process_and_by_peer,
    descendants_that_have_ended_or_hide_are_no_obstacle,
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
