//! A program and whatever it starts, whose system calls fail where a test says so.
//!
//! The number of a call is changed when it is entered, so that nothing happens, and its result when it returns.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::process::{Command, ExitStatus};
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use super::steps::{Call, ask_for_tracer, entry_of, ptrace};

/// An entry into a system call by one of a family of processes.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The thread that enters.
    pub thread: i32,
    /// Whose: empty for the program that was started, `[1]` for the second process that it has forked, `[1, 0]` for the first
    /// that this one has forked.
    pub lineage: &'a [usize],
    /// How many programs this process has executed itself.
    pub programs: usize,
    /// The call.
    pub call: Call,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is made.
    Pass,
    /// It is not made, and returns this errno.
    Fail(i32),
    /// It is made, and nothing more is seen of its process.
    Leave,
}

/// What has become of the program that was started.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// It has ended.
    Exited(ExitStatus),
    /// It goes on, and was left.
    Left,
    /// The time was over, and the family was killed.
    Late,
}

/// Runs a program and shows each system call of it, of its threads and of whatever they start to `judge`, until all of them have ended
/// or are left.
///
/// # Panics
/// Where the program cannot be started or traced.
pub fn run_family(
    command: &mut Command,
    limit: Duration,
    judge: impl FnMut(Entry<'_>) -> Verdict + Send,
) -> End {
    let alive = Mutex::new(BTreeSet::new());
    thread::scope(|scope| {
        let (ended, end) = channel::<()>();
        let watch = scope.spawn({
            let alive = &alive;
            move || {
                let is_late = end.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
                if is_late {
                    for task in &*alive.lock().unwrap() {
                        // SAFETY: it sends a signal. The tracer has not waited for any of these yet, so the numbers are theirs.
                        unsafe { libc::kill(*task, libc::SIGKILL) };
                    }
                }
                is_late
            }
        });
        // A thread of its own waits for these processes alone.
        let status = scope
            .spawn(|| {
                Family { alive: &alive, tasks: BTreeMap::new(), early: BTreeSet::new() }.run(command, judge)
            })
            .join()
            .unwrap();
        drop(ended);
        if watch.join().unwrap() { End::Late } else { status.map_or(End::Left, End::Exited) }
    })
}

struct Task {
    /// Its process.
    process: i32,
    lineage: Vec<usize>,
    programs: usize,
    children: usize,
    /// What the call that it is in is to return.
    fails: Option<i32>,
}

struct Family<'a> {
    alive: &'a Mutex<BTreeSet<i32>>,
    tasks: BTreeMap<i32, Task>,
    /// Those that have stopped before whoever made them told of them.
    early: BTreeSet<i32>,
}

