//! What the two ends talk through: anything that can be read and written, with a limit on the time.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};
use rustix::net::{SendFlags, send};

/// Both directions between the two ends of a hand-over.
///
/// A socket or any other descriptor that is read and written is a channel; [`Pair`] makes one of two descriptors, such as the
/// pipes to a child process, and [`Threads`] of anything else.
pub trait Channel {
    /// Writes what can be written of `output`, and reads what can be read into `input`. Waits until one of the two is possible, or
    /// until the deadline; an empty `output` or `input` is not waited for.
    ///
    /// # Errors
    /// [`ErrorKind::Interrupted`]: this end is to stop. It begins nothing more, says so, and brings to rest what is under way, for which
    /// it goes on using the channel; its text says why.
    ///
    /// Any other: the channel is broken. No more of the `output` was passed on than earlier calls have told, unless
    /// [`hides_writes`](Self::hides_writes) says otherwise.
    fn exchange(
        &mut self,
        output: &[u8],
        input: &mut [u8],
        deadline: Option<Instant>,
    ) -> io::Result<Exchanged>;

    /// Whether bytes may be passed on before they are told as written, because a layer of encryption or a thread is in between. Then
    /// fewer connections can be taken back when the channel fails.
    fn hides_writes(&self) -> bool {
        false
    }

    /// The last word of a hand-over is written: a channel that serves only one may close its output.
    fn has_said_all(&mut self) {}

    /// Whether the target is proven to have ended without taking any connection: then all connections that left come back. Asked when
    /// the channel has failed; may wait until the deadline for the proof.
    fn has_ended(&mut self, deadline: Option<Instant>) -> bool {
        let _ = deadline;
        false
    }
}

/// What [`Channel::exchange`] has done: nothing at all where the deadline is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exchanged {
    /// Bytes of the output that are written.
    pub written: usize,
    /// Bytes that were read; zero is the end.
    pub read: Option<usize>,
}

impl<T: AsFd> Channel for T {
    fn exchange(
        &mut self,
        output: &[u8],
        input: &mut [u8],
        deadline: Option<Instant>,
    ) -> io::Result<Exchanged> {
        both(self.as_fd(), self.as_fd(), output, input, deadline)
    }
}

/// Two descriptors: one to read from, one to write to.
#[derive(Debug)]
pub struct Pair<R, W> {
    /// What the other end says.
    pub read: R,
    /// What is said to it.
    pub write: W,
}

impl<R: AsFd, W: AsFd> Channel for Pair<R, W> {
    fn exchange(
        &mut self,
        output: &[u8],
        input: &mut [u8],
        deadline: Option<Instant>,
    ) -> io::Result<Exchanged> {
        both(self.read.as_fd(), self.write.as_fd(), output, input, deadline)
    }
}

impl<R: AsFd, W: AsFd> Pair<R, W> {
    /// The same, until the bell becomes readable: then this end stops, and gives this reason.
    pub fn until<B: AsFd>(self, bell: B, reason: impl Into<String>) -> Until<R, W, B> {
        Until { pair: self, bell, reason: Some(reason.into()) }
    }
}

/// A [`Pair`] that can be [interrupted](Pair::until).
#[derive(Debug)]
pub struct Until<R, W, B> {
    pair: Pair<R, W>,
    bell: B,
    /// The reason is told once.
    reason: Option<String>,
}

impl<R: AsFd, W: AsFd, B: AsFd> Channel for Until<R, W, B> {
    fn exchange(
        &mut self,
        output: &[u8],
        input: &mut [u8],
        deadline: Option<Instant>,
    ) -> io::Result<Exchanged> {
        let bell = self.reason.as_ref().map(|_| self.bell.as_fd());
        match exchange(self.pair.read.as_fd(), self.pair.write.as_fd(), bell, output, input, deadline)? {
            Some(exchanged) => Ok(exchanged),
            None => Err(io::Error::new(ErrorKind::Interrupted, self.reason.take().unwrap_or_default())),
        }
    }
}

/// A descriptor to write to, and no way back. See [`Sending::one_way`](crate::Sending::one_way).
#[derive(Debug)]
pub struct OneWay<W>(pub W);

impl<W: AsFd> Channel for OneWay<W> {
    fn exchange(&mut self, output: &[u8], _: &mut [u8], deadline: Option<Instant>) -> io::Result<Exchanged> {
        both(self.0.as_fd(), self.0.as_fd(), output, &mut [], deadline)
    }
}

/// The most that a pipe takes without waiting once it is writable (`PIPE_BUF`).
const PIECE: usize = 4096;

