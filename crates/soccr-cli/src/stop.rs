//! A process stopped for an instant, by ptrace(2).
//!
//! Unlike SIGSTOP it is invisible to the parent of the process (a shell would take its terminal back), unlike the
//! freezer of cgroups it concerns no other process, and unlike both it ends by itself when this process dies.

use std::collections::BTreeMap;
use std::io;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Pid;

use crate::{process, sys};

/// How long a thread may take to stop: one that waits for a disk cannot be interrupted.
const LIMIT: Duration = Duration::from_secs(5);

/// Processes that this one can stop and continue. Dropping it continues them.
#[derive(Debug)]
pub(crate) struct Stopper {
    processes: Vec<Pid>,
    threads: BTreeMap<i32, Thread>,
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
    /// With the signal that it was about to receive, or 0.
    Stopped(i32),
    Gone,
}

impl Stopper {
    /// Prepares to stop all threads of the processes.
    pub(crate) fn seize(processes: &[Pid]) -> Result<Self> {
        let mut stopper =
            Self { processes: processes.to_vec(), threads: BTreeMap::new(), same_thread: PhantomData };
        stopper.seize_new_threads()?;
        Ok(stopper)
    }

    /// Stops the processes; returns when none of their threads runs.
    pub(crate) fn stop(&mut self) -> Result<()> {
        loop {
            self.interrupt_and_wait()?;
            // A thread may have started another one before it stopped.
            if !self.seize_new_threads()? {
                return Ok(());
            }
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
        for thread in self.threads.values_mut().filter(running) {
            while thread.state == State::Running {
                match sys::status(thread.id) {
                    Ok(Some(status)) => thread.state = after(status),
                    Ok(None) if start.elapsed() > LIMIT => {
                        bail!("thread {} does not stop: it waits for a device", thread.id)
                    }
                    Ok(None) => std::thread::sleep(Duration::from_micros(20)),
                    Err(_) => thread.state = State::Gone,
                }
            }
        }
        Ok(())
    }

    /// Whether there were any.
    fn seize_new_threads(&mut self) -> Result<bool> {
        let mut found = false;
        for pid in &self.processes {
            for id in process::threads(*pid).with_context(|| format!("pid {pid}"))? {
                if self.threads.contains_key(&id.as_raw_pid()) {
                    continue;
                }
                match sys::seize(id) {
                    Ok(()) => {}
                    // It has just ended.
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
                    Err(error) => return Err(refused(*pid, error)),
                }
                self.threads.insert(id.as_raw_pid(), Thread { id, state: State::Running });
                found = true;
            }
        }
        Ok(found)
    }
}

/// The state that waitpid(2) has told.
fn after(status: i32) -> State {
    if !libc::WIFSTOPPED(status) {
        return State::Gone;
    }
    // A stop of ours, or of job control, is an event; anything else is a signal that the thread still has to get.
    match status >> 16 {
        0 => State::Stopped(libc::WSTOPSIG(status)),
        _ => State::Stopped(0),
    }
}

fn refused(pid: Pid, error: io::Error) -> anyhow::Error {
    let advice = match error.raw_os_error() {
        Some(libc::EPERM) => {
            "another program traces it (a debugger?), or it belongs to another user: run as root; see also the sysctl \
             kernel.yama.ptrace_scope"
        }
        _ => "it cannot be stopped",
    };
    anyhow::Error::new(error).context(format!("pid {pid}: PTRACE_SEIZE — {advice}"))
}

impl Drop for Stopper {
    fn drop(&mut self) {
        // Only a stopped thread can be let go; what cannot be stopped is let go when this process ends.
        let _ = self.interrupt_and_wait();
        for thread in self.threads.values() {
            if let State::Stopped(signal) = thread.state {
                let _ = sys::detach(thread.id, signal);
            }
        }
    }
}
