//! Held packets on their way into a socket.
//!
//! They are injected, as if they arrived now. That costs some 20 µs per 64 KB, for which an application waits that is about
//! to read: so bytes that only continue what has arrived go straight into the receive queue, where the socket
//! is restored and not yet resumed. That takes a quarter of the time.

use std::iter::Peekable;
use std::os::fd::BorrowedFd;

use crate::connection::{Flow, after};
use crate::error::Result;
use crate::queue;
use crate::segment::{Run, flags};
use crate::sys::raw::Injector;

/// With what the kernel adds this fills its 64 KiB of memory. More would take 128 KiB of the receive buffer,
/// and the peer's window allows for no such waste.
pub(super) const LONGEST: usize = 65_000;

/// The packets of one connection that have been handed to it.
#[derive(Debug)]
pub(super) struct Replay {
    flow: Flow,
    count: usize,
    /// The end of what reaches furthest into the sequence space, and the sequence number behind it.
    furthest: Option<(Run, u32)>,
    /// What has been handed over. To give back the memory takes as long as that: not while anybody waits.
    pub(super) spent: Vec<Run>,
}

impl Replay {
    pub(super) fn new(flow: Flow) -> Self {
        Self { flow, count: 0, furthest: None, spent: Vec::new() }
    }

    pub(super) fn flow(&self) -> Flow {
        self.flow
    }

    /// Hands over undamaged packets: every one is tried, and the first error returned. `socket` is the connection, where
    /// nothing arrives for it by itself.
    pub(super) fn packets(
        &mut self,
        injector: &Injector,
        runs: impl IntoIterator<Item = Run>,
        socket: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let mut outcome = Ok(());
        let ends = self.flow.on_the_wire();
        let mut runs = runs
            .into_iter()
            .map(|mut run| {
                run.readdress(ends.remote, ends.local);
                run
            })
            .peekable();
        while let Some(run) = runs.next() {
            outcome = outcome.and(self.inject(injector, run));
            if let Some(socket) = socket {
                outcome = outcome.and(self.append(injector, socket, &mut runs));
            }
        }
        outcome
    }

    /// Makes the connection answer to what has been replayed, and returns how many packets that were.
    ///
    /// Its answers were dropped, where the lock was still on. It acknowledges at once what it gets a second
    /// time (RFC 9293 §3.10.7.4), and at any acknowledgement it sends what it may.
    pub(super) fn finish(&mut self, injector: &Injector) -> Result<usize> {
        if let Some((mut run, _)) = self.furthest.take() {
            self.send(injector, &mut run)?;
        }
        Ok(self.count)
    }

    fn inject(&mut self, injector: &Injector, mut run: Run) -> Result<()> {
        self.send(injector, &mut run)?;
        self.remember(run);
        Ok(())
    }

    /// Appends to the queue what says nothing new but its data, compared to what reaches furthest. That one was injected:
    /// with it the kernel has checked the headers and learned the peer's clock.
    fn append(
        &mut self,
        injector: &Injector,
        socket: BorrowedFd<'_>,
        runs: &mut Peekable<impl Iterator<Item = Run>>,
    ) -> Result<()> {
        let Some((furthest, seq)) = &self.furthest else { return Ok(()) };
        let mut following: Vec<Run> = Vec::new();
        while let Some(run) = runs.next_if(|run| following.last().unwrap_or(furthest).is_continued_by(run)) {
            following.push(run);
        }
        if following.is_empty() {
            return Ok(());
        }
        let mut outcome = Ok(());
        let appended = match Flow::of(&socket) {
            Ok(flow) if flow.on_the_wire() == self.flow.on_the_wire() => {
                queue::append(socket, *seq, following.iter().map(Run::data))
            }
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
                outcome = outcome.and(self.inject(injector, run));
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

    fn send(&self, injector: &Injector, run: &mut Run) -> Result<()> {
        /// What every link can carry (RFC 8200 §5).
        const SMALLEST_MTU: usize = 1280;
        let mut send = |limit| run.pieces(limit, |packet| injector.send(packet, self.flow.local));
        match send(LONGEST) {
            Err(error) if error.errno() == Some(libc::EMSGSIZE) => send(SMALLEST_MTU),
            other => other,
        }
    }
}