fn both(
    read: BorrowedFd<'_>,
    write: BorrowedFd<'_>,
    output: &[u8],
    input: &mut [u8],
    deadline: Option<Instant>,
) -> io::Result<Exchanged> {
    Ok(exchange(read, write, None, output, input, deadline)?.expect("there is no bell"))
}

/// `None` where the bell rings.
fn exchange(
    read: BorrowedFd<'_>,
    write: BorrowedFd<'_>,
    bell: Option<BorrowedFd<'_>>,
    output: &[u8],
    input: &mut [u8],
    deadline: Option<Instant>,
) -> io::Result<Option<Exchanged>> {
    if bell.is_none()
        && !output.is_empty()
        && let Ok(written @ 1..) = write_at_once(write, output)
    {
        return Ok(Some(Exchanged { written, read: None }));
    }
    loop {
        let timeout = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = timeout.map(|timeout| timeout.try_into().expect("a time limit fits"));
        let mut events = Vec::with_capacity(3);
        if let Some(bell) = bell {
            events.push(PollFd::from_borrowed_fd(bell, PollFlags::IN));
        }
        if !input.is_empty() {
            events.push(PollFd::from_borrowed_fd(read, PollFlags::IN));
        }
        if !output.is_empty() {
            events.push(PollFd::from_borrowed_fd(write, PollFlags::OUT));
        }
        match poll(&mut events, timeout.as_ref()) {
            Ok(0) => return Ok(Some(Exchanged::default())),
            Err(Errno::INTR) => continue,
            polled => polled?,
        };
        let mut exchanged = Exchanged::default();
        let mut events = events.iter().map(|event| !event.revents().is_empty());
        if bell.is_some() && events.next() == Some(true) {
            return Ok(None);
        }
        if !input.is_empty() && events.next() == Some(true) {
            exchanged.read = unless_busy(rustix::io::read(read, &mut *input))?;
        }
        if !output.is_empty() && events.next() == Some(true) {
            match unless_busy(write_some(write, output)) {
                // What has been read counts first: it may say why.
                Err(_) if exchanged.read.is_some() => {}
                written => exchanged.written = written?.unwrap_or(0),
            }
        }
        let is_late = || deadline.is_some_and(|deadline| deadline <= Instant::now());
        // What poll(2) calls ready need not be.
        if exchanged != Exchanged::default() || is_late() {
            return Ok(Some(exchanged));
        }
    }
}

/// Writes without waiting for the reader, where there is room as `poll(2)` says.
fn write_some(write: BorrowedFd<'_>, output: &[u8]) -> rustix::io::Result<usize> {
    let piece = &output[..output.len().min(PIECE)];
    match write_at_once(write, output) {
        Err(Errno::OPNOTSUPP) => rustix::io::write(write, piece),
        // poll(2) calls a file writable in any case, and some file systems never write without waiting for the disk.
        Err(Errno::AGAIN) if is_file(write) => rustix::io::write(write, piece),
        written => written,
    }
}

fn is_file(fd: BorrowedFd<'_>) -> bool {
    let kind = fstat(fd).map(|status| FileType::from_raw_mode(status.st_mode));
    matches!(kind, Ok(FileType::RegularFile | FileType::BlockDevice))
}

/// Writes what there is room for, without waiting. Pipes can do that since Linux 6.4, many other descriptors never.
fn write_at_once(write: BorrowedFd<'_>, output: &[u8]) -> rustix::io::Result<usize> {
    match send(write, output, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Err(Errno::NOTSOCK) => pwritev2(write, &[IoSlice::new(output)], u64::MAX, ReadWriteFlags::NOWAIT),
        sent => sent,
    }
}

fn unless_busy(outcome: rustix::io::Result<usize>) -> rustix::io::Result<Option<usize>> {
    match outcome {
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        other => other.map(Some),
    }
}

/// A channel of any reader and writer, each served by a thread that waits for it.
///
/// A thread that waits in vain stays until its reader or writer fails: dropping the channel does not end it.
#[derive(Debug)]
pub struct Threads {
    output: Sender<Arc<[u8]>>,
    /// What both threads tell.
    told: Receiver<Told>,
    /// Bytes handed to the writer and not confirmed.
    writing: Option<Arc<[u8]>>,
    /// Another stream has begun before they were.
    is_broken: bool,
    /// What was read and did not fit.
    left: Vec<u8>,
}

#[derive(Debug)]
enum Told {
    Read(Vec<u8>),
    Wrote,
    Failed(io::Error),
}

