//! Connections and the state of their owners move between two ends of a channel, on the real kernel.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use soccr_handover::channel::{Channel, Exchanged, Pair, Threads};
use soccr_handover::protocol::Fate;
use soccr_handover::{Arrived, ErrorKind, Event, Limits, Mover, Outcome, Terms};
use soccr_lab::{Flags, Lab, Namespace, Side, Sniffer};

soccr_lab::tests![
    state_and_what_was_read_move_along,
    between_hosts_every_byte_arrives_in_both_directions,
    many_move_together,
    one_channel_carries_many_sends,
    pipes_and_threads_are_channels,
    what_the_target_does_not_want_stays,
    where_nobody_answers_nothing_is_touched,
    a_target_that_ends_before_the_commit_leaves_it_here,
    a_commit_that_cannot_have_been_read_is_taken_back,
    a_channel_that_breaks_behind_the_commit_leaves_no_certainty,
    a_commit_that_may_have_been_read_is_not_taken_back,
    a_source_that_ends_before_the_commit_leaves_nothing_there,
    a_state_that_is_too_long_stays_with_its_connection,
    what_is_no_connection_is_given_back,
    with_kernel_tls_it_moves_with_its_session,
    with_kernel_tls_what_is_refused_goes_on,
];

/// How long a read may take before its test fails.
const LIMIT: Duration = Duration::from_secs(20);

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
    assert_eq!(
        (arrived.state(), arrived.flow().unwrap().remote),
        (&b"session 7"[..], peer.local_addr().unwrap())
    );
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

/// Gives the kernel keys for both directions of both ends (TLS 1.2, AES-GCM-128); false where it has no TLS.
fn encrypt(ends: [&TcpStream; 2]) -> bool {
    let mut crypto = [7; 40];
    crypto[..4].copy_from_slice(&[3, 3, 51, 0]);
    crypto[32..].fill(0);
    for end in ends {
        if let Err(error) = soccr_lab::set_option(end, 6, 31, b"tls") {
            eprintln!("\nSKIPPED: the kernel has no TLS (modprobe tls): {error}");
            return false;
        }
        [1, 2].into_iter().for_each(|direction| soccr_lab::set_option(end, 282, direction, &crypto).unwrap());
    }
    true
}

/// The state stands for what a program knows of the session.
fn with_kernel_tls_it_moves_with_its_session() {
    let (ours, peers) = connect(1);
    let (mut ours, mut peer) = (ours.into_iter().next().unwrap(), &peers[0]);
    if !encrypt([&ours, peer]) {
        return;
    }
    for number in 0..10 {
        peer.write_all(&[number; 20_000]).unwrap();
        assert_eq!(read(&ours, 3), [number; 3]);
        ours.write_all(b"to the peer").unwrap();
        let (mut here, there) = UnixStream::pair().unwrap();
        let listening = listen(there, Terms::default());
        let mover = Mover::new().unwrap();
        let departing = mover.take(ours).unwrap().unread(&[number; 3]).unwrap().with_critical_state([number]);
        let outcome = departing.send(&mut here);
        assert!(outcome.is_moved(), "{outcome:?}");
        drop(here);
        let arrived = listening.join().unwrap().pop().unwrap();
        assert_eq!(arrived.state(), [number]);
        ours = arrived.into_stream().unwrap();
        assert_eq!(read(&ours, 20_000), [number; 20_000]);
        assert_eq!(read(peer, 11), b"to the peer");
        assert_alive(&ours, peer);
    }
}

