//! Sources that say what is not true, or what no source says.

use std::fs;
use std::os::unix::fs::MetadataExt;

use soccr::connection::Tracked;
use soccr::steer::{Foreign, Tunnel};
use soccr_image::stream::{Message, Place, Reader, Steered, Writer};
use soccr_lab::wait_until;

use super::*;

/// This network, as the kernel names it.
pub fn here() -> Place {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let host = u128::from_str_radix(&boot.trim().replace('-', ""), 16).unwrap().to_be_bytes();
    let namespace = fs::metadata("/proc/thread-self/ns/net").unwrap();
    Place { host, namespace: [namespace.dev(), namespace.ino()] }
}

/// The words of a source, as a test makes them.
pub struct Source {
    pub writer: Writer<UnixStream>,
    answers: Reader<UnixStream>,
}

impl Source {
    /// Says BEGIN, and hears that the target is there.
    pub fn begin(channel: &UnixStream, connections: u32, place: Option<Place>) -> Self {
        Self::begin_with(channel, begin(connections, place, None))
    }

    fn begin_with(channel: &UnixStream, begin: Message) -> Self {
        let mut writer = Writer::new(channel.try_clone().unwrap()).unwrap();
        writer.send(&begin).unwrap();
        Self { writer, answers: Reader::new(channel.try_clone().unwrap()).unwrap() }
    }

    pub fn hear(&mut self) -> Option<Message> {
        self.answers.receive().unwrap()
    }
}

fn begin(connections: u32, place: Option<Place>, steered: Option<Steered>) -> Message {
    Message::Begin { connections, answers: true, notes: false, place, steered }
}

/// With it, a source could have anybody's connections locked: those of a source in the same network are in use there.
pub fn nobody_learns_the_place_of_a_target() {
    let (ours, peers) = connect(1);
    let saved = soccr::pause(&ours[0]).unwrap().save().unwrap();
    let mut learned = None;
    for _ in 0..2 {
        let (channel, there) = UnixStream::pair().unwrap();
        let listening = listen(there, Terms::default());
        let mut source = Source::begin(&channel, 1, learned);
        source.writer.connection(1, "x", &saved).unwrap();
        let mut answer = source.hear();
        if let Some(Message::Here { place }) = answer {
            learned = Some(place);
            answer = source.hear();
        }
        match answer {
            Some(Message::Refused { reason, .. }) => assert!(reason.contains("in use here"), "{reason}"),
            other => panic!("{other:?}"),
        }
        assert_alive(&ours[0], &peers[0]);
        drop((source, channel));
        assert!(listening.join().unwrap().is_empty());
    }
}

