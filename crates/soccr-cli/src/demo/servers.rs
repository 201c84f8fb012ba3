//! `soccr demo --servers`: a client keeps one connection while servers that know nothing of soccr replace each other.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use soccr::adopt::Adopter;
use soccr_lab::{Host, Lab};

use super::report::{BAD, BOLD, DIM, GOOD, resets_sent, say};
use crate::exit::Exit;

const PORT: u16 = 8080;
/// The servers, which take turns.
const NAMES: [&str; 2] = ["alice", "bob"];
/// What a server prints when it listens.
const LISTENING: &str = "listening\n";
/// How long the client waits for an answer and a server for its port, and how often that is tried.
const PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(5);

/// The account, for machines.
#[derive(Debug, Serialize)]
struct Account {
    moves: u32,
    answers: u32,
    /// Of all hosts.
    resets: u64,
}

/// Replaces the server again and again. Needs what adopting needs, and says so.
pub(super) fn run(moves: u32, json: bool) -> Result<Exit> {
    let lab = Lab::new().context("the private network")?;
    lab.a.run(Adopter::new).context("--servers puts a connection into the accept queue of a server")?;
    let address = SocketAddr::from((lab.a.v4, PORT));
    let mut server = Server::start(&lab.a, NAMES[0])?;
    let mut client = lab.peer.run(|| Client::connect(address))?;
    let told = |line: std::fmt::Arguments<'_>| {
        if json { Ok(()) } else { say(line) }
    };
    told(format_args!(
        "One connection, and servers that accept, read and answer, and know of nothing else."
    ))?;
    told(format_args!(
        "{DIM}Each is told to listen no more, the next one listens on the same port and gets the connection.{DIM:#}"
    ))?;
    told(format_args!(""))?;
    let mut answers = 0;
    for number in 1..=moves + 1 {
        for _ in 0..2 {
            answers += 1;
            let (question, answer, time) = client.ask(answers)?;
            ensure!(answer.starts_with(server.name), "{answer:?} is the answer of another server");
            told(format_args!(
                "  client: {question:<12} {answer:<20} {DIM}{:.2} ms{DIM:#}",
                milliseconds(time)
            ))?;
        }
        if number <= moves {
            server.listen_no_more();
            let next = Server::start(&lab.a, NAMES[number as usize % NAMES.len()])?;
            let start = Instant::now();
            move_all(&lab.a, &server)?;
            told(format_args!(
                "{BOLD}  $ soccr send --pid {} --all --via 'soccr receive --adopt'{BOLD:#}   {DIM}{} → {}, {:.0} ms{DIM:#}",
                server.process.id(),
                server.name,
                next.name,
                milliseconds(start.elapsed()),
            ))?;
            server = next;
        }
    }
    let resets = [&lab.peer, &lab.a].into_iter().map(resets_sent).sum();
    if json {
        say(format_args!("{}", serde_json::to_string(&Account { moves, answers, resets })?))?;
    }
    let style = if resets == 0 { GOOD } else { BAD };
    told(format_args!(""))?;
    told(format_args!(
        "{style}{moves} moves, {answers} answers over one connection, {resets} resets{style:#}"
    ))?;
    Ok(if resets == 0 { Exit::Done } else { Exit::Lost })
}

/// What an administrator would type.
fn move_all(host: &Host, from: &Server) -> Result<()> {
    let via = format!("/proc/{}/exe receive --adopt", std::process::id());
    let mut send = Command::new("/proc/self/exe");
    send.args(["send", "--pid", &from.process.id().to_string(), "--all", "--via", &via]);
    let output = host.run(|| send.output()).context("soccr send")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && complaint.is_empty(), "soccr send: {}: {complaint}", output.status);
    Ok(())
}

/// A server, in a process of its own, that listens until its standard input ends.
#[derive(Debug)]
struct Server {
    name: &'static str,
    process: Child,
}

impl Server {
    /// Returns when it listens.
    fn start(host: &Host, name: &'static str) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.args(["demo-server", name]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut server = Self { name, process: host.run(|| command.spawn()).context("a server")? };
        let output = server.process.stdout.as_mut().context("its standard output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        ensure!(line == LISTENING, "{name} does not listen");
        Ok(server)
    }

    fn listen_no_more(&mut self) {
        drop(self.process.stdin.take());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The server: accepts, reads lines, answers with its name in front.
pub(crate) fn serve(name: &'static str) -> Result<Exit> {
    // The previous server may be about to close its listener.
    let listener = retry(|| TcpListener::bind(("0.0.0.0", PORT)))?;
    let ours = listener.try_clone()?;
    std::thread::spawn(move || {
        for stream in ours.incoming().flatten() {
            std::thread::spawn(move || answer(name, &stream));
        }
    });
    print!("{LISTENING}");
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    // Connections go on; a thread that waits in accept(2) would keep the port.
    rustix::net::shutdown(&listener, rustix::net::Shutdown::Both)?;
    drop(listener);
    loop {
        std::thread::park();
    }
}

fn answer(name: &str, mut stream: &TcpStream) {
    for line in BufReader::new(stream).lines().map_while(std::io::Result::ok) {
        if stream.write_all(format!("{name}: {line}\n").as_bytes()).is_err() {
            return;
        }
    }
}

/// Tries until it succeeds, or the patience is over.
fn retry<T>(attempt: impl Fn() -> std::io::Result<T>) -> std::io::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(_) if Instant::now() < deadline => std::thread::sleep(POLL),
            outcome => return outcome,
        }
    }
}

#[derive(Debug)]
struct Client {
    output: TcpStream,
    input: BufReader<TcpStream>,
}

impl Client {
    fn connect(address: SocketAddr) -> Result<Self> {
        let output = TcpStream::connect(address).context("the client connects")?;
        output.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { input: BufReader::new(output.try_clone()?), output })
    }

    /// A question, its answer, and how long that took.
    fn ask(&mut self, number: u32) -> Result<(String, String, Duration)> {
        let question = format!("question {number}");
        let start = Instant::now();
        self.output.write_all(format!("{question}\n").as_bytes())?;
        let mut answer = String::new();
        self.input.read_line(&mut answer).context("the client waits for an answer")?;
        Ok((question, answer.trim_end().to_owned(), start.elapsed()))
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
