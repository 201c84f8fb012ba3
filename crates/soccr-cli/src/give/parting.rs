//! How a target parts from its source, and from whoever has started it: neither waits for the program that has the connections.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::{fcntl_dupfd_cloexec, read, retry_on_intr, write};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{WaitOptions, setsid, waitpid};
use soccr_handover::foreign::process::fork;

use crate::exit::Exit;

/// What the parent of a detached process is told.
const FAILED: &[u8] = b"-";
const RUNS: &[u8] = b"+";

/// What a target has open for others, as long as the connections are not given. A program that is executed inherits none of it.
#[derive(Debug, Default)]
pub(crate) struct Parting {
    /// To the source, and the last word of the hand-over, for which that waits.
    source: Option<(OwnedFd, Vec<u8>)>,
    /// To the process that this one has been detached from.
    parent: Option<OwnedFd>,
    /// Where the program writes its messages.
    log: Option<File>,
    /// Where we write ours.
    stderr: Option<OwnedFd>,
}

impl Parting {
    /// Has this process go on as a child in a session of its own; the parent waits for what becomes of it, and has its exit code.
    pub(crate) fn detach() -> Result<Result<Self, Exit>> {
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).context("pipe2")?;
        let Some(child) = fork().context("fork")? else {
            setsid().context("setsid")?;
            let mut parting = Self::default();
            parting.parent = Some(theirs);
            return Ok(Ok(parting));
        };
        drop(theirs);
        leave_pipe()?;
        let (mut last, mut byte) = (0, [0]);
        while retry_on_intr(|| read(&ours, &mut byte)).context("read")? > 0 {
            last = byte[0];
        }
        if last == RUNS[0] {
            return Ok(Err(Exit::Done));
        }
        match waitpid(Some(child), WaitOptions::empty()).context("waitpid")? {
            Some((_, status)) if status.exit_status() == Some(0) => Ok(Err(Exit::Done)),
            // It has said why.
            Some((_, status)) => std::process::exit(status.exit_status().unwrap_or(Exit::Failed as i32)),
            None => bail!("the detached process is gone"),
        }
    }

    /// What the program writes on standard error goes to this file, and is added to what is there.
    pub(crate) fn log_to(&mut self, path: &Path) -> Result<()> {
        let file = OpenOptions::new().append(true).create(true).open(path);
        self.log = Some(file.with_context(|| path.display().to_string())?);
        Ok(())
    }

    /// Standard input and output were the pipes to the source, which does not read what the program writes.
    pub(crate) fn leave_source(&mut self, end: Vec<u8>) -> Result<()> {
        let source = fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3).context("fcntl(F_DUPFD_CLOEXEC)")?;
        self.source = Some((source, end));
        leave_pipe()?;
        // Who reads a pipe to its end would wait for the program; who has gone would kill it by SIGPIPE.
        if self.log.is_none() && is_pipe(rustix::stdio::stderr()) {
            self.log = Some(OpenOptions::new().write(true).open("/dev/null").context("/dev/null")?);
        }
        Ok(())
    }

    /// The program is about to run. Descriptors below `end` are its own.
    pub(crate) fn leave(&mut self, end: RawFd) -> Result<()> {
        let beyond = |fd: BorrowedFd<'_>| fcntl_dupfd_cloexec(fd, end).context("fcntl(F_DUPFD_CLOEXEC)");
        if let Some(parent) = &mut self.parent {
            *parent = beyond(parent.as_fd())?;
        }
        if let Some(log) = self.log.take() {
            self.stderr = Some(beyond(rustix::stdio::stderr())?);
            rustix::stdio::dup2_stderr(log).context("dup2")?;
        }
        if let Some(parent) = &self.parent {
            write(parent, RUNS).context("write")?;
        }
        self.end();
        Ok(())
    }

    /// The connections are where they are to be.
    fn end(&mut self) {
        let Some((source, end)) = self.source.take() else { return };
        // One that does not read has ended, or does not care.
        let mut events = [PollFd::new(&source, PollFlags::OUT)];
        if poll(&mut events, Some(&Timespec::default())).is_ok_and(|count| count > 0) {
            let _ = write(&source, &end);
        }
    }

    /// It does not run.
    pub(crate) fn fail(self) {
        if let Some(stderr) = &self.stderr {
            let _ = rustix::stdio::dup2_stderr(stderr);
        }
        if let Some(parent) = &self.parent {
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

fn leave_pipe() -> Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").context("/dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("dup2")?;
    rustix::stdio::dup2_stdout(&null).context("dup2")?;
    Ok(())
}

/// Somebody reads from it, and may wait for its end.
pub(crate) fn is_pipe(fd: BorrowedFd<'_>) -> bool {
    let kind = fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
    matches!(kind, Ok(FileType::Fifo | FileType::Socket))
}
