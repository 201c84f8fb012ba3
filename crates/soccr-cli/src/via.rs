//! The command at the other end of a hand-over (`--via`), and the pipes to it.

use std::cell::Cell;
use std::io::{self, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use soccr_image::stream::{Message, Reader};

use crate::lifeline::Lifeline;
use crate::{descriptors, exit};

/// The most that a pipe takes without waiting once it is writable (`PIPE_BUF`).
const PIECE: usize = 4096;

/// How long to watch a command that has what it needs.
const PARTING: Duration = Duration::from_millis(200);

/// How many answers wait for this process: two for each connection of a window. A target that says more waits.
const ANSWERS: usize = 2 * crate::source::WINDOW;

/// The instant by which the other end must have read and answered; whoever has a clone may move it.
#[derive(Clone, Debug)]
pub(crate) struct Deadline(Rc<Cell<Instant>>);

impl Deadline {
    pub(crate) fn after(limit: Duration) -> Self {
        Self(Rc::new(Cell::new(Instant::now() + limit)))
    }

    /// The time begins anew.
    pub(crate) fn set(&self, limit: Duration) {
        self.0.set(Instant::now() + limit);
    }

    pub(crate) fn remaining(&self) -> Duration {
        self.0.get().saturating_duration_since(Instant::now())
    }
}

/// A pipe to write to, which does not wait for its reader for ever.
#[derive(Debug)]
pub(crate) struct Output {
    fd: OwnedFd,
    deadline: Deadline,
}

impl Output {
    pub(crate) fn new(fd: OwnedFd, deadline: Deadline) -> Self {
        Self { fd, deadline }
    }
}

/// What has become of the bytes in a pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// All of them have been read, as far as that can be told.
    Done,
    /// Nobody will read them.
    Closed,
    /// Not in time.
    Late,
}

impl Output {
    /// Waits until what has been written is read.
    pub(crate) fn read(&self) -> Reading {
        let tick = Duration::from_millis(1).try_into().expect("milliseconds fit");
        loop {
            // Not a pipe: then nothing is to be waited for.
            if !matches!(rustix::io::ioctl_fionread(&self.fd), Ok(1..)) {
                return Reading::Done;
            }
            let mut closed = [PollFd::new(&self.fd, PollFlags::empty())];
            // That it has been read is no event.
            if poll(&mut closed, Some(&tick)).is_ok_and(|count| count > 0) {
                return Reading::Closed;
            }
            if self.deadline.remaining().is_zero() {
                return Reading::Late;
            }
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let limit = self.deadline.remaining().try_into().expect("a time limit fits");
        let mut writable = [PollFd::new(&self.fd, PollFlags::OUT)];
        if poll(&mut writable, Some(&limit))? == 0 {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the other end does not read"));
        }
        Ok(rustix::io::write(&self.fd, &bytes[..bytes.len().min(PIECE)])?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What comes back from the target.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "they are short-lived, and most are messages")]
pub(crate) enum Answer {
    /// The target is there, and prepared.
    Hello,
    Message(Message),
    /// It has said everything that it had to say.
    End,
    /// Its pipe is closed or broken, too early.
    Gone(String),
    /// Nothing, for too long.
    Late,
}

/// A command that has been started, and that nobody listens to yet.
#[derive(Debug)]
pub(crate) struct Started {
    lifeline: Lifeline,
    child: Child,
}

/// A running command.
#[derive(Debug)]
pub(crate) struct Via {
    answers: Receiver<Answer>,
    lifeline: Lifeline,
    child: Child,
}

impl Started {
    /// Runs a command of the shell, in the network of the calling thread.
    pub(crate) fn new(line: &str) -> Result<Self> {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(line).stdin(Stdio::piped()).stdout(Stdio::piped());
        descriptors::keep_limit_from(&mut command);
        let (lifeline, child) =
            Lifeline::with(&mut command, |command| command.spawn().context("--via: /bin/sh"))?;
        Ok(Self { lifeline, child })
    }

    /// Listens to it, on a thread. Its standard input is returned.
    pub(crate) fn listen(self, deadline: Deadline) -> Result<(Via, Output)> {
        let Self { lifeline, mut child } = self;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (stdin, stdout) = stdin.zip(stdout).context("--via: no pipes")?;
        let (send, answers) = sync_channel(ANSWERS);
        std::thread::Builder::new().name("answers".into()).spawn(move || {
            let outcome = listen(BufReader::new(stdout), |answer| send.send(answer).is_ok());
            // Nobody listens any longer: then nobody cares.
            let _ = send.send(match outcome {
                Ok(()) => Answer::End,
                Err(error) => Answer::Gone(error.to_string()),
            });
        })?;
        let stdin = stdin.as_fd().try_clone_to_owned().context("fcntl(F_DUPFD_CLOEXEC)")?;
        Ok((Via { answers, lifeline, child }, Output::new(stdin, deadline)))
    }
}

impl Via {
    /// Waits for an answer. What has come by the deadline is returned behind it, too.
    pub(crate) fn answer(&self, deadline: &Deadline) -> Answer {
        match self.answers.recv_timeout(deadline.remaining()) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => Answer::Late,
            Err(RecvTimeoutError::Disconnected) => Answer::Gone("it has ended".into()),
        }
    }

    /// Says so where the command fails after all is settled: a program that does not start does so at once.
    pub(crate) fn part(mut self) {
        let limit = PARTING.try_into().expect("a time limit fits");
        let pid = Pid::from_child(&self.child);
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return };
        let _ = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit));
        if let Ok(Some(status)) = self.child.try_wait()
            && !status.success()
        {
            exit::complain(&format!("--via: the command has ended: {status}"));
        }
    }

    /// Whether the target, not only the pipe to it, is known to have ended. Waits a moment for that.
    pub(crate) fn target_has_ended(&mut self, deadline: &Deadline) -> bool {
        self.lifeline.is_cut(deadline.remaining())
    }
}

fn listen(reader: impl io::Read, mut each: impl FnMut(Answer) -> bool) -> soccr_image::Result<()> {
    let mut reader = Reader::new(reader)?;
    each(Answer::Hello);
    while let Some(message) = reader.receive()? {
        if !each(Answer::Message(message)) {
            break;
        }
    }
    Ok(())
}
