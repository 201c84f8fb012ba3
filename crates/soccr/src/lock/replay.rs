//! Held packets on their way into a socket.
//!
//! They are injected, as if they arrived now. An application that is about to read waits for that, some 20 µs for 64 KB:
//! so bytes that only continue what has arrived go straight into the receive queue, in half the time, where the connection
//! is restored, locked and not yet resumed.

use std::collections::{HashMap, VecDeque};
use std::iter::Peekable;
use std::os::fd::BorrowedFd;

use crate::connection::{Flow, after};
use crate::error::Result;
use crate::queue;
use crate::segment::{Run, flags};
use crate::sys::raw::{Inward, Ways};
use crate::sys::tcp;
use crate::tls;

/// With what the kernel adds this fills its 64 KiB of memory. More would take 128 KiB of the receive buffer,
/// and the peer's window allows for no such waste.
pub(super) const LONGEST: usize = 65_000;

/// The packets of one connection that have been handed to it.
#[derive(Debug)]
pub(super) struct Replay {
    flow: Flow,
    /// The same as the packets of the peer must show it to reach it (NAT).
    wire: Flow,
    /// To which its socket is bound, or 0.
    interface: u32,
    count: usize,
    /// The end of what reaches furthest into the sequence space, and the sequence number behind it.
    furthest: Option<(Run, u32)>,
    /// It is in repair mode. Its peer hears of everything when it is resumed.
    to_be_resumed: bool,
    /// What has been handed over. To give back the memory takes as long as that: not while anybody waits.
    pub(super) spent: Vec<Run>,
    /// What [came back](Self::came_back), and what came behind: for when the lock lets everything in.
    pub(super) returned: VecDeque<Run>,
}

impl Replay {
    pub(super) fn new(flow: Flow, wire: Flow, interface: u32) -> Self {
        Self {
            flow,
            wire,
            interface,
            count: 0,
            furthest: None,
            to_be_resumed: false,
            spent: Vec::new(),
            returned: VecDeque::new(),
        }
    }

    /// The way for its packets.
    pub(super) fn way<'a>(&self, ways: &'a mut Ways) -> Result<Inward<'a>> {
        ways.inward(self.wire.remote, self.wire.local, self.interface)
    }

    /// Hands over undamaged packets: every one is tried, and the first error returned. `socket` is the connection, where
    /// nothing arrives for it by itself.
    pub(super) fn packets(
        &mut self,
        way: &Inward<'_>,
        runs: impl IntoIterator<Item = Run>,
        socket: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let ends = self.wire.on_the_wire();
        let readdress = |mut run: Run| {
            run.readdress(ends.remote, ends.local);
            run
        };
        let mut runs = runs.into_iter().map(readdress).peekable();
        let socket = socket.filter(|socket| self.is_restored_in(*socket));
        self.to_be_resumed |= socket.is_some();
        let mut outcome = Ok(());
        while let Some(run) = runs.next() {
            let following = if socket.is_some() { continuation(&run, &mut runs) } else { Vec::new() };
            outcome = outcome.and(match socket {
                Some(socket) if !following.is_empty() => self.append(way, socket, run, following),
                _ => self.inject(way, run),
            });
        }
        outcome
    }

    /// Packets have met the lock while the connection got them: a rule for outgoing packets takes the mark away by which a
    /// lock lets them pass. Returns whether these are such, and no longer counts them as handed over.
    pub(super) fn came_back(&mut self, held: &VecDeque<Run>) -> bool {
        if self.spent.is_empty() {
            return false;
        }
        let mut given: HashMap<u32, Vec<&Run>> = HashMap::new();
        self.spent.iter().for_each(|run| given.entry(run.parsed().seq).or_default().push(run));
        let is_given = |run: &&Run| {
            given.get(&run.parsed().seq).is_some_and(|given| given.iter().any(|given| run.begins_like(given)))
        };
        let again = held.iter().filter(is_given).count();
        self.count -= again.min(self.count);
        again > 0
    }

    /// Makes the connection answer to what has been replayed, and returns how many packets that were.
    ///
    /// Its answers were dropped, where the lock was still on. It acknowledges at once what it gets a second
    /// time (RFC 9293 §3.10.7.4), and at any acknowledgement it sends what it may.
    pub(super) fn finish(&mut self, way: &Inward<'_>) -> Result<usize> {
        if let Some((mut run, _)) = self.furthest.take()
            && !self.to_be_resumed
        {
            self.send(way, &mut run)?;
        }
        Ok(self.count)
    }

    /// Whether this socket is the connection, in repair mode, and TCP alone.
    fn is_restored_in(&self, socket: BorrowedFd<'_>) -> bool {
        Flow::of(&socket).is_ok_and(|flow| flow.on_the_wire() == self.flow.on_the_wire())
            && tcp::in_repair(socket).unwrap_or(false)
            // It would take what is written for bytes of the application.
            && !tls::has_layer(socket).unwrap_or(true)
    }

    fn inject(&mut self, way: &Inward<'_>, mut run: Run) -> Result<()> {
        self.send(way, &mut run)?;
        self.remember(run);
        Ok(())
    }

    /// Injects the first packet, and appends the packets that say nothing new but their data. The kernel has then checked the headers,
    /// and learned the peer's clock: where it has taken the packet in.
    fn append(
        &mut self,
        way: &Inward<'_>,
        socket: BorrowedFd<'_>,
        first: Run,
        following: Vec<Run>,
    ) -> Result<()> {
        let seq = following[0].parsed().seq;
        let before = queue::rcv_nxt(socket);
        let mut outcome = self.inject(way, first);
        let arrived = |before: u32| Ok(before != seq && queue::rcv_nxt(socket)? == seq);
        // What reaches further may still be on its way, and get in between.
        let is_furthest = self.furthest.as_ref().is_some_and(|(_, end)| *end == seq);
        let appended = match before.and_then(arrived) {
            Ok(true) if is_furthest => queue::append(socket, seq, following.iter().map(Run::data)),
            _ => Ok(0),
        };
        let appended = appended.unwrap_or_else(|error| {
            outcome = Err(error);
            0
        });
        for (index, run) in following.into_iter().enumerate() {
            if index < appended {
                self.remember(run);
            } else {
                outcome = outcome.and(self.inject(way, run));
            }
        }
        outcome
    }

    fn remember(&mut self, run: Run) {
        let parsed = run.parsed();
        let fin = u32::from(parsed.flags & flags::FIN != 0);
        let end = parsed.seq.wrapping_add(parsed.payload.len() as u32).wrapping_add(fin);
        let is_behind = self.furthest.as_ref().is_some_and(|(_, furthest)| after(*furthest, end));
        if parsed.flags & (flags::RST | flags::SYN) == 0 && !is_behind {
            self.furthest = Some((run.end(), end));
        }
        self.count += 1;
        self.spent.push(run);
    }

    fn send(&self, way: &Inward<'_>, run: &mut Run) -> Result<()> {
        /// What every link can carry (RFC 8200 §5).
        const SMALLEST_MTU: usize = 1280;
        let mut send = |limit| run.pieces(limit, |packet| way.send(packet));
        match send(LONGEST) {
            Err(error) if error.errno() == Some(libc::EMSGSIZE) => send(SMALLEST_MTU),
            other => other,
        }
    }
}

