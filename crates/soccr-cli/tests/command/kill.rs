//! Either end of a hand-over killed, or asked to end, at every boundary between two records: the connection lives on exactly one side.
//!
//! The test is the pipe between the two ends. It passes one record after the other, and kills an end when the record
//! that is a boundary has been written and before it is read.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};
use soccr::lock::PersistentLock;
use soccr::{Flow, Lock};
use soccr_lab::{Call, Side, run_and_kill, run_and_watch, wait_until};

use crate::programs::{SOCCR, assert_runs, assert_unlocked, installed, json, soccr};
use crate::transfer::Move;

crate::tests![
    a_killed_source_leaves_one_connection,
    a_source_killed_before_it_lets_go_leaves_no_silence,
    a_killed_target_leaves_one_connection,
    what_has_been_taken_before_the_source_is_killed_has_moved,
    a_source_that_is_asked_to_end_finishes_what_it_has_begun,
    a_target_that_is_asked_to_end_finishes_what_it_has_begun,
    a_killed_starter_costs_no_connection,
    a_lock_that_somebody_else_removes_is_no_error,
];

/// The kinds of records, by their numbers in the stream.
pub const PREAMBLE: u16 = 0;
pub const CONNECTION: u16 = 1;
pub const BEGIN: u16 = 3;
pub const COMMIT: u16 = 4;
pub const READY: u16 = 6;
pub const TAKEN: u16 = 8;
pub const END: u16 = 9;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Source,
    /// The second process of the source.
    Keeper,
    Target,
    /// The process that has been started as the target, which the target is a child of.
    Starter,
}

/// A record that is written by one of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boundary(pub End, pub u16);

pub const BOUNDARIES: [Boundary; 9] = [
    Boundary(End::Source, PREAMBLE),
    Boundary(End::Source, BEGIN),
    Boundary(End::Source, CONNECTION),
    Boundary(End::Source, COMMIT),
    Boundary(End::Source, END),
    Boundary(End::Target, PREAMBLE),
    Boundary(End::Target, READY),
    Boundary(End::Target, TAKEN),
    Boundary(End::Target, END),
];

/// Every boundary, for a move to another host and for one to another program of the same.
pub fn moves() -> impl Iterator<Item = (Side, Boundary)> {
    [Side::B, Side::A].into_iter().flat_map(|goal| BOUNDARIES.map(|boundary| (goal, boundary)))
}

fn a_killed_source_leaves_one_connection() {
    if !installed("python3") {
        return;
    }
    for (goal, boundary) in moves() {
        let mut moving = Move::to(goal, 1);
        eprintln!("the source dies at {boundary:?}, to {goal:?}");
        let status = hand_over(&moving, End::Source, boundary, Signal::KILL);
        assert_eq!(status.code(), None, "{boundary:?}: killed");
        let stays = [PREAMBLE, BEGIN, CONNECTION, READY].contains(&boundary.1);
        if stays {
            assert_runs(&moving.old.pid());
            moving.lab.a.run(assert_unlocked);
            moving.assert_lives_at(Side::A, "old ");
            assert_nobody_has_it(&moving);
        } else {
            moving.assert_lives_at(goal, "new ");
            moving.clients.clear();
            assert_eq!(moving.old.output(), "errno 103\n", "{boundary:?}");
        }
    }
}

fn a_source_killed_before_it_lets_go_leaves_no_silence() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(2);
    // It takes a connection from its socket by connecting that to nowhere.
    let lets_go = |call: &Call| call.number == libc::SYS_connect;
    let mut send = moving.send(&["--all", "--via", &moving.receive()]);
    assert!(run_and_kill(send.stderr(Stdio::null()), lets_go), "it was killed");
    assert_runs(&moving.old.pid());
    moving.lab.a.run(assert_unlocked);
    moving.assert_lives_at(Side::A, "old ");
}

fn a_killed_target_leaves_one_connection() {
    if !installed("python3") {
        return;
    }
    for (goal, boundary) in moves() {
        let mut moving = Move::to(goal, 1);
        eprintln!("the target dies at {boundary:?}, to {goal:?}");
        let status = hand_over(&moving, End::Target, boundary, Signal::KILL);
        let was_taken = matches!(boundary, Boundary(_, TAKEN | END));
        assert_nobody_has_it(&moving);
        if was_taken {
            // Unless it has said that it has given the connection away, nobody knows.
            let code = if boundary.1 == END && boundary.0 == End::Target { 0 } else { 3 };
            assert_eq!(status.code(), Some(code), "{boundary:?}");
            // It was the target's, and ends with it like any connection of a process that is killed.
            moving.lab.steer(goal).unwrap();
            let mut client = moving.clients.remove(0);
            let _ = client.write_all(b"more");
            assert!(!matches!(client.read(&mut [0]), Ok(1..)), "{boundary:?}");
            assert_eq!(moving.old.output(), "errno 103\n", "{boundary:?}");
        } else {
            assert_eq!(status.code(), Some(1), "{boundary:?}");
            assert_runs(&moving.old.pid());
            moving.lab.a.run(assert_unlocked);
            moving.assert_lives_at(Side::A, "old ");
        }
    }
}

