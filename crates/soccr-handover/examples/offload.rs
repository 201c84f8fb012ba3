//! A load balancer that leaves the data path: it reads a request, chooses a backend, and gives the connection away. The backend
//! answers the client directly, under the balancer's address; what the client sends on is steered past the balancer's programs, by its kernel.
//!
//! ```text
//!   client ─── 192.0.2.1:80 front ───────────▶ backend 192.0.2.2
//!      ▲                                          │
//!      └────────────────── answers ───────────────┘
//!
//! cargo build --example offload
//! sudo target/debug/examples/offload backend a 192.0.2.2 192.0.2.1:9000                      # on two hosts,
//! sudo target/debug/examples/offload backend b 192.0.2.3 192.0.2.1:9000
//! sudo target/debug/examples/offload front 192.0.2.1:80 192.0.2.1:9000 192.0.2.2 192.0.2.3   # on the third: then GET /a/4096
//! sudo target/debug/examples/offload relay 192.0.2.1:80 192.0.2.2 192.0.2.3                       # the same, but copies: to compare
//! ```
//!
//! The first letter of the path names the backend, the rest how many bytes it sends. A backend keeps the connection until a
//! request is for the other one: then it hands the connection back, with the request that it has read in front of the queue.
//! All hosts are in one network; whoever may connect to port 9000 of one of them can give it connections.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use soccr::steer::NextHop;
use soccr_handover::{Mover, Outcome};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const HANDOVER: u16 = 9000;
const HTTP: u16 = 8080;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["front", address, control, a, b] => {
            front(address.parse()?, control.parse()?, [a.parse()?, b.parse()?])
        }
        ["backend", name, address, front] => backend(name, address.parse()?, front.parse()?),
        ["relay", address, a, b] => relay(address.parse()?, [a.parse()?, b.parse()?]),
        _ => Err("usage: offload front|backend|relay …: see the beginning of its source".into()),
    }
}

/// A program to which connections can be given, one after the other.
struct Giving {
    mover: Mover,
    to: SocketAddr,
    steered: Vec<NextHop>,
    channel: Mutex<Option<TcpStream>>,
}

impl Giving {
    fn new(mover: &Mover, to: SocketAddr, steered: Vec<NextHop>) -> Arc<Self> {
        Arc::new(Self { mover: mover.clone(), to, steered, channel: Mutex::new(None) })
    }

    /// Gives a connection away with what has been read of it. Returns it where it stays.
    fn give(&self, stream: TcpStream, read: &[u8]) -> Result<Option<TcpStream>> {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        if channel.is_none() {
            let connected = TcpStream::connect(self.to)?;
            // Short words go to and fro: the algorithm of Nagle would hold them back for 40 ms at a time.
            connected.set_nodelay(true)?;
            *channel = Some(connected);
        }
        let departing = self.mover.take(stream)?.unread(read)?;
        let sending = self.mover.sending([departing]).steered_to(self.steered.clone());
        match sending.through(channel.as_mut().expect("it is connected")).pop() {
            Some(Outcome::Stays(stream, why)) => {
                eprintln!("stays: {why}");
                *channel = None;
                Ok(Some(stream))
            }
            Some(Outcome::Unknown(why)) => Err(why.into()),
            Some(Outcome::Moved) | None => Ok(None),
        }
    }
}

/// Takes connections in, from everybody who connects.
fn take_in(
    mover: &Mover,
    control: TcpListener,
    serve: impl Fn(TcpStream) -> Result<()> + Clone + Send + 'static,
) {
    for channel in control.incoming().flatten() {
        let (mover, serve) = (mover.clone(), serve.clone());
        thread::spawn(move || {
            // As at the other end.
            let _ = channel.set_nodelay(true);
            let mut arriving = mover.listen(channel);
            while let Ok(Some(arrived)) = arriving.next() {
                match arrived.into_stream() {
                    Ok(stream) => start(stream, serve.clone()),
                    Err(error) => eprintln!("{error}"),
                }
            }
        });
    }
}

fn start(stream: TcpStream, serve: impl Fn(TcpStream) -> Result<()> + Send + 'static) {
    thread::spawn(move || serve(stream).map_err(|error| eprintln!("{error}")));
}

/// Reads requests, and gives the connections to whom they are for.
fn front(address: SocketAddr, control: SocketAddr, backends: [IpAddr; 2]) -> Result<()> {
    let mover = Mover::new()?;
    let give = |ip: IpAddr| Ok(Giving::new(&mover, (ip, HANDOVER).into(), vec![NextHop::new(ip)?]));
    let backends: Vec<Arc<Giving>> = backends.into_iter().map(give).collect::<Result<_>>()?;
    let serve = move |stream: TcpStream| {
        let Some(request) = Request::read(&stream)? else { return Ok(()) };
        match backends[request.backend].give(stream, &request.bytes)? {
            Some(stream) => {
                Ok((&stream).write_all(b"HTTP/1.1 503 Unavailable\r\ncontent-length: 0\r\n\r\n")?)
            }
            None => Ok(()),
        }
    };
    let (listener, control) = (TcpListener::bind(address)?, TcpListener::bind(control)?);
    println!("ready");
    let back = serve.clone();
    thread::spawn(move || take_in(&mover, control, back));
    for stream in listener.incoming() {
        start(stream?, serve.clone());
    }
    Ok(())
}

