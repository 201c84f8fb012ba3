//! The command at the other end of a hand-over (`--via`), and the pipes to it.

use std::io;
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use soccr_handover::channel::{Channel, Exchanged, Pair};

use crate::lifeline::Lifeline;
use crate::{descriptors, exit};

/// How long to watch a command that has what it needs.
const PARTING: Duration = Duration::from_millis(200);
/// How long, while a target on this host still gives away what it has.
const GIVING: Duration = Duration::from_secs(60);

/// A running command.
#[derive(Debug)]
pub(crate) struct Via {
    lifeline: Lifeline,
    child: Child,
    /// `None` where nothing more is said to it.
    to: Option<ChildStdin>,
    from: ChildStdout,
}

impl Via {
    /// Runs a command of the shell, in the network of the calling thread.
    pub(crate) fn start(line: &str) -> Result<Self> {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(line).stdin(Stdio::piped()).stdout(Stdio::piped());
        descriptors::keep_limit_from(&mut command);
        let (lifeline, mut child) =
            Lifeline::with(&mut command, |command| command.spawn().context("--via: /bin/sh"))?;
        let (to, from) = (child.stdin.take(), child.stdout.take().context("--via: no pipes")?);
        Ok(Self { lifeline, child, to, from })
    }

    /// Whether the command has not failed, as far as that is known: a program that does not start fails at once, and a target that
    /// gives connections away itself says by its end whether it could.
    pub(crate) fn part(mut self) -> bool {
        self.to = None;
        let Ok(ended) = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()) else { return true };
        self.lifeline.wait_while_giving(GIVING);
        let limit = PARTING.try_into().expect("a time limit fits");
        let _ = poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&limit));
        match self.child.try_wait() {
            Ok(Some(status)) if !status.success() => {
                exit::complain(&format!("--via: the command has ended: {status}"));
                false
            }
            _ => true,
        }
    }
}

impl Channel for Via {
    fn exchange(
        &mut self,
        output: &[u8],
        input: &mut [u8],
        deadline: Option<Instant>,
    ) -> io::Result<Exchanged> {
        let write = self.to.as_ref().map_or(self.from.as_fd(), AsFd::as_fd);
        Pair { read: &self.from, write }.exchange(output, input, deadline)
    }

    fn has_said_all(&mut self) {
        self.to = None;
    }

    /// Whether the target, not only the pipe to it, is known to have ended.
    fn has_ended(&mut self, deadline: Option<Instant>) -> bool {
        // One that lives on hears that nothing more comes.
        self.to = None;
        let remaining = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        self.lifeline.is_cut(remaining.unwrap_or(Duration::MAX))
    }
}