fn what_has_been_taken_before_the_source_is_killed_has_moved() {
    if !installed("python3") {
        return;
    }
    // As many as are on their way together, and then some.
    const FIRST: usize = 128;
    let mut moving = Move::new(FIRST + 20);
    let next = (Boundary(End::Source, CONNECTION), FIRST + 1);
    let status = hand_over_until(&moving, next, &[End::Source], Signal::KILL);
    assert_eq!(status.code(), None, "killed");
    assert_runs(&moving.old.pid());
    let moved = moving.clients.drain(..FIRST).collect();
    moving.assert_lives_at(Side::A, "old ");
    moving.clients = moved;
    moving.assert_lives_at(Side::B, "new ");
    moving.end();
}

fn a_source_that_is_asked_to_end_finishes_what_it_has_begun() {
    if !installed("python3") {
        return;
    }
    for boundary in BOUNDARIES {
        let mut moving = Move::new(1);
        eprintln!("the source is asked to end at {boundary:?}");
        let status = hand_over(&moving, End::Source, boundary, Signal::TERM);
        if [PREAMBLE, BEGIN, CONNECTION, READY].contains(&boundary.1) {
            assert_eq!(status.code(), None, "{boundary:?}: killed");
            assert_runs(&moving.old.pid());
            moving.lab.a.run(assert_unlocked);
            moving.assert_lives_at(Side::A, "old ");
            assert_nobody_has_it(&moving);
        } else if boundary == Boundary(End::Target, END) {
            // All is settled; it may have come before the end of the command or after.
            moving.assert_lives_at(Side::B, "new ");
            moving.end();
        } else {
            assert_eq!(status.code(), Some(0), "{boundary:?}");
            moving.assert_lives_at(Side::B, "new ");
            moving.end();
        }
    }
}

fn a_target_that_is_asked_to_end_finishes_what_it_has_begun() {
    // After its END it is the program already.
    let before_program = |boundary: &Boundary| *boundary != Boundary(End::Target, END);
    target_ends(End::Target, Signal::TERM, BOUNDARIES.into_iter().filter(before_program));
}

/// As socat(1) does when the stream ends, which may be before the program runs or after.
fn a_killed_starter_costs_no_connection() {
    target_ends(End::Starter, Signal::TERM, BOUNDARIES);
    target_ends(End::Starter, Signal::KILL, BOUNDARIES);
}

fn target_ends(victim: End, signal: Signal, boundaries: impl IntoIterator<Item = Boundary>) {
    if !installed("python3") {
        return;
    }
    for boundary in boundaries {
        let mut moving = Move::new(1);
        eprintln!("the target is asked to end at {boundary:?}: {signal:?} to {victim:?}");
        let status = hand_over(&moving, victim, boundary, signal);
        // It gives back what it has not been given yet; after the COMMIT it has the connection, and goes on. A starter that dies with the
        // last words in its hands leaves the source in doubt.
        if status.code() == Some(0) || victim == End::Starter && status.code() == Some(3) {
            moving.assert_lives_at(Side::B, "new ");
            moving.end();
        } else {
            assert!(![TAKEN, END].contains(&boundary.1), "{boundary:?}: {status}");
            assert_nobody_has_it(&moving);
            assert_runs(&moving.old.pid());
            moving.assert_lives_at(Side::A, "old ");
        }
    }
}

/// Two remove all locks at the same time, at every moment of one of them.
fn a_lock_that_somebody_else_removes_is_no_error() {
    let flow = |port| Flow { local: ([192, 0, 2, 1], port).into(), remote: ([192, 0, 2, 2], 7).into() };
    let lock = |port| {
        let mut lock = Lock::drop_traffic(&[flow(port)]).unwrap();
        lock.persist(&format!("lock{port}"), None).unwrap();
    };
    let mut turn = 0;
    loop {
        (1..4).for_each(lock);
        let mut sent = 0;
        let code = run_and_watch(&mut soccr(&["unlock", "--all"]), |call| {
            sent += usize::from([libc::SYS_sendto, libc::SYS_sendmsg].contains(&call.number));
            if sent == turn + 1 {
                PersistentLock::list().unwrap().first().map(PersistentLock::remove).transpose().unwrap();
                sent += 1000;
            }
        });
        assert_eq!(code, Some(0), "at message {turn}");
        assert_unlocked();
        turn += 1;
        if sent < 1000 {
            break;
        }
    }
    assert!(turn > 3, "somebody was faster");
}