fn with_kernel_tls_what_is_refused_goes_on() {
    let (ours, peers) = connect(1);
    let (ours, mut peer) = (ours.into_iter().next().unwrap(), &peers[0]);
    if !encrypt([&ours, peer]) {
        return;
    }
    peer.write_all(b"unread").unwrap();
    let (mut here, there) = UnixStream::pair().unwrap();
    let listening = listen(there, Terms::default().accept_if(|_| Err("not here".into())));
    let outcome = Mover::new().unwrap().take(ours).unwrap().send(&mut here);
    let ours = stays(outcome, ErrorKind::Refused);
    drop(here);
    assert!(listening.join().unwrap().is_empty());
    assert_eq!(read(&ours, 6), b"unread");
    assert_alive(&ours, peer);
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

/// A relay between source and target, which breaks where a test wants it to.
struct Relay {
    channel: UnixStream,
    /// How many bytes are passed on to the target.
    limit: usize,
    /// Whether a write beyond that fails; otherwise it is swallowed, and the channel ends.
    fails: bool,
    is_cut: bool,
}

impl Relay {
    fn new(channel: UnixStream, limit: usize, fails: bool) -> Self {
        Self { channel, limit, fails, is_cut: false }
    }
}

impl Channel for Relay {
    fn exchange(
        &mut self,
        output: &[u8],
        input: &mut [u8],
        deadline: Option<Instant>,
    ) -> io::Result<Exchanged> {
        if self.is_cut {
            return match self.fails {
                true => Err(io::ErrorKind::BrokenPipe.into()),
                false => Ok(Exchanged { written: 0, read: Some(0) }),
            };
        }
        let passed = &output[..output.len().min(self.limit)];
        if !output.is_empty() && passed.is_empty() {
            self.is_cut = true;
            self.channel.shutdown(Shutdown::Both).unwrap();
            return match self.fails {
                true => Err(io::ErrorKind::BrokenPipe.into()),
                false => Ok(Exchanged { written: output.len(), read: None }),
            };
        }
        let exchanged = self.channel.exchange(passed, input, deadline)?;
        self.limit -= exchanged.written;
        Ok(exchanged)
    }
}

/// Moves a connection of the same shape, and finds out how many bytes the source writes before COMMIT.
fn bytes_before_commit() -> usize {
    struct Counted(UnixStream, Vec<usize>);
    impl Channel for Counted {
        fn exchange(
            &mut self,
            output: &[u8],
            input: &mut [u8],
            deadline: Option<Instant>,
        ) -> io::Result<Exchanged> {
            let exchanged = self.0.exchange(output, input, deadline)?;
            if exchanged.written > 0 {
                self.1.push(exchanged.written);
            }
            Ok(exchanged)
        }
    }
    let (ours, _peers) = connect(1);
    let (here, there) = UnixStream::pair().unwrap();
    let listening = listen(there, Terms::default());
    let mut here = Counted(here, Vec::new());
    for stream in ours {
        assert!(Mover::new().unwrap().take(stream).unwrap().named("x").send(&mut here).is_moved());
    }
    let written = std::mem::take(&mut here.1);
    drop(here);
    assert_eq!(listening.join().unwrap().len(), 1);
    // BEGIN, CONNECTION, COMMIT, END.
    assert_eq!(written.len(), 4, "{written:?}");
    written[0] + written[1]
}

/// In a network of its own, so that what was learned of one path does not make the next connection longer.
fn elsewhere<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(|| Namespace::new().unwrap().run(work)).join().unwrap())
}

fn a_target_that_ends_before_the_commit_leaves_it_here() {
    let (mut ours, peers) = connect(1);
    let (here, there) = UnixStream::pair().unwrap();
    let listening = listen(there, Terms::default());
    // It has said READY, or not.
    let mut here = Relay::new(here, 100, true);
    let stream =
        stays(Mover::new().unwrap().take(ours.pop().unwrap()).unwrap().send(&mut here), ErrorKind::Gone);
    assert_eq!(listening.join().unwrap().len(), 0);
    assert_alive(&stream, &peers[0]);
}

fn a_commit_that_cannot_have_been_read_is_taken_back() {
    let before = elsewhere(bytes_before_commit);
    for commit in [0, 1, 19] {
        let (mut ours, mut peers) = connect(1);
        peers[0].write_all(b"unread ").unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        let listening = listen(there, Terms::default());
        // The seven bytes are in the connection.
        let mut here = Relay::new(here, before + 7 + commit, true);
        let departing = Mover::new().unwrap().take(ours.pop().unwrap()).unwrap().named("x");
        let stream = stays(departing.send(&mut here), ErrorKind::Gone);
        assert_eq!(listening.join().unwrap().len(), 0);
        assert_eq!(read(&stream, 7), b"unread ");
        assert_alive(&stream, &peers[0]);
    }
}

