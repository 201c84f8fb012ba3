//! A program watched, killed or failed at a chosen system call.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// An entry into a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// `SYS_…` of this architecture.
    pub number: i64,
    /// As registers hold them.
    pub arguments: [u64; 6],
}

/// Runs a program, and kills it before the first system call of its first thread for which `kill_at` is true. Returns whether it
/// was killed.
///
/// # Panics
/// Where the program cannot be started or traced.
pub fn run_and_kill(command: &mut Command, kill_at: impl FnMut(&Call) -> bool) -> bool {
    trace(command, kill_at).0
}

/// Runs a program and shows each system call of its first thread to `watch`, before it is made. Returns the exit code.
///
/// # Panics
/// Where the program cannot be started or traced.
pub fn run_and_watch(command: &mut Command, mut watch: impl FnMut(&Call)) -> Option<i32> {
    let (_, status) = trace(command, |call| {
        watch(call);
        false
    });
    libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))
}

/// Makes a system call fail in a program where its first argument is the given one.
pub fn let_fail(command: &mut Command, number: i64, argument: u32, errno: i32) {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const ANSWER: u32 = libc::BPF_RET | libc::BPF_K;
    let step = |code: u32, jf, k| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    // struct seccomp_data: the number, the machine, an address, then the arguments.
    let filter = [
        step(LOAD, 0, 0),
        step(EQUAL, 3, number as u32),
        step(LOAD, 0, 16),
        step(EQUAL, 1, argument),
        step(ANSWER, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        step(ANSWER, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let mut filter = filter;
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: the kernel copies the program, which lives until the call returns.
        let result = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: between fork and exec it makes two system calls and takes no memory.
    unsafe { command.pre_exec(install) };
}

/// Whether it was killed, and its status.
fn trace(command: &mut Command, mut kill_at: impl FnMut(&Call) -> bool) -> (bool, i32) {
    ask_for_tracer(command);
    let child = &mut command.spawn().unwrap();
    let mut killed = false;
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one int.
        let waited = unsafe { libc::waitpid(child.id() as i32, &mut status, libc::__WALL) };
        if waited < 0 || !libc::WIFSTOPPED(status) {
            // The child has been waited for.
            let _ = child.wait();
            return (killed, status);
        }
        let mut signal = 0;
        match libc::WSTOPSIG(status) {
            at_call if at_call == libc::SIGTRAP | 0x80 => {
                if !killed && entry_of(child.id() as i32).is_some_and(|call| kill_at(&call)) {
                    child.kill().unwrap();
                    killed = true;
                }
            }
            libc::SIGTRAP => {
                let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
                ptrace(libc::PTRACE_SETOPTIONS, child.id() as i32, options as usize).unwrap();
            }
            other => signal = other,
        }
        let _ = ptrace(libc::PTRACE_SYSCALL, child.id() as i32, signal as usize);
    }
}

/// Makes this process the tracer of the program, which asks for that itself, and stops behind exec: who seizes it from outside may find
/// that it has ended.
pub(super) fn ask_for_tracer(command: &mut Command) {
    let ask = || {
        // SAFETY: the request reads and writes no memory.
        let result = unsafe { libc::ptrace(libc::PTRACE_TRACEME) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: between fork and exec it makes one system call and takes no memory.
    unsafe { command.pre_exec(ask) };
}

/// The call that a stopped thread is about to make.
pub(super) fn entry_of(thread: i32) -> Option<Call> {
    const ENTRY: u64 = 1;
    // struct ptrace_syscall_info: kind, addresses, then number and arguments.
    let mut info = [0u64; 11];
    // SAFETY: the kernel writes at most the given number of bytes, the size of `info`.
    let length =
        unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, thread, size_of_val(&info), info.as_mut_ptr()) };
    (length > 0 && info[0] & 0xff == ENTRY)
        .then(|| Call { number: info[3] as i64, arguments: info[4..10].try_into().unwrap() })
}

pub(super) fn ptrace(request: libc::c_uint, thread: i32, data: usize) -> io::Result<()> {
    // SAFETY: none of the requests made here reads or writes memory of this process.
    let result = unsafe { libc::ptrace(request, thread, 0usize, data) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