/// Takes those of the next packets that continue this one.
fn continuation(run: &Run, runs: &mut Peekable<impl Iterator<Item = Run>>) -> Vec<Run> {
    let mut following: Vec<Run> = Vec::new();
    while let Some(next) = runs.next_if(|next| following.last().unwrap_or(run).is_continued_by(next)) {
        following.push(next);
    }
    following
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::time::Duration;

    use super::*;
    use crate::fin::wait_for;
    use crate::lock::packets::tests::{connection, next};
    use crate::segment::Parsed;
    use crate::sys::filter;

    /// In the queue beside it, nothing would join the two.
    #[test]
    fn what_closes_a_gap_arrives_as_packets() {
        let Some((_peer, ours, control)) = connection() else { return };
        let _paused = crate::pause(&ours).unwrap();
        let flow = Flow::of(&ours).unwrap();
        let mut ways = Ways::open().unwrap();
        let mut replay = Replay::new(flow, flow, 0);
        let way = replay.way(&mut ways).unwrap();
        let runs = [200, 0, 100].map(|offset| {
            let packet = next(&ours, &control, offset, &[1; 100]);
            Run::new(&packet, Parsed::new(&packet).unwrap())
        });
        replay.packets(&way, runs, Some(ours.as_fd())).unwrap();
        let all = || Ok((tcp::unread(ours.as_fd())? == 300).then_some(()));
        assert_eq!(wait_for(Duration::from_secs(20), all).unwrap(), Some(()));
    }

    /// That `rcv_nxt` is behind it does not show that it has arrived now, and that packets like it are taken.
    #[test]
    fn nothing_is_put_behind_what_is_sent_again() {
        let Some((_peer, ours, control)) = connection() else { return };
        // struct sock_filter: BPF_RET | BPF_K, with 0 as the bytes that are kept.
        let [low, high] = 6u16.to_ne_bytes();
        filter::attach(ours.as_fd(), &[low, high, 0, 0, 0, 0, 0, 0]).unwrap();
        let _paused = crate::pause(&ours).unwrap();
        let flow = Flow::of(&ours).unwrap();
        let mut ways = Ways::open().unwrap();
        let mut replay = Replay::new(flow, flow, 0);
        let way = replay.way(&mut ways).unwrap();
        let runs = [0u32.wrapping_sub(100), 0].map(|offset| {
            let packet = next(&ours, &control, offset, &[1; 100]);
            Run::new(&packet, Parsed::new(&packet).unwrap())
        });
        replay.packets(&way, runs, Some(ours.as_fd())).unwrap();
        assert_eq!(tcp::unread(ours.as_fd()).unwrap(), 0);
    }
}
