//! What this machine can do, found out without the tested code: otherwise a defect of that code would skip the test that should
//! find it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::{fmt, fs};

use rustix::net::{AddressFamily, SocketType, socket};

use crate::sys::set_option;

/// Whether the kernel is of this version, or of a later one.
pub fn has_kernel(version: [u32; 2]) -> bool {
    let release = release();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
    [(); 2].map(|()| numbers.next().unwrap_or(0)) >= version
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Why BPF programs that need a kernel of this version could not be loaded by this thread, in words.
///
/// # Panics
/// There is no reason why they could not: `error` is a defect.
#[track_caller]
pub fn obstacle_to_bpf(version: [u32; 2], error: impl fmt::Display) -> String {
    find_obstacle(version).unwrap_or_else(|| panic!("{error}"))
}

fn find_obstacle(version: [u32; 2]) -> Option<String> {
    let [major, minor] = version;
    if !has_kernel(version) {
        return Some(format!("needs Linux {major}.{minor}, and this is {}", release()));
    }
    if !is_root() {
        return Some("needs all rights of root in the initial user namespace".into());
    }
    let types = "/sys/kernel/btf/vmlinux";
    (!Path::new(types).exists()).then(|| format!("needs {types}: a kernel with CONFIG_DEBUG_INFO_BTF"))
}

/// Whether this thread may put sockets of its network into repair mode.
pub fn may_repair() -> bool {
    const TCP_REPAIR: i32 = 19;
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None);
    socket.is_ok_and(|socket| set_option(socket, libc::IPPROTO_TCP, TCP_REPAIR, &1_i32.to_ne_bytes()).is_ok())
}

/// Whether this thread has the rights in the initial user namespace that loading BPF programs and networks are about.
fn is_root() -> bool {
    /// `PROC_USER_INIT_INO`
    const INITIAL: u64 = 0xEFFF_FFFD;
    const NET_ADMIN: u64 = 1 << 12;
    const NET_RAW: u64 = 1 << 13;
    const SYS_ADMIN: u64 = 1 << 21;
    let needed = NET_ADMIN | NET_RAW | SYS_ADMIN;
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0);
    effective & needed == needed
        && fs::metadata("/proc/thread-self/ns/user").is_ok_and(|namespace| namespace.ino() == INITIAL)
}
