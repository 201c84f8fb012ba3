//! Locks that stay when the process ends.

use std::io::Write;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use soccr::Flow;
use soccr::lock::{Mode, PersistentLock, SILENCE};
use soccr_lab::{Family, Supervisor, wait_until};

use crate::{connect, expect, expect_nothing, retransmissions};

pub fn a_persistent_lock_is_listed_and_removed() {
    for family in Family::ALL {
        let mut connected = connect(family);
        connected.pair.b.run(|| PersistentLock::create("until-noon", &[connected.flow], None)).unwrap();
        let locks = connected.pair.b.run(PersistentLock::list).unwrap();
        assert_eq!((locks.len(), &*locks[0].name, locks[0].remaining), (1, "until-noon", None));
        assert_eq!(locks[0].flows.len(), 1);
        assert_eq!(locks[0].flows[0].remote.port(), connected.flow.remote.port());
        assert_eq!(locks[0].flows[0].local.ip(), connected.flow.local.ip().to_canonical());
        connected.peer.write_all(b"later").unwrap();
        connected.ours.write_all(b"later").unwrap();
        connected.settle();
        expect_nothing(&mut connected.ours);
        expect_nothing(&mut connected.peer);
        let again = connected.pair.b.run(|| PersistentLock::create("until-noon", &[connected.flow], None));
        assert!(again.unwrap_err().to_string().contains("EEXIST"));
        connected.pair.b.run(|| locks[0].remove()).unwrap();
        expect(&mut connected.ours, b"later");
        expect(&mut connected.peer, b"later");
        assert_eq!(connected.pair.b.run(PersistentLock::list).unwrap(), []);
        let gone = connected.pair.b.run(|| locks[0].remove()).unwrap_err();
        assert!(gone.to_string().contains("ENOENT"), "{gone}");
    }
}

pub fn a_persistent_lock_ends_with_its_time() {
    let mut connected = connect(Family::V4);
    let (here, flow) = (&connected.pair.b, connected.flow);
    let list = || here.run(PersistentLock::list).unwrap();
    let create = |limit: Option<u64>| {
        here.run(|| PersistentLock::create("short", &[flow], limit.map(Duration::from_secs))).unwrap();
    };
    create(Some(20));
    let remaining = list()[0].remaining.unwrap();
    assert!(remaining <= Duration::from_secs(20) && !remaining.is_zero(), "{remaining:?}");
    connected.peer.write_all(b"so").unwrap();
    connected.settle();
    expect_nothing(&mut connected.ours);
    here.run(|| list()[0].remove()).unwrap();
    expect(&mut connected.ours, b"so");
    create(Some(1));
    connected.peer.write_all(b"on").unwrap();
    expect(&mut connected.ours, b"on");
    wait_until("the lock is empty", || list()[0].flows.is_empty());
    // The next one clears up.
    create(None);
    let locks = list();
    assert_eq!((locks.len(), locks[0].flows.len()), (1, 1));
}

/// Two may find it at the same time.
pub fn what_is_over_may_be_cleared_up_by_others_at_any_moment() {
    let flow = Flow { local: "192.0.2.1:1".parse().unwrap(), remote: "192.0.2.2:2".parse().unwrap() };
    let list = || PersistentLock::list().unwrap();
    for moment in 0.. {
        PersistentLock::create("over", &[flow], Some(Duration::from_millis(1))).unwrap();
        wait_until("the lock is empty", || list()[0].flows.is_empty());
        let mut messages = 0;
        let created = thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            let creating = scope.spawn(move || {
                sender.send(Supervisor::of_this_thread(&[libc::SYS_sendto])).unwrap();
                PersistentLock::create("over", &[flow], None)
            });
            let supervisor = receiver.recv().unwrap().expect("seccomp");
            let clear_up =
                || list().iter().filter(|lock| lock.flows.is_empty()).for_each(|lock| lock.remove().unwrap());
            let decide = |messages: &mut usize| {
                if *messages == moment {
                    clear_up();
                }
                *messages += 1;
                None
            };
            while supervisor.decide(|_| decide(&mut messages)).unwrap().is_some() {}
            creating.join().unwrap()
        });
        created.unwrap_or_else(|error| panic!("before message {moment}: {error}"));
        let [lock] = &list()[..] else { panic!("{:?}", list()) };
        assert_eq!(lock.flows, [flow]);
        lock.remove().unwrap();
        if messages <= moment {
            assert!(messages > 2, "{messages}");
            break;
        }
    }
}

