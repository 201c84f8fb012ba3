//! How fast a connection is after a move, and what that costs a restore.
//!
//! ```sh
//! cargo bench -p soccr --bench speed              # a table, in a minute
//! cargo bench -p soccr --bench speed -- --runs 5  # the medians of more moves
//! cargo bench -p soccr --bench speed -- --json    # one JSON object
//! ```
//!
//! Goodput is what the receiving application gets in the first second after the move, divided by that of the second
//! before it. Each connection is locked (hold), saved, detached and restored on the same host.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use soccr::connection::Path;
use soccr::settings::Settings;
use soccr::{Connection, Fidelity, Flow, Lock, pause};
use soccr_lab::{Family, Pair, Shape};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const SECOND: Duration = Duration::from_secs(1);
/// Until congestion control has found its window.
const WARM_UP: Duration = Duration::from_secs(2);
/// Restores of each kind whose cost is measured.
const RESTORES: usize = 500;

/// Which of its two ways the connection is busy.
#[derive(Clone, Copy, Debug)]
enum Direction {
    Sending,
    Receiving,
}

/// How much of its speed is brought back.
#[derive(Clone, Copy, Debug)]
enum Effort {
    /// Everything, as far as this user may.
    All,
    /// What BPF does not do.
    WithoutBpf,
    /// Neither path nor settings.
    Plain,
}

impl Effort {
    const ALL: [(Self, &str); 3] =
        [(Self::All, "all"), (Self::WithoutBpf, "without BPF"), (Self::Plain, "plain")];

    fn reduce(self, connection: &mut Connection) {
        match self {
            Self::All => {}
            // Zero leaves as it is.
            Self::WithoutBpf => {
                let path = connection.path.unwrap_or_default();
                connection.path = Some(Path { snd_cwnd: 0, snd_ssthresh: 0, ..path });
                connection.control.options.ecn = false;
            }
            Self::Plain => {
                connection.path = None;
                connection.settings = Settings::default();
                connection.control.options.ecn = false;
            }
        }
    }
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let json = arguments.iter().any(|argument| argument == "--json");
    let runs = match arguments.iter().position(|argument| argument == "--runs") {
        Some(place) => arguments.get(place + 1).ok_or("--runs wants a number")?.parse()?,
        None => 1,
    };
    if let Err(unavailable) = soccr_lab::enter() {
        eprintln!("nothing can be measured: {unavailable}");
        return Ok(());
    }
    soccr::prepare();
    let mut results = Vec::new();
    if !json {
        println!(
            "{:30} {:10} {:12} {:>14} {:>14} {:>7}",
            "line", "we are", "brought back", "before", "after", "ratio"
        );
    }
    for (line, delay, rate) in
        [("20 ms, 200 Mbit/s", 10_000, 200_000_000), ("1 ms, 1 Gbit/s", 500, 1_000_000_000)]
    {
        let shape = Shape {
            delay: Duration::from_micros(delay),
            rate: Some(rate),
            queue: 1 << 20,
            ..Shape::default()
        };
        for (direction, doing) in [(Direction::Sending, "sending"), (Direction::Receiving, "receiving")] {
            for (effort, name) in Effort::ALL {
                let mut moves =
                    (0..runs).map(|_| goodput(&shape, direction, effort)).collect::<Outcome<Vec<_>>>()?;
                moves.sort_by(|a, b| (a[1] / a[0]).total_cmp(&(b[1] / b[0])));
                let [before, after] = moves[moves.len() / 2];
                let ratio = after / before;
                if json {
                    results.push(format!(
                        r#"{{"line":"{line}","direction":"{doing}","effort":"{name}","runs":{runs},"before_bits":{before:.0},"after_bits":{after:.0},"ratio":{ratio:.4}}}"#
                    ));
                } else {
                    let [before, after] = [before, after].map(|bits| format!("{:.1} Mbit/s", bits / 1e6));
                    println!("{line:30} {doing:10} {name:12} {before:>14} {after:>14} {ratio:>7.3}");
                }
            }
        }
    }
    let costs = costs()?;
    let [plain, without_bpf, all] = costs.map(|cost| cost.as_nanos() as f64 / 1e3);
    if json {
        println!(
            r#"{{"goodput":[{}],"restore_us":{{"plain":{plain:.1},"without_bpf":{without_bpf:.1},"all":{all:.1}}}}}"#,
            results.join(",")
        );
    } else {
        println!(
            "\nmedian of {RESTORES} restores: plain {plain:.1} µs, without BPF {without_bpf:.1} µs, all {all:.1} µs"
        );
    }
    Ok(())
}

