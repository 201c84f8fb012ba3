//! Connections and the state of their owners move between two ends of a channel, on the real kernel.

mod broken;
mod quiet;
mod seat;
mod silence;
mod stop;
mod tls;
mod untrusted;

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use soccr::Flow;
use soccr::steer::NextHop;
use soccr_handover::channel::{Channel, Exchanged, OneWay, Pair, Threads};
use soccr_handover::protocol::Fate;
use soccr_handover::{Arrived, ErrorKind, Event, Limits, Mover, Outcome, Terms, try_out};
use soccr_lab::{Flags, LIMIT, Lab, Lan, Namespace, Side, Sniffer, blocked_signals};

use broken::{
    a_channel_that_breaks_behind_the_commit_leaves_no_certainty,
    a_commit_that_cannot_have_been_read_is_taken_back, a_commit_that_may_have_been_read_is_not_taken_back,
    a_listener_that_panics_ends_nothing_else,
    a_piece_that_is_told_after_the_reader_has_failed_ends_nothing_else,
    a_source_that_ends_before_the_commit_leaves_nothing_there,
    a_target_that_ends_before_the_commit_leaves_it_here, a_target_that_has_not_said_its_last_word_is_told_of,
    a_writer_that_never_tells_is_not_waited_for, after_an_error_nothing_more_is_waited_for,
    what_is_said_to_be_taken_has_gone_on,
};
use quiet::{
    a_stream_that_is_complete_does_not_fail_with_its_channel, a_target_that_is_not_heard_tells_what_is_lost,
    what_has_arrived_does_not_wait_for_a_silent_source,
    what_has_arrived_does_not_wait_for_the_stream_behind_it,
};
use seat::{
    a_handshake_comes_back, what_a_disconnect_clears_comes_back, what_lets_in_the_peer_alone_is_no_obstacle,
};
use silence::{
    a_silence_begins_again, silences_do_not_end_each_other, what_does_not_come_home_is_steered_on,
    what_does_not_come_home_stays_silent,
};
use stop::{a_child_in_vfork_goes_on_until_its_parent_stops, a_thread_that_does_not_stop_holds_no_other_up};
use tls::{with_kernel_tls_it_moves_with_its_session, with_kernel_tls_what_is_refused_goes_on};
use untrusted::{
    a_state_that_nobody_takes_is_not_kept, addresses_on_the_wire_are_nobody_elses,
    nobody_learns_the_place_of_a_target, nothing_is_delivered_for_a_source_that_is_not_reached,
    what_comes_without_its_state_stays_alone, what_is_delivered_for_a_connection_ends_with_it,
    who_begins_twice_leaves_no_tunnel,
};

soccr_lab::tests![
    state_and_what_was_read_move_along,
    between_hosts_every_byte_arrives_in_both_directions,
    many_move_together,
    one_channel_carries_many_sends,
    pipes_and_threads_are_channels,
    what_is_never_written_waits_no_longer_than_the_deadline,
    the_threads_of_a_channel_take_no_signal,
    what_the_target_does_not_want_stays,
    what_no_next_hop_is_named_for_stays,
    a_question_takes_no_room,
    a_question_is_about_the_address_that_is_mapped,
    where_nobody_answers_nothing_is_touched,
    a_target_that_ends_before_the_commit_leaves_it_here,
    a_commit_that_cannot_have_been_read_is_taken_back,
    a_channel_that_breaks_behind_the_commit_leaves_no_certainty,
    a_commit_that_may_have_been_read_is_not_taken_back,
    a_piece_that_is_told_after_the_reader_has_failed_ends_nothing_else,
    a_writer_that_never_tells_is_not_waited_for,
    a_source_that_ends_before_the_commit_leaves_nothing_there,
    a_target_that_has_not_said_its_last_word_is_told_of,
    a_target_that_is_not_heard_tells_what_is_lost,
    what_has_arrived_does_not_wait_for_a_silent_source,
    what_has_arrived_does_not_wait_for_the_stream_behind_it,
    a_stream_that_is_complete_does_not_fail_with_its_channel,
    after_an_error_nothing_more_is_waited_for,
    a_listener_that_panics_ends_nothing_else,
    what_is_said_to_be_taken_has_gone_on,
    a_state_that_is_too_long_stays_with_its_connection,
    what_is_no_connection_is_given_back,
    a_handshake_comes_back,
    what_a_disconnect_clears_comes_back,
    what_lets_in_the_peer_alone_is_no_obstacle,
    a_silence_begins_again,
    what_does_not_come_home_stays_silent,
    what_does_not_come_home_is_steered_on,
    silences_do_not_end_each_other,
    a_thread_that_does_not_stop_holds_no_other_up,
    a_child_in_vfork_goes_on_until_its_parent_stops,
    with_kernel_tls_it_moves_with_its_session,
    with_kernel_tls_what_is_refused_goes_on,
    nobody_learns_the_place_of_a_target,
    addresses_on_the_wire_are_nobody_elses,
    what_comes_without_its_state_stays_alone,
    who_begins_twice_leaves_no_tunnel,
    nothing_is_delivered_for_a_source_that_is_not_reached,
    what_is_delivered_for_a_connection_ends_with_it,
    a_state_that_nobody_takes_is_not_kept,
];