impl Family<'_> {
    /// How it has ended; nothing where it was left.
    fn run(
        mut self,
        command: &mut Command,
        mut judge: impl FnMut(Entry<'_>) -> Verdict,
    ) -> Option<ExitStatus> {
        ask_for_tracer(command);
        // waitpid(2) below waits for it; one that is left has another owner.
        let first = command.spawn().unwrap().id() as i32;
        self.add(first, Task { process: first, lineage: Vec::new(), programs: 1, children: 0, fails: None });
        let mut ended = None;
        while !self.tasks.is_empty() {
            let mut status = 0;
            // SAFETY: the kernel writes one int.
            let task = unsafe { libc::waitpid(-1, &mut status, libc::__WALL | libc::__WNOTHREAD) };
            if task < 0 {
                break;
            }
            if libc::WIFSTOPPED(status) {
                self.stopped(task, status, &mut judge);
                continue;
            }
            self.remove(task);
            if task == first {
                ended = Some(std::os::unix::process::ExitStatusExt::from_raw(status));
            }
        }
        ended
    }

    fn add(&mut self, id: i32, task: Task) {
        self.alive.lock().unwrap().insert(id);
        self.tasks.insert(id, task);
    }

    fn remove(&mut self, id: i32) {
        self.alive.lock().unwrap().remove(&id);
        self.tasks.remove(&id);
    }

    fn stopped(&mut self, id: i32, status: i32, judge: &mut impl FnMut(Entry<'_>) -> Verdict) {
        let mut signal = 0;
        match (libc::WSTOPSIG(status), status >> 16) {
            _ if !self.tasks.contains_key(&id) => {
                // It goes on as soon as it is known whose it is.
                self.early.insert(id);
                return;
            }
            (at_call, _) if at_call == libc::SIGTRAP | 0x80 => {
                if self.at_call(id, judge) == Verdict::Leave {
                    let _ = ptrace(libc::PTRACE_DETACH, id, 0);
                    return self.remove(id);
                }
            }
            (
                libc::SIGTRAP,
                event @ (libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE),
            ) => {
                self.has_made(id, event);
            }
            (libc::SIGTRAP, libc::PTRACE_EVENT_EXEC) => self.tasks.get_mut(&id).unwrap().programs += 1,
            (libc::SIGTRAP, _) => {
                // Behind the first exec.
                let options = libc::PTRACE_O_TRACESYSGOOD
                    | libc::PTRACE_O_EXITKILL
                    | libc::PTRACE_O_TRACEFORK
                    | libc::PTRACE_O_TRACEVFORK
                    | libc::PTRACE_O_TRACECLONE
                    | libc::PTRACE_O_TRACEEXEC;
                ptrace(libc::PTRACE_SETOPTIONS, id, options as usize).unwrap();
            }
            // A new one begins with it.
            (libc::SIGSTOP, _) => {}
            (other, _) => signal = other,
        }
        let _ = ptrace(libc::PTRACE_SYSCALL, id, signal as usize);
    }

    fn has_made(&mut self, id: i32, event: i32) {
        let mut new: libc::c_ulong = 0;
        // SAFETY: the kernel writes one unsigned long.
        let result = unsafe { libc::ptrace(libc::PTRACE_GETEVENTMSG, id, 0usize, &raw mut new) };
        if result < 0 {
            return;
        }
        let new = new as i32;
        let maker = &self.tasks[&id];
        let (process, programs) = (maker.process, maker.programs);
        let mut lineage = maker.lineage.clone();
        let task = if event == libc::PTRACE_EVENT_CLONE {
            Task { process, lineage, programs, children: 0, fails: None }
        } else {
            // Its threads count together.
            let leader = self.tasks.get_mut(&process).map_or(0, |leader| {
                leader.children += 1;
                leader.children - 1
            });
            lineage.push(leader);
            Task { process: new, lineage, programs: 0, children: 0, fails: None }
        };
        self.add(new, task);
        if self.early.remove(&new) {
            let _ = ptrace(libc::PTRACE_SYSCALL, new, 0);
        }
    }

    fn at_call(&mut self, id: i32, judge: &mut impl FnMut(Entry<'_>) -> Verdict) -> Verdict {
        let task = self.tasks.get_mut(&id).unwrap();
        let Some(call) = entry_of(id) else {
            if let Some(errno) = task.fails.take() {
                let _ = change(id, |registers| registers.rax = -i64::from(errno) as u64);
            }
            return Verdict::Pass;
        };
        let verdict = judge(Entry { thread: id, lineage: &task.lineage, programs: task.programs, call });
        if let Verdict::Fail(errno) = verdict {
            let _ = change(id, |registers| registers.orig_rax = u64::MAX);
            task.fails = Some(errno);
        }
        verdict
    }
}

fn change(task: i32, change: impl FnOnce(&mut libc::user_regs_struct)) -> io::Result<()> {
    let mut registers = std::mem::MaybeUninit::<libc::user_regs_struct>::uninit();
    // SAFETY: the kernel writes this structure.
    let result = unsafe { libc::ptrace(libc::PTRACE_GETREGS, task, 0usize, registers.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is written; any bits are a value of it.
    let mut registers = unsafe { registers.assume_init() };
    change(&mut registers);
    // SAFETY: the kernel reads this structure.
    let result = unsafe { libc::ptrace(libc::PTRACE_SETREGS, task, 0usize, &raw const registers) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
