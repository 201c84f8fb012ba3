//! Threads of the library take no signal: one that the program has blocked in its own threads waits for it.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;

use soccr::lock::{Locker, Mode};
use soccr::{Flow, bulk, pause};
use soccr_lab::{blocked_signals, wait_until};

soccr_lab::tests![the_thread_of_a_lock_takes_no_signal, the_threads_of_bulk_take_no_signal,];

fn connect() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:8080").unwrap();
    let peer = TcpStream::connect("127.0.0.1:8080").unwrap();
    (listener.accept().unwrap().0, peer)
}

/// What the threads of this name block.
fn masks(name: &str) -> Vec<u64> {
    let mask = |task: &Path| {
        let is_it = fs::read_to_string(task.join("comm")).ok()?.trim() == name;
        is_it.then(|| blocked_signals(task).ok()).flatten()
    };
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    tasks.filter_map(|task| mask(&task.unwrap().path())).collect()
}

#[track_caller]
fn assert_blocked(mask: u64) {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1, libc::SIGCHLD, libc::SIGALRM] {
        assert!(mask & 1 << (signal - 1) != 0, "{signal} in {mask:x}");
    }
    // A program may have a handler for these, and where they are blocked the kernel ends the process.
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS] {
        assert!(mask & 1 << (signal - 1) == 0, "{signal} in {mask:x}");
    }
}

fn ours() -> u64 {
    blocked_signals(Path::new("/proc/thread-self")).unwrap()
}

fn the_thread_of_a_lock_takes_no_signal() {
    let before = ours();
    let (ours_end, _peer) = connect();
    let locker = Locker::new(Mode::HOLD).unwrap();
    let lock = locker.lock(&[Flow::of(&ours_end).unwrap()]).unwrap();
    wait_until("the thread has its name", || !masks("soccr-hold").is_empty());
    masks("soccr-hold").into_iter().for_each(assert_blocked);
    drop(lock);
    locker.close();
    assert_eq!(ours(), before);
}

fn the_threads_of_bulk_take_no_signal() {
    let before = ours();
    let (ours_end, _peer) = connect();
    let paused = pause(&ours_end).unwrap();
    let connection = paused.save().unwrap();
    paused.detach().unwrap();
    // The first one comes back; for the others the place is taken.
    let many = (0..100).map(|number| (number, connection.clone()));
    let (mut masks, mut restored) = (Vec::new(), Vec::new());
    bulk::restore(many, |_, outcome| {
        if std::thread::current().name() == Some("soccr-bulk") {
            masks.push(ours());
        }
        restored.extend(outcome);
    });
    assert!(!masks.is_empty());
    masks.into_iter().for_each(assert_blocked);
    assert_eq!((restored.len(), ours()), (1, before));
}
