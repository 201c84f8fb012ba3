//! What breaks on the way: who has the connection then.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};

use soccr::diag::Diag;
use soccr_image::stream::{Decoded, Decoder, Message};

use super::*;

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

pub fn a_target_that_ends_before_the_commit_leaves_it_here() {
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

pub fn a_commit_that_cannot_have_been_read_is_taken_back() {
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

pub fn a_channel_that_breaks_behind_the_commit_leaves_no_certainty() {
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

pub fn a_commit_that_may_have_been_read_is_not_taken_back() {
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

/// Fails once it is told to, and says so by its end.
struct Failing {
    channel: UnixStream,
    fails: Arc<AtomicBool>,
    _ended: Sender<()>,
}

impl Read for Failing {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.channel.read(bytes)?;
        if self.fails.load(Ordering::SeqCst) { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(read) }
    }
}

/// Passes a piece on, but tells so only when the reader beside it has failed.
struct Slow {
    channel: UnixStream,
    /// How many pieces come before that one.
    pieces: usize,
    fails: Arc<AtomicBool>,
    has_ended: Receiver<()>,
}

impl Write for Slow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let is_late = self.pieces == 0;
        self.pieces = self.pieces.wrapping_sub(1);
        if is_late {
            // Before the other end can answer.
            self.fails.store(true, Ordering::SeqCst);
            self.channel.shutdown(Shutdown::Read).unwrap();
            self.has_ended.recv().unwrap_err();
        }
        self.channel.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub fn a_piece_that_is_told_after_the_reader_has_failed_ends_nothing_else() {
    let (ours, peers) = connect(3);
    // BEGIN, CONNECTION, COMMIT: each waits for its own limit.
    thread::scope(|scope| {
        for (pieces, ends) in ours.into_iter().zip(peers).enumerate() {
            scope.spawn(move || a_late_piece_ends_nothing_else(pieces, ends));
        }
    });
}

fn a_late_piece_ends_nothing_else(pieces: usize, (ours, peer): (TcpStream, TcpStream)) {
    let (here, there) = UnixStream::pair().unwrap();
    let listening = listen(there, Terms::default());
    let (ended, has_ended) = channel();
    let fails = Arc::new(AtomicBool::new(false));
    let channel = here.try_clone().unwrap();
    let reader = Failing { channel, fails: Arc::clone(&fails), _ended: ended };
    let writer = Slow { channel: here.try_clone().unwrap(), pieces, fails, has_ended };
    let mut threads = Threads::new(reader, writer).unwrap();
    // It waits so long for the word that is late; what comes before that may take its time.
    let (mut limits, short) = (Limits::default(), Duration::from_secs(5));
    match pieces {
        0 => limits.start = short,
        1 => limits.answer = short,
        _ => {}
    }
    let mover = Mover::with(limits).unwrap();
    let outcome = mover.take(ours).unwrap().send(&mut threads);
    drop(threads);
    here.shutdown(Shutdown::Both).unwrap();
    let mut arrived = listening.join().unwrap();
    match (pieces, outcome) {
        (2, Outcome::Unknown(error)) => {
            assert_eq!(error.kind(), ErrorKind::Gone);
            assert_alive(&arrived.pop().unwrap().into_stream().unwrap(), &peer);
        }
        (_, outcome) => assert_alive(&stays(outcome, ErrorKind::Gone), &peer),
    }
    assert!(arrived.is_empty());
}

/// Passes nothing on, and fails in the end.
struct Blocked(Receiver<()>);

impl Write for Blocked {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        self.0.recv().map_err(|_| io::ErrorKind::BrokenPipe.into()).map(|()| 0)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub fn a_writer_that_never_tells_is_not_waited_for() {
    let (mut ours, peers) = connect(1);
    let (here, _there) = UnixStream::pair().unwrap();
    let (end, has_ended) = channel();
    let mut threads = Threads::new(here.try_clone().unwrap(), Blocked(has_ended)).unwrap();
    let outcome = hasty().take(ours.pop().unwrap()).unwrap().send(&mut threads);
    assert_alive(&stays(outcome, ErrorKind::Late), &peers[0]);
    drop(end);
    here.shutdown(Shutdown::Both).unwrap();
}

pub fn a_source_that_ends_before_the_commit_leaves_nothing_there() {
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
                notes: false,
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

/// The target takes them, and does not say its last word.
pub fn a_target_that_has_not_said_its_last_word_is_told_of() {
    let (ours, peers) = connect(2);
    let (mut here, mut there) = UnixStream::pair().unwrap();
    let (send, told) = channel();
    let mut limits = Limits::default();
    limits.end = Duration::from_millis(300);
    let mover = Mover::with(limits).unwrap().on_event(move |event| {
        if let Event::Unfinished(why) = event {
            send.send(why.to_owned()).unwrap();
        }
    });
    let receiving = thread::spawn(move || {
        let received = Mover::new().unwrap().receive_all(&mut there, Terms::default());
        (there, received)
    });
    let departing: Vec<_> = ours.into_iter().map(|stream| mover.take(stream).unwrap()).collect();
    assert!(mover.send_all(departing, &mut here).iter().all(Outcome::is_moved));
    assert_eq!(told.try_iter().collect::<Vec<_>>(), ["the target answers too late"]);
    let (_there, received) = receiving.join().unwrap();
    for (arrived, peer) in received.arrived.into_iter().zip(&peers) {
        assert_alive(&arrived.into_stream().unwrap(), peer);
    }
}

/// Whoever asks once more after an error is not kept waiting.
pub fn after_an_error_nothing_more_is_waited_for() {
    let (here, there) = UnixStream::pair().unwrap();
    let mover = Mover::new().unwrap();
    let mut arriving = mover.listen(there);
    let mut writer = soccr_image::stream::Writer::new(&here).unwrap();
    let begin = Message::Begin { connections: 1, answers: true, notes: false, place: None, steered: None };
    writer.send(&begin).unwrap();
    drop(here);
    assert_eq!(arriving.next().unwrap_err().kind(), ErrorKind::Gone);
    assert!(arriving.next().unwrap().is_none());
}

/// The connections come back, and the program goes on.
pub fn a_listener_that_panics_ends_nothing_else() {
    let (ours, peers) = connect(2);
    let (mut here, _there) = UnixStream::pair().unwrap();
    let mut limits = Limits::default();
    limits.start = Duration::from_millis(50);
    let mover = Mover::with(limits).unwrap().on_event(|event| {
        if let Event::Settled { .. } = event {
            panic!("as a test wants it");
        }
    });
    let departing: Vec<_> = ours.into_iter().map(|stream| mover.take(stream).unwrap()).collect();
    let sent = catch_unwind(AssertUnwindSafe(|| mover.send_all(departing, &mut here)));
    assert!(sent.is_err());
    let back = mover.came_back();
    assert_eq!(back.len(), 2);
    for (back, peer) in back.iter().zip(&peers) {
        assert_alive(&back.value, peer);
    }
}

/// Looks at a connection whenever the target is about to say that it has it.
struct Watched {
    channel: UnixStream,
    decoder: Decoder,
    /// How much has been written, and decoded.
    bytes: (usize, usize),
    flow: Flow,
    unread: Arc<Mutex<Option<u32>>>,
}

impl Channel for Watched {
    fn exchange(
        &mut self,
        output: &[u8],
        input: &mut [u8],
        deadline: Option<Instant>,
    ) -> io::Result<Exchanged> {
        let (written, decoded) = self.bytes;
        self.decoder.feed(&output[(decoded - written).min(output.len())..]);
        self.bytes.1 = decoded.max(written + output.len());
        loop {
            match self.decoder.decode().unwrap() {
                Decoded::Message(Message::Taken { .. }) => {
                    let Flow { local, remote } = self.flow;
                    let unread = Diag::open().unwrap().find(local, remote, |socket| socket.receive_queue);
                    *self.unread.lock().unwrap() = unread.unwrap();
                }
                Decoded::Incomplete | Decoded::End => break,
                _ => {}
            }
        }
        let exchanged = self.channel.exchange(output, input, deadline)?;
        self.bytes.0 += exchanged.written;
        Ok(exchanged)
    }
}

/// If the source heard it earlier, the end of the target would leave a connection silent that the source does not look after any more.
pub fn what_is_said_to_be_taken_has_gone_on() {
    let (mut ours, peers) = connect(1);
    let (mut here, there) = UnixStream::pair().unwrap();
    let unread = Arc::new(Mutex::new(None));
    let watched = Watched {
        channel: there,
        decoder: Decoder::new(),
        bytes: (0, 0),
        flow: Flow::of(&ours[0]).unwrap(),
        unread: Arc::clone(&unread),
    };
    let peer = peers[0].try_clone().unwrap();
    // While the connection is locked.
    let terms =
        Terms::default().accept_if(move |_| (&peer).write_all(b"held").map_err(|error| error.to_string()));
    let listening = listen(watched, terms);
    assert!(Mover::new().unwrap().take(ours.remove(0)).unwrap().send(&mut here).is_moved());
    drop(here);
    let ours = listening.join().unwrap().pop().unwrap().into_stream().unwrap();
    assert_eq!(*unread.lock().unwrap(), Some(4));
    assert_eq!(read(&ours, 4), b"held");
}