/// A connection between two hosts: the end that moves, and the peer.
fn connect(pair: &Pair) -> Outcome<(TcpStream, TcpStream)> {
    let listener = pair.b.run(|| TcpListener::bind(pair.b.address(Family::V4, 80)))?;
    let ours = pair.a.run(|| TcpStream::connect(pair.a.address_of(&pair.b, Family::V4, 80)))?;
    let (peer, _) = listener.accept()?;
    for socket in [&ours, &peer] {
        rustix::net::sockopt::set_tcp_congestion(socket, "cubic")?;
    }
    Ok((ours, peer))
}

/// Bits per second in the second before the move, and in the one after it.
fn goodput(shape: &Shape, direction: Direction, effort: Effort) -> Outcome<[f64; 2]> {
    let pair = Pair::shaped(shape)?;
    let (mut ours, mut peer) = connect(&pair)?;
    let (received, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let (received, stop) = (&received, &stop);
        let busy = scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                match direction {
                    Direction::Sending => read(&mut peer, received),
                    Direction::Receiving => write(&mut peer),
                }
            }
        });
        let work = |ours: &mut TcpStream, time: Duration| {
            let (start, before) = (Instant::now(), received.load(Ordering::Relaxed));
            while start.elapsed() < time {
                match direction {
                    Direction::Sending => write(ours),
                    Direction::Receiving => read(ours, received),
                }
            }
            (received.load(Ordering::Relaxed) - before) as f64 * 8.0 / start.elapsed().as_secs_f64()
        };
        work(&mut ours, WARM_UP);
        let before = work(&mut ours, SECOND);
        let moved = move_once(&pair, ours, effort);
        let after = moved.map(|mut ours| {
            let after = work(&mut ours, SECOND);
            stop.store(true, Ordering::Relaxed);
            // The peer may wait for bytes or for room.
            let _ = ours.shutdown(std::net::Shutdown::Both);
            after
        });
        stop.store(true, Ordering::Relaxed);
        let _ = busy.join();
        Ok([before, after?])
    })
}

fn write(stream: &mut TcpStream) {
    const PIECE: [u8; 1 << 14] = [7; 1 << 14];
    // The end of the connection is the end of the measurement.
    let _ = stream.write(&PIECE);
}

fn read(stream: &mut TcpStream, received: &AtomicU64) {
    let mut piece = [0; 1 << 16];
    received.fetch_add(stream.read(&mut piece).unwrap_or(0) as u64, Ordering::Relaxed);
}

fn move_once(pair: &Pair, ours: TcpStream, effort: Effort) -> Outcome<TcpStream> {
    let lock = pair.a.run(|| Lock::hold(&[Flow::of(&ours)?]))?;
    let paused = pause(&ours)?;
    let mut connection = paused.save()?;
    paused.detach()?;
    effort.reduce(&mut connection);
    let restored = pair.a.run(|| connection.restore())?;
    lock.release()?;
    Ok(restored.resume()?)
}

/// The median time of a restore: plain, without BPF, and of everything.
fn costs() -> Outcome<[Duration; 3]> {
    let pair = Pair::new()?;
    let (mut ours, mut peer) = connect(&pair)?;
    // So that there is a round-trip time.
    ours.write_all(b"ping")?;
    peer.read_exact(&mut [0; 4])?;
    let mut times = [const { Vec::new() }; 3];
    for round in 0..3 * RESTORES {
        let paused = pause(&ours)?;
        let mut connection = paused.save()?;
        paused.detach()?;
        connection.path = connection.path.map(|path| Path {
            snd_cwnd: 77,
            rtt: path.rtt.max(Duration::from_micros(50)),
            ..path
        });
        [Effort::Plain, Effort::WithoutBpf, Effort::All][round % 3].reduce(&mut connection);
        // On a thread that stays in the namespace, which a server's is, too.
        let (restored, time) = pair.a.run(|| {
            let start = Instant::now();
            (connection.restore(), start.elapsed())
        });
        let restored = restored?;
        times[round % 3].push(time);
        if round == 2 {
            for lost in restored.report().iter().filter(|entry| entry.fidelity() == Fidelity::Missing) {
                eprintln!("not brought back: {lost}");
            }
        }
        ours = restored.resume()?;
    }
    Ok(times.map(|mut times| {
        times.sort();
        times[times.len() / 2]
    }))
}