/// Answers requests, and hands connections back whose next request is for another backend.
fn backend(name: &str, address: IpAddr, front: SocketAddr) -> Result<()> {
    let (mover, ours) = (Mover::new()?, index_of(name));
    let back = Giving::new(&mover, front, Vec::new());
    let serve = move |stream: TcpStream| {
        while let Some(request) = Request::read(&stream)? {
            if request.backend != ours {
                return back.give(stream, &request.bytes).map(drop);
            }
            answer(&stream, &request)?;
        }
        Ok(())
    };
    let (control, http) = (TcpListener::bind((address, HANDOVER))?, TcpListener::bind((address, HTTP))?);
    println!("ready");
    // For the relay.
    let served = serve.clone();
    thread::spawn(move || http.incoming().flatten().for_each(|stream| start(stream, served.clone())));
    take_in(&mover, control, serve);
    Ok(())
}

/// Of the two backends, `b` is the second.
fn index_of(name: &str) -> usize {
    usize::from(name.starts_with('b'))
}

fn answer(mut stream: &TcpStream, request: &Request) -> io::Result<()> {
    const PIECE: &[u8] = &[b'x'; 64 << 10];
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", request.length);
    let mut left = request.length;
    let first = left.min(PIECE.len());
    stream.write_all(&[head.as_bytes(), &PIECE[..first]].concat())?;
    left -= first;
    while left > 0 {
        let next = left.min(PIECE.len());
        stream.write_all(&PIECE[..next])?;
        left -= next;
    }
    Ok(())
}

/// `GET /a/4096`
struct Request {
    bytes: Vec<u8>,
    backend: usize,
    length: usize,
}

impl Request {
    /// `None` where the client has ended the connection.
    fn read(stream: &TcpStream) -> Result<Option<Self>> {
        const LIMIT: Duration = Duration::from_secs(60);
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let Some(bytes) = read_head(stream)? else { return Ok(None) };
        let text = String::from_utf8_lossy(&bytes);
        let path = text.split(' ').nth(1).unwrap_or_default();
        let (name, length) = path.trim_start_matches('/').split_once('/').unwrap_or_default();
        let (backend, length) = (index_of(name), length.parse().unwrap_or(0));
        Ok(Some(Self { backend, length, bytes }))
    }
}

/// Reads up to the empty line and not further: clients do not send the next request before the answer.
fn read_head(mut stream: &TcpStream) -> io::Result<Option<Vec<u8>>> {
    let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
    while !bytes.ends_with(b"\r\n\r\n") {
        match stream.read(&mut piece)? {
            0 => return Ok(None),
            read => bytes.extend_from_slice(&piece[..read]),
        }
    }
    Ok(Some(bytes))
}

/// The same front, in the data path: answers are spliced, from socket to socket by a pipe.
fn relay(address: SocketAddr, backends: [IpAddr; 2]) -> Result<()> {
    let serve = move |client: TcpStream| {
        let mut upstream: [Option<TcpStream>; 2] = [None, None];
        let (from, to) = pipe_with(PipeFlags::CLOEXEC)?;
        let _ = fcntl_setpipe_size(&to, 1 << 20);
        while let Some(request) = Request::read(&client)? {
            let slot = &mut upstream[request.backend];
            if slot.is_none() {
                *slot = Some(TcpStream::connect((backends[request.backend], HTTP))?);
            }
            let mut upstream = slot.as_ref().expect("it is connected");
            upstream.write_all(&request.bytes)?;
            let mut left = head_length(&request) + request.length;
            while left > 0 {
                let mut read = splice(upstream, None, &to, None, left, SpliceFlags::MOVE)?;
                left -= read;
                if read == 0 {
                    return Err("the backend has ended in the middle of an answer".into());
                }
                while read > 0 {
                    let more = if left > 0 { SpliceFlags::MORE } else { SpliceFlags::empty() };
                    read -= splice(&from, None, &client, None, read, SpliceFlags::MOVE | more)?;
                }
            }
        }
        Ok(())
    };
    let listener = TcpListener::bind(address)?;
    println!("ready");
    for stream in listener.incoming() {
        start(stream?, serve);
    }
    Ok(())
}

/// The length of what [`answer`] writes before the object.
fn head_length(request: &Request) -> usize {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", request.length).len()
}
