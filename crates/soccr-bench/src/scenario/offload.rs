//! A load balancer that gives its connections away (`examples/offload`), beside the same one that copies the answers by splice(2):
//! whole programs, two backends, keep-alive.
//!
//! The processor time is that of the balancer's program. What its kernel does to steer the clients' packets, some 4 µs for each, is
//! counted nowhere: it happens in whatever context a packet arrives.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use soccr_lab::{Host, Lan};

use crate::arguments::Arguments;
use crate::report::{Report, Row};
use crate::statistics::Samples;

const SIZES: [(usize, &str); 4] =
    [(4 << 10, "4 KiB"), (64 << 10, "64 KiB"), (1 << 20, "1 MiB"), (10 << 20, "10 MiB")];
/// Requests on one connection.
const REQUESTS: [usize; 2] = [1, 32];
const CLIENTS: usize = 4;

pub(crate) fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let program = build()?;
    let time = Duration::from_millis(if arguments.full { 5_000 } else { 1_000 });
    for requests in REQUESTS {
        for (size, name) in SIZES {
            let relayed = measure(&program, true, size, requests, time)?;
            let offloaded = measure(&program, false, size, requests, time)?;
            let what = |what: &str| format!("{name}, {requests} a connection: {what}");
            let rates = [&relayed, &offloaded].map(|figures| figures.rate);
            let count = offloaded.latency.count();
            report.add(Row::goodput("offload", what("relayed, then offloaded"), count, rates));
            report.add(Row::new("offload", what("latency"), &offloaded.latency).against(&relayed.latency));
            report.add(Row::new("offload", what("front, a request"), &offloaded.used).against(&relayed.used));
        }
    }
    Ok(())
}

fn build() -> Result<PathBuf> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let package = ["build", "--quiet", "--release", "-p", "soccr-handover", "--example", "offload"];
    ensure!(Command::new(cargo).args(package).status()?.success(), "the example cannot be built");
    let ours = std::env::current_exe()?;
    let target = ours.ancestors().nth(2).context("a benchmark is in a directory of cargo")?;
    Ok(target.join("examples/offload"))
}

/// A program that ends with this value.
struct Program(Child);

impl Program {
    /// Starts it on a host, and waits until it is ready.
    fn start(program: &Path, host: &Host, arguments: &[&str]) -> Result<Self> {
        let command = || Command::new(program).args(arguments).stdout(Stdio::piped()).spawn();
        let mut started = Self(host.run(command)?);
        let mut line = String::new();
        BufReader::new(started.0.stdout.take().context("a pipe")?).read_line(&mut line)?;
        ensure!(line == "ready\n", "the example has not started");
        Ok(started)
    }

    /// What it has used of the processors.
    fn used(&self) -> Result<Duration> {
        /// Of `utime`, behind the name, which may have blanks.
        const FIELD: usize = 11;
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let fields: Vec<&str> = stat.rsplit_once(") ").context("stat")?.1.split(' ').collect();
        let ticks = fields[FIELD].parse::<u64>()? + fields[FIELD + 1].parse::<u64>()?;
        Ok(Duration::from_nanos(ticks * 1_000_000_000 / rustix::param::clock_ticks_per_second()))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Figures {
    /// Bits per second.
    rate: f64,
    latency: Samples,
    used: Samples,
}

fn measure(program: &Path, relays: bool, size: usize, requests: usize, time: Duration) -> Result<Figures> {
    let lan = Lan::new()?;
    let address = |host: usize| lan.hosts[host].v4.to_string();
    let (http, control) = (format!("{}:80", address(0)), format!("{}:9000", address(0)));
    let backend = |name, host: usize| {
        Program::start(program, &lan.hosts[host], &["backend", name, &address(host), &control])
    };
    let _backends = [backend("a", 1)?, backend("b", 2)?];
    let front = if relays {
        Program::start(program, &lan.hosts[0], &["relay", &http, &address(1), &address(2)])?
    } else {
        Program::start(program, &lan.hosts[0], &["front", &http, &control, &address(1), &address(2)])?
    };
    let (start, before) = (Instant::now(), front.used()?);
    let mut latency = Samples::default();
    let mut count = 0u32;
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let peer = &lan.peer;
                let home = lan.hosts[0].v4;
                scope.spawn(move || peer.run(|| client(home, number, size, requests, time)))
            })
            .collect();
        for client in clients {
            for sample in client.join().ok().context("a client has panicked")?? {
                latency.push(sample);
                count += 1;
            }
        }
        Ok::<_, anyhow::Error>(())
    })?;
    let taken = start.elapsed();
    let mut used = Samples::default();
    used.push((front.used()? - before) / count.max(1));
    Ok(Figures { rate: f64::from(count) * size as f64 * 8.0 / taken.as_secs_f64(), latency, used })
}

/// Asks again and again; returns how long each answer took.
fn client(
    home: Ipv4Addr,
    number: usize,
    size: usize,
    requests: usize,
    time: Duration,
) -> Result<Vec<Duration>> {
    let backend = ["a", "b"][number % 2];
    let request = format!("GET /{backend}/{size} HTTP/1.1\r\nhost: lab\r\n\r\n");
    let expected = format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n").len() + size;
    let (mut samples, mut buffer) = (Vec::new(), vec![0; 256 << 10]);
    let begin = Instant::now();
    while begin.elapsed() < time {
        let mut stream = TcpStream::connect(SocketAddr::from((home, 80)))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        for _ in 0..requests {
            let start = Instant::now();
            stream.write_all(request.as_bytes())?;
            let mut left = expected;
            while left > 0 {
                let read = stream.read(&mut buffer)?;
                ensure!(read > 0 && read <= left, "the answer ends early");
                left -= read;
            }
            samples.push(start.elapsed());
        }
    }
    Ok(samples)
}
