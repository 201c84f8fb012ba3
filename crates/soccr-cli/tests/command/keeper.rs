//! What the keeper is there for: whoever is killed, asked to end or stopped leaves no socket in repair mode, and no process that stands
//! still.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::Mutex;
use std::thread;

use rustix::net::sockopt::socket_reuseaddr;
use rustix::process::{Pid, Signal, kill_process};
use soccr_lab::{Call, Lab, Side, run_and_kill, run_and_watch, wait_until};

use crate::kill::*;
use crate::programs::{
    Program, SOCCR, Said, ask, assert_runs, assert_unlocked, connect, descriptors, installed, python, server,
    soccr,
};
use crate::targets::Answers;
use crate::transfer::Move;

crate::tests![
    a_socket_does_not_stay_in_repair,
    who_asks_both_processes_to_end_leaves_no_socket_in_repair,
    a_terminal_does_not_stop_what_others_wait_for,
    a_killed_keeper_costs_no_connection,
    what_is_half_put_back_does_not_come_to_life,
    what_a_save_has_half_put_back_does_not_come_to_life,
    what_a_save_cannot_put_back_stays_silent_and_is_told,
];

fn a_socket_does_not_stay_in_repair() {
    if !installed("python3") {
        return;
    }
    let server = server("", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", ""), "one");
    let fd = descriptors(&server.pid()).remove(0);
    // No longer than for a look: whoever shares the socket is stopped as well.
    let reuses_address = || {
        use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
        let process = pidfd_open(Pid::from_raw(server.0.id() as i32).unwrap(), PidfdFlags::empty()).unwrap();
        let socket = pidfd_getfd(process, fd.parse().unwrap(), PidfdGetfdFlags::empty()).unwrap();
        socket_reuseaddr(&socket).unwrap()
    };
    // Repair mode lasts from the first call that sets TCP_REPAIR to the second.
    let mut steps = 1;
    loop {
        let (mut set, mut after) = (0, 0);
        let mut save = soccr(&["save", "--keep", "--pid", &server.pid(), "--fd", &fd]);
        let killed = run_and_kill(save.stdout(Stdio::null()), |call| {
            set += u32::from(sets_repair(call));
            after += u32::from(set == 1);
            after > steps
        });
        assert_runs(&server.pid());
        assert_eq!(ask(&mut client, "more", ""), "more", "killed after {steps} calls");
        assert!(reuses_address(), "SO_REUSEADDR, killed after {steps} calls");
        if !killed {
            break;
        }
        steps += 7;
    }
    assert!(steps > 7, "it was killed in repair mode");
}

fn sets_repair(call: &Call) -> bool {
    let option = [libc::SOL_TCP as u64, libc::TCP_REPAIR as u64];
    call.number == libc::SYS_setsockopt && call.arguments[1..3] == option
}

/// As systemd(1) does, and `pkill soccr`.
fn who_asks_both_processes_to_end_leaves_no_socket_in_repair() {
    if !installed("python3") {
        return;
    }
    let server = server("", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", ""), "one");
    let network = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let here = network("thread-self");
    let is_ours = |pid: &Pid| {
        let pid = pid.to_string();
        let program = std::fs::read_link(format!("/proc/{pid}/exe"));
        program.is_ok_and(|program| program == Path::new(SOCCR)) && network(&pid) == here
    };
    let mut asked = Vec::new();
    let mut save = soccr(&["save", "--keep", "--pid", &server.pid(), "--all", "--with-local"]);
    let (mut set, mut after) = (0, 0);
    let code = run_and_watch(save.stdout(Stdio::null()), |call| {
        set += u32::from(sets_repair(call));
        after += u32::from(set == 1);
        if after == 5 && asked.is_empty() {
            asked.extend(soccr_handover::foreign::process::all().unwrap().into_iter().filter(is_ours));
            // The keeper first, which must not end before it is needed.
            asked.iter().rev().for_each(|pid| kill_process(*pid, Signal::TERM).unwrap());
        }
    });
    assert_eq!((code, asked.len()), (None, 2), "killed");
    assert_runs(&server.pid());
    assert_eq!(ask(&mut client, "more", ""), "more");
}

/// The processes stand still, and Ctrl-Z does not reach the keeper.
fn a_terminal_does_not_stop_what_others_wait_for() {
    if !installed("python3") {
        return;
    }
    for kind in [CONNECTION, COMMIT] {
        let mut moving = Move::new(1);
        // In a group of its own: the kernel does not stop one that nobody could make go on.
        let send = |via: &str| {
            let mut send = moving.send(&["--all", "--via", via]);
            send.process_group(0);
            send
        };
        let boundary = (Boundary(End::Source, kind), 1);
        let status = hand_over_by(send, &moving.receive(), boundary, &[End::Source], Signal::TSTP);
        assert_eq!(status.code(), Some(0), "{kind}");
        moving.assert_lives_at(Side::B, "new ");
        moving.end();
    }
}

/// Accepts a connection, and looks at it when it is told to.
const BUSY: &str = r#"
import socket, sys
connection = socket.create_server(("", 7)).accept()[0]
for line in sys.stdin:
    connection.sendall(b"old " + connection.recv(65536))
"#;

/// It dies between COMMIT and TAKEN, when the connection is nowhere but in the memory of the source, and the target dies too.
fn a_killed_keeper_costs_no_connection() {
    if !installed("python3") {
        return;
    }
    for goal in [Side::A, Side::B] {
        let lab = Lab::new().unwrap();
        let mut old = lab.a.run(|| Program::start(python(BUSY, &[]).stdin(Stdio::piped())));
        let mut tell = old.0.stdin.take().unwrap();
        let clients = vec![lab.peer.run(|| connect((lab.a.v4, 7)))];
        wait_until("it is accepted", || lab.a.run(|| descriptors(&old.pid()).len() == 1));
        let host = lab.host(goal);
        let beside = host.run(|| Program::start(Command::new("sleep").arg("1000")));
        let mut moving = Move { lab, old, clients, beside, goal, directory: ".".into() };
        let boundary = (Boundary(End::Source, COMMIT), 1);
        let status = hand_over_until(&moving, boundary, &[End::Keeper, End::Target], Signal::KILL);
        assert_eq!(status.code(), Some(1), "to {goal:?}");
        assert_runs(&moving.old.pid());
        moving.lab.a.run(assert_unlocked);
        writeln!(tell).unwrap();
        moving.assert_lives_at(Side::A, "old ");
    }
}

/// The source dies while it puts a connection back, before that has its unread bytes again: without them it must not go on.
fn what_is_half_put_back_does_not_come_to_life() {
    if !installed("python3") {
        return;
    }
    let lab = Lab::new().unwrap();
    let mut old = lab.a.run(|| Program::start(python(BUSY, &[]).stdin(Stdio::piped()).stderr(Stdio::null())));
    let tell = old.0.stdin.take().unwrap();
    let mut client = lab.peer.run(|| connect((lab.a.v4, 7)));
    wait_until("it is accepted", || lab.a.run(|| descriptors(&old.pid()).len() == 1));
    client.write_all(b"first").unwrap();
    let target = Answers::refusing_behind_the_commit();
    let mut send = soccr(&["send", "--pid", &old.pid(), "--all", "--via", &target.command()]);
    // It is taken from its socket by connecting that to nowhere, and put back by connecting it to its peer.
    let (mut connects, mut is_back) = (0, false);
    let killed = run_and_kill(send.stderr(Stdio::null()), |call| {
        let now = is_back;
        connects += u32::from(call.number == libc::SYS_connect);
        is_back = connects == 2;
        now
    });
    assert!(killed);
    stays_silent(old, tell, client);
}

/// The same, where the image could not be finished: somebody else has put one there.
fn what_a_save_has_half_put_back_does_not_come_to_life() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let mut old = Program::start(python(BUSY, &[]).stdin(Stdio::piped()).stderr(Stdio::null()));
    let tell = old.0.stdin.take().unwrap();
    let mut client = connect(([127, 0, 0, 1], 7));
    wait_until("it is accepted", || descriptors(&old.pid()).len() == 1);
    client.write_all(b"first").unwrap();
    let mut save = soccr(&["save", "--pid", &old.pid(), "--all", "--with-local", "-o"]);
    let (mut connects, mut is_back) = (0, false);
    let killed = run_and_kill(save.arg(&image).stderr(Stdio::null()), |call| {
        let now = is_back;
        connects += u32::from(call.number == libc::SYS_connect);
        if connects == 1 {
            std::fs::write(&image, "another").unwrap();
        }
        is_back = connects == 2;
        now
    });
    assert!(killed);
    stays_silent(old, tell, client);
}

/// Reads to the end of its client, and has a filter from then on that drops every FIN, and that nothing takes off any more. Says something
/// when it is told to.
const LOCKED: &str = r#"
import ctypes, socket, struct, sys
connection = socket.create_server(("127.0.0.1", 7)).accept()[0]
while connection.recv(100):
    pass
# The flags of the TCP header; BPF_LD, BPF_JMP, BPF_RET, BPF_RET.
code = b"".join(struct.pack("HBBI", *step) for step in [(0x30, 0, 0, 13), (0x45, 0, 1, 1), (6, 0, 0, 0), (6, 0, 0, 0xffffffff)])
buffer = ctypes.create_string_buffer(code, len(code))
connection.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HP", 4, ctypes.addressof(buffer)))
connection.setsockopt(socket.SOL_SOCKET, 44, 1)
print("filtered", flush=True)
sys.stdin.readline()
connection.sendall(b"old")
"#;

/// The peer's FIN, which must be played to the socket, does not get through.
fn what_a_save_cannot_put_back_stays_silent_and_is_told() {
    if !installed("python3") {
        return;
    }
    cannot_be_put_back("did not arrive", |save, watch| run_and_watch(save, watch));
}

/// The save fails for a reason with `why` in it. It is run by `run`, which is to show each of its calls.
pub fn cannot_be_put_back(
    why: &str,
    mut run: impl FnMut(&mut Command, &mut (dyn FnMut(&Call) + Send)) -> Option<i32>,
) {
    for to_file in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        let mut old = Program::start(python(LOCKED, &[]).stdin(Stdio::piped()).stderr(Stdio::null()));
        let tell = old.0.stdin.take().unwrap();
        let client = connect(([127, 0, 0, 1], 7));
        client.shutdown(Shutdown::Write).unwrap();
        let mut said = [0; 9];
        old.0.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
        let mut save = soccr(&["save", "--pid", &old.pid(), "--fd", &descriptors(&old.pid()).remove(0)]);
        let complaints = Said::new();
        save.stderr(complaints.output());
        // Read until the connection leaves its socket; what comes then is the end of the image.
        let (reader, writer) = std::io::pipe().unwrap();
        let reader = Mutex::new(Some(reader));
        match to_file {
            true => save.arg("-o").arg(&image),
            false => save.stdout(writer),
        };
        let code = thread::scope(|scope| {
            scope.spawn(|| {
                wait_until("nobody is to read any more", || match &mut *reader.lock().unwrap() {
                    Some(reader) if rustix::io::ioctl_fionread(&reader).unwrap() > 0 => {
                        reader.read(&mut [0; 4096]).unwrap() == 0
                    }
                    reader => reader.is_none(),
                });
            });
            let mut connects = 0;
            run(&mut save, &mut |call| {
                connects += u32::from(call.number == libc::SYS_connect);
                if connects == 1 {
                    reader.lock().unwrap().take();
                    std::fs::write(&image, "another").unwrap();
                }
            })
        });
        let complaints = complaints.read();
        assert_eq!(code, Some(if to_file { 1 } else { 4 }), "{complaints}");
        if to_file {
            let left = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path());
            let left: Vec<_> = left.filter(|path| *path != image).collect();
            assert!(
                left.len() == 1 && complaints.contains(left[0].to_str().unwrap()),
                "{left:?} {complaints}"
            );
        } else {
            assert!(complaints.contains("it is lost") && complaints.contains(why), "{complaints}");
        }
        stays_silent(old, tell, client);
    }
}

/// The server looks at its connection and ends with an error, and its client hears nothing.
fn stays_silent(mut old: Program, mut tell: ChildStdin, mut client: TcpStream) {
    let _ = client.write_all(b"second");
    writeln!(tell).unwrap();
    wait_until("the server has an error", || old.0.try_wait().unwrap().is_some());
    client.set_nonblocking(true).unwrap();
    let silence = client.read(&mut [0]).unwrap_err();
    assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock);
}