fn a_channel_that_breaks_behind_the_commit_leaves_no_certainty() {
    let before = elsewhere(bytes_before_commit);
    let (mut ours, peers) = connect(1);
    let (here, there) = UnixStream::pair().unwrap();
    let listening = listen(there, Terms::default());
    // COMMIT is swallowed, and nobody knows.
    let mut here = Relay::new(here, before, false);
    match Mover::new().unwrap().take(ours.pop().unwrap()).unwrap().named("x").send(&mut here) {
        Outcome::Unknown(error) => assert_eq!(error.kind(), ErrorKind::Gone),
        other => panic!("{other:?}"),
    }
    assert_eq!(listening.join().unwrap().len(), 0);
    // Nobody has it, and nobody says so: this host is silent about it.
    peers[0].set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!((&peers[0]).write_all(b"?").is_ok());
    let heard = (&peers[0]).read(&mut [0]).unwrap_err();
    assert_eq!(heard.kind(), io::ErrorKind::WouldBlock);
}

/// A channel that passes on what it does not tell, and ends when it has passed on COMMIT.
struct Layer {
    channel: UnixStream,
    passed: usize,
    limit: usize,
}

impl Channel for Layer {
    fn exchange(
        &mut self,
        output: &[u8],
        input: &mut [u8],
        deadline: Option<Instant>,
    ) -> io::Result<Exchanged> {
        if self.passed + output.len() > self.limit {
            self.channel.write_all(output).unwrap();
            // Its answer is what gets lost.
            self.channel.read_exact(&mut [0]).unwrap();
            return Ok(Exchanged { written: 0, read: Some(0) });
        }
        let exchanged = self.channel.exchange(output, input, deadline)?;
        self.passed += exchanged.written;
        Ok(exchanged)
    }

    fn hides_writes(&self) -> bool {
        true
    }
}

fn a_commit_that_may_have_been_read_is_not_taken_back() {
    let limit = elsewhere(bytes_before_commit);
    let (mut ours, peers) = connect(1);
    let (here, there) = UnixStream::pair().unwrap();
    let listening = listen(there, Terms::default());
    let mut here = Layer { channel: here, passed: 0, limit };
    let (tell, told) = channel();
    let mover = Mover::new().unwrap().on_event(move |event| {
        if let Event::Settled { name, fate } = event {
            tell.send((name.to_owned(), fate)).unwrap();
        }
    });
    match mover.take(ours.pop().unwrap()).unwrap().named("x").send(&mut here) {
        Outcome::Unknown(error) => assert_eq!(error.kind(), ErrorKind::Gone),
        other => panic!("{other:?}"),
    }
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [("x".to_owned(), Fate::Unknown)]);
    drop(here);
    let arrived = listening.join().unwrap().pop().unwrap();
    assert_alive(&arrived.into_stream().unwrap(), &peers[0]);
}

fn a_source_that_ends_before_the_commit_leaves_nothing_there() {
    let lab = Lab::new().unwrap();
    let listener = lab.a.run(|| TcpListener::bind((lab.a.v4, 80))).unwrap();
    let peer = lab.peer.run(|| TcpStream::connect((lab.a.v4, 80))).unwrap();
    let (ours, _) = listener.accept().unwrap();
    let (here, mut there) = UnixStream::pair().unwrap();
    let saved = soccr::pause(&ours).unwrap().save().unwrap();
    thread::scope(|scope| {
        let lab = &lab;
        let listening = scope.spawn(move || {
            lab.b.run(move || {
                let mover = Mover::new().unwrap();
                let mut arriving = mover.listen(here);
                arriving.next().map(|arrived| arrived.is_some()).unwrap_err().kind()
            })
        });
        let mut writer = soccr_image::stream::Writer::new(&there).unwrap();
        writer
            .send(&soccr_image::stream::Message::Begin {
                connections: 1,
                answers: true,
                place: None,
                steered: None,
            })
            .unwrap();
        writer.connection(1, "x", &saved).unwrap();
        let mut reader = soccr_image::stream::Reader::new(&mut there).unwrap();
        let ready = reader.receive().unwrap();
        assert_eq!(ready, Some(soccr_image::stream::Message::Ready { connection: 1 }));
        drop(there);
        assert_eq!(listening.join().unwrap(), ErrorKind::Gone);
    });
    // Nothing of it is left there, and it was never gone from here.
    let free = lab.b.run(|| {
        let mut sockets = 0;
        soccr::diag::Diag::open().unwrap().visit(|_| sockets += 1).unwrap();
        sockets
    });
    assert_eq!(free, 0);
    assert_alive(&ours, &peer);
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
