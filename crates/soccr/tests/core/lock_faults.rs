//! Every system call of a lock fails once: no connection stays locked by mistake, and none is unlocked.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use soccr::connection::Flow;
use soccr::lock::{Locker, Mode, PersistentLock};
use soccr::{Lock, Restored, pause};
use soccr_lab::{Family, Faults, OnCpu, Pair, Shape, TcpInfo, supervised, sysctl, wait_until};

use crate::ends::{Ends, PORT, info, set_deaf};

/// Calls `body` until it comes to an end without the fault that it arms.
fn with_every_fault(mut body: impl FnMut(&Faults, &dyn Fn()) -> bool + Send) {
    // What the body has made on the supervised thread ends with it: threads are supervised as well.
    supervised(move |faults| {
        let mut left = 0;
        while body(faults, &|| faults.arm(left, libc::ENOMEM)) {
            left += 1;
        }
        assert!(left > 0, "nothing has failed");
    });
}

fn connection() -> (Ends, Flow, Locker) {
    let ends = Ends::new(Family::V4);
    let flow = Flow::of(&ends.ours).unwrap();
    let locker = Locker::beside(&ends.ours, Mode::HOLD).unwrap();
    (ends, flow, locker)
}

pub fn a_lock_that_fails_locks_nothing() {
    let (mut ends, flow, locker) = connection();
    with_every_fault(|faults, arm| {
        arm();
        let locked = locker.lock(&[flow]);
        let failed = faults.disarm();
        match locked {
            Ok(lock) => drop(lock.release().unwrap()),
            Err(error) => assert_eq!((error.step(), error.errno()), ("lock", Some(libc::ENOMEM)), "{error}"),
        }
        ends.receive(1000);
        // It is neither locked nor taken for locked.
        locker.lock(&[flow]).unwrap().release().unwrap();
        failed.is_some()
    });
    ends.finish();
}

pub fn a_lock_of_many_that_fails_locks_nothing() {
    // Root, too, needs two transactions for them.
    let flows: Vec<Flow> = ["192.0.2.1", "2001:db8::1"]
        .into_iter()
        .flat_map(|host| (0..1 << 15).map(move |port| SocketAddr::new(host.parse().unwrap(), port)))
        .map(|local| Flow { local, remote: SocketAddr::new(local.ip(), 1) })
        .collect();
    let locker = Locker::new(Mode::Drop).unwrap();
    with_every_fault(|faults, arm| {
        arm();
        let locked = locker.lock(&flows);
        let failed = faults.disarm();
        match locked {
            Ok(lock) => drop(lock.release().unwrap()),
            Err(error) => assert_eq!(error.errno(), Some(libc::ENOMEM), "{error}"),
        }
        locker.lock(&flows).expect("none of them is locked").release().unwrap();
        failed.is_some()
    });
}

pub fn a_release_that_fails_unlocks() {
    let (ends, flow, locker) = connection();
    with_every_fault(|faults, arm| {
        let lock = locker.lock(&[flow]).unwrap();
        (&ends.peer).write_all(b"held").unwrap();
        wait_until("it is held", || lock.held() > 0);
        arm();
        let released = lock.release();
        let failed = faults.disarm();
        match released {
            Ok(count) => assert!(count > 0, "thrown away, after {failed:?}"),
            Err(error) => {
                assert_eq!((error.step(), error.errno()), ("unlock", Some(libc::ENOMEM)), "{error}");
            }
        }
        let mut read = [0; 4];
        (&ends.ours).read_exact(&mut read).unwrap();
        assert_eq!(&read, b"held");
        failed.is_some()
    });
}

/// More than fits into the longest packet.
const MUCH: usize = 200_000;

fn much() -> Vec<u8> {
    (0..MUCH).map(|index| (index % 251) as u8).collect()
}

fn expect_much(ends: &Ends) {
    let mut read = vec![0; MUCH];
    (&ends.ours).read_exact(&mut read).unwrap();
    assert!(read == much(), "other bytes than were sent");
}

/// A connection whose peer sends so much at a time.
fn warm_connection() -> Ends {
    let pair = Pair::shaped(&Shape::rtt(Duration::from_millis(5))).unwrap();
    pair.b.run(|| sysctl("net/ipv4/tcp_slow_start_after_idle", "0")).unwrap();
    // All of it fits, whatever the kernel thinks that it takes.
    pair.b.run(|| sysctl("net/ipv4/tcp_wmem", &format!("4096 {0} {0}", 8 * MUCH))).unwrap();
    let address = pair.b.address(Family::V4, PORT);
    let listener = pair.b.run(|| TcpListener::bind(address)).unwrap();
    let ours = pair.a.run(|| TcpStream::connect(address)).unwrap();
    let (peer, _) = listener.accept().unwrap();
    let ends = Ends::between(pair, ours, peer, address);
    while !is_warm(&ends) {
        thread::scope(|scope| {
            scope.spawn(|| (&ends.peer).write_all(&much()).unwrap());
            expect_much(&ends);
        });
    }
    ends
}

