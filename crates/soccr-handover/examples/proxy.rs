//! An HTTP server on tokio and hyper whose connections move to another process, here or on another host: idle ones, and those of which
//! half a request has been read.
//!
//! ```text
//! cargo build --features tokio --example proxy
//! sudo target/debug/examples/proxy 192.0.2.1:8080 127.0.0.1:9000          # HERE: answers; a successor may come on port 9000
//! sudo target/debug/examples/proxy 192.0.2.1:8080 127.0.0.1:9000 take     # THERE: takes the connections over, and answers from then on
//! ```
//!
//! A connection moves between two answers; what hyper has read ahead goes back in front of the queue. Nothing of it is in the memory of
//! the process then, so that no state goes along. For another host the address moves there, too, and the channel goes through
//! `ssh -L`: whoever may connect to it gets the connections.
//!
//! Whoever connects while nobody listens, between the last answer HERE and the first one THERE, is refused and has to try again; on one host
//! the listener can go along, as in the example `replace`.

use std::convert::Infallible;
use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::Full;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use soccr_handover::{Mover, Outcome};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// A connection between two answers, and what has been read of the next request.
type Idle = (TcpStream, Bytes);

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (address, control): (SocketAddr, SocketAddr) = match &arguments[..] {
        [address, control] | [address, control, _] => (address.parse()?, control.parse()?),
        _ => return Err("usage: proxy ADDRESS:PORT CONTROL_ADDRESS:PORT [take]".into()),
    };
    let mover = Mover::new()?;
    let mut idle = match arguments.len() {
        3 => take_over(&mover, TcpStream::connect(control).await?).await,
        _ => Vec::new(),
    };
    loop {
        let (channel, all) = serve(address, control, idle).await?;
        idle = give_away(&mover, channel, all).await;
        if idle.is_empty() {
            println!("moved");
            return Ok(());
        }
    }
}

/// HERE: everything moves. Returns what stays.
async fn give_away(mover: &Mover, mut channel: TcpStream, idle: Vec<Idle>) -> Vec<Idle> {
    let (mut departing, mut kept) = (Vec::new(), Vec::new());
    for (stream, read) in idle {
        // An error here: the client has just gone.
        let Ok(connection) = mover.take(stream) else { continue };
        let Ok(connection) = connection.unread(&read) else { continue };
        departing.push(connection);
        kept.push(read);
    }
    let outcomes = mover.send_all_async(departing, &mut channel).await;
    let mut staying = Vec::new();
    for (outcome, read) in outcomes.into_iter().zip(kept) {
        match outcome {
            Outcome::Moved => {}
            Outcome::Stays(stream, why) => {
                eprintln!("stays: {why}");
                staying.push((stream, read));
            }
            Outcome::Unknown(why) => eprintln!("it is there, or nowhere: {why}"),
        }
    }
    staying
}

/// THERE: takes over what comes, until the other end closes the channel.
async fn take_over(mover: &Mover, channel: TcpStream) -> Vec<Idle> {
    let mut arrivals = mover.listen_async(channel);
    let mut idle = Vec::new();
    loop {
        match arrivals.next().await {
            Ok(Some(arrived)) => match arrived.into_stream() {
                Ok(stream) => idle.push((stream, Bytes::new())),
                Err(error) => eprintln!("lost: {error}"),
            },
            Ok(None) => return idle,
            Err(error) => {
                // Those that have come are ours.
                eprintln!("the predecessor: {error}");
                return idle;
            }
        }
    }
}

/// Answers until a successor comes: then everything that is idle, and the way to the successor.
async fn serve(address: SocketAddr, control: SocketAddr, idle: Vec<Idle>) -> Result<(TcpStream, Vec<Idle>)> {
    let (listener, control) = (TcpListener::bind(address).await?, TcpListener::bind(control).await?);
    println!("{} connections", idle.len());
    let (leave, told) = watch::channel(false);
    let mut answering = JoinSet::new();
    for (stream, read) in idle {
        answering.spawn(answer(stream, read, told.clone()));
    }
    let channel = loop {
        tokio::select! {
            accepted = listener.accept() => drop(answering.spawn(answer(accepted?.0, Bytes::new(), told.clone()))),
            accepted = control.accept() => break accepted?.0,
        }
    };
    leave.send(true)?;
    Ok((channel, answering.join_all().await.into_iter().flatten().collect()))
}

/// Answers requests on one connection until it is `told` to stop; `None` where the client has ended it.
async fn answer(stream: TcpStream, read: Bytes, mut told: watch::Receiver<bool>) -> Option<Idle> {
    let under_way = Arc::new(AtomicUsize::new(0));
    let is_blocked = Arc::new(AtomicBool::new(false));
    let service = service_fn({
        let under_way = Arc::clone(&under_way);
        move |request| {
            under_way.fetch_add(1, Relaxed);
            let under_way = Arc::clone(&under_way);
            Box::pin(async move {
                let response = respond(request).await;
                under_way.fetch_sub(1, Relaxed);
                Ok::<_, Infallible>(response)
            })
        }
    });
    let io = Watched { read, io: TokioIo::new(stream), is_blocked: Arc::clone(&is_blocked) };
    let mut connection = http1::Builder::new().serve_connection(io, service);
    let mut leave = pin!(told.wait_for(|told| *told));
    let mut is_leaving = false;
    let is_idle = poll_fn(|context| {
        is_leaving = is_leaving || leave.as_mut().poll(context).is_ready();
        match connection.poll_without_shutdown(context) {
            Poll::Ready(_) => Poll::Ready(false),
            // It waits for the client, and has written everything.
            Poll::Pending if is_leaving && under_way.load(Relaxed) == 0 && !is_blocked.load(Relaxed) => {
                Poll::Ready(true)
            }
            Poll::Pending => Poll::Pending,
        }
    });
    if !is_idle.await {
        return None;
    }
    let parts = connection.into_parts();
    // What hyper has not taken of the bytes that were read before it comes behind what it has.
    let read = [parts.read_buf, parts.io.read].concat().into();
    Some((parts.io.io.into_inner(), read))
}

async fn respond(_: Request<hyper::body::Incoming>) -> Response<Full<Bytes>> {
    Response::new(Full::new(format!("process {}\n", std::process::id()).into()))
}

/// The stream of a connection: what has been read of it before comes first, and whether it holds up what is written is known.
struct Watched {
    read: Bytes,
    io: TokioIo<TcpStream>,
    is_blocked: Arc<AtomicBool>,
}

impl Watched {
    fn watch<T>(&self, written: Poll<T>) -> Poll<T> {
        self.is_blocked.store(written.is_pending(), Relaxed);
        written
    }
}

impl Read for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.io).poll_read(context, buffer);
        }
        let length = self.read.len().min(buffer.remaining());
        buffer.put_slice(&self.read.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl Write for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(context, bytes);
        self.watch(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(context);
        self.watch(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
