//! Sources that say no more, hear nothing, or begin what they do not end: what has arrived is not kept waiting, and what is lost is told.

use std::collections::VecDeque;

use soccr::Connection;
use soccr_image::stream::{Message, Reader, Writer};

use super::untrusted::here;
use super::*;

/// A source that says nothing more, as one without power, and of which no connection ends.
pub fn what_has_arrived_does_not_wait_for_a_silent_source() {
    // Behind the last connection, and between two windows.
    for (announced, ended) in [(1, Ok(())), (2, Err(ErrorKind::Late))] {
        let lab = Lab::new().unwrap();
        let listener = lab.a.run(|| TcpListener::bind((lab.a.v4, 80))).unwrap();
        let peer = lab.peer.run(|| TcpStream::connect((lab.a.v4, 80))).unwrap();
        peer.set_read_timeout(Some(LIMIT)).unwrap();
        let (ours, _) = listener.accept().unwrap();
        let paused = soccr::pause(&ours).unwrap();
        let saved = paused.save().unwrap();
        paused.detach().unwrap();
        lab.steer(Side::B).unwrap();
        let (there, mut here) = UnixStream::pair().unwrap();
        let (tell, told) = channel();
        thread::scope(|scope| {
            let (lab, there) = (&lab, there);
            scope.spawn(move || {
                let mut limits = Limits::default();
                limits.decision = Duration::from_millis(300);
                let mover = lab.b.run(|| Mover::with(limits).unwrap());
                tell.send(lab.b.run(|| mover.receive_all(&mut here, Terms::default()))).unwrap();
            });
            let mut writer = Writer::new(&there).unwrap();
            let [answers, notes] = [true, false];
            let begin = Message::Begin { connections: announced, answers, notes, place: None, steered: None };
            writer.send(&begin).unwrap();
            writer.connection(1, "x", &saved).unwrap();
            let mut reader = Reader::new(&there).unwrap();
            assert_eq!(reader.receive().unwrap(), Some(Message::Ready { connection: 1 }));
            writer.send(&Message::Commit { connection: 1 }).unwrap();
            let received = told.recv_timeout(LIMIT).unwrap();
            assert_eq!(received.outcome.map_err(|error| error.kind()), ended);
            let arrived = received.arrived.into_iter().next().unwrap();
            assert_alive(&arrived.into_stream().unwrap(), &peer);
        });
    }
}

/// The beginning of a stream whose source hears no answers.
fn begin() -> Writer<Vec<u8>> {
    let mut writer = Writer::new(Vec::new()).unwrap();
    let [answers, notes] = [false, false];
    writer.send(&Message::Begin { connections: 1, answers, notes, place: None, steered: None }).unwrap();
    writer
}

/// All of it: the source has let go of the connection.
fn one_way(connection: &Connection) -> Vec<u8> {
    let mut writer = begin();
    writer.connection(1, "x", connection).unwrap();
    writer.send(&Message::Commit { connection: 1 }).unwrap();
    writer.finish().unwrap()
}

/// A connection that is in memory alone, and its peer.
fn saved() -> (Connection, TcpStream) {
    let (mut ours, mut peers) = connect(1);
    let (ours, peer) = (ours.remove(0), peers.remove(0));
    let paused = soccr::pause(&ours).unwrap();
    let saved = paused.save().unwrap();
    paused.detach().unwrap();
    (saved, peer)
}

/// It begins another stream, and says nothing more.
pub fn what_has_arrived_does_not_wait_for_the_stream_behind_it() {
    let mut limits = Limits::default();
    limits.decision = Duration::from_millis(300);
    for is_long in [false, true] {
        let (saved, peer) = saved();
        let mut beginning = begin();
        // One byte, or all that comes before its connection.
        let behind: &[u8] = if is_long { beginning.get_mut() } else { b"\n" };
        let (mut here, mut there) = UnixStream::pair().unwrap();
        here.write_all(&[&one_way(&saved), behind].concat()).unwrap();
        let (tell, told) = channel();
        let mover = Mover::with(limits).unwrap();
        thread::spawn(move || tell.send(mover.receive_all(&mut there, Terms::default())).unwrap());
        let received = told.recv_timeout(LIMIT).unwrap();
        assert_eq!(received.outcome.map_err(|error| error.kind()), Err(ErrorKind::Late));
        let arrived = received.arrived.into_iter().next().unwrap();
        assert_alive(&arrived.into_stream().unwrap(), &peer);
    }
}

/// A channel that fails behind these bytes.
struct Ending(Vec<u8>, io::ErrorKind);

impl Channel for Ending {
    fn exchange(&mut self, _: &[u8], input: &mut [u8], _: Option<Instant>) -> io::Result<Exchanged> {
        let bytes = std::mem::take(&mut self.0);
        if bytes.is_empty() {
            return Err(self.1.into());
        }
        input[..bytes.len()].copy_from_slice(&bytes);
        Ok(Exchanged { written: 0, read: Some(bytes.len()) })
    }
}

/// The channel breaks, or the caller is asked to end.
pub fn a_stream_that_is_complete_does_not_fail_with_its_channel() {
    for kind in [io::ErrorKind::ConnectionReset, io::ErrorKind::Interrupted] {
        let (saved, peer) = saved();
        let mover = Mover::new().unwrap();
        let received = mover.receive_all(&mut Ending(one_way(&saved), kind), Terms::default());
        received.outcome.unwrap();
        let arrived = received.arrived.into_iter().next().unwrap();
        assert_alive(&arrived.into_stream().unwrap(), &peer);
    }
}

/// A source that never reads what the target writes. While the target writes nothing, it says its next message.
struct Deaf(VecDeque<Vec<u8>>);

impl Channel for Deaf {
    fn exchange(
        &mut self,
        output: &[u8],
        input: &mut [u8],
        deadline: Option<Instant>,
    ) -> io::Result<Exchanged> {
        if !output.is_empty() {
            thread::sleep(deadline.unwrap().saturating_duration_since(Instant::now()));
            return Ok(Exchanged::default());
        }
        let words = self.0.pop_front().unwrap_or_default();
        input[..words.len()].copy_from_slice(&words);
        Ok(Exchanged { written: 0, read: Some(words.len()) })
    }
}

pub fn a_target_that_is_not_heard_tells_what_is_lost() {
    let (ours, peers) = connect(1);
    // Its socket stays: it cannot be restored beside that.
    let saved = soccr::pause(&ours[0]).unwrap().save().unwrap();
    let mut writer = Writer::new(Vec::new()).unwrap();
    let place = Some(here());
    let begin = Message::Begin { connections: 1, answers: true, notes: false, place, steered: None };
    writer.send(&begin).unwrap();
    writer.connection(1, "x", &saved).unwrap();
    let offer = std::mem::take(writer.get_mut());
    writer.send(&Message::Commit { connection: 1 }).unwrap();
    let commit = std::mem::take(writer.get_mut());
    let (tell, told) = channel();
    let mover = hasty().on_event(move |event| match event {
        Event::Lost { number, .. } => tell.send(("lost", number)).unwrap(),
        Event::Refused { number, .. } => tell.send(("refused", number)).unwrap(),
        _ => {}
    });
    let mut arriving = mover.listen(Deaf([offer, commit].into()));
    assert_eq!(arriving.next().unwrap_err().kind(), ErrorKind::Gone);
    drop(arriving);
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [("lost", 1)]);
    assert_alive(&ours[0], &peers[0]);
}
