//! The feature `tokio`: nothing that waits is done on the threads of the executor.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use ::tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ::tokio::net::TcpStream;
use ::tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use ::tokio::task::{JoinHandle, spawn_blocking};
use ::tokio::time::{timeout, timeout_at};

use crate::arrival::{Arrival, Landed};
use crate::channel::Exchanged;
use crate::departing::{items_of, sealed::Sealed};
use crate::departure::{Departure, Manner};
use crate::drive::{Engine, PIECE};
use crate::error::{Error, ErrorKind, Result};
use crate::mover::Shared;
use crate::{Arrived, Departing, Mover, Outcome, Stream, Terms};

impl Sealed for TcpStream {}

impl Stream for TcpStream {
    fn into_std(self) -> io::Result<std::net::TcpStream> {
        self.into_std()
    }

    fn from_std(stream: std::net::TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Self::from_std(stream)
    }
}

impl Departing<TcpStream> {
    /// Moves the connection to the listener at the other end of the channel, and waits for what becomes of it. See
    /// [`Departing::send`] of streams that wait.
    ///
    /// If the future is dropped, polled or not, connections that can come back do so: see [`Mover::came_back`].
    pub fn send(
        self,
        channel: &mut (impl AsyncRead + AsyncWrite + Unpin),
    ) -> impl Future<Output = Outcome<TcpStream>> {
        let sending = send(Arc::clone(&self.shared), [self], channel);
        async { sending.await.pop().expect("one connection has one outcome") }
    }
}

impl Mover {
    /// Like [`send_all`](Self::send_all), without waiting on this thread. The time of [`Limits::start`](crate::Limits::start) begins with
    /// this call.
    ///
    /// If the future is dropped, polled or not, connections that can come back do so: see [`came_back`](Self::came_back).
    pub fn send_all_async(
        &self,
        departing: impl IntoIterator<Item = Departing<TcpStream>>,
        channel: &mut (impl AsyncRead + AsyncWrite + Unpin),
    ) -> impl Future<Output = Vec<Outcome<TcpStream>>> {
        send(Arc::clone(&self.shared), departing, channel)
    }

    /// Takes in the connections that come through a channel, by a task of its own: to be called where the runtime is.
    pub fn listen_async<C>(&self, channel: C) -> Arrivals
    where
        C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        self.listen_async_for(channel, Terms::default())
    }

    /// The same, under conditions.
    pub fn listen_async_for<C>(&self, channel: C, terms: Terms) -> Arrivals
    where
        C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (landed, arrivals) = unbounded_channel();
        let task = ::tokio::spawn(listen(self.clone(), channel, terms, landed));
        Arrivals { arrivals, task: Some(task) }
    }
}

/// The connections are on their way from here on: a future that is dropped before it was polled gives them back, too.
fn send<C: AsyncRead + AsyncWrite + Unpin>(
    shared: Arc<Shared>,
    departing: impl IntoIterator<Item = Departing<TcpStream>>,
    channel: &mut C,
) -> impl Future<Output = Vec<Outcome<TcpStream>>> {
    let mut engine = Departure::new(Arc::clone(&shared), Manner::default(), items_of(departing));
    async move {
        let count = engine.count();
        let mut line = Line::new(channel);
        let mut happened = None;
        loop {
            engine = match aside(engine, happened.take()).await {
                Ok(engine) => engine,
                Err(()) => {
                    let ends = || Outcome::Unknown(Error::new(ErrorKind::Gone, "the runtime ends"));
                    return (0..count).map(|_| ends()).collect();
                }
            };
            if engine.is_over() && engine.output().bytes().is_empty() {
                break;
            }
            happened = Some(line.wait(&mut engine).await);
        }
        line.flush(shared.limits.answer).await;
        engine.outcomes().into_iter().map(|ended| Outcome::of(&shared, ended)).collect()
    }
}

/// The connections that come through a channel, stream after stream, until its other end closes it.
///
/// Connections arrive whether [`next`](Self::next) is called or not. Dropping this closes silently what the source has not let go
/// of: such a connection stays at the source.
#[derive(Debug)]
#[must_use = "dropping it ends the task that listens"]
pub struct Arrivals {
    arrivals: UnboundedReceiver<Result<Landed>>,
    /// Until its end is told.
    task: Option<JoinHandle<()>>,
}

impl Arrivals {
    /// Waits for the next connection. `None` when the channel is closed between two streams. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The channel is broken, or the source does not know its part. What it had let go of has been given before. Or the task that listens
    /// has panicked, as where the [terms](Terms::accept_if) do. It is told once.
    pub async fn next(&mut self) -> Result<Option<Arrived<TcpStream>>> {
        if let Some(landed) = self.arrivals.recv().await {
            return landed.map(|landed| Some(Arrived::new(landed)));
        }
        let Some(task) = &mut self.task else { return Ok(None) };
        let ended = task.await;
        self.task = None;
        ended
            .map(|()| None)
            .map_err(|error| Error::of(ErrorKind::Gone, "the task that listens has ended", error))
    }
}