/// How long a read may take before its test fails.
/// Connections over `lo`: our ends, and the peers'.
fn connect(count: usize) -> (Vec<TcpStream>, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:8080").unwrap();
    let connect = |_| {
        let peer = TcpStream::connect("127.0.0.1:8080").unwrap();
        peer.set_read_timeout(Some(LIMIT)).unwrap();
        (listener.accept().unwrap().0, peer)
    };
    (0..count).map(connect).unzip()
}

/// A mover that waits less for what does not come.
fn hasty() -> Mover {
    let mut limits = Limits::default();
    (limits.start, limits.answer) = (Duration::from_millis(300), Duration::from_millis(300));
    Mover::with(limits).unwrap()
}

/// Takes in what comes through a channel, on a thread in the same network, until that is closed.
fn listen(channel: impl Channel + Send + 'static, terms: Terms) -> thread::JoinHandle<Vec<Arrived>> {
    thread::spawn(move || {
        let mover = Mover::new().unwrap();
        let mut arriving = mover.listen_for(channel, terms);
        let mut arrived = Vec::new();
        // A source that breaks off is the affair of some tests.
        while let Ok(Some(one)) = arriving.next() {
            arrived.push(one);
        }
        arrived
    })
}

fn read(mut stream: &TcpStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Both ends hear from each other.
fn assert_alive(ours: &TcpStream, peer: &TcpStream) {
    for (mut from, to) in [(ours, peer), (peer, ours)] {
        from.write_all(b"hello").unwrap();
        assert_eq!(read(to, 5), b"hello");
    }
}

#[track_caller]
fn stays(outcome: Outcome, kind: ErrorKind) -> TcpStream {
    match outcome {
        Outcome::Stays(stream, error) if error.kind() == kind => stream,
        other => panic!("{other:?}"),
    }
}

fn state_and_what_was_read_move_along() {
    let (ours, mut peers) = connect(1);
    let (ours, peer) = (ours.into_iter().next().unwrap(), &mut peers[0]);
    peer.write_all(b"request, half ").unwrap();
    assert_eq!(read(&ours, 14), b"request, half ");
    peer.write_all(b"of it").unwrap();
    let (mut here, there) = UnixStream::pair().unwrap();
    let listening = listen(there, Terms::default());
    let mover = Mover::new().unwrap();
    let departing = mover.take(ours).unwrap().unread(b"half ").unwrap().with_state(*b"session 7");
    assert!(departing.send(&mut here).is_moved());
    drop(here);
    let arrived = listening.join().unwrap().pop().unwrap();
    assert_eq!((arrived.state(), arrived.flow().remote), (&b"session 7"[..], peer.local_addr().unwrap()));
    let ours = arrived.into_stream().unwrap();
    assert_eq!(read(&ours, 10), b"half of it");
    assert_alive(&ours, peer);
}

/// What both ends write, wherever the connection is meanwhile.
fn between_hosts_every_byte_arrives_in_both_directions() {
    const LENGTH: usize = 3_000_000;
    let lab = Lab::new().unwrap();
    let listener = lab.a.run(|| TcpListener::bind((lab.a.v4, 80))).unwrap();
    let peer = lab.peer.run(|| TcpStream::connect((lab.a.v4, 80))).unwrap();
    let mut resets = Sniffer::flagged(&lab.peer.namespace, "eth0", Flags::RST).unwrap();
    let (ours, _) = listener.accept().unwrap();
    peer.set_read_timeout(Some(LIMIT)).unwrap();
    let bytes: Vec<u8> = (0..LENGTH).map(|at| ((at * 31) >> 3) as u8).collect();
    let half = LENGTH / 2;
    thread::scope(|scope| {
        let writing = scope.spawn(|| (&peer).write_all(&bytes).unwrap());
        let echoed = scope.spawn(|| read(&peer, LENGTH) == bytes);
        // Half of it is echoed here, the rest there.
        let first = read(&ours, half);
        (&ours).write_all(&first).unwrap();
        let (mut here, there) = UnixStream::pair().unwrap();
        let (arrived, comes) = channel();
        let lab = &lab;
        scope.spawn(move || {
            lab.b.run(move || {
                let mover = Mover::new().unwrap();
                let mut arriving = mover.listen(there);
                arrived.send(arriving.next().unwrap().unwrap().into_stream().unwrap()).unwrap();
                while arriving.next().unwrap().is_some() {}
            })
        });
        let departing = lab.a.run(|| Mover::new().unwrap()).take(ours).unwrap();
        assert!(lab.a.run(|| departing.send(&mut here)).is_moved());
        lab.steer(Side::B).unwrap();
        let ours = comes.recv().unwrap();
        let rest = read(&ours, LENGTH - half);
        (&ours).write_all(&rest).unwrap();
        writing.join().unwrap();
        assert!(echoed.join().unwrap(), "what came back is what was sent");
        ours.shutdown(Shutdown::Write).unwrap();
        assert_eq!((&peer).read(&mut [0]).unwrap(), 0);
    });
    assert!(resets.segments().unwrap().is_empty());
}

fn many_move_together() {
    let (ours, mut peers) = connect(300);
    for (number, peer) in peers.iter_mut().enumerate() {
        peer.write_all(&(number as u32).to_be_bytes()).unwrap();
    }
    let (mut here, there) = UnixStream::pair().unwrap();
    let listening = listen(there, Terms::default());
    let mover = Mover::new().unwrap();
    let departing = ours.into_iter().enumerate().map(|(number, stream)| {
        mover.take(stream).unwrap().with_state((number as u32).to_be_bytes()).named(number.to_string())
    });
    let departing: Vec<_> = departing.collect();
    assert!(mover.send_all(departing, &mut here).iter().all(Outcome::is_moved));
    drop(here);
    let arrived = listening.join().unwrap();
    assert_eq!(arrived.len(), 300);
    for one in arrived {
        let state = one.state().to_vec();
        let number = u32::from_be_bytes(*state.first_chunk().unwrap());
        assert_eq!(one.name(), number.to_string());
        let stream = one.into_stream().unwrap();
        assert_eq!(read(&stream, 4), state);
        assert_alive(&stream, &peers[number as usize]);
    }
}

fn one_channel_carries_many_sends() {
    let (ours, peers) = connect(3);
    let (mut here, there) = UnixStream::pair().unwrap();
    let listening = listen(there, Terms::default());
    let mover = Mover::new().unwrap();
    for (stream, number) in ours.into_iter().zip(0..) {
        assert!(mover.take(stream).unwrap().with_state([number]).send(&mut here).is_moved());
    }
    drop(here);
    for (one, (peer, number)) in listening.join().unwrap().into_iter().zip(peers.iter().zip(0..)) {
        assert_eq!(one.state(), [number]);
        assert_alive(&one.into_stream().unwrap(), peer);
    }
}

fn pipes_and_threads_are_channels() {
    let (ours, peers) = connect(2);
    let mover = Mover::new().unwrap();
    let mut streams = ours.into_iter();
    let (read_answers, write_answers) = io::pipe().unwrap();
    let (read_words, write_words) = io::pipe().unwrap();
    let listening = listen(Pair { read: read_words, write: write_answers }, Terms::default());
    let mut here = Pair { read: read_answers, write: write_words };
    assert!(mover.take(streams.next().unwrap()).unwrap().send(&mut here).is_moved());
    drop(here);
    assert_alive(&listening.join().unwrap().pop().unwrap().into_stream().unwrap(), &peers[0]);

    let (here, there) = UnixStream::pair().unwrap();
    let threads = |end: UnixStream| Threads::new(end.try_clone().unwrap(), end).unwrap();
    let closing = here.try_clone().unwrap();
    let (mut here, listening) = (threads(here), listen(threads(there), Terms::default()));
    assert!(mover.take(streams.next().unwrap()).unwrap().send(&mut here).is_moved());
    closing.shutdown(Shutdown::Both).unwrap();
    assert_alive(&listening.join().unwrap().pop().unwrap().into_stream().unwrap(), &peers[1]);
}

fn what_is_never_written_waits_no_longer_than_the_deadline() {
    // It is writable, though not for a number as high as this.
    let counter = eventfd(1, EventfdFlags::NONBLOCK).unwrap();
    let output = (u64::MAX - 1).to_ne_bytes();
    let deadline = Some(Instant::now() + Duration::from_millis(50));
    let exchanged = OneWay(counter).exchange(&output, &mut [], deadline).unwrap();
    assert_eq!(exchanged, Exchanged::default());
}

/// Tells which signals its thread blocks.
struct Looking(Sender<u64>);

impl Looking {
    fn look(&self) -> io::Result<usize> {
        self.0.send(blocked_signals(Path::new("/proc/thread-self"))?).map_err(io::Error::other)?;
        Ok(1)
    }
}

impl Read for Looking {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        self.look()
    }
}

