//! The command at the other end of a hand-over (`--via`), and the pipes to it.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use soccr_handover::channel::{Channel, Exchanged, Pair};

use crate::give::parting::is_pipe;
use crate::lifeline::Lifeline;
use crate::signals::{self, Bell};
use crate::{descriptors, exit, sys};

/// The size of the pipe to the target, if the user may have that: it holds a window of idle connections.
const ROOM: usize = 1 << 20;

/// How long a command that has failed may take to end.
const PARTING: Duration = Duration::from_millis(200);
/// How long a target on this host may take to give its connections away.
const GIVING: Duration = Duration::from_secs(60);

/// Which connections the target has, or may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    None,
    Some,
    All,
}

/// A running command.
#[derive(Debug)]
pub(crate) struct Via<'a> {
    lifeline: Lifeline,
    child: Child,
    /// `None` when nothing more is to be said to it.
    to: Option<ChildStdin>,
    /// `None` when nothing more is to be heard from it.
    from: Option<ChildStdout>,
    /// A thread passes this on until the pipe is closed.
    messages: Option<(OwnedFd, JoinHandle<()>)>,
    /// The answer is read once.
    bell: Option<&'a Bell>,
    /// This command has been asked to end, and the bell has told.
    is_to_end: bool,
}

impl<'a> Via<'a> {
    /// Runs a command of the shell, in the network of the calling thread. Nothing more is sent to it once the bell rings.
    ///
    /// What the terminal sends to all (Ctrl-C) does not reach it, so it is ended by a signal that ends this command: that one is
    /// [ignored](signals::Deaf) once a connection has left.
    pub(crate) fn start(line: &str, bell: Option<&'a Bell>) -> Result<Self> {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(line).stdin(Stdio::piped()).stdout(Stdio::piped());
        if is_pipe(rustix::stdio::stderr()) {
            command.stderr(Stdio::piped());
        }
        descriptors::keep_limit_from(&mut command);
        signals::restore_for(&mut command);
        signals::spare(&mut command);
        let spawn = if bell.is_some() { Command::spawn } else { sys::spawn_to_end_with_us };
        let (lifeline, mut child) =
            Lifeline::with(&mut command, |command| spawn(command).context("--via: /bin/sh"))?;
        let (to, from) = (child.stdin.take(), child.stdout.take());
        if let Some(to) = &to {
            // A larger pipe needs fewer switches between the two processes. If the user may not have that size, the pipe stays as it is.
            let _ = fcntl_setpipe_size(to, ROOM);
        }
        Ok(Self { lifeline, child, to, from, messages: None, bell, is_to_end: false })
    }

    /// If our standard error is a pipe, passes on by a thread what the command writes on its own. So a reader of our pipe waits for us
    /// alone, and not for programs that the command leaves running.
    pub(crate) fn listen(&mut self) -> Result<()> {
        let Some(mut stderr) = self.child.stderr.take() else { return Ok(()) };
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC).context("pipe2")?;
        let thread = std::thread::Builder::new().name("messages".into());
        // The main thread takes all signals: none ends both processes while it makes itself deaf.
        let spawn = || thread.spawn(move || pass_on(&mut stderr, &stopped));
        let thread = soccr::without_signals(spawn).context("a thread")?;
        self.messages = Some((stop, thread));
        Ok(())
    }

    /// Whether the command has succeeded, as far as is known: the exit status of a target that gives connections away tells whether it
    /// could. One that has not said its last word by now cannot say it to us any more, but to people.
    pub(crate) fn part(mut self, left: Left, has_said_all: bool) -> bool {
        self.to = None;
        if !has_said_all {
            self.from = None;
        }
        sys::end_alone();
        if self.is_to_end && left == Left::None {
            // It may wait for a password, or for a host.
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        }
        let gives = self.lifeline.wait_while_giving(GIVING);
        if (gives || left != Left::All)
            && let Ok(ended) = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())
        {
            let limit = PARTING.try_into().expect("a time limit fits");
            let _ = retry_on_intr(|| poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&limit)));
        }
        if let Some((stop, thread)) = self.messages.take() {
            drop(stop);
            let _ = thread.join();
        }
        match self.child.try_wait() {
            Ok(Some(status)) if !status.success() && !self.is_to_end => {
                exit::complain(&format!("--via: the command has ended: {status}"));
                false
            }
            _ => true,
        }
    }
}

/// Until the command closes the pipe or, once this is to stop, until nothing is left to read.
fn pass_on(from: &mut ChildStderr, stopped: &OwnedFd) {
    let mut text = [0; 4096];
    loop {
        let mut events = [PollFd::new(&*from, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        match poll(&mut events, None) {
            Err(Errno::INTR) => continue,
            Ok(_) if !events[0].revents().is_empty() => {}
            _ => return,
        }
        match from.read(&mut text) {
            // If our reader has gone, nothing else is lost.
            Ok(length @ 1..) => drop(io::stderr().write_all(&text[..length])),
            _ => return,
        }
    }
}

impl Channel for Via<'_> {
    fn exchange(
        &mut self,
        output: &[u8],
        input: &mut [u8],
        deadline: Option<Instant>,
    ) -> io::Result<Exchanged> {
        let from = self.from.as_ref().ok_or(ErrorKind::BrokenPipe)?;
        let write = self.to.as_ref().map_or(from.as_fd(), AsFd::as_fd);
        let mut pair = Pair { read: from, write };
        let Some(bell) = self.bell else { return pair.exchange(output, input, deadline) };
        let exchanged =
            pair.until(bell, "this command has been asked to end").exchange(output, input, deadline);
        if exchanged.as_ref().is_err_and(|error| error.kind() == ErrorKind::Interrupted) {
            (self.bell, self.is_to_end) = (None, true);
        }
        exchanged
    }

    fn has_said_all(&mut self) {
        self.to = None;
    }

    /// Whether the target, not only the pipe to it, is known to have ended.
    fn has_ended(&mut self, deadline: Option<Instant>) -> bool {
        // A target that lives on reads the end of the stream.
        self.to = None;
        let remaining = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        self.lifeline.is_cut(remaining.unwrap_or(Duration::MAX))
    }
}
