//! The target of a hand-over: connections on their way to a recipient.
//!
//! The words and their order are those of [`soccr_image::stream`]. What arrives without a pause is locked, restored and
//! resumed together, as a batch. In the namespace of the source the old socket is in the way until the COMMIT: there a
//! connection is restored behind that.

use std::cell::Cell;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::net::TcpStream;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, poll};
use soccr::bulk::{self, Needs};
use soccr::connection::State;
use soccr::diag::Diag;
use soccr::lock::{Held, Locker, Mode};
use soccr::{Connection, Flow, Lock, Restored};
use soccr_image::AddressMap;
use soccr_image::stream::{Message, Reader, Writer};

use crate::fidelity::Reports;
use crate::handover::Recipient;
use crate::lifeline::Claim;
use crate::signals::Deaf;
use crate::{exit, silence};

/// The most connections of a batch, and the most bytes in their queues. A source that sends as many at a time is not
/// waited for.
const BATCH: usize = 256;
const BATCH_BYTES: usize = 16 << 20;

/// How long a batch waits for what is still announced. Each one takes about a millisecond by itself.
const PATIENCE: Duration = Duration::from_millis(2);

/// Takes connections from a source.
#[derive(Debug)]
pub(crate) struct Target<'a> {
    claim: Claim,
    /// Since the source may have let go of a connection.
    deaf: Option<Deaf>,
    locker: Locker,
    maps: &'a [AddressMap],
    recipient: &'a Recipient,
    reports: Reports<'a>,
    /// How many connections are still to come, as the source has said.
    announced: usize,
    /// How many more connections the recipient can take.
    room: usize,
    /// The numbers that the source has used.
    numbers: HashSet<u32>,
    arriving: Vec<Arriving>,
    arriving_bytes: usize,
    waiting: BTreeMap<u32, Waiting>,
    /// Those that the source has let go of, and that are not restored yet.
    committed: Vec<Committed>,
    batches: Vec<Batch>,
    streams: BTreeMap<u32, TcpStream>,
    answers: Option<Writer<Answers>>,
    failed: usize,
    lost: usize,
}

/// What has become of everything.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) deaf: Option<Deaf>,
    pub(crate) streams: Vec<TcpStream>,
    /// The source has listened.
    pub(crate) answered: bool,
    pub(crate) failed: usize,
    pub(crate) lost: usize,
}

/// A connection that has been read.
#[derive(Debug)]
struct Arriving {
    id: u32,
    name: String,
    connection: Connection,
}

/// A connection that is silent until the source says COMMIT.
#[derive(Debug)]
struct Waiting {
    name: String,
    batch: usize,
    place: Place,
    held: Held,
}

/// Where it waits.
#[derive(Debug)]
enum Place {
    /// In its new socket, complete.
    Restored(Restored),
    /// In memory, while the old socket is in this namespace.
    Behind(Box<Connection>),
}

/// A connection to be restored now that its old socket is out of the way.
#[derive(Debug)]
struct Committed {
    id: u32,
    name: String,
    batch: usize,
    connection: Connection,
    held: Held,
}

/// Connections under one lock.
#[derive(Debug)]
struct Batch {
    /// `None` when it is over.
    lock: Option<Lock>,
    /// How many the source has not decided about.
    undecided: usize,
    /// Those that are ours: they go on when the rest is decided.
    taken: Vec<(u32, Restored, Held)>,
}

impl<'a> Target<'a> {
    pub(crate) fn new(
        maps: &'a [AddressMap],
        recipient: &'a Recipient,
        reports: Reports<'a>,
        claim: Claim,
    ) -> Result<Self> {
        Ok(Self {
            claim,
            deaf: None,
            locker: Locker::new(Mode::HOLD)?,
            maps,
            recipient,
            reports,
            announced: 0,
            room: recipient.capacity(),
            numbers: HashSet::new(),
            arriving: Vec::new(),
            arriving_bytes: 0,
            waiting: BTreeMap::new(),
            committed: Vec::new(),
            batches: Vec::new(),
            streams: BTreeMap::new(),
            answers: None,
            failed: 0,
            lost: 0,
        })
    }

