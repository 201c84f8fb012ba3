//! Which connections of which processes `send` moves.

use std::process::{Command, Stdio};

use soccr_lab::{Lab, Side};

use crate::programs::{HEIR, Program, SERVER, SOCCR, ask, connect, installed, run};

crate::tests![connections_are_chosen_by_process_and_by_peer];

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
