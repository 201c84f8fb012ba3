//! A server that can be stopped and started again while its clients stay connected.
//!
//! ```text
//! cargo build --example stop_and_start
//! sudo target/debug/examples/stop_and_start 127.0.0.1:7000 /run/images     # serves; "stop" or end of input ends it
//! sudo target/debug/examples/stop_and_start 127.0.0.1:7000 /run/images     # later: goes on where the first one was
//! ```
//!
//! It numbers the lines that each client sends. When it stops, each connection becomes a file, its count part of the name;
//! meanwhile a lock keeps the host silent about them, so that no client is told that nobody is there. Nothing in here knows
//! whether the new process is the same program, or a newer one.

use std::error::Error;
use std::fs;
use std::io::{ErrorKind, Read, Write, stdin};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use soccr::lock::PersistentLock;
use soccr::{Flow, Lock};

/// How long a restart may take: afterwards the host answers for the connections again, with resets.
const LIMIT: Duration = Duration::from_secs(60);
const LOCK: &str = "stop-and-start-example";

struct Client {
    stream: TcpStream,
    lines: u64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(address), Some(directory)) = (arguments.next(), arguments.next()) else {
        return Err("usage: stop_and_start ADDRESS:PORT DIRECTORY".into());
    };
    let directory = Path::new(&directory);
    fs::create_dir_all(directory)?;
    let listener = TcpListener::bind(&address)?;
    let mut clients = restore(directory)?;
    println!("serving, {} connections restored", clients.len());
    serve(&listener, &mut clients)?;
    save(directory, &clients)?;
    println!("stopped, {} connections saved", clients.len());
    Ok(())
}

/// Serves until "stop" or the end of standard input.
fn serve(listener: &TcpListener, clients: &mut Vec<Client>) -> Result<(), Box<dyn Error>> {
    loop {
        let stdin = stdin();
        let mut events = vec![PollFd::new(&stdin, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        events.extend(clients.iter().map(|client| PollFd::new(&client.stream, PollFlags::IN)));
        poll(&mut events, None)?;
        let ready: Vec<bool> = events.iter().map(|event| !event.revents().is_empty()).collect();
        if ready[0] {
            let mut line = String::new();
            if stdin.read_line(&mut line)? == 0 || line.trim() == "stop" {
                return Ok(());
            }
        }
        let mut served = ready[2..].iter();
        clients.retain_mut(|client| match served.next() {
            Some(true) => client.answer().is_ok(),
            _ => true,
        });
        if ready[1] {
            let stream = listener.accept()?.0;
            stream.set_nonblocking(true)?;
            clients.push(Client { stream, lines: 0 });
        }
    }
}

impl Client {
    /// Numbers what the client has sent; an error where it has gone.
    fn answer(&mut self) -> std::io::Result<()> {
        let mut bytes = [0; 4096];
        let length = match self.stream.read(&mut bytes) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            read => read?,
        };
        for line in bytes[..length].split_inclusive(|byte| *byte == b'\n') {
            self.lines += 1;
            write!(self.stream, "{}: {}", self.lines, String::from_utf8_lossy(line))?;
        }
        Ok(())
    }
}

/// Makes a file of every connection. They live on until all files are there.
fn save(directory: &Path, clients: &[Client]) -> Result<(), Box<dyn Error>> {
    let flows: Vec<Flow> = clients.iter().map(|client| Flow::of(&client.stream)).collect::<Result<_, _>>()?;
    if flows.is_empty() {
        return Ok(());
    }
    let mut lock = Lock::drop_traffic(&flows)?;
    let mut all = Vec::new();
    for (number, client) in clients.iter().enumerate() {
        let paused = soccr::pause(&client.stream)?;
        let path = directory.join(format!("{number}-{}.soccr", client.lines));
        soccr_image::save_file(path, &paused.save()?)?;
        all.push(paused);
    }
    lock.persist(LOCK, Some(LIMIT))?;
    for paused in all {
        paused.detach()?;
    }
    Ok(())
}

/// Makes connections of the files again.
fn restore(directory: &Path) -> Result<Vec<Client>, Box<dyn Error>> {
    let mut restored = Vec::new();
    for file in fs::read_dir(directory)? {
        let path = file?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let Some((_, lines)) = name.split_once('-') else { continue };
        restored.push((soccr_image::load_file(&path)?.restore()?, lines.parse()?));
        fs::remove_file(&path)?;
    }
    for lock in PersistentLock::list()?.into_iter().filter(|lock| lock.name == LOCK) {
        lock.remove()?;
    }
    let mut clients = Vec::new();
    for (socket, lines) in restored {
        let stream = socket.resume()?;
        clients.push(Client { stream, lines });
    }
    Ok(clients)
}
