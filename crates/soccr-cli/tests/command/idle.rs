//! `send --idle`: what is in use stays.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use soccr_lab::{Lab, Side, wait_until};

use crate::adopt::{End, adoption_works, epoll, moves, wait_for_listener};
use crate::programs::{SOCCR, Said, complaints, connect, descriptors, fail, hear, installed, json, soccr};
use crate::transfer::Move;

crate::tests![
    only_idle_connections_leave,
    what_is_no_longer_idle_stays,
    every_byte_arrives_while_clients_that_pause_are_drained,
    nobody_is_waited_for_longer_than_a_day,
];

impl Move {
    fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.old.pid()]).status().unwrap().success());
    }

    /// Stops the old server: from here on it reads nothing.
    fn stop(&self) {
        self.signal("-STOP");
        let threads = format!("/proc/{}/task", self.old.pid());
        wait_until("all its threads are stopped", || {
            std::fs::read_dir(&threads).unwrap().all(|thread| {
                let status = std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
                status.contains("State:\tT")
            })
        });
    }

    /// The first client says something, which waits in the queue of the stopped server.
    fn say_unread(&mut self) {
        self.clients[0].write_all(b"unread").unwrap();
        wait_until("it has arrived", || {
            let sockets = json(&["list", "--json", "--pid", &self.old.pid(), "--state", "established"]);
            sockets.iter().any(|socket| socket["receive_queue"] == 6)
        });
    }

    /// The first connection is where it was, with everything that was said to it; the others have moved.
    fn assert_first_stays(&mut self) {
        // While it has nothing to say: at the other host its packets would draw a reset.
        let first = self.clients.remove(0);
        self.assert_lives_at(Side::B, "new ");
        self.lab.steer(Side::A).unwrap();
        self.signal("-CONT");
        self.clients = vec![first];
        assert_eq!(hear(&mut self.clients[0], 10), "old unread");
        self.assert_lives_at(Side::A, "old ");
    }
}

fn only_idle_connections_leave() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(3);
    let (code, complaint) = moving.try_send(&["--all", "--idle", "86400", "--via", &moving.receive()]);
    assert_eq!(code, 1, "{complaint}");
    assert!(complaint.contains("no connection has been idle for 86400 s"), "{complaint}");
    moving.stop();
    moving.say_unread();
    let (code, complaint) = moving.try_send(&["--all", "--idle", "0", "--via", &moving.receive()]);
    assert_eq!(code, 0, "{complaint}");
    assert!(complaint.contains("1 of 3 connections are in use, and stay"), "{complaint}");
    moving.assert_first_stays();
}

fn what_is_no_longer_idle_stays() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(3);
    moving.stop();
    let directory = tempfile::tempdir().unwrap();
    let [chosen, said] = ["chosen", "said"].map(|name| directory.path().join(name));
    let via = format!(
        "touch {}; until [ -e {} ]; do sleep 0.1; done; {}",
        chosen.display(),
        said.display(),
        moving.receive()
    );
    let told = Said::new();
    let mut sending = moving.send(&["--all", "--idle", "0", "--timeout", "60", "--via", &via]);
    let mut sending = sending.stderr(told.output()).spawn().unwrap();
    wait_until("the connections are chosen", || chosen.exists());
    moving.say_unread();
    std::fs::write(&said, "").unwrap();
    let code = sending.wait().unwrap().code();
    let complaint = told.read();
    assert_eq!(code, Some(3), "{complaint}");
    assert!(complaint.contains("stays: it is in use again (--idle)"), "{complaint}");
    moving.assert_first_stays();
}

/// Says something, hears it again and pauses, until it is told to stop. How often.
fn converse(mut client: TcpStream, stop: &AtomicBool) -> usize {
    for turn in 0_usize.. {
        if stop.load(Ordering::Relaxed) {
            return turn;
        }
        let said: Vec<u8> = (0..4096 - turn % 64).map(|place| (place ^ turn) as u8).collect();
        client.write_all(&said).unwrap();
        let mut heard = vec![0; said.len()];
        client.read_exact(&mut heard).unwrap();
        assert!(heard == said, "other bytes in turn {turn}");
        // Without pauses no connection would ever be idle.
        thread::sleep(Duration::from_millis(turn as u64 * 37 % 200));
    }
    unreachable!()
}

/// Sends what is idle until nothing is left, and returns how often something stayed.
fn drain(pid: &str) -> usize {
    let via = format!("{SOCCR} receive --adopt");
    let mut stayed = 0;
    while !descriptors(pid).is_empty() {
        let output = soccr(&["send", "--pid", pid, "--all", "--idle", "0", "--via", &via]).output().unwrap();
        let complaint = complaints(&output.stderr);
        let reasons = [
            "are in use, and stay",
            "it is in use again (--idle)",
            "no connection has been idle for 0 s",
            // What a target says when everything stays.
            "the source has sent no connection",
            "the command has ended: exit status: 1",
        ];
        for line in complaint.lines() {
            assert!(reasons.iter().any(|reason| line.contains(reason)), "{}: {line}", output.status);
            stayed += usize::from(line.contains("idle"));
        }
        assert!(output.status.success() || !complaint.is_empty(), "{}", output.status);
    }
    stayed
}

fn every_byte_arrives_while_clients_that_pause_are_drained() {
    if !adoption_works() {
        return;
    }
    let clients = 10;
    let rounds = moves(40) / clients;
    let lab = Lab::new().unwrap();
    let mut server = lab.a.run(|| epoll("", "", clients));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let end = End(&stop);
        let talk = |_| {
            let client = lab.peer.run(|| connect((lab.a.v4, 7)));
            scope.spawn(|| converse(client, &stop))
        };
        let talking: Vec<_> = (0..clients).map(talk).collect();
        let mut stayed = 0;
        for _ in 0..rounds {
            server = lab.a.run(|| {
                wait_for_listener(false);
                let new = epoll("", "", clients);
                wait_for_listener(true);
                stayed += drain(&server.pid());
                new
            });
        }
        drop(end);
        let turns: usize = talking.into_iter().map(|talk| talk.join().unwrap()).sum();
        eprintln!("{} moves, {turns} turns, {stayed} times something stayed", rounds * clients);
    });
}

fn nobody_is_waited_for_longer_than_a_day() {
    let complaint = fail(2, &["receive", "--adopt", "--drain", "86401"]);
    assert!(complaint.contains("86400"), "{complaint}");
}