/// On the host to which the connection did not go, where that is not the one on which it stays.
pub fn assert_nobody_has_it(moving: &Move) {
    if moving.goal == Side::A {
        return;
    }
    let pid = moving.beside.pid();
    wait_until("the target has given up", || {
        json(&["list", "--json", "--netns", &pid]).iter().all(|socket| socket["savable"] == false)
    });
}

/// Hands the connection over, and kills one end at a boundary. How the source ends.
pub fn hand_over(moving: &Move, victim: End, boundary: Boundary, signal: Signal) -> ExitStatus {
    hand_over_until(moving, (boundary, 1), &[victim], signal)
}

/// The same, where the boundary is passed for the nth time.
pub fn hand_over_until(
    moving: &Move,
    boundary: (Boundary, usize),
    victims: &[End],
    signal: Signal,
) -> ExitStatus {
    let send = |via: &str| moving.send(&["--all", "--via", via]);
    hand_over_by(send, &moving.receive(), boundary, victims, signal)
}

/// The same, with these commands at both ends: `send` gets what it is to run as the target.
pub fn hand_over_by(
    send: impl FnOnce(&str) -> Command,
    receive: &str,
    (boundary, nth): (Boundary, usize),
    victims: &[End],
    signal: Signal,
) -> ExitStatus {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for name in ["from-source", "to-target", "from-target", "to-source"] {
        let made = Command::new("mkfifo").arg(path(name)).status().unwrap();
        assert!(made.success());
    }
    // The target inherits the lifeline, as it does without pipes between.
    let via = format!(
        "d={}; {receive} < $d/to-target > $d/from-target & \
         echo $! > $d/pid.new; mv $d/pid.new $d/pid; cat $d/to-source & exec cat > $d/from-source",
        directory.path().display(),
    );
    let mut source = send(&via).spawn().unwrap();
    let source_pid = source.id();
    // Whoever is killed has opened its ends, or the others would wait for that for ever.
    let connected = Barrier::new(2);
    let passed = AtomicUsize::new(0);
    let pass = |record| {
        if record == boundary && passed.fetch_add(1, Ordering::Relaxed) + 1 == nth {
            // A target that gives the connections away is the process that has been started.
            let gives = receive.contains("--adopt");
            let end = |victim| if gives && victim == End::Target { End::Starter } else { victim };
            victims.iter().for_each(|victim| kill(end(*victim), signal, source_pid, &path("pid")));
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let (from, to) = (open(&path("from-source")), create(&path("to-target")));
            connected.wait();
            relay(from, to, |kind| pass(Boundary(End::Source, kind)));
        });
        scope.spawn(|| {
            let (from, to) = (open(&path("from-target")), create(&path("to-source")));
            connected.wait();
            relay(from, to, |kind| pass(Boundary(End::Target, kind)));
        });
        // A killed process that nobody has waited for is as dead as any other.
        source.wait().unwrap()
    })
}

/// The children of a process that has one thread.
pub fn children(pid: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// The child of the source that is the same program.
pub fn keeper(source: u32) -> u32 {
    let is_soccr =
        |pid: &u32| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|path| path == Path::new(SOCCR));
    children(source).into_iter().find(is_soccr).unwrap()
}

fn open(path: &Path) -> File {
    File::open(path).unwrap()
}

fn create(path: &Path) -> File {
    OpenOptions::new().write(true).open(path).unwrap()
}

/// Passes records on until one side is gone.
fn relay(mut from: File, mut to: File, mut boundary: impl FnMut(u16)) {
    let mut record = vec![0; 16];
    let mut kind = PREAMBLE;
    while from.read_exact(&mut record[..16]).is_ok() {
        if kind != PREAMBLE || record[..8] != *b"\x89SOCCR\r\n" {
            kind = u16::from_le_bytes([record[0], record[1]]);
            let length = u32::from_le_bytes([record[8], record[9], record[10], record[11]]) as usize;
            record.resize(16 + length + 4, 0);
            if from.read_exact(&mut record[16..]).is_err() {
                return;
            }
        }
        boundary(kind);
        if to.write_all(&record).is_err() {
            return;
        }
        record.resize(16, 0);
    }
}

fn kill(victim: End, signal: Signal, source: u32, target: &Path) {
    let starter = || -> u32 {
        wait_until("the target has a number", || target.exists());
        std::fs::read_to_string(target).unwrap().trim().parse().unwrap()
    };
    let pid = match victim {
        End::Source => source,
        End::Keeper => keeper(source),
        End::Starter => starter(),
        End::Target => {
            let starter = starter();
            wait_until("it has a child", || !children(starter).is_empty());
            children(starter)[0]
        }
    };
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
    if signal != Signal::KILL {
        // It may well live on; where it does not, it never gets to see the record.
        return;
    }
    wait_until_dead(pid as i32);
}

/// Whether anybody has waited for it or not.
pub fn wait_until_dead(pid: i32) {
    wait_until("it is dead", || match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit(')').next().unwrap().trim_start().starts_with(['Z', 'X']),
        Err(_) => true,
    });
}
