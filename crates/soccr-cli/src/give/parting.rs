//! How a target parts from its source, and from whoever has started it: neither waits for the program that has the connections.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::{fcntl_dupfd_cloexec, read, retry_on_intr, write};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, getppid, set_parent_process_death_signal, setsid, waitpid,
};
use soccr_handover::LastWords;
use soccr_handover::foreign::process::fork;

use crate::exit::Exit;

/// What the process that has been started is told.
const FAILED: &[u8] = b"-";
const RUNS: &[u8] = b"+";

/// What a target has open for others, as long as the connections are not given. A program that is executed inherits none of it.
#[derive(Debug, Default)]
pub(crate) struct Parting {
    /// To the source, and the last word of the hand-over, for which that waits.
    source: Option<(OwnedFd, LastWords)>,
    /// The process that has been started, whose child this one is, and the pipe to it.
    parent: Option<(Pid, OwnedFd)>,
    /// Where the program writes its messages.
    log: Option<File>,
    /// Where we write ours.
    stderr: Option<OwnedFd>,
}

impl Parting {
    /// Goes on in a child, in a session of its own. A relay such as socat(1) kills the process that it has started when the stream
    /// ends: that must not be the one that has the connections. This one waits, and has the exit code of the child; or only until the
    /// connections are given, where it is to `leave` then.
    pub(crate) fn apart(leave: bool) -> Result<Result<Self, Exit>> {
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).context("pipe2")?;
        let starter = getpid();
        let Some(child) = fork().context("fork")? else {
            setsid().context("setsid")?;
            let mut parting = Self::default();
            parting.parent = Some((starter, theirs));
            return Ok(Ok(parting));
        };
        drop(theirs);
        leave_pipe()?;
        let (mut last, mut byte) = (0, [0]);
        while retry_on_intr(|| read(&ours, &mut byte)).context("read")? > 0 {
            last = byte[0];
        }
        if last == RUNS[0] {
            if leave {
                return Ok(Err(Exit::Done));
            }
            // Who reads it to its end would wait for the program.
            if is_pipe(rustix::stdio::stderr()) {
                rustix::stdio::dup2_stderr(null()?).context("dup2")?;
            }
        }
        match retry_on_intr(|| waitpid(Some(child), WaitOptions::empty())).context("waitpid")? {
            // What there was to say, it has said.
            Some((_, status)) => std::process::exit(match status.terminating_signal() {
                Some(signal) => 128 + signal,
                None => status.exit_status().unwrap_or(Exit::Failed as i32),
            }),
            None => bail!("the child is gone"),
        }
    }

    /// Until the connections are given, the end of the process that has been started is a request to end (SIGTERM). To be called
    /// last of what changes the privileges of this process, which the kernel forgets this with.
    pub(crate) fn end_with_parent(&self) -> Result<()> {
        let Some((starter, _)) = &self.parent else { return Ok(()) };
        set_parent_process_death_signal(Some(Signal::TERM)).context("prctl(PR_SET_PDEATHSIG)")?;
        if getppid() != Some(*starter) {
            bail!("the process that was started is gone");
        }
        Ok(())
    }

    /// What the program writes on standard error goes to this file, and is added to what is there.
    pub(crate) fn log_to(&mut self, path: &Path) -> Result<()> {
        let file = OpenOptions::new().append(true).create(true).open(path);
        self.log = Some(file.with_context(|| path.display().to_string())?);
        Ok(())
    }

    /// Standard input and output were the pipes to the source, which does not read what the program writes.
    pub(crate) fn leave_source(&mut self, end: LastWords) -> Result<()> {
        let source = fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3).context("fcntl(F_DUPFD_CLOEXEC)")?;
        self.source = Some((source, end));
        leave_pipe()?;
        // Who reads a pipe to its end would wait for the program; who has gone would kill it by SIGPIPE.
        if self.log.is_none() && is_pipe(rustix::stdio::stderr()) {
            self.log = Some(null()?);
        }
        Ok(())
    }

    /// The program is about to run. Descriptors below `end` are its own.
    pub(crate) fn leave(&mut self, end: RawFd) -> Result<()> {
        let beyond = |fd: BorrowedFd<'_>| fcntl_dupfd_cloexec(fd, end).context("fcntl(F_DUPFD_CLOEXEC)");
        if let Some((_, parent)) = &mut self.parent {
            *parent = beyond(parent.as_fd())?;
        }
        if let Some(log) = self.log.take() {
            self.stderr = Some(beyond(rustix::stdio::stderr())?);
            rustix::stdio::dup2_stderr(log).context("dup2")?;
        }
        if let Some((_, parent)) = &self.parent {
            set_parent_process_death_signal(None).context("prctl(PR_SET_PDEATHSIG)")?;
            // It may have been killed.
            let _ = write(parent, RUNS);
        }
        self.end();
        Ok(())
    }

    /// The connections are where they are to be.
    pub(crate) fn end(&mut self) {
        let Some((source, end)) = self.source.take() else { return };
        // One that does not read has ended, or does not care.
        let mut events = [PollFd::new(&source, PollFlags::OUT)];
        if poll(&mut events, Some(&Timespec::default())).is_ok_and(|count| count > 0) {
            let _ = write(&source, &end.into_bytes());
        }
    }

    /// It does not run.
    pub(crate) fn fail(self) {
        if let Some(stderr) = &self.stderr {
            let _ = rustix::stdio::dup2_stderr(stderr);
        }
        if let Some((_, parent)) = &self.parent {
            // Who is gone does not care.
            let _ = write(parent, FAILED);
        }
    }
}

impl Drop for Parting {
    fn drop(&mut self) {
        self.end();
    }
}

fn null() -> Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/null").context("/dev/null")
}

fn leave_pipe() -> Result<()> {
    let null = null()?;
    rustix::stdio::dup2_stdin(&null).context("dup2")?;
    rustix::stdio::dup2_stdout(&null).context("dup2")?;
    Ok(())
}

/// Somebody reads from it, and may wait for its end.
pub(crate) fn is_pipe(fd: BorrowedFd<'_>) -> bool {
    let kind = fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
    matches!(kind, Ok(FileType::Fifo | FileType::Socket))
}
