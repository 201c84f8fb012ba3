//! No call leaves a descriptor behind that its caller has not been given: a program that restores connections may need
//! every number for itself. Alone in its process, whose descriptors are listed.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use soccr::lock::{Locker, Mode};
use soccr::{Connection, bulk, pause};
use soccr_lab::{Case, Family, Made, Pair, State, obstacle_to_bpf, skip};

soccr_lab::tests![no_call_leaves_a_descriptor];

/// What each number of this process is open on, but for the folder that is read.
fn descriptors() -> Vec<(String, String)> {
    let entries = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap());
    let named = |entry: fs::DirEntry| {
        let target = fs::read_link(entry.path()).ok()?;
        Some((entry.file_name().into_string().unwrap(), target.to_string_lossy().into_owned()))
    };
    let mut open: Vec<_> = entries.filter_map(named).collect();
    open.retain(|(_, target)| !target.starts_with("/proc/"));
    open.sort();
    open
}

/// Runs one call, which leaves `more` descriptors.
fn leaves<T>(more: usize, what: &str, call: impl FnOnce() -> T) -> T {
    let before = descriptors();
    let outcome = call();
    let after = descriptors();
    assert_eq!(after.len(), before.len() + more, "{what}: {before:?} became {after:?}");
    outcome
}

/// Keeps its BPF programs, as it says; also where there was no room for them a moment ago.
fn prepare() {
    let limit = getrlimit(Resource::Nofile);
    leaves(0, "no room", || {
        setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..limit }).unwrap();
        soccr::prepare();
        setrlimit(Resource::Nofile, limit).unwrap();
    });
    let before = descriptors().len();
    soccr::prepare();
    if descriptors().len() != before + 2 {
        skip(obstacle_to_bpf([6, 4], "it is not prepared"));
    }
}

fn no_call_leaves_a_descriptor() {
    prepare();
    let states = State::MAKEABLE;
    for (family, state) in Family::ALL.into_iter().flat_map(|family| states.map(|state| (family, state))) {
        let pair = Pair::new().unwrap();
        let case = Case { family, state, received: 0, sent: 0, unsent: 0 };
        let Made { socket, remote, peer: _peer, .. } = case.make(&pair.a, &pair.b);
        let name = format!("{family:?}, {state:?}");
        let connection: Connection = pair.a.run(|| {
            let paused = leaves(0, &name, || pause(&socket).unwrap().with_peer(remote));
            let connection = leaves(0, &name, || paused.save().unwrap());
            leaves(0, &name, || paused.detach().unwrap());
            connection
        });
        drop(socket);
        pair.a.run(|| {
            let restored = leaves(1, &name, || connection.restore().unwrap());
            let stream = leaves(0, &name, || restored.resume().unwrap());
            pause(&stream).unwrap().with_peer(remote).detach().unwrap();
            drop(stream);
            let mut restored = Vec::new();
            leaves(1, &name, || {
                bulk::restore([((), connection.clone())], |(), one| restored.push(((), one.unwrap())))
            });
            leaves(0, &name, || {
                let locker = Locker::new(Mode::HOLD).unwrap();
                locker.lock(&[connection.flow()]).unwrap().release().unwrap();
                locker.close();
            });
            let mut streams = Vec::new();
            leaves(0, &name, || bulk::resume(restored, |(), one| streams.push(one.unwrap())));
        });
    }
}
