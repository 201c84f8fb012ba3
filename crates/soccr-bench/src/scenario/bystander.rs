//! What a client feels that has nothing to do with it: its process has other connections, and those leave by the command.
//!
//! The longest of its round trips while `soccr send` runs, to a target that takes its time to start; beside it the longest of as long a time
//! without a move.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use soccr_lab::{Pair, wait_until};

use crate::arguments::Arguments;
use crate::report::{Report, Row};
use crate::statistics::{Samples, repeat};

/// How many connections leave.
const COUNTS: [usize; 2] = [1, 1000];
const RUNS: usize = 20;
/// Those that leave came to this port, the bystander to the next.
const PORT: u16 = 8000;

pub(crate) fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let Some(command) = command() else {
        eprintln!("SKIPPED: bystander: build the command first: cargo build --release -p soccr-cli");
        return Ok(());
    };
    let start = if arguments.full { "3" } else { "0.3" };
    for count in COUNTS {
        let (mut samples, mut bare) = (Samples::default(), Samples::default());
        repeat(Duration::ZERO, RUNS, |_| {
            let scene = Scene::new(count)?;
            let began = Instant::now();
            samples.push(scene.longest(|| scene.move_by(&command, start))?);
            let as_long = began.elapsed();
            bare.push(scene.longest(|| {
                thread::sleep(as_long);
                Ok(())
            })?);
            anyhow::Ok(())
        })?;
        report.add(Row::new("bystander", format!("{count} leave"), &samples).against(&bare));
    }
    Ok(())
}

/// The command that was built beside this benchmark.
fn command() -> Option<PathBuf> {
    let here = std::env::current_exe().ok()?;
    Some(here.parent()?.parent()?.join("soccr")).filter(|path| path.exists())
}

/// A server in a process of its own, those that leave, and one that stays.
struct Scene {
    pair: Pair,
    server: Child,
    /// Until they have left.
    _leaving: Vec<TcpStream>,
    bystander: TcpStream,
}

impl Scene {
    fn new(count: usize) -> Result<Self> {
        let pair = Pair::new()?;
        let address: SocketAddr = (pair.a.v4, PORT).into();
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--serve", &address.to_string()]);
        let server = pair.a.run(|| command.spawn())?;
        let connect = |port| TcpStream::connect((pair.a.v4, port));
        let (leaving, bystander) = pair.b.run(|| {
            let mut bystander = None;
            wait_until("the server listens", || {
                bystander = connect(PORT + 1).ok();
                bystander.is_some()
            });
            let leaving = (0..count).map(|_| connect(PORT)).collect::<std::io::Result<Vec<_>>>();
            leaving.map(|leaving| (leaving, bystander.expect("it is connected")))
        })?;
        bystander.set_nodelay(true)?;
        // Whoever is answered was accepted.
        leaving.iter().try_for_each(turn)?;
        Ok(Self { pair, server, _leaving: leaving, bystander })
    }

    /// The longest turn of the bystander meanwhile.
    fn longest(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let (is_over, bystander) = (Arc::new(AtomicBool::new(false)), self.bystander.try_clone()?);
        let watch = {
            let is_over = Arc::clone(&is_over);
            thread::spawn(move || {
                let mut longest = Duration::ZERO;
                while !is_over.load(Ordering::Relaxed) {
                    let begin = Instant::now();
                    turn(&bystander)?;
                    longest = longest.max(begin.elapsed());
                    // It leaves the processors to others.
                    thread::sleep(Duration::from_micros(200));
                }
                std::io::Result::Ok(longest)
            })
        };
        let worked = work();
        is_over.store(true, Ordering::Relaxed);
        let longest = watch.join().expect("it does not panic")?;
        worked.map(|()| longest)
    }

    fn move_by(&self, command: &PathBuf, start: &str) -> Result<()> {
        let via = format!("sleep {start}; exec {} receive --detach -- true", command.display());
        let (pid, port) = (self.server.id().to_string(), PORT.to_string());
        let mut send = Command::new(command);
        send.args(["send", "--pid", &pid, "--port", &port, "--via", &via]);
        let output = self.pair.a.run(|| send.output())?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.server.kill().and_then(|()| self.server.wait());
    }
}

fn turn(mut stream: &TcpStream) -> std::io::Result<()> {
    stream.write_all(b".")?;
    stream.read_exact(&mut [0])
}

/// The server: it answers what it hears, on this address and on the next port.
pub(crate) fn serve(address: &str) -> Result<()> {
    let address: SocketAddr = address.parse()?;
    let next = (address.ip(), address.port() + 1);
    let listeners = [TcpListener::bind(address)?, TcpListener::bind(next)?];
    listeners.iter().try_for_each(|listener| listener.set_nonblocking(true))?;
    let mut streams: Vec<TcpStream> = Vec::new();
    loop {
        let sockets = listeners.iter().map(AsFd::as_fd).chain(streams.iter().map(AsFd::as_fd));
        let mut events: Vec<_> = sockets.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        match poll(&mut events, None) {
            Err(rustix::io::Errno::INTR) => continue,
            polled => polled.context("poll")?,
        };
        let ready: Vec<bool> = events.iter().map(|event| !event.revents().is_empty()).collect();
        let mut heard = ready[listeners.len()..].iter();
        streams.retain_mut(|stream| {
            let mut bytes = [0; 64];
            !heard.next().expect("each was asked")
                || stream
                    .read(&mut bytes)
                    .is_ok_and(|length| length > 0 && stream.write_all(&bytes[..length]).is_ok())
        });
        for (listener, _) in listeners.iter().zip(&ready).filter(|(_, is_ready)| **is_ready) {
            // All that wait: the queue is short.
            streams.extend(std::iter::from_fn(|| listener.accept().ok()).map(|(stream, _)| stream));
        }
    }
}