impl Write for Looking {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        self.look()
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn the_threads_of_a_channel_take_no_signal() {
    const SIGTERM: u32 = 15;
    let (reader, writer) = (channel(), channel());
    let mut threads = Threads::new(Looking(reader.0), Looking(writer.0)).unwrap();
    threads.exchange(&[1], &mut [], None).unwrap();
    for masks in [reader.1, writer.1] {
        let mask = masks.recv_timeout(LIMIT).unwrap();
        assert!(mask & 1 << (SIGTERM - 1) != 0, "{mask:x}");
    }
}

fn what_the_target_does_not_want_stays() {
    let (ours, mut peers) = connect(3);
    peers[1].write_all(b"unread ").unwrap();
    let (mut here, there) = UnixStream::pair().unwrap();
    let terms = Terms::default().accept_if(|offer| match offer.state {
        b"1" => Err("version 1 is not understood here".into()),
        _ => Ok(()),
    });
    let listening = listen(there, terms);
    let mover = Mover::new().unwrap();
    let departing: Vec<_> = ours
        .into_iter()
        .zip([*b"0", *b"1", *b"2"])
        .map(|(stream, state)| mover.take(stream).unwrap().unread(b"read ").unwrap().with_state(state))
        .collect();
    let mut outcomes = mover.send_all(departing, &mut here);
    drop(here);
    assert!(outcomes.remove(0).is_moved());
    match outcomes.remove(0) {
        Outcome::Stays(stream, error) => {
            assert_eq!(error.kind(), ErrorKind::Refused);
            assert!(error.to_string().contains("version 1 is not understood here"), "{error}");
            // As it was: what had been read is the program's still.
            assert_eq!(read(&stream, 7), b"unread ");
            assert_alive(&stream, &peers[1]);
        }
        other => panic!("{other:?}"),
    }
    assert!(outcomes.remove(0).is_moved());
    assert_eq!(listening.join().unwrap().len(), 2);
}

fn a_question_takes_no_room() {
    let (mut ours, peers) = connect(2);
    let (mut here, there) = UnixStream::pair().unwrap();
    let mut terms = Terms::default();
    terms.room = Some(1);
    let listening = listen(there, terms);
    let flows: Vec<_> = ours.iter().map(|stream| ("x".to_owned(), Flow::of(stream).unwrap())).collect();
    for _ in 0..2 {
        let answers = try_out(flows.clone(), &mut here, LIMIT, |_| {}).unwrap();
        // There is room for one of the two.
        assert_eq!(answers.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false]);
    }
    let mover = Mover::new().unwrap();
    assert!(mover.take(ours.pop().unwrap()).unwrap().send(&mut here).is_moved());
    // That was the room.
    let stream = stays(mover.take(ours.pop().unwrap()).unwrap().send(&mut here), ErrorKind::Refused);
    drop(here);
    assert_alive(&stream, &peers[0]);
    assert_alive(&listening.join().unwrap().pop().unwrap().into_stream().unwrap(), &peers[1]);
}