/// No loss has made the peer cautious.
fn is_warm(ends: &Ends) -> bool {
    let info = info(&ends.peer);
    (info.snd_cwnd * info.snd_mss) as usize > MUCH
}

/// Moves the connection into another socket, which gets what the peer sends meanwhile by `release`.
fn move_much(ends: &mut Ends, release: impl FnOnce(Lock, &Restored)) {
    let flow = Flow::of(&ends.ours).unwrap();
    let lock = Locker::beside(&ends.ours, Mode::HOLD).unwrap().lock(&[flow]).unwrap();
    let paused = pause(&ends.ours).unwrap();
    let connection = paused.save().unwrap();
    paused.detach().unwrap();
    (&ends.peer).write_all(&much()).unwrap();
    wait_until("some is held", || lock.held() > 2);
    let restored = ends.pair.a.run(|| connection.restore()).unwrap();
    release(lock, &restored);
    ends.ours = restored.resume().unwrap();
    expect_much(ends);
}

pub fn a_release_into_a_queue_that_fails_loses_nothing() {
    let _cpu = OnCpu::stay(0);
    let mut ends = warm_connection();
    with_every_fault(move |faults, arm| {
        if !is_warm(&ends) {
            ends = warm_connection();
        }
        let mut failed = None;
        move_much(&mut ends, |lock, restored| {
            arm();
            let released = lock.release_into(&[restored]);
            failed = faults.disarm();
            if let Err(error) = released {
                assert_eq!((error.step(), error.errno()), ("unlock", Some(libc::ENOMEM)), "{error}");
            }
        });
        failed.is_some()
    });
}

pub fn nothing_is_put_behind_what_did_not_arrive() {
    let _cpu = OnCpu::stay(0);
    move_much(&mut warm_connection(), |lock, restored| {
        set_deaf(restored, true).unwrap();
        lock.release_into(&[restored]).unwrap();
        assert_eq!(TcpInfo::of(restored).unwrap().unread, 0);
        set_deaf(restored, false).unwrap();
    });
}

/// The thread that reads what is held fails in one of its calls. Whoever takes is told, and reads alone from then on.
pub fn a_reader_that_fails_is_told_of_and_done_without() {
    const CALLS: [&[i64]; 2] = [&[libc::SYS_recvfrom], &[libc::SYS_poll, libc::SYS_ppoll]];
    for calls in CALLS {
        supervised(move |faults| {
            // This thread makes none of these calls while a fault is armed.
            let (ends, flow, locker) = connection();
            ends.peer.set_nodelay(true).unwrap();
            let lock = locker.lock(&[flow]).unwrap();
            let send = |text| rustix::io::write(&ends.peer, text).unwrap();
            let fail = |errno, text| {
                faults.arm_among(calls, 0, errno);
                send(text);
                wait_until("a call fails", || faults.has_failed());
            };
            // A signal is no reason to end.
            fail(libc::EINTR, b"held");
            wait_until("it is held", || lock.held() > 0);
            fail(libc::EINVAL, b"more");
            let mut told = None;
            wait_until("it is told", || {
                told = lock.take().err();
                told.is_some()
            });
            let told = told.unwrap();
            assert_eq!((told.step(), told.errno()), ("take", Some(libc::EINVAL)), "{told}");
            send(b"last");
            wait_until("it is taken", || {
                lock.take().unwrap()[0].packets.iter().any(|packet| packet.ends_with(b"last"))
            });
            lock.release().unwrap();
            let mut read = [0; 12];
            (&ends.ours).read_exact(&mut read).unwrap();
            assert_eq!(&read, b"heldmorelast");
        });
    }
}

pub fn a_lock_that_does_not_persist_stays() {
    let (ends, flow, locker) = connection();
    let host = &ends.pair.a;
    with_every_fault(|faults, arm| {
        let mut lock = locker.lock(&[flow]).unwrap();
        arm();
        let persisted = lock.persist("gone", None);
        let failed = faults.disarm();
        let locks = host.run(PersistentLock::list).unwrap();
        match persisted {
            Ok(()) => host.run(|| locks[0].remove()).unwrap(),
            Err(error) => {
                assert_eq!((error.step(), error.errno()), ("lock", Some(libc::ENOMEM)), "{error}");
                assert_eq!((locks.len(), lock.flows()), (0, &[flow][..]), "after {failed:?}");
                // It holds what arrives.
                (&ends.peer).write_all(b"held").unwrap();
                wait_until("it is held", || lock.held() > 0);
                lock.release().unwrap();
                (&ends.ours).read_exact(&mut [0; 4]).unwrap();
            }
        }
        failed.is_some()
    });
}
