//! Many connections that nothing happens on.
//!
//! There may be more of them than one process may have descriptors, as on a host with many processes: so they are held
//! by threads with a table of descriptors of their own.

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use soccr::{Flow, Restored};
use soccr_handover::Mover;
use soccr_lab::{Host, Pair, sysctl};

use crate::sys;

/// How many connections a thread holds.
const SHARD: usize = 10_000;
/// How many wait to be accepted.
const BACKLOG: usize = 64;
const PORT: u16 = 8000;

/// What a thread holds.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    pub(crate) streams: Vec<TcpStream>,
    /// In the middle of a move.
    pub(crate) restored: Vec<(usize, Restored)>,
    /// For programs that hand over.
    pub(crate) mover: Option<Mover>,
    pub(crate) channel: Option<UnixStream>,
}

/// A pipe whose ends have the same numbers in all threads: it is older than they are.
pub(crate) type Pipe = Arc<(PipeReader, PipeWriter)>;

/// Connections, the program that has them, and the one that will get them.
#[derive(Debug)]
pub(crate) struct Move {
    pub(crate) pipe: Pipe,
    pub(crate) source: Shard,
    pub(crate) target: Shard,
}

type Job = Box<dyn FnOnce(&mut Ends) + Send>;

/// A thread on a host, with descriptors of its own.
#[derive(Debug)]
pub(crate) struct Shard {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Shard {
    fn on(pair: &Arc<Pair>, host: fn(&Pair) -> &Host) -> Self {
        let (jobs, queue): (_, Receiver<Job>) = channel();
        let pair = Arc::clone(pair);
        let thread = thread::spawn(move || {
            sys::own_descriptors();
            host(&pair).namespace.enter().expect("setns");
            let mut ends = Ends::default();
            queue.into_iter().for_each(|job| job(&mut ends));
        });
        Self { jobs: Some(jobs), thread: Some(thread) }
    }

    /// Runs `job` there, and waits for it.
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce(&mut Ends) -> T + Send + 'static) -> T {
        self.start(job).recv().expect("the thread does not panic")
    }

    /// Runs `job` there: its outcome comes.
    pub(crate) fn start<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Ends) -> T + Send + 'static,
    ) -> Receiver<T> {
        let (sender, receiver) = channel();
        let jobs = self.jobs.as_ref().expect("until the drop");
        jobs.send(Box::new(move |ends| drop(sender.send(job(ends))))).expect("the thread does not panic");
        receiver
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        self.jobs = None;
        // Thousands of descriptors are closed before anything else is measured.
        self.thread.take().map(JoinHandle::join);
    }
}

/// Connections between a server on host `a`, whose ends move, and clients on host `b`.
#[derive(Debug)]
pub(crate) struct Idle {
    pub(crate) moves: Vec<Move>,
    peers: Vec<Shard>,
    pub(crate) pair: Arc<Pair>,
}

impl Idle {
    pub(crate) fn new(count: usize) -> Result<Self> {
        let pair = Arc::new(Pair::new()?);
        pair.b.run(|| sysctl("net/ipv4/ip_local_port_range", "10000 65000"))?;
        let mut idle = Self { moves: Vec::new(), peers: Vec::new(), pair };
        for start in (0..count).step_by(SHARD) {
            // The kernel looks long for the last ephemeral ports towards a single one: so each shard has its own.
            let address = (idle.pair.a.v4, PORT + idle.moves.len() as u16).into();
            let pipe = Arc::new(std::io::pipe()?);
            let [source, target] = [(), ()].map(|()| Shard::on(&idle.pair, |pair| &pair.a));
            idle.moves.push(Move { pipe, source, target });
            idle.peers.push(Shard::on(&idle.pair, |pair| &pair.b));
            idle.connect(address, (count - start).min(SHARD))?;
        }
        Ok(idle)
    }

    fn connect(&self, address: SocketAddr, count: usize) -> Result<()> {
        let shard = &self.moves.last().context("a shard")?.source;
        let peers = self.peers.last().context("a shard")?;
        let listener = Arc::new(shard.run(move |_| TcpListener::bind(address))?);
        for start in (0..count).step_by(BACKLOG) {
            let batch = (count - start).min(BACKLOG);
            peers.run(move |peers| {
                (0..batch).try_for_each(|_| TcpStream::connect(address).map(|peer| peers.streams.push(peer)))
            })?;
            let listener = Arc::clone(&listener);
            shard.run(move |ends| {
                (0..batch).try_for_each(|_| listener.accept().map(|(stream, _)| ends.streams.push(stream)))
            })?;
        }
        // Its number means something there only.
        shard.run(move |_| drop(listener));
        Ok(())
    }

    /// The targets are the next sources.
    pub(crate) fn turn(&mut self) {
        self.moves.iter_mut().for_each(|Move { source, target, .. }| std::mem::swap(source, target));
    }

    pub(crate) fn flows(&self) -> soccr::Result<Vec<Flow>> {
        let mut flows = Vec::new();
        for Move { source: shard, .. } in &self.moves {
            flows.extend(
                shard.run(|ends| ends.streams.iter().map(Flow::of).collect::<soccr::Result<Vec<_>>>())?,
            );
        }
        Ok(flows)
    }

    /// Every connection is alive: of each that is looked at, both ends hear from the other.
    pub(crate) fn check(&self) -> Result<()> {
        type Talk = fn(&mut TcpStream) -> std::io::Result<()>;
        let write: Talk = |stream| stream.write_all(b"hi");
        let read: Talk = |stream| stream.read_exact(&mut [0; 2]);
        let all = |shard: &Shard, talk: Talk| {
            shard.run(move |ends| {
                let step = ends.streams.len().div_ceil(50);
                ends.streams.iter_mut().step_by(step).try_for_each(talk)
            })
        };
        for (Move { source: shard, .. }, peers) in self.moves.iter().zip(&self.peers) {
            all(shard, write)?;
            all(peers, read)?;
            // What comes back acknowledges that: nothing is under way from the end that moves.
            all(peers, write)?;
            all(shard, read)?;
        }
        Ok(())
    }
}