fn a_question_is_about_the_address_that_is_mapped() {
    let (ours, _peers) = connect(1);
    for (to, is_here) in [("127.0.0.2", true), ("192.0.2.9", false)] {
        let (mut here, there) = UnixStream::pair().unwrap();
        let mut terms = Terms::default();
        terms.map.push(format!("127.0.0.1:8080={to}:8080").parse().unwrap());
        let listening = listen(there, terms);
        let flow = Flow::of(&ours[0]).unwrap();
        let answer = try_out([("x".into(), flow)], &mut here, LIMIT, |_| {}).unwrap().pop().unwrap();
        assert_eq!(answer.is_ok(), is_here, "{answer:?}");
        drop(here);
        assert!(listening.join().unwrap().is_empty());
    }
}

fn what_no_next_hop_is_named_for_stays() {
    let lan = Lan::new().unwrap();
    let (home, away) = (&lan.hosts[0], &lan.hosts[1]);
    let listener = home.run(|| TcpListener::bind((home.v6, 80))).unwrap();
    let peer = lan.peer.run(|| TcpStream::connect((home.v6, 80))).unwrap();
    peer.set_read_timeout(Some(LIMIT)).unwrap();
    let (ours, _) = listener.accept().unwrap();
    let (mut here, there) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let mut terms = Terms::default();
        terms.steered = soccr_handover::Steered::Always;
        let listening = scope.spawn(|| away.run(|| listen(there, terms)).join().unwrap());
        let outcome = home.run(|| {
            let (mover, hop) = (Mover::new().unwrap(), NextHop::new(away.v4.into()).unwrap());
            let sending = mover.sending([mover.take(ours).unwrap()]).steered_to(vec![hop]);
            sending.through(&mut here).pop().unwrap()
        });
        drop(here);
        match outcome {
            Outcome::Stays(ours, error) => {
                assert!(error.to_string().contains("no next hop for IPv6"), "{error}");
                assert_alive(&ours, &peer);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(listening.join().unwrap().len(), 0);
    });
}

