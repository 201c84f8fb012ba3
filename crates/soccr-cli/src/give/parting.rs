//! How a target leaves its source and the process that started it, so that neither waits for the program that gets the connections.

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

/// Messages of the child to the process that has been started.
const FAILED: &[u8] = b"-";
const RUNS: &[u8] = b"+";

/// Descriptors that a target keeps until the connections are given. A program that is executed inherits none of them.
#[derive(Debug, Default)]
pub(crate) struct Parting {
    /// The pipe to the source, and the last words of the hand-over, for which the source waits.
    source: Option<(OwnedFd, LastWords)>,
    /// The process that has been started, whose child this one is, and the pipe to it.
    parent: Option<(Pid, OwnedFd)>,
    /// Where the program writes its messages.
    log: Option<File>,
    /// Where this command writes its messages.
    stderr: Option<OwnedFd>,
}

impl Parting {
    /// Goes on in a child, in a session of its own: a relay such as socat(1) kills the process that it has started when the stream
    /// ends, so another process must have the connections. The parent waits for the child and ends with its exit code; with `leave`,
    /// it ends when the connections are given.
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
            // The reader of our standard error would wait for the program.
            if is_pipe(rustix::stdio::stderr()) {
                rustix::stdio::dup2_stderr(null()?).context("dup2")?;
            }
        }
        match retry_on_intr(|| waitpid(Some(child), WaitOptions::empty())).context("waitpid")? {
            // The child has printed all messages.
            Some((_, status)) => std::process::exit(match status.terminating_signal() {
                Some(signal) => 128 + signal,
                None => status.exit_status().unwrap_or(Exit::Failed as i32),
            }),
            None => bail!("the child is gone"),
        }
    }

    /// Until the connections are given, this process gets SIGTERM when the process that has been started ends. Call it after every
    /// change of privileges: with each the kernel forgets the request.
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
        // The reader of a pipe would wait for the program; a pipe without a reader would kill the program by SIGPIPE.
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
            // The parent may have been killed.
            let _ = write(parent, RUNS);
        }
        self.end();
        Ok(())
    }

    /// The connections are given: sends the last words.
    pub(crate) fn end(&mut self) {
        let Some((source, end)) = self.source.take() else { return };
        // A source that does not read has ended, or does not wait.
        let mut events = [PollFd::new(&source, PollFlags::OUT)];
        if poll(&mut events, Some(&Timespec::default())).is_ok_and(|count| count > 0) {
            let _ = write(&source, &end.into_bytes());
        }
    }

    /// The program could not be started.
    pub(crate) fn fail(self) {
        if let Some(stderr) = &self.stderr {
            let _ = rustix::stdio::dup2_stderr(stderr);
        }
        if let Some((_, parent)) = &self.parent {
            // The parent may have ended.
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

/// Whether it is a pipe, whose reader may wait for its end.
pub(crate) fn is_pipe(fd: BorrowedFd<'_>) -> bool {
    let kind = fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
    matches!(kind, Ok(FileType::Fifo | FileType::Socket))
}
