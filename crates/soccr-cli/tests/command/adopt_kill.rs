//! `--adopt` with one end killed: the connection is at the old server, in the queue of the new one, or has ended so that its
//! client sees it. Nobody hears nothing for good.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use soccr::connection::State;
use soccr::diag::{Diag, Socket};
use soccr_lab::{Call, Host, Lab, Side, programs_on_lo, run_and_kill, wait_until};

use crate::adopt::{adoption_works, epoll, wait_for_listener};
use crate::kill::{End, hand_over_by, moves, wait_until_dead};
use crate::programs::{Program, SOCCR, ask, connect, descriptors, json, soccr};

crate::tests![
    an_end_killed_between_two_messages_leaves_no_silence,
    a_source_killed_at_any_moment_leaves_no_silence,
    a_target_killed_at_any_moment_leaves_no_silence,
];

/// Clients of a server that listens no more, and another server.
struct Servers {
    lab: Lab,
    old: Program,
    new: Program,
    goal: Side,
    clients: Vec<TcpStream>,
}

impl Servers {
    fn start(goal: Side, count: usize) -> Self {
        let lab = Lab::new().unwrap();
        let old = lab.a.run(|| epoll("", "old ", count));
        let mut clients: Vec<TcpStream> =
            (0..count).map(|_| lab.peer.run(|| connect((lab.a.v4, 7)))).collect();
        clients.iter_mut().for_each(|client| assert_eq!(ask(client, "one", "old "), "old one"));
        lab.a.run(|| wait_for_listener(false));
        let new = lab.host(goal).run(|| {
            let new = epoll("", "new ", count);
            wait_for_listener(true);
            new
        });
        Self { lab, old, new, goal, clients }
    }

    fn receive(&self) -> String {
        format!("{SOCCR} receive --netns {} --adopt", self.new.pid())
    }

    /// Sends the connection of the first client, with a short silence about it afterwards.
    fn send(&self, via: &str) -> Command {
        let (pid, remote) = (self.old.pid(), self.clients[0].local_addr().unwrap().to_string());
        let sockets = json(&["list", "--json", "--pid", &pid]);
        let socket = sockets.iter().find(|socket| socket["remote"] == remote).expect("it is here");
        let fd = socket["processes"][0]["fd"].to_string();
        let mut send = soccr(&["send", "--pid", &pid, "--fd", &fd, "--via", via]);
        send.args(["--silence", "1"]);
        send
    }

    /// What has become of the connection of the first client: whose prefix it hears, if anybody's. Where the old server has it no
    /// more, it leaves the list.
    fn fate(&mut self, when: &str) -> Option<&'static str> {
        self.lab.host(self.goal).run(|| wait_until("no program is left", || programs_on_lo().unwrap() == 0));
        let local = self.clients[0].local_addr().unwrap();
        let is_here = |host: &Host| {
            let mut found = false;
            let visit =
                |socket: &Socket<'_>| found |= socket.remote == local && socket.state == State::Established;
            host.run(|| Diag::open().unwrap().visit(visit).unwrap());
            found
        };
        let side = if is_here(&self.lab.a) { Side::A } else { self.goal };
        self.lab.steer(side).unwrap();
        let client = &mut self.clients[0];
        let _ = client.write_all(b"two");
        let mut answer = [0; 7];
        match client.read_exact(&mut answer) {
            Ok(()) if &answer == b"old two" => return Some("old"),
            Ok(()) => assert_eq!(&answer, b"new two", "{when}"),
            Err(error) => assert_ne!(error.kind(), ErrorKind::WouldBlock, "silence: {when}"),
        }
        self.clients.remove(0);
        wait_until("the old server has closed it", || {
            descriptors(&self.old.pid()).len() == self.clients.len()
        });
        (&answer == b"new two").then_some("new")
    }
}

fn an_end_killed_between_two_messages_leaves_no_silence() {
    if !adoption_works() {
        return;
    }
    for (goal, boundary) in moves() {
        for victim in [End::Source, End::Target] {
            let mut servers = Servers::start(goal, 1);
            let send = |via: &str| servers.send(via);
            hand_over_by(send, &servers.receive(), (boundary, 1), &[victim], Signal::KILL);
            let fate = servers.fate(&format!("{victim:?} killed at {boundary:?}, to {goal:?}"));
            eprintln!("{victim:?} dies at {boundary:?}, to {goal:?}: {fate:?}");
        }
    }
}

fn a_source_killed_at_any_moment_leaves_no_silence() {
    if !adoption_works() {
        return;
    }
    let forks = |call: &Call| [libc::SYS_clone, libc::SYS_clone3, libc::SYS_vfork].contains(&call.number);
    at_any_moment(forks, |servers, directory, look| {
        let receive = servers.receive();
        let via = format!("cd {}; echo $$ > new; mv new pid; exec {receive}", directory.display());
        run_and_kill(servers.send(&via).stderr(Stdio::null()), look)
    });
}

fn a_target_killed_at_any_moment_leaves_no_silence() {
    if !adoption_works() {
        return;
    }
    let speaks = |call: &Call| call.number == libc::SYS_write && call.arguments[0] == 1;
    at_any_moment(speaks, |servers, directory, look| {
        for pipe in ["back", "forth"] {
            let made = Command::new("mkfifo").arg(directory.join(pipe)).status().unwrap();
            assert!(made.success());
        }
        let directory = directory.display();
        let via = format!("cat {directory}/back & exec cat > {directory}/forth");
        let mut source = servers.send(&via).stderr(Stdio::null()).spawn().unwrap();
        let receive = format!("exec {} < {directory}/forth > {directory}/back", servers.receive());
        let killed = run_and_kill(Command::new("sh").args(["-c", &receive]).stderr(Stdio::null()), look);
        source.wait().unwrap();
        killed
    });
}

/// Part of a look at other processes, of which a machine may have any number.
fn looks_around(call: &Call) -> bool {
    let calls = [
        libc::SYS_openat,
        libc::SYS_fcntl,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_getdents64,
        libc::SYS_readlink,
        libc::SYS_readlinkat,
        libc::SYS_read,
        libc::SYS_close,
    ];
    calls.contains(&call.number)
}

/// Hands one connection after the other over, with one end killed at a later system call each time: from that where it `begins` to
/// deal with the other end, until nothing is left to be killed.
fn at_any_moment(
    begins: fn(&Call) -> bool,
    mut hand_over: impl FnMut(&Servers, &Path, &mut dyn FnMut(&Call) -> bool) -> bool,
) {
    /// Not each of some hundred calls has a meaning of its own.
    const STRIDE: usize = 41;
    const MOST: usize = 150;
    let mut servers = Servers::start(Side::A, MOST);
    let mut fates = Vec::new();
    for turn in 0..MOST {
        let directory = tempfile::tempdir().unwrap();
        let mut calls = 0;
        let killed = hand_over(&servers, directory.path(), &mut |call| {
            calls += usize::from(begins(call) || calls > 0 && !looks_around(call));
            calls > STRIDE * turn + 1
        });
        if let Ok(pid) = std::fs::read_to_string(directory.path().join("pid")) {
            wait_until_dead(pid.trim().parse().unwrap());
        }
        fates.push(servers.fate(&format!("killed at call {calls}")));
        if !killed {
            break;
        }
    }
    eprintln!("{} times killed: {fates:?}", fates.len() - 1);
    assert!(fates[0] == Some("old") && fates.last() == Some(&Some("new")), "{fates:?}");
}