fn where_nobody_answers_nothing_is_touched() {
    let (mut ours, peers) = connect(2);
    // Silent, and gone.
    let (mut here, _there) = UnixStream::pair().unwrap();
    let start = Instant::now();
    let stream = stays(hasty().take(ours.pop().unwrap()).unwrap().send(&mut here), ErrorKind::Late);
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert_alive(&stream, &peers[1]);
    let (mut here, there) = UnixStream::pair().unwrap();
    drop(there);
    let stream = stays(hasty().take(ours.pop().unwrap()).unwrap().send(&mut here), ErrorKind::Gone);
    assert_alive(&stream, &peers[0]);
}

fn a_state_that_is_too_long_stays_with_its_connection() {
    let (mut ours, peers) = connect(2);
    let (mut here, there) = UnixStream::pair().unwrap();
    let listening = listen(there, Terms::default());
    let mover = Mover::new().unwrap();
    let longest = vec![7; soccr_image::stream::STATE_LIMIT];
    let too_long = mover.take(ours.pop().unwrap()).unwrap().with_state([&longest[..], b"x"].concat());
    let long = mover.take(ours.pop().unwrap()).unwrap().with_state(longest.clone());
    let mut outcomes = mover.send_all([too_long, long], &mut here);
    drop(here);
    assert!(outcomes.pop().unwrap().is_moved());
    assert_alive(&stays(outcomes.pop().unwrap(), ErrorKind::TooMuch), &peers[1]);
    let arrived = listening.join().unwrap().pop().unwrap();
    assert!(arrived.state() == longest);
    assert_alive(&arrived.into_stream().unwrap(), &peers[0]);
}

fn what_is_no_connection_is_given_back() {
    let (ours, _) = connect(1);
    let listener = TcpListener::bind("127.0.0.1:9").unwrap();
    let no_stream = TcpStream::from(std::os::fd::OwnedFd::from(listener));
    let rejected = Mover::new().unwrap().take(no_stream).unwrap_err();
    assert_eq!(rejected.error.kind(), ErrorKind::Connection);
    assert_eq!(rejected.value.local_addr().unwrap().port(), 9);
    drop(ours);
}
