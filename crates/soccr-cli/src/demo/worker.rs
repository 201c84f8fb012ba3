//! A program that has the connection for a while: it reads and writes, checks every byte, and hands the connection on.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use soccr::Flow;
use soccr::Restored;
use soccr::lock::{Held, Lock, Locker, Mode};

use crate::exit::Exit;

use super::pattern::{CHUNK, Direction, Pattern, TICK, allowance};
use super::wire::{Answer, Order, Progress, now, receive, send};

/// How often reading is tried again when the connection changes meanwhile.
const ATTEMPTS: usize = 5;

/// Runs a program of the demonstration: orders come in on standard input, answers go out on standard output.
pub(crate) fn run() -> Result<Exit> {
    soccr::prepare();
    Worker {
        orders: BufReader::new(std::io::stdin()),
        listener: None,
        stream: None,
        restored: None,
        locker: Locker::new(Mode::HOLD)?,
        lock: None,
        flow: None,
        incoming: Pattern::new(Direction::ToProgram),
        outgoing: Pattern::new(Direction::ToPeer),
        buffer: vec![0; 256 << 10],
        progress: Progress::default(),
        last_read_at: 0,
        awaited: None,
    }
    .serve()?;
    Ok(Exit::Done)
}

struct Worker {
    orders: BufReader<std::io::Stdin>,
    listener: Option<TcpListener>,
    stream: Option<TcpStream>,
    /// A connection that is here and not yet alive.
    restored: Option<Restored>,
    locker: Locker,
    lock: Option<Lock>,
    flow: Option<Flow>,
    incoming: Pattern,
    outgoing: Pattern,
    buffer: Vec<u8>,
    progress: Progress,
    last_read_at: u64,
    /// The place in the stream of the first byte that can only have arrived after the move.
    awaited: Option<u64>,
}

impl Worker {
    fn serve(mut self) -> Result<()> {
        loop {
            let order = match &self.stream {
                Some(_) => match self.stream_until_order()? {
                    Some(order) => order,
                    None => return Ok(()),
                },
                None => receive(&mut self.orders)?,
            };
            if !self.obey(order.0, &order.1)? {
                return Ok(());
            }
        }
    }

