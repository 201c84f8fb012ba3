//! A program killed at a chosen system call.
#![allow(unsafe_code)]

use std::io;
use std::process::{Child, Command};

/// An entry into a system call.
pub struct Call {
    pub number: i64,
    pub arguments: [u64; 6],
}

/// Runs a program, shows each system call of its first thread to `kill_at`, and kills it before the first for which that
/// says so. Whether it was killed.
pub fn run_and_kill(command: &mut Command, kill_at: impl FnMut(&Call) -> bool) -> bool {
    let mut child = command.spawn().unwrap();
    let killed = trace(&mut child, kill_at);
    // The tracer has waited for it already.
    let _ = child.wait();
    killed
}

fn trace(child: &mut Child, mut kill_at: impl FnMut(&Call) -> bool) -> bool {
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
    ptrace(libc::PTRACE_SEIZE, child, options as usize).unwrap();
    ptrace(libc::PTRACE_INTERRUPT, child, 0).unwrap();
    let mut killed = false;
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one int.
        let waited = unsafe { libc::waitpid(child.id() as i32, &mut status, libc::__WALL) };
        if waited < 0 || !libc::WIFSTOPPED(status) {
            return killed;
        }
        let mut signal = 0;
        match libc::WSTOPSIG(status) {
            at_call if at_call == libc::SIGTRAP | 0x80 => {
                if !killed && entry(child).is_some_and(|call| kill_at(&call)) {
                    child.kill().unwrap();
                    killed = true;
                }
            }
            _ if status >> 16 != 0 => {}
            other => signal = other,
        }
        let _ = ptrace(libc::PTRACE_SYSCALL, child, signal as usize);
    }
}

/// How many BPF programs look at what comes from `lo`, in the network namespace of the calling thread (`BPF_PROG_QUERY`).
pub fn programs_on_lo() -> io::Result<u32> {
    const QUERY: libc::c_long = 16;
    const TCX_INGRESS: u32 = 46;
    // target, attach type, two words of flags, the address of a list, its length, and more that stays zero.
    let mut attribute = [0u32; 16];
    attribute[..2].copy_from_slice(&[1, TCX_INGRESS]);
    // SAFETY: the kernel reads and writes at most the given number of bytes, the size of `attribute`.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, QUERY, attribute.as_mut_ptr(), size_of_val(&attribute)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(attribute[6]) }
}

fn entry(child: &Child) -> Option<Call> {
    const ENTRY: u64 = 1;
    // struct ptrace_syscall_info: kind, addresses, then number and arguments.
    let mut info = [0u64; 11];
    // SAFETY: the kernel writes at most the given number of bytes, the size of `info`.
    let length = unsafe {
        libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, child.id() as i32, size_of_val(&info), info.as_mut_ptr())
    };
    (length > 0 && info[0] & 0xff == ENTRY)
        .then(|| Call { number: info[3] as i64, arguments: info[4..10].try_into().unwrap() })
}

fn ptrace(request: libc::c_uint, child: &Child, data: usize) -> io::Result<()> {
    // SAFETY: none of the requests made here reads or writes memory of this process.
    let result = unsafe { libc::ptrace(request, child.id() as i32, 0usize, data) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
