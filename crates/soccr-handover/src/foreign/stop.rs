//! Stops a process for an instant, by ptrace(2).
//!
//! The parent of the process does not notice: after SIGSTOP a shell would take its terminal back. Only this process is stopped;
//! the freezer would stop its whole cgroup. And the stop ends by itself when the process that stops it dies. As with both, some system calls fail with
//! EINTR, such as epoll_wait(2): on x86-64 they are [made again](sys::make_call_again).
//!
//! Measured on Linux 6.18, a thread in epoll_wait(2) stopped 100 times: by ptrace in 19 µs (31 at most), without an EINTR; by the
//! freezer in 0.46 ms (18 at most), with 100. On aarch64 nothing shows the first argument of the call that was interrupted
//! (`orig_x0`), which it needs to be made again: `/proc/PID/syscall` tells the result in its place (Linux 6.1).

use std::collections::BTreeMap;
use std::io;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use rustix::process::Pid;

use super::process::{self, Sharing};
use super::sys;
use crate::error::{Context, Error, ErrorKind, Result};

/// How long a thread may take to stop: one that waits for a disk cannot be interrupted.
const LIMIT: Duration = Duration::from_secs(5);

/// Stopped processes. Dropping this continues them.
#[derive(Debug)]
pub struct Stopped {
    threads: BTreeMap<i32, Thread>,
    /// How long to wait for a thread: no longer at all once one has not stopped.
    limit: Duration,
    /// Only the thread that has seized another can stop or continue it.
    same_thread: PhantomData<*const ()>,
}

#[derive(Debug)]
struct Thread {
    id: Pid,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    /// The thread, and the signal that it was about to receive, or 0.
    Stopped(i32),
    Gone,
}

impl Stopped {
    /// Stops the processes; returns when none of their threads runs.
    ///
    /// # Errors
    /// `EPERM` where one belongs to another user, or is traced already; or a thread waits for a device.
    pub fn stop(sharing: &mut Sharing) -> Result<Self> {
        sharing.look_again()?;
        let mut stopped = Self { threads: BTreeMap::new(), limit: LIMIT, same_thread: PhantomData };
        loop {
            // A thread may have started another one before it stopped, and a process another process.
            if !stopped.seize_new_threads(sharing.processes())? && !sharing.look_again()? {
                return Ok(stopped);
            }
            stopped.interrupt_and_wait()?;
        }
    }

    fn interrupt_and_wait(&mut self) -> Result<()> {
        let running = |thread: &&mut Thread| thread.state == State::Running;
        for thread in self.threads.values_mut().filter(running) {
            match sys::interrupt(thread.id) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => thread.state = State::Gone,
                other => other.with_context(|| format!("thread {}: PTRACE_INTERRUPT", thread.id))?,
            }
        }
        let start = Instant::now();
        loop {
            let mut late = None;
            for thread in self.threads.values_mut().filter(running) {
                match sys::status(thread.id) {
                    Ok(Some(status)) => {
                        thread.state = after(status);
                        if let State::Stopped(_) = thread.state {
                            // This fails only if the thread has just been killed.
                            let _ = sys::make_call_again(thread.id);
                        }
                    }
                    Ok(None) => late = late.or(Some(thread.id)),
                    Err(_) => thread.state = State::Gone,
                }
            }
            let Some(late) = late else { return Ok(()) };
            if start.elapsed() > self.limit {
                // Those that have stopped do not stand still for it once more.
                self.limit = Duration::ZERO;
                return Err(Error::system(format!("thread {late} does not stop: it waits for a device")));
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Whether there were new ones. The child of a process that may still run has to wait: were it stopped in vfork(2), before it has begun
    /// its own program, its parent could not stop.
    fn seize_new_threads(&mut self, processes: &[Pid]) -> Result<bool> {
        let mut new = BTreeMap::new();
        for pid in processes {
            let mut threads = process::threads(*pid).with_context(|| format!("pid {pid}"))?;
            threads.retain(|id| !self.threads.contains_key(&id.as_raw_pid()));
            if !threads.is_empty() {
                new.insert(pid.as_raw_pid(), (*pid, threads));
            }
        }
        for (pid, threads) in new.values() {
            let parent = if new.len() > 1 { process::parent(*pid).ok().flatten() } else { None };
            if parent.is_some_and(|parent| new.contains_key(&parent.as_raw_pid())) {
                continue;
            }
            for id in threads {
                let state = match sys::seize(*id) {
                    Ok(()) => State::Running,
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) || process::has_ended(*id) => {
                        State::Gone
                    }
                    Err(error) => return Err(refused(*pid, error)),
                };
                self.threads.insert(id.as_raw_pid(), Thread { id: *id, state });
            }
        }
        Ok(!new.is_empty())
    }
}

/// The state that waitpid(2) has told.
fn after(status: i32) -> State {
    if !libc::WIFSTOPPED(status) {
        return State::Gone;
    }
    // Our stops and those of job control are events; any other stop is a signal that the thread still has to get.
    match status >> 16 {
        0 => State::Stopped(libc::WSTOPSIG(status)),
        _ => State::Stopped(0),
    }
}

fn refused(pid: Pid, error: io::Error) -> Error {
    let advice = match (error.raw_os_error(), process::tracer(pid)) {
        (Some(libc::EPERM), Some(tracer)) => format!("{tracer} traces it: end that first"),
        (Some(libc::EPERM), None) => {
            "it belongs to another user: run as root; see also the sysctl kernel.yama.ptrace_scope".into()
        }
        _ => "it cannot be stopped".into(),
    };
    let kind =
        if error.raw_os_error() == Some(libc::EPERM) { ErrorKind::NoPermission } else { ErrorKind::System };
    Error::of(kind, format!("pid {pid}: PTRACE_SEIZE — {advice}"), error)
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Only a stopped thread can be detached. The kernel detaches the others when this process ends.
        let _ = self.interrupt_and_wait();
        for thread in self.threads.values() {
            if let State::Stopped(signal) = thread.state {
                let _ = sys::detach(thread.id, signal);
            }
        }
    }
}
