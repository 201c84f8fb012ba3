//! Silence about what has left, begun and ended by many at the same time.

use std::net::Ipv4Addr;

use soccr::connection::Tracked;
use soccr::lock::{PersistentLock, SILENCE};
use soccr::steer::{Steering, Times};
use soccr_handover::silence::{begin, lift};
use soccr_image::stream::Message;
use soccr_lab::{TcpInfo, wait_until};

use super::untrusted::Source;
use super::*;

fn flow(port: u16) -> Flow {
    Flow { local: (Ipv4Addr::LOCALHOST, 80).into(), remote: (Ipv4Addr::LOCALHOST, port).into() }
}

fn is_silent(flow: Flow) -> bool {
    PersistentLock::list().unwrap().iter().any(|lock| lock.flows.contains(&flow))
}

/// A connection may come back without its silence being ended, and leave again: as the only one in the lock, or beside others.
pub fn a_silence_begins_again() {
    begin(&[flow(1)], Duration::from_secs(2)).unwrap();
    begin(&[flow(1)], SILENCE).unwrap();
    let lock = PersistentLock::list().unwrap().remove(0);
    assert_eq!(lock.flows, [flow(1)]);
    assert!(lock.remaining.unwrap() > SILENCE / 2);
    begin(&[flow(1), flow(2)], SILENCE).unwrap();
    begin(&[flow(2)], SILENCE).unwrap();
    assert!(is_silent(flow(1)) && is_silent(flow(2)));
    lift(&[flow(1), flow(2)]).unwrap();
    assert_eq!(PersistentLock::list().unwrap(), []);
}

/// The first to begin makes the lock, the last to end removes it, and neither may disturb the others.
pub fn silences_do_not_end_each_other() {
    const TIMES: usize = 15;
    let one_after_another = |port| {
        thread::spawn(move || {
            for _ in 0..TIMES {
                begin(&[flow(port)], SILENCE).unwrap();
                assert!(is_silent(flow(port)));
                lift(&[flow(port)]).unwrap();
                assert!(!is_silent(flow(port)));
            }
        })
    };
    let all: Vec<_> = (1..=3).map(one_after_another).collect();
    all.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(PersistentLock::list().unwrap(), []);
}

/// It lives elsewhere: a late packet here must not end it.
pub fn what_does_not_come_home_stays_silent() {
    let lab = Lab::new().unwrap();
    let listener = lab.a.run(|| TcpListener::bind((lab.a.v4, 80))).unwrap();
    let mut peer = lab.peer.run(|| TcpStream::connect((lab.a.v4, 80))).unwrap();
    peer.set_read_timeout(Some(LIMIT)).unwrap();
    let mut resets = Sniffer::flagged(&lab.peer.namespace, "eth0", Flags::RST).unwrap();
    let (ours, _) = listener.accept().unwrap();
    let (mut here, there) = UnixStream::pair().unwrap();
    let listening = lab.b.run(|| listen(there, Terms::default()));
    assert!(lab.a.run(|| Mover::new().unwrap().take(ours).unwrap().send(&mut here)).is_moved());
    drop(here);
    lab.steer(Side::B).unwrap();
    let ours = listening.join().unwrap().pop().unwrap().into_stream().unwrap();
    assert_alive(&ours, &peer);

    let saved = soccr::pause(&ours).unwrap().save().unwrap();
    let (channel, there) = UnixStream::pair().unwrap();
    let listening = lab.a.run(|| listen(there, Terms::default()));
    let mut source = Source::begin(&channel, 1, None);
    source.writer.connection(1, "x", &saved).unwrap();
    assert_eq!(source.hear(), Some(Message::Ready { connection: 1 }));
    source.writer.send(&Message::Abort { connection: 1, reason: "changed".into() }).unwrap();
    source.writer.end().unwrap();
    assert_eq!(source.hear(), None);
    drop((source, channel));
    assert!(listening.join().unwrap().is_empty());

    lab.steer(Side::A).unwrap();
    let before = TcpInfo::of(&peer).unwrap().total_retrans;
    peer.write_all(b"late").unwrap();
    wait_until("it has come to the old host", || {
        !resets.segments().unwrap().is_empty() || TcpInfo::of(&peer).unwrap().total_retrans > before
    });
    assert!(resets.segments().unwrap().is_empty());
    lab.steer(Side::B).unwrap();
    assert_eq!(read(&ours, 4), b"late");
    assert_alive(&ours, &peer);
}

/// It lives elsewhere, with these addresses on the wire: its packets do not come to the old host again.
pub fn what_does_not_come_home_is_steered_on() {
    let lan = Lan::new().unwrap();
    let [home, away] = [&lan.hosts[0], &lan.hosts[1]];
    let listener = home.run(|| TcpListener::bind((home.v4, 80))).unwrap();
    let leave = || {
        let peer = lan.peer.run(|| TcpStream::connect((home.v4, 80))).unwrap();
        let (ours, _) = listener.accept().unwrap();
        let paused = soccr::pause(&ours).unwrap();
        let saved = paused.save().unwrap();
        paused.detach().unwrap();
        (saved, peer)
    };
    let ((gone, mut peer), (mut saved, _other)) = (leave(), leave());
    let steering = home.run(|| Steering::open("eth0", "eth0", Times::default())).unwrap();
    home.run(|| steering.steer(&[gone.flow()], away.v4.into())).unwrap();
    let steered = || home.run(|| steering.contents()).unwrap()[0].packets;

    // Nothing translates it so here.
    saved.tracked = Some(Tracked { wire: gone.flow(), initiator: false, mark: 0 });
    let (channel, there) = UnixStream::pair().unwrap();
    let listening = home.run(|| listen(there, Terms::default()));
    let mut source = Source::begin(&channel, 1, None);
    source.writer.connection(1, "x", &saved).unwrap();
    match source.hear() {
        Some(Message::Refused { reason, .. }) => assert!(reason.contains("NAT"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let before = steered();
    peer.set_nonblocking(true).unwrap();
    peer.write_all(b"late").unwrap();
    wait_until("it is steered, or has drawn a reset", || {
        steered() > before
            || peer.peek(&mut [0]).is_err_and(|error| error.kind() != io::ErrorKind::WouldBlock)
    });
    assert!(steered() > before);
    drop((source, channel));
    assert!(listening.join().unwrap().is_empty());
}
