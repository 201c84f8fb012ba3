//! How a target leaves its source and the process that started it, so that neither waits for the program that gets the connections.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::{Errno, fcntl_dupfd_cloexec, retry_on_intr, write};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, getppid, set_parent_process_death_signal, setsid, waitpid,
};
use soccr_handover::LastWords;
use soccr_handover::foreign::process::fork;

use crate::exit::{self, Coded, Exit};
use crate::signals;

/// Messages of the child to the process that has been started: the first behind the last words to the source. The last one counts.
const RUNS: &[u8] = b"+";
const FAILED: &[u8] = b"-";

/// Descriptors that a target keeps until the connections are given. A program that is executed inherits none of them.
#[derive(Debug, Default)]
pub(crate) struct Parting {
    /// What will be needed to leave the source: another descriptor of the pipe to it, and /dev/null.
    spare: Option<(OwnedFd, File)>,
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
            // Here the terminal ends and stops nobody, and the program is to heed its signals.
            signals::heed_terminal();
            let mut parting = Self::default();
            parting.parent = Some((starter, theirs));
            return Ok(Ok(parting));
        };
        drop(theirs);
        let source = fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3).context("fcntl(F_DUPFD_CLOEXEC)")?;
        replace_pipe(&null()?)?;
        // The pipe ends when the child has ended, or has executed the program.
        let mut said = Vec::new();
        File::from(ours).read_to_end(&mut said).map_err(unknown)?;
        let words = said.strip_suffix(RUNS).filter(|_| has_executed(child));
        if let Some(words) = words {
            send(&source, words);
        }
        drop(source);
        if words.is_some() {
            if leave {
                return Ok(Err(Exit::Done));
            }
            // The reader of our standard error would wait for the program.
            if is_pipe(rustix::stdio::stderr()) {
                rustix::stdio::dup2_stderr(null()?).context("dup2")?;
            }
        }
        let waited = retry_on_intr(|| waitpid(Some(child), WaitOptions::empty()));
        match waited.map_err(|errno| unknown(errno.into()))? {
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

    /// Opens what will be needed to leave the source, before a connection is here.
    pub(crate) fn prepare(&mut self) -> Result<()> {
        let source = fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3).context("fcntl(F_DUPFD_CLOEXEC)")?;
        self.spare = Some((source, null()?));
        Ok(())
    }

    /// Standard input and output were the pipes to the source, which does not read what the program writes.
    pub(crate) fn leave_source(&mut self, end: LastWords) -> Result<()> {
        let (source, null) = self.spare.take().context("nothing is prepared")?;
        self.source = Some((source, end));
        replace_pipe(&null)?;
        // The reader of a pipe would wait for the program; a pipe without a reader would kill the program by SIGPIPE.
        if self.log.is_none() && is_pipe(rustix::stdio::stderr()) {
            self.log = Some(null);
        }
        Ok(())
    }

    /// The program is about to run. Descriptors below `end` are its own.
    pub(crate) fn make_room(&mut self, end: RawFd) -> Result<()> {
        let beyond = |fd: BorrowedFd<'_>| fcntl_dupfd_cloexec(fd, end).context("fcntl(F_DUPFD_CLOEXEC)");
        if let Some((_, parent)) = &mut self.parent {
            *parent = beyond(parent.as_fd())?;
        }
        if let Some((source, _)) = &mut self.source {
            *source = beyond(source.as_fd())?;
        }
        if let Some(log) = self.log.take() {
            self.stderr = Some(beyond(rustix::stdio::stderr())?);
            rustix::stdio::dup2_stderr(log).context("dup2")?;
        }
        if self.parent.is_some() {
            set_parent_process_death_signal(None).context("prctl(PR_SET_PDEATHSIG)")?;
        }
        Ok(())
    }

    /// Call it right before the program is executed. That may still fail, so the parent gets the last words, and sends them once the
    /// program runs.
    pub(crate) fn leave(&mut self) -> Result<()> {
        let Some((_, parent)) = &self.parent else {
            self.end();
            return Ok(());
        };
        let words = self.source.as_ref().map(|(_, end)| end.so_far()).unwrap_or_default();
        match write_all(parent, &[&words, RUNS].concat()) {
            Ok(()) => {}
            // The parent has been killed.
            Err(Errno::PIPE) => self.end(),
            Err(error) => return Err(error).context("the process that was started"),
        }
        Ok(())
    }

    /// The connections are given: sends the last words. If the source does not take them, people hear of them here.
    pub(crate) fn end(&mut self) {
        if let Some((source, end)) = self.source.take() {
            let notes = end.notes();
            if !send(&source, &end.into_bytes()) {
                notes.iter().for_each(|note| exit::complain(note));
            }
        }
    }

    /// The program could not be started.
    pub(crate) fn fail(&self) {
        if let Some(stderr) = &self.stderr {
            let _ = rustix::stdio::dup2_stderr(stderr);
        }
        if let Some((_, parent)) = &self.parent {
            // The parent may have ended.
            let _ = write_all(parent, FAILED);
        }
    }
}

/// Whether a child that has not been waited for has ever executed a program, be it that it has ended since.
fn has_executed(child: Pid) -> bool {
    /// From <linux/sched.h>: "forked but didn't exec".
    const FORKNOEXEC: u64 = 0x40;
    // Where it is hidden (hidepid), it has executed a program of another user.
    let Ok(status) = std::fs::read_to_string(format!("/proc/{child}/stat")) else { return true };
    // Behind the name, which may contain anything: state, parent, group, session, terminal, its group, flags.
    let flags = status.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(6)?.parse().ok());
    flags.is_none_or(|flags: u64| flags & FORKNOEXEC == 0)
}

/// The child goes on, and nobody hears of it.
fn unknown(error: std::io::Error) -> Coded {
    Coded(Exit::Lost, format!("what becomes of the connections is unknown: {error}"))
}

/// Says the last words to the source; returns whether it takes them.
fn send(source: &OwnedFd, words: &[u8]) -> bool {
    // A source that does not read has ended, or does not wait.
    let mut events = [PollFd::new(source, PollFlags::OUT)];
    retry_on_intr(|| poll(&mut events, Some(&Timespec::default()))).is_ok_and(|count| count > 0)
        && write_all(source, words).is_ok()
}

fn write_all(to: &OwnedFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        let written = retry_on_intr(|| write(to, bytes))?;
        bytes = &bytes[written..];
    }
    Ok(())
}

impl Drop for Parting {
    fn drop(&mut self) {
        self.end();
    }
}

fn null() -> Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/null").context("/dev/null")
}

fn replace_pipe(null: &File) -> Result<()> {
    rustix::stdio::dup2_stdin(null).context("dup2")?;
    rustix::stdio::dup2_stdout(null).context("dup2")?;
    Ok(())
}

/// Whether it is a pipe, whose reader may wait for its end.
pub(crate) fn is_pipe(fd: BorrowedFd<'_>) -> bool {
    let kind = fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
    matches!(kind, Ok(FileType::Fifo | FileType::Socket))
}