    /// Obeys an order; false where it was the last one.
    fn obey(&mut self, order: Order, bytes: &[u8]) -> Result<bool> {
        match order {
            Order::Listen { port } => {
                self.listener = Some(TcpListener::bind(("0.0.0.0", port))?);
                answer(&Answer::Done, &[])?;
            }
            Order::Accept => {
                let (stream, _) = self.listener.as_ref().context("not listening")?.accept()?;
                stream.set_nonblocking(true)?;
                self.flow = Some(Flow { local: stream.local_addr()?, remote: stream.peer_addr()? });
                answer(&Answer::Connected { mss: mss(&stream)? }, &[])?;
                self.stream = Some(stream);
            }
            Order::Expect { local, remote } => {
                let flow = Flow { local, remote };
                self.lock = Some(self.locker.lock(&[flow])?);
                self.flow = Some(flow);
                answer(&Answer::Done, &[])?;
            }
            Order::Release => self.release()?,
            Order::GiveHeld => {
                let mut stream = soccr_image::stream::Writer::new(Vec::new())?;
                for held in self.lock.as_ref().context("not locked")?.take()? {
                    stream.held(1, &held.packets)?;
                }
                answer(&Answer::Held, &stream.finish()?)?;
                return Ok(false);
            }
            Order::Restore(progress) => {
                let connection = soccr_image::read(bytes)?;
                self.awaited = Some(progress.read + u64::from(connection.control.inq_len));
                self.progress = progress;
                self.restored = Some(connection.restore()?);
                answer(&Answer::Done, &[])?;
            }
            Order::Go => self.go(bytes)?,
            Order::Finish => {
                self.finish()?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn release(&mut self) -> Result<()> {
        let stream = self.stream.take().context("no connection")?;
        let flow = self.flow.context("no connection")?;
        let locked_at = now();
        self.lock = Some(self.locker.lock(&[flow])?);
        let take = || {
            let paused = soccr::pause(&stream)?;
            let connection = paused.save()?;
            paused.detach().map(|()| connection)
        };
        // On busy processors a packet that had passed the lock may arrive after the save: then the connection goes on.
        let mut taken = take();
        for _ in 1..ATTEMPTS {
            taken = taken.or_else(|_| take());
        }
        let connection = taken?;
        let mut image = Vec::new();
        soccr_image::write(&mut image, &connection)?;
        let released = Answer::Released {
            locked_at,
            last_read_at: self.last_read_at,
            progress: self.progress,
            unread: connection.control.inq_len,
            unacknowledged: connection.control.outq_len,
        };
        answer(&released, &image)
    }

    fn go(&mut self, bytes: &[u8]) -> Result<()> {
        let restored = self.restored.take().context("no connection")?;
        let flow = self.flow.context("no connection")?;
        let mut reader = soccr_image::stream::Reader::new(bytes)?;
        while let Some(message) = reader.receive()? {
            if let soccr_image::stream::Message::Held { packets, .. } = message {
                Held { flow, packets }.replay(&restored)?;
            }
        }
        self.lock.take().context("not locked")?.release_into(&[&restored])?;
        let stream = restored.resume()?;
        answer(&Answer::Going { unlocked_at: now(), mss: mss(&stream)? }, &[])?;
        self.stream = Some(stream);
        Ok(())
    }

    /// Reads and writes until an order comes; `None` where the demonstration has ended.
    fn stream_until_order(&mut self) -> Result<Option<(Order, Vec<u8>)>> {
        let mut stream = self.stream.take().context("no connection")?;
        let (start, written_before) = (Instant::now(), self.progress.written);
        let tick = Timespec::try_from(TICK)?;
        loop {
            let ahead = self.progress.written - written_before > allowance(start);
            let wanted = if ahead { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
            let mut polled = [
                PollFd::new(&stream, wanted),
                PollFd::from_borrowed_fd(self.orders.get_ref().as_fd(), PollFlags::IN),
            ];
            poll(&mut polled, ahead.then_some(&tick))?;
            let (ready, order) = (polled[0].revents(), !polled[1].revents().is_empty());
            if ready.contains(PollFlags::IN) {
                self.read(&mut stream)?;
            }
            if ready.contains(PollFlags::OUT) {
                self.write(&mut stream)?;
            }
            if order || !self.orders.buffer().is_empty() {
                self.stream = Some(stream);
                if self.orders.fill_buf()?.is_empty() {
                    return Ok(None);
                }
                return receive(&mut self.orders).map(Some);
            }
        }
    }

    fn read(&mut self, stream: &mut TcpStream) -> Result<usize> {
        let length = match stream.read(&mut self.buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(usize::MAX),
            other => other.context("the program reads")?,
        };
        self.progress.differences += self.incoming.differences(self.progress.read, &self.buffer[..length]);
        self.progress.read += length as u64;
        self.last_read_at = now();
        if self.awaited.is_some_and(|awaited| self.progress.read > awaited) {
            self.awaited = None;
            answer(&Answer::Heard { first_read_at: self.last_read_at }, &[])?;
        }
        Ok(length)
    }

    fn write(&mut self, stream: &mut TcpStream) -> Result<()> {
        match stream.write(&self.outgoing.at(self.progress.written)[..CHUNK]) {
            Ok(length) => self.progress.written += length as u64,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("the program writes"),
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let mut stream = self.stream.take().context("no connection")?;
        stream.set_nonblocking(false)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        while self.read(&mut stream)? > 0 {}
        answer(&Answer::Finished { progress: self.progress }, &[])
    }
}

fn answer(message: &Answer, bytes: &[u8]) -> Result<()> {
    send(&mut std::io::stdout().lock(), message, bytes)
}

/// Bytes per segment that the program sends (`TCP_MAXSEG`).
fn mss(stream: &TcpStream) -> Result<u32> {
    Ok(socket2::SockRef::from(stream).tcp_mss()?)
}