    /// Listens to the source until it has said everything.
    pub(crate) fn listen(&mut self, input: File) -> Result<()> {
        let buffered = Rc::new(Cell::new(0));
        let more = input.try_clone().context("standard input")?;
        let input =
            Input { reader: BufReader::with_capacity(64 << 10, input), buffered: Rc::clone(&buffered) };
        let mut reader = Reader::new(input).context("standard input")?;
        loop {
            let full = self.arriving.len() >= BATCH || self.arriving_bytes >= BATCH_BYTES;
            let idle = buffered.get() == 0 && !is_readable(&more, self.patience());
            if full || idle {
                self.restore()?;
            }
            if idle || self.committed.len() >= BATCH {
                self.restore_committed();
            }
            match reader.receive() {
                Ok(Some(Message::Connection { id, name, connection })) => {
                    self.announced = self.announced.saturating_sub(1);
                    self.arriving_bytes += connection.receive_queue.len() + connection.send_queue.len();
                    self.arriving.push(Arriving { id, name, connection });
                }
                Ok(Some(message)) => {
                    self.restore()?;
                    self.hear(message)?;
                }
                Ok(None) => return self.restore(),
                Err(error) => match error.connection() {
                    Some(id) => self.refuse(id, &error.into()),
                    None => return Err(anyhow::Error::new(error).context("the source")),
                },
            }
        }
    }

    /// How long it is worth waiting for more, before what has come is restored.
    fn patience(&self) -> Duration {
        let more_arrive = !self.arriving.is_empty() && self.announced > 0;
        let more_are_let_go = !self.committed.is_empty() && !self.waiting.is_empty();
        if more_arrive || more_are_let_go { PATIENCE } else { Duration::ZERO }
    }

    fn hear(&mut self, message: Message) -> Result<()> {
        match message {
            Message::Begin { connections, answers } => {
                let connections = connections as usize;
                Needs { connections, ..Needs::default() }.check()?;
                self.announced = connections;
                if answers && self.answers.is_none() {
                    // One that does not listen may have let go of them already: they are rescued in the end.
                    self.recipient.check_room(connections)?;
                    self.answers = Some(Writer::new(Answers)?);
                }
            }
            Message::Held { connection, packets } => {
                if let Some(waiting) = self.waiting.get_mut(&connection) {
                    waiting.held.packets.extend(packets);
                }
            }
            Message::Commit { connection } => {
                let id = connection;
                if let Some(Waiting { name, batch, place, held }) = self.waiting.remove(&id) {
                    match place {
                        Place::Restored(restored) => self.take(id, batch, restored, held),
                        Place::Behind(connection) => {
                            let connection = *connection;
                            self.committed.push(Committed { id, name, batch, connection, held });
                        }
                    }
                }
            }
            Message::Abort { connection, .. } => {
                if let Some(waiting) = self.waiting.remove(&connection) {
                    self.room += 1;
                    self.decided(waiting.batch);
                }
            }
            _ => bail!("the source does not know its part"),
        }
        Ok(())
    }

    /// Restores what has arrived.
    fn restore(&mut self) -> Result<()> {
        self.arriving_bytes = 0;
        let mut batch = Vec::new();
        for mut arriving in std::mem::take(&mut self.arriving) {
            if !self.numbers.insert(arriving.id) {
                bail!("the source uses the number {} twice", arriving.id);
            }
            if self.room == 0 {
                self.refuse(arriving.id, &anyhow!("{}: --stdio takes one connection", arriving.name));
                continue;
            }
            AddressMap::apply_to_connection(self.maps, &mut arriving.connection);
            self.room -= 1;
            match self.recipient.check(&arriving.connection) {
                Ok(()) => batch.push(arriving),
                Err(error) => self.give_up(arriving.id, &arriving.name, error),
            }
        }
        let flows: Vec<Flow> = batch.iter().map(|arriving| arriving.connection.flow()).collect();
        match self.locker.lock(&flows) {
            _ if batch.is_empty() => Ok(()),
            Ok(lock) => self.restore_locked(batch, lock),
            // One of them is in the way of all.
            Err(_) => batch.into_iter().try_for_each(|arriving| {
                match self.locker.lock(&[arriving.connection.flow()]) {
                    Ok(lock) => self.restore_locked(vec![arriving], lock)?,
                    Err(error) => self.give_up(arriving.id, &arriving.name, error.into()),
                }
                Ok(())
            }),
        }
    }