pub fn a_lock_becomes_persistent() {
    let mut connected = connect(Family::V4);
    let mut lock = connected.lock(Mode::HOLD);
    connected.peer.write_all(b"thrown away").unwrap();
    lock.persist("no such name!", None).unwrap_err();
    connected.settle();
    expect_nothing(&mut connected.ours);
    wait_until("it is held", || lock.held() > 0);
    lock.persist("afterwards", None).unwrap();
    drop(lock);
    connected.settle();
    expect_nothing(&mut connected.ours);
    let locks = connected.pair.b.run(PersistentLock::list).unwrap();
    assert_eq!((&*locks[0].name, &*locks[0].flows), ("afterwards", &[connected.flow][..]));
    connected.pair.b.run(|| locks[0].remove()).unwrap();
    expect(&mut connected.ours, b"thrown away");
    assert!(retransmissions(&connected.pair.a.namespace) > 0);
}

pub fn names_of_persistent_locks_are_checked() {
    let flow = Flow { local: "192.0.2.1:1".parse().unwrap(), remote: "192.0.2.2:2".parse().unwrap() };
    for name in ["", "a b", "a/b", "\u{e4}", &"x".repeat(65)] {
        let error = PersistentLock::create(name, &[flow], None).unwrap_err();
        assert_eq!(error.kind(), soccr::ErrorKind::Invalid, "{name}");
    }
    let nothing = PersistentLock::create("nothing", &[], None).unwrap_err();
    assert_eq!(nothing.kind(), soccr::ErrorKind::Invalid);
    PersistentLock::create(&"x".repeat(64), &[flow], None).unwrap();
}

pub fn a_persistent_lock_grows() {
    let mut connected = connect(Family::Mapped);
    let other = Flow {
        local: (connected.pair.b.v4, 9).into(),
        remote: (connected.pair.a.v4, connected.flow.remote.port()).into(),
    };
    connected.pair.b.run(|| {
        PersistentLock::create("grows", &[other], None).unwrap();
        let mut lock = PersistentLock::list().unwrap().remove(0);
        lock.extend(&[connected.flow], Some(SILENCE)).unwrap();
        assert_eq!(lock.flows, [other, connected.flow]);
        // All or nothing.
        let third = Flow { local: (connected.pair.b.v4, 10).into(), ..other };
        assert!(lock.extend(&[third, connected.flow], None).unwrap_err().to_string().contains("EEXIST"));
    });
    connected.peer.write_all(b"later").unwrap();
    connected.settle();
    expect_nothing(&mut connected.ours);
    connected.pair.b.run(|| {
        let lock = PersistentLock::list().unwrap().remove(0);
        assert_eq!(lock.flows.len(), 2);
        assert!(lock.flows.contains(&connected.flow.on_the_wire()));
        lock.unlock(&[connected.flow]).unwrap();
        assert_eq!(PersistentLock::list().unwrap()[0].flows, [other]);
        lock.remove().unwrap();
        let gone = lock.clone().extend(&[connected.flow], None);
        assert!(gone.unwrap_err().to_string().contains("ENOENT"));
    });
    expect(&mut connected.ours, b"later");
}

pub fn what_others_add_stays_locked() {
    let mut connected = connect(Family::Mapped);
    let other = Flow { local: (connected.pair.b.v4, 9).into(), ..connected.flow };
    connected.pair.b.run(|| {
        PersistentLock::create("shared", &[other], None).unwrap();
        let before = PersistentLock::list().unwrap().remove(0);
        before.clone().extend(&[connected.flow], Some(SILENCE)).unwrap();
        before.unlock(&[other]).unwrap();
        assert_eq!(PersistentLock::list().unwrap()[0].flows, [connected.flow.on_the_wire()]);
    });
    connected.peer.write_all(b"later").unwrap();
    connected.settle();
    expect_nothing(&mut connected.ours);
    connected.pair.b.run(|| {
        let now = PersistentLock::list().unwrap().remove(0);
        now.unlock(&[connected.flow]).unwrap();
        assert_eq!(PersistentLock::list().unwrap(), []);
    });
    expect(&mut connected.ours, b"later");
}