impl Threads {
    /// Starts the two threads.
    ///
    /// # Errors
    /// The errors of starting a thread.
    pub fn new(
        mut reader: impl Read + Send + 'static,
        mut writer: impl Write + Send + 'static,
    ) -> io::Result<Self> {
        // Bounded: a writer that floods us has to wait.
        let (tell, told) = sync_channel(1);
        let (output, pieces) = channel::<Arc<[u8]>>();
        let tell_wrote = tell.clone();
        let named = |name: &str| std::thread::Builder::new().name(name.into());
        let read = move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let read = match reader.read(&mut buffer) {
                    Ok(length) => Told::Read(buffer[..length].to_vec()),
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) => Told::Failed(error),
                };
                let is_last = !matches!(&read, Told::Read(bytes) if !bytes.is_empty());
                if tell.send(read).is_err() || is_last {
                    break;
                }
            }
        };
        let write = move || {
            for piece in pieces {
                let wrote = writer.write_all(&piece).and_then(|()| writer.flush());
                let wrote = wrote.map_or_else(Told::Failed, |()| Told::Wrote);
                if tell_wrote.send(wrote).is_err() {
                    break;
                }
            }
        };
        soccr::without_signals(|| named("soccr-read").spawn(read))?;
        soccr::without_signals(|| named("soccr-write").spawn(write))?;
        Ok(Self { output, told, writing: None, is_broken: false, left: Vec::new() })
    }

    fn give(&mut self, bytes: Vec<u8>, input: &mut [u8]) -> Option<usize> {
        let length = bytes.len().min(input.len());
        input[..length].copy_from_slice(&bytes[..length]);
        self.left = bytes[length..].to_vec();
        Some(length)
    }
}

impl Channel for Threads {
    fn exchange(
        &mut self,
        output: &[u8],
        input: &mut [u8],
        deadline: Option<Instant>,
    ) -> io::Result<Exchanged> {
        if !self.left.is_empty() && !input.is_empty() {
            let left = std::mem::take(&mut self.left);
            return Ok(Exchanged { written: 0, read: self.give(left, input) });
        }
        match &self.writing {
            Some(piece) => self.is_broken |= !output.is_empty() && !output.starts_with(piece),
            None if !output.is_empty() => {
                let piece = Arc::from(output);
                // The thread ends only when its writer has failed, and tells that first.
                self.writing = self.output.send(Arc::clone(&piece)).is_ok().then_some(piece);
            }
            None => {}
        }
        if self.is_broken {
            // What the other end still gets belongs to a stream whose rest was thrown away.
            return Err(io::Error::new(
                ErrorKind::BrokenPipe,
                "an earlier hand-over was not read to its end",
            ));
        }
        let far = Duration::from_secs(86_400);
        loop {
            let limit = deadline.map_or(far, |deadline| deadline.saturating_duration_since(Instant::now()));
            return match self.told.recv_timeout(limit) {
                Ok(Told::Read(bytes)) => Ok(Exchanged { written: 0, read: self.give(bytes, input) }),
                Ok(Told::Wrote) => match self.writing.take() {
                    Some(piece) if !output.is_empty() => Ok(Exchanged { written: piece.len(), read: None }),
                    // Nobody waits for it any longer.
                    _ => continue,
                },
                Ok(Told::Failed(error)) => Err(error),
                Err(RecvTimeoutError::Timeout) => Ok(Exchanged::default()),
                Err(RecvTimeoutError::Disconnected) => Err(ErrorKind::BrokenPipe.into()),
            };
        }
    }

    fn hides_writes(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Takes a piece when it is told to.
    struct Gate(Receiver<()>);

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.recv().map_err(|_| ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_an_earlier_stream_has_said_does_not_count_for_the_next_one() {
        let soon = || Some(Instant::now() + Duration::from_millis(10));
        for is_told_between in [true, false] {
            let (_silent, reader) = UnixStream::pair().unwrap();
            let (go, wait) = channel();
            let mut threads = Threads::new(reader, Gate(wait)).unwrap();
            let say = |threads: &mut Threads, output: &[u8], deadline| {
                threads.exchange(output, &mut [0; 9], deadline)
            };
            assert_eq!(say(&mut threads, b"first stream", soon()).unwrap(), Exchanged::default());
            // More of the same stream.
            assert_eq!(say(&mut threads, b"first stream goes on", soon()).unwrap(), Exchanged::default());
            if is_told_between {
                go.send(()).unwrap();
                while threads.writing.is_some() {
                    assert_eq!(say(&mut threads, b"", soon()).unwrap(), Exchanged::default());
                }
                go.send(()).unwrap();
                let written = Exchanged { written: 6, read: None };
                assert_eq!(say(&mut threads, b"second", None).unwrap(), written);
            } else {
                for output in [&b"second"[..], b""] {
                    let error = say(&mut threads, output, None).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
                }
            }
        }
    }
}