async fn listen<C>(mover: Mover, mut channel: C, mut terms: Terms, landed: UnboundedSender<Result<Landed>>)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let mut engine = Arrival::new(Arc::clone(&mover.shared), terms.clone());
    let mut line = Line::new(&mut channel);
    let mut happened = None;
    let error = loop {
        engine = match aside(engine, happened.take()).await {
            Ok(engine) => engine,
            Err(()) => return,
        };
        // Whoever has the connection may stop listening: the source is told before.
        let has_said_all = engine.output().bytes().is_empty();
        while has_said_all && let Some(one) = engine.landed() {
            // If nobody takes the connection, it ends as any dropped stream does.
            let _ = landed.send(Ok(one));
        }
        if engine.is_over() && has_said_all {
            match engine.next_stream(line.is_open) {
                Ok(Some(rest)) => {
                    terms.room = engine.room();
                    engine = Arrival::new(Arc::clone(&mover.shared), terms.clone());
                    engine.feed(&rest);
                    continue;
                }
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        }
        ::tokio::select! {
            waited = line.wait(&mut engine) => happened = Some(waited),
            () = landed.closed() => break None,
        }
    };
    // What has not arrived is closed before anybody is waited for.
    drop(engine);
    line.flush(mover.shared.limits.answer).await;
    if let Some(error) = error {
        let _ = landed.send(Err(error));
    }
}

/// What the other end, or the clock, has done.
enum Happened {
    Read(Vec<u8>),
    Wrote,
    Ended,
    Late,
    Broken(io::Error),
}

/// Runs on a blocking thread what may wait for the kernel.
async fn aside<E: Engine + Send + 'static>(
    mut engine: E,
    happened: Option<Happened>,
) -> std::result::Result<E, ()> {
    let work = move || {
        match happened {
            Some(Happened::Read(bytes)) => engine.feed(&bytes),
            Some(Happened::Ended) => engine.ended(false),
            Some(Happened::Late) => engine.late(),
            Some(Happened::Broken(error)) => engine.broken(error),
            Some(Happened::Wrote) | None => {}
        }
        engine.advance();
        engine
    };
    match spawn_blocking(work).await {
        Ok(engine) => Ok(engine),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(()),
    }
}

/// A channel, and what is known of it.
struct Line<'a, C> {
    channel: &'a mut C,
    input: Vec<u8>,
    is_open: bool,
    /// There may be bytes in a buffer of the channel.
    is_unflushed: bool,
}

impl<'a, C: AsyncRead + AsyncWrite + Unpin> Line<'a, C> {
    fn new(channel: &'a mut C) -> Self {
        Self { channel, input: vec![0; PIECE], is_open: true, is_unflushed: false }
    }

    /// Has the last words arrive, as far as the other end reads them in time.
    async fn flush(&mut self, limit: Duration) {
        if self.is_unflushed {
            let _ = timeout(limit, poll_fn(|context| Pin::new(&mut *self.channel).poll_flush(context))).await;
        }
    }

    /// Writes, reads or waits once.
    async fn wait(&mut self, engine: &mut impl Engine) -> Happened {
        let deadline = engine.deadline();
        // Such a channel may have passed on more than it tells.
        engine.output().doubt();
        let output = engine.output().bytes();
        let exchanged = poll_fn(|context| self.exchange(output, context));
        let exchanged = match deadline {
            Some(deadline) if deadline <= Instant::now() => return Happened::Late,
            Some(deadline) => match timeout_at(deadline.into(), exchanged).await {
                Ok(exchanged) => exchanged,
                Err(_) => return Happened::Late,
            },
            None => exchanged.await,
        };
        match exchanged {
            Ok(Exchanged { written, read }) => {
                if written > 0 {
                    engine.output().wrote(written);
                }
                match read {
                    Some(0) => {
                        self.is_open = false;
                        Happened::Ended
                    }
                    Some(length) => Happened::Read(self.input[..length].to_vec()),
                    None => Happened::Wrote,
                }
            }
            Err(error) => Happened::Broken(error),
        }
    }

    fn exchange(
        &mut self,
        output: &[u8],
        context: &mut std::task::Context<'_>,
    ) -> Poll<io::Result<Exchanged>> {
        let mut exchanged = Exchanged::default();
        if self.is_open {
            let mut input = ReadBuf::new(&mut self.input);
            if let Poll::Ready(read) = Pin::new(&mut *self.channel).poll_read(context, &mut input) {
                exchanged.read = read.map(|()| Some(input.filled().len()))?;
            }
        }
        if !output.is_empty() {
            match Pin::new(&mut *self.channel).poll_write(context, output) {
                // What has been read counts first: it may say why.
                Poll::Ready(Err(_)) if exchanged.read.is_some() => {}
                Poll::Ready(written) => {
                    exchanged.written = written?;
                    self.is_unflushed = true;
                }
                Poll::Pending => {}
            }
        }
        if exchanged != Exchanged::default() {
            return Poll::Ready(Ok(exchanged));
        }
        if output.is_empty() && self.is_unflushed {
            ready!(Pin::new(&mut *self.channel).poll_flush(context))?;
            self.is_unflushed = false;
        }
        Poll::Pending
    }
}