/// Addresses that only the source knows are locked beside those of the socket.
pub fn addresses_on_the_wire_are_nobody_elses() {
    let (mut ours, peers) = connect(2);
    let paused = soccr::pause(&ours[1]).unwrap();
    let mut saved = paused.save().unwrap();
    paused.detach().unwrap();
    drop(ours.pop());
    // Its own addresses are free here.
    for (wire, is_free) in [(Flow::of(&ours[0]).unwrap(), false), (saved.flow(), true)] {
        saved.tracked = Some(Tracked { wire, initiator: false, mark: 0 });
        let (channel, there) = UnixStream::pair().unwrap();
        let listening = listen(there, Terms::default());
        let mut source = Source::begin(&channel, 1, None);
        source.writer.connection(1, "x", &saved).unwrap();
        match source.hear() {
            Some(Message::Ready { .. }) if is_free => {}
            Some(Message::Refused { reason, .. }) if !is_free => {
                assert!(reason.contains("in use here"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        assert_alive(&ours[0], &peers[0]);
        drop((source, channel));
        assert!(listening.join().unwrap().is_empty());
    }
}

/// A damaged state is the affair of its connection.
pub fn what_comes_without_its_state_stays_alone() {
    let (mut ours, peers) = connect(2);
    let (here, there) = UnixStream::pair().unwrap();
    let listening = listen(there, Terms::default());
    let mover = Mover::new().unwrap();
    let departing: Vec<_> = [ours.remove(0), ours.remove(0)]
        .map(|stream| mover.take(stream).unwrap().with_state(*b"its state"))
        .into();
    let mut outcomes = mover.send_all(departing, &mut Damaging { channel: here, is_done: false });
    assert!(outcomes.pop().unwrap().is_moved());
    assert_alive(&stays(outcomes.pop().unwrap(), ErrorKind::Refused), &peers[0]);
    let arrived = listening.join().unwrap().pop().unwrap();
    assert_eq!(arrived.state(), b"its state");
    assert_alive(&arrived.into_stream().unwrap(), &peers[1]);
}

/// Damages the first state that it passes on.
struct Damaging {
    channel: UnixStream,
    is_done: bool,
}

impl Channel for Damaging {
    fn exchange(
        &mut self,
        output: &[u8],
        input: &mut [u8],
        deadline: Option<Instant>,
    ) -> io::Result<Exchanged> {
        let found = output.windows(9).position(|bytes| bytes == b"its state");
        match found.filter(|_| !self.is_done) {
            None => self.channel.exchange(output, input, deadline),
            Some(at) => {
                self.is_done = true;
                let mut damaged = output[..=at].to_vec();
                damaged[at] ^= 1;
                self.channel.write_all(&damaged)?;
                Ok(Exchanged { written: damaged.len(), read: None })
            }
        }
    }
}

/// Only the tunnel of the last one would be removed.
pub fn who_begins_twice_leaves_no_tunnel() {
    let lan = Lan::new().unwrap();
    let [home, away] = [&lan.hosts[0], &lan.hosts[1]];
    let begin = |id| {
        let tunnel = Tunnel::known(home.v4.into(), away.v4.into(), id, 4789);
        home.run(|| tunnel.open()).unwrap();
        begin(1, None, Some(Steered { tunnel: Some(tunnel), ..Steered::default() }))
    };
    let (channel, there) = UnixStream::pair().unwrap();
    let listening = away.run(|| listen(there, Terms::default()));
    let mut source = Source::begin_with(&channel, begin(1));
    assert_eq!(away.run(Tunnel::list).unwrap().len(), 1);
    source.writer.send(&begin(2)).unwrap();
    assert_eq!(source.hear(), None);
    drop((source, channel));
    assert!(listening.join().unwrap().is_empty());
    assert_eq!(away.run(Tunnel::list).unwrap(), []);
}

/// It says that it steers packets, and nobody knows from where: they would be taken from anywhere.
pub fn nothing_is_delivered_for_a_source_that_is_not_reached() {
    let lan = Lan::new().unwrap();
    let (_source, _listening, answer) = offer_steered(&lan, Steered::default());
    match answer {
        Some(Message::Refused { reason, .. }) => assert!(reason.contains("not known here"), "{reason}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(lan.hosts[1].run(Foreign::list).unwrap(), []);
}

/// The stream goes on meanwhile.
pub fn what_is_delivered_for_a_connection_ends_with_it() {
    let lan = Lan::new().unwrap();
    let steered = Steered { from: vec![lan.hosts[0].v4.into()], ..Steered::default() };
    let (mut source, _listening, answer) = offer_steered(&lan, steered);
    assert_eq!(answer, Some(Message::Ready { connection: 1 }));
    let delivered = || lan.hosts[1].run(Foreign::list).unwrap();
    assert_eq!(delivered().len(), 1);
    source.writer.send(&Message::Abort { connection: 1, reason: "changed".into() }).unwrap();
    wait_until("nothing is delivered any more", || delivered().is_empty());
}

/// Offers a connection with the address of the first host to the second one, and hears the answer.
fn offer_steered(lan: &Lan, steered: Steered) -> (Source, thread::JoinHandle<Vec<Arrived>>, Option<Message>) {
    let [home, away] = [&lan.hosts[0], &lan.hosts[1]];
    let listener = home.run(|| TcpListener::bind((home.v4, 80))).unwrap();
    let _peer = lan.peer.run(|| TcpStream::connect((home.v4, 80))).unwrap();
    let saved = soccr::pause(&listener.accept().unwrap().0).unwrap().save().unwrap();
    let (channel, there) = UnixStream::pair().unwrap();
    let listening = away.run(|| listen(there, Terms::default()));
    let mut source = Source::begin_with(&channel, begin(2, None, Some(steered)));
    source.writer.connection(1, "x", &saved).unwrap();
    let answer = source.hear();
    (source, listening, answer)
}

/// It would take memory for as long as the connection waits to be passed on.
pub fn a_state_that_nobody_takes_is_not_kept() {
    let (mut ours, peers) = connect(1);
    let (mut here, there) = UnixStream::pair().unwrap();
    let mut terms = Terms::default();
    terms.takes_states = false;
    let listening = listen(there, terms);
    let departing = Mover::new().unwrap().take(ours.pop().unwrap()).unwrap().with_state(*b"its state");
    assert!(departing.send(&mut here).is_moved());
    drop(here);
    let arrived = listening.join().unwrap().pop().unwrap();
    assert_eq!(arrived.state(), b"");
    assert_alive(&arrived.into_stream().unwrap(), &peers[0]);
}
