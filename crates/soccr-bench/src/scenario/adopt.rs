//! `adopt`: from values into the accept queue of a listener, per connection. Beside it, the way that only a program written
//! for it can take: restored, and each descriptor passed by SCM_RIGHTS. The floor of both: the segments of the adoption, made
//! before, sent by a loop that looks at nothing.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketType, recvmsg, sendmsg, socket, sockopt,
};
use soccr::adopt::Adopter;
use soccr::lock::{Locker, Mode};
use soccr::{Connection, Flow, Lock};
use soccr_lab::sysctl;

use crate::arguments::Arguments;
use crate::floor;
use crate::idle::{Ends, Idle};
use crate::report::{Report, Row};
use crate::statistics::Samples;
use crate::sys;

/// The kernel counts one more than the backlog.
const BACKLOG: i32 = 20_000;

pub(crate) fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    for count in [1, 1_000, 10_000] {
        let rounds = if arguments.full { 50 } else { 10 };
        let idle = Idle::new(count)?;
        let SocketAddr::V4(address) = idle.flows()?.first().context("a connection")?.local else {
            bail!("IPv4 only");
        };
        let measured = idle.moves[0].source.run(move |ends| measure(ends, address, rounds));
        match measured {
            Ok(Measured { adopted, sent, passed }) => {
                idle.check()?;
                for (way, samples) in [("adopted", adopted), ("restored, passed by SCM_RIGHTS", passed)] {
                    report.add(Row::new("adopt", format!("{count} {way}, each"), &samples).against(&sent));
                }
            }
            Err(error) => eprintln!("SKIPPED: adopt: {error:#}"),
        }
    }
    Ok(())
}

#[derive(Default)]
struct Measured {
    adopted: Samples,
    /// The floor.
    sent: Samples,
    passed: Samples,
}

/// All ways, in turn. The connections end up where they began.
fn measure(ends: &mut Ends, address: SocketAddrV4, rounds: usize) -> Result<Measured> {
    sysctl("net/core/somaxconn", &BACKLOG.to_string())?;
    let mut adopter = Adopter::new()?;
    let locker = Locker::new(Mode::HOLD)?;
    let raw = sys::raw_socket();
    let listener = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    sockopt::set_socket_reuseaddr(&listener, true)?;
    rustix::net::bind(&listener, &address)?;
    rustix::net::listen(&listener, BACKLOG)?;
    let mut measured = Measured::default();
    for _ in 0..rounds {
        let (lock, connections) = take(&locker, &mut ends.streams)?;
        let start = Instant::now();
        let outcomes = adopter.adopt(&lock, &connections);
        measured.adopted.push(each(start, connections.len()));
        outcomes.into_iter().collect::<soccr::Result<Vec<_>>>()?;
        lock.release()?;
        accept(&listener, connections.len(), &mut ends.streams)?;

        let (lock, connections) = take(&locker, &mut ends.streams)?;
        let segments: Vec<_> = connections.iter().map(floor::adopting).collect();
        let start = Instant::now();
        for segment in &segments {
            sys::inject(raw.as_fd(), segment, address);
        }
        measured.sent.push(each(start, connections.len()));
        lock.release()?;
        accept(&listener, connections.len(), &mut ends.streams)?;

        let (lock, connections) = take(&locker, &mut ends.streams)?;
        let sockets = UnixStream::pair()?;
        let mut restored = Vec::with_capacity(connections.len());
        let start = Instant::now();
        for connection in &connections {
            let socket = connection.restore()?;
            drop(pass(&sockets, &socket)?);
            restored.push(socket);
        }
        measured.passed.push(each(start, connections.len()));
        lock.release()?;
        for socket in restored {
            ends.streams.push(socket.resume()?);
        }
    }
    Ok(measured)
}

fn accept(listener: &OwnedFd, count: usize, streams: &mut Vec<TcpStream>) -> Result<()> {
    let limit = Timespec { tv_sec: 5, tv_nsec: 0 };
    for _ in 0..count {
        let ready = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&limit))?;
        ensure!(ready == 1, "a segment was lost on `lo`");
        streams.push(rustix::net::accept(listener)?.into());
    }
    Ok(())
}

fn each(start: Instant, count: usize) -> Duration {
    start.elapsed() / count as u32
}

/// Takes the connections out of their sockets.
fn take(locker: &Locker, streams: &mut Vec<TcpStream>) -> Result<(Lock, Vec<Connection>)> {
    let flows = streams.iter().map(Flow::of).collect::<soccr::Result<Vec<_>>>()?;
    let lock = locker.lock(&flows)?;
    let taken = streams.drain(..).map(|stream| {
        let paused = soccr::pause(&stream)?;
        let connection = paused.save()?;
        paused.detach().map(|()| connection)
    });
    let connections = taken.collect::<soccr::Result<Vec<_>>>()?;
    Ok((lock, connections))
}

/// Sends a descriptor, and receives it.
fn pass((from, to): &(UnixStream, UnixStream), socket: impl AsFd) -> Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [socket.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(from, &[IoSlice::new(b".")], &mut control, SendFlags::NOSIGNAL)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(to, &mut [IoSliceMut::new(&mut [0])], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let received = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    received.context("no descriptor was received")
}
