//! Moves the connection from program to program: the conductor of the demonstration.

use std::io::BufReader;
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use soccr::Flow;
use soccr_lab::Host;

use super::network::Network;
use super::peer::{Counts, Peer};
use super::wire::{Answer, Order, Progress, receive, send};

const PORT: u16 = 8080;

/// Has the program that owns the connection, and the network in which it moves.
#[derive(Debug)]
pub(crate) struct Mover<'network> {
    network: &'network Network,
    place: usize,
    owner: Program,
    mss_before: u32,
    mss_after: u32,
}

/// One move, as it went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Move {
    /// Where it was.
    pub(crate) from: usize,
    /// Where it went.
    pub(crate) to: usize,
    /// When it was locked, by the clock of [`now`](super::wire::now).
    pub(crate) locked_at: u64,
    /// From the first lock to the last unlock.
    pub(crate) lock: Duration,
    /// The longest time without a byte, of both directions.
    pub(crate) silence: Duration,
    /// Bytes in the receive queue that moved.
    pub(crate) unread: u32,
    /// Bytes in the send queue that moved.
    pub(crate) unacknowledged: u32,
}

/// What both ends have counted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ends {
    pub(crate) peer: Counts,
    pub(crate) program: Progress,
    pub(crate) mss_before: u32,
    pub(crate) mss_after: u32,
}

impl<'network> Mover<'network> {
    /// Starts the first program, which listens on host A.
    pub(crate) fn start(network: &'network Network) -> Result<Self> {
        let mut owner = Program::start(network.hosts()[0])?;
        owner.order(&Order::Listen { port: PORT }, &[])?;
        Ok(Self { network, place: 0, owner, mss_before: 0, mss_after: 0 })
    }

    /// The address that the peer speaks to.
    pub(crate) fn address(&self) -> SocketAddr {
        (self.network.address(), PORT).into()
    }

    /// Lets the first program accept the connection.
    pub(crate) fn accept(&mut self) -> Result<()> {
        match self.owner.order(&Order::Accept, &[])?.0 {
            Answer::Connected { mss } => (self.mss_before, self.mss_after) = (mss, mss),
            other => bail!("unexpected answer {other:?}"),
        }
        Ok(())
    }

    /// Moves the connection to a new program on the next host.
    pub(crate) fn move_once(&mut self, peer: &Peer) -> Result<Move> {
        let hosts = self.network.hosts();
        let (from, to) = (self.place, (self.place + 1) % hosts.len());
        let flow = Flow { local: self.address(), remote: peer.address()? };
        let mut next = Program::start(hosts[to])?;
        next.order(&Order::Expect { local: flow.local, remote: flow.remote }, &[])?;

        peer.watch();
        let (released, image) = self.owner.order(&Order::Release, &[])?;
        let Answer::Released { locked_at, last_read_at, progress, unread, unacknowledged } = released else {
            bail!("unexpected answer {released:?}");
        };
        // From here on the next program holds what the peer sends; before, the last one did.
        self.network.bring(flow, to)?;
        next.send(&Order::Restore(progress), &image)?;
        let (_, held) = self.owner.order(&Order::GiveHeld, &[])?;
        next.answer()?;
        let (going, _) = next.order(&Order::Go, &held)?;
        let Answer::Going { unlocked_at, mss } = going else { bail!("unexpected answer {going:?}") };
        let (heard, _) = next.answer()?;
        let Answer::Heard { first_read_at } = heard else { bail!("unexpected answer {heard:?}") };
        peer.wait_for_byte(unlocked_at)?;

        self.mss_after = mss;
        self.place = to;
        std::mem::replace(&mut self.owner, next).wait()?;
        Ok(Move {
            from,
            to,
            locked_at,
            lock: Duration::from_nanos(unlocked_at - locked_at),
            silence: Duration::from_nanos(first_read_at - last_read_at).max(peer.longest_silence()),
            unread,
            unacknowledged,
        })
    }

    /// Ends both streams and counts.
    pub(crate) fn finish(mut self, peer: Peer) -> Result<Ends> {
        peer.stop_writing();
        let (finished, _) = self.owner.order(&Order::Finish, &[])?;
        let Answer::Finished { progress } = finished else { bail!("unexpected answer {finished:?}") };
        self.owner.wait()?;
        Ok(Ends {
            peer: peer.finish()?,
            program: progress,
            mss_before: self.mss_before,
            mss_after: self.mss_after,
        })
    }
}

/// A program of the demonstration, in a process of its own.
#[derive(Debug)]
struct Program {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Program {
    fn start(host: &Host) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("demo-program").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = host.run(|| command.spawn()).context("a program of the demonstration")?;
        let orders = child.stdin.take().context("its standard input")?;
        let answers = BufReader::new(child.stdout.take().context("its standard output")?);
        Ok(Self { child, orders, answers })
    }

    fn order(&mut self, order: &Order, bytes: &[u8]) -> Result<(Answer, Vec<u8>)> {
        self.send(order, bytes)?;
        self.answer()
    }

    fn send(&mut self, order: &Order, bytes: &[u8]) -> Result<()> {
        send(&mut self.orders, order, bytes)
    }

    fn answer(&mut self) -> Result<(Answer, Vec<u8>)> {
        receive(&mut self.answers)
    }

    fn wait(mut self) -> Result<()> {
        drop(self.orders);
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { bail!("a program of the demonstration has failed: {status}") }
    }
}