    fn restore_locked(&mut self, batch: Vec<Arriving>, lock: Lock) -> Result<()> {
        let number = self.batches.len();
        self.batches.push(Batch { lock: Some(lock), undecided: batch.len(), taken: Vec::new() });
        // Where that cannot be found out, the restore tells.
        let mut diag = Diag::open().ok();
        let mut is_in_use = |flow: Flow| {
            let state = diag.as_mut()?.find(flow.local, flow.remote, |socket| socket.state).ok()??;
            Some(state != State::TimeWait)
        };
        let (behind, free): (Vec<_>, Vec<_>) =
            batch.into_iter().partition(|arriving| is_in_use(arriving.connection.flow()) == Some(true));
        // They have left this host, not long ago maybe. Our own lock keeps them silent from here on.
        lift(&free.iter().map(|arriving| arriving.connection.flow()).collect::<Vec<_>>());
        for Arriving { id, name, connection } in behind {
            match connection.validate() {
                Ok(()) => {
                    let flow = connection.flow();
                    self.ready(id, name, number, flow, Place::Behind(Box::new(connection)));
                }
                Err(error) => self.give_up_of(number, id, &name, error.into()),
            }
        }
        let mut outcomes = Vec::with_capacity(free.len());
        let keyed = free.into_iter().map(|Arriving { id, name, connection }| {
            let flow = connection.flow();
            ((id, name, flow), connection)
        });
        bulk::restore(keyed, |key, outcome| outcomes.push((key, outcome)));
        for ((id, name, flow), outcome) in outcomes {
            match self.check(&name, outcome) {
                Ok(restored) => self.ready(id, name, number, flow, Place::Restored(restored)),
                Err(error) => self.give_up_of(number, id, &name, error),
            }
        }
        Ok(())
    }

    fn check(&mut self, name: &str, outcome: soccr::Result<Restored>) -> Result<Restored> {
        let restored = outcome?;
        self.reports.add(name, &restored)?;
        Ok(restored)
    }

    fn ready(&mut self, id: u32, name: String, batch: usize, flow: Flow, place: Place) {
        let held = Held { flow, packets: Vec::new() };
        self.waiting.insert(id, Waiting { name, batch, place, held });
        self.deaf.get_or_insert_with(Deaf::begin);
        self.answer(&Message::Ready { connection: id });
    }

    /// Restores what has been waiting for the COMMIT. A source that listens takes back what cannot be restored.
    fn restore_committed(&mut self) {
        if self.committed.is_empty() {
            return;
        }
        let committed = std::mem::take(&mut self.committed);
        let flows: Vec<Flow> = committed.iter().map(|committed| committed.held.flow).collect();
        // The source has begun to stay silent about what leaves it.
        lift(&flows);
        let mut outcomes = Vec::with_capacity(committed.len());
        let keyed = committed
            .into_iter()
            .map(|Committed { id, name, batch, connection, held }| ((id, name, batch, held), connection));
        bulk::restore(keyed, |key, outcome| outcomes.push((key, outcome)));
        for ((id, name, batch, held), outcome) in outcomes {
            match self.check(&name, outcome) {
                Ok(restored) => self.take(id, batch, restored, held),
                Err(error) if self.answers.is_none() => {
                    self.lost += 1;
                    exit::complain(&format!("connection {id}: lost: {}", exit::line(&error)));
                    self.decided(batch);
                }
                Err(error) => self.give_up_of(batch, id, &name, error),
            }
        }
    }

    /// It is ours.
    fn take(&mut self, id: u32, batch: usize, restored: Restored, held: Held) {
        self.claim.has_taken();
        self.answer(&Message::Taken { connection: id });
        self.batches[batch].taken.push((id, restored, held));
        self.decided(batch);
    }

    fn give_up_of(&mut self, batch: usize, id: u32, name: &str, error: anyhow::Error) {
        self.give_up(id, name, error);
        self.decided(batch);
    }

    fn give_up(&mut self, id: u32, name: &str, error: anyhow::Error) {
        self.room += 1;
        self.refuse(id, &if name.is_empty() { error } else { error.context(name.to_owned()) });
    }

    fn refuse(&mut self, id: u32, error: &anyhow::Error) {
        let reason = exit::line(error);
        exit::complain(&format!("connection {id}: {reason}"));
        self.failed += 1;
        self.answer(&Message::Refused { connection: id, reason });
    }

    /// Where the source does not hear it, it has gone on without us: its end of the stream tells what it has decided.
    fn answer(&mut self, message: &Message) {
        if let Some(answers) = &mut self.answers {
            let _ = answers.send(message);
        }
    }

    /// The source has decided about one more of a batch.
    fn decided(&mut self, batch: usize) {
        self.batches[batch].undecided -= 1;
        if self.batches[batch].undecided == 0 {
            self.resume(batch);
        }
    }

    fn resume(&mut self, batch: usize) {
        let batch = &mut self.batches[batch];
        let Some(lock) = batch.lock.take() else { return };
        let taken = std::mem::take(&mut batch.taken);
        let restored = taken.into_iter().map(|(id, restored, held)| {
            // What cannot be delivered the peer sends again.
            let _ = held.replay(&restored);
            (id, restored)
        });
        let restored: Vec<_> = restored.collect();
        let _ = lock.release();
        let (streams, lost) = (&mut self.streams, &mut self.lost);
        bulk::resume(restored, |id, outcome| match outcome {
            Ok(stream) => {
                streams.insert(id, stream);
            }
            Err(error) => {
                *lost += 1;
                exit::complain(&format!("connection {id}: lost: {error}"));
            }
        });
    }

    /// The source has said its last word. What it has not let go of is closed, silently.
    pub(crate) fn end(mut self) -> Arrived {
        self.waiting.clear();
        self.restore_committed();
        for batch in 0..self.batches.len() {
            self.resume(batch);
        }
        if let Err(error) = self.reports.tell() {
            exit::complain(&exit::line(&error));
        }
        let answered = self.answers.is_some();
        if let Some(answers) = self.answers {
            // Where the source is gone, nobody waits for it.
            let _ = answers.finish();
        }
        let streams = self.streams.into_values().collect();
        Arrived { deaf: self.deaf, streams, answered, failed: self.failed, lost: self.lost }
    }
}

/// Ends the silence about connections that are back.
fn lift(flows: &[Flow]) {
    if let Err(error) = silence::lift(flows) {
        exit::complain(&exit::line(&error));
    }
}

/// The source has said something, or says it in time.
fn is_readable(input: &File, patience: Duration) -> bool {
    let mut events = [PollFd::new(input, PollFlags::IN)];
    let patience = patience.try_into().expect("milliseconds fit");
    poll(&mut events, Some(&patience)).is_ok_and(|count| count > 0)
}

/// Standard input, and how much of it has been read ahead.
struct Input {
    reader: BufReader<File>,
    buffered: Rc<Cell<usize>>,
}

impl Read for Input {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(bytes);
        self.buffered.set(self.reader.buffer().len());
        read
    }
}

/// Standard output without a buffer: the source waits for every answer.
#[derive(Debug)]
struct Answers;

impl Write for Answers {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(rustix::stdio::stdout(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
