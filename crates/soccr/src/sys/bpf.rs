//! `bpf(2)`: maps, programs, links and type information, each as a descriptor.
//!
//! Everything loaded here is gone when its last descriptor is closed, at the latest with the process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_BTF_LOAD: libc::c_long = 18;
const BPF_LINK_CREATE: libc::c_long = 28;

/// The longest verifier log that is asked for.
const LOG: usize = 64 << 10;

/// What a map is created from, in the order of `union bpf_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MapSpec {
    pub(crate) map_type: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) map_flags: u32,
    pub(crate) inner_map_fd: u32,
    pub(crate) numa_node: u32,
    pub(crate) map_name: [u8; 16],
    pub(crate) map_ifindex: u32,
    pub(crate) btf_fd: RawFd,
    pub(crate) btf_key_type_id: u32,
    pub(crate) btf_value_type_id: u32,
    pub(crate) btf_vmlinux_value_type_id: u32,
}

/// A map.
#[derive(Debug)]
pub(crate) struct Map {
    fd: OwnedFd,
    key_size: usize,
    value_size: usize,
}

/// What a program is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProgramSpec<'a> {
    pub(crate) prog_type: u32,
    pub(crate) expected_attach_type: u32,
    /// The type in the kernel's BTF that the program belongs to; zero for none.
    pub(crate) attach_btf_id: u32,
    pub(crate) instructions: &'a [u64],
}

#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map_fd: RawFd,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgramAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
}

#[repr(C)]
#[derive(Default)]
struct TestRunAttr {
    prog_fd: RawFd,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
}

#[repr(C)]
#[derive(Default)]
struct BtfAttr {
    btf: u64,
    log_buf: u64,
    btf_size: u32,
    log_size: u32,
    log_level: u32,
    pad: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkAttr {
    fd: RawFd,
    target: u32,
    attach_type: u32,
    flags: u32,
}

impl Map {
    /// Creates a map.
    pub(crate) fn create(spec: &MapSpec) -> io::Result<Self> {
        // SAFETY: the attribute holds no pointers.
        let fd = unsafe { new(BPF_MAP_CREATE, spec) }?;
        Ok(Self { fd, key_size: spec.key_size as usize, value_size: spec.value_size as usize })
    }

    /// Sets the value of a key.
    pub(crate) fn update(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        assert!(key.len() == self.key_size && value.len() == self.value_size);
        let attr = ElementAttr { value: address(value), ..self.element(key) };
        // SAFETY: the kernel reads `key_size` and `value_size` bytes, which the two slices have.
        unsafe { call(BPF_MAP_UPDATE_ELEM, &attr) }.map(drop)
    }

    /// Removes a key.
    pub(crate) fn delete(&self, key: &[u8]) -> io::Result<()> {
        assert!(key.len() == self.key_size);
        // SAFETY: the kernel reads `key_size` bytes, which the slice has.
        unsafe { call(BPF_MAP_DELETE_ELEM, &self.element(key)) }.map(drop)
    }

    fn element(&self, key: &[u8]) -> ElementAttr {
        ElementAttr { map_fd: self.fd.as_raw_fd(), key: address(key), ..Default::default() }
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Loads a program; where the verifier refuses it, its log is in the error's text.
pub(crate) fn load_program(spec: &ProgramSpec<'_>) -> io::Result<OwnedFd> {
    let mut attr = ProgramAttr {
        prog_type: spec.prog_type,
        insn_cnt: spec.instructions.len() as u32,
        insns: spec.instructions.as_ptr().expose_provenance() as u64,
        license: address(b"Dual MIT/GPL\0"),
        expected_attach_type: spec.expected_attach_type,
        attach_btf_id: spec.attach_btf_id,
        ..Default::default()
    };
    let load = || {
        // SAFETY: the instructions are as many as the attribute says, and the licence ends with a zero.
        unsafe { new(BPF_PROG_LOAD, &attr) }
    };
    retry(load).map_err(|error| {
        let mut log = vec![0_u8; LOG];
        attr.log_buf = log.as_mut_ptr().expose_provenance() as u64;
        (attr.log_level, attr.log_size) = (1, LOG as u32);
        // SAFETY: as above, and the kernel writes at most `log_size` bytes into `log`.
        let again = unsafe { new(BPF_PROG_LOAD, &attr) };
        let text = String::from_utf8_lossy(log.split(|byte| *byte == 0).next().unwrap_or_default());
        match again {
            Err(_) if !text.is_empty() => io::Error::new(error.kind(), format!("{error}: {}", text.trim())),
            _ => error,
        }
    })
}

/// A signal, or a debugger, ends the verifier's work with `EAGAIN`.
fn retry(load: impl Fn() -> io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    const ATTEMPTS: usize = 20;
    let interrupted = |error: &io::Error| error.raw_os_error() == Some(libc::EAGAIN);
    for _ in 1..ATTEMPTS {
        match load() {
            Err(error) if interrupted(&error) => {}
            loaded => return loaded,
        }
    }
    load()
}

/// Gives the kernel type information for maps.
pub(crate) fn load_btf(btf: &[u8]) -> io::Result<OwnedFd> {
    let attr = BtfAttr { btf: address(btf), btf_size: btf.len() as u32, ..Default::default() };
    // SAFETY: the kernel reads `btf_size` bytes.
    unsafe { new(BPF_BTF_LOAD, &attr) }
}

/// Attaches a program, or a `struct_ops` map, until the link is closed.
pub(crate) fn link(object: BorrowedFd<'_>, target: u32, attach_type: u32) -> io::Result<OwnedFd> {
    let attr = LinkAttr { fd: object.as_raw_fd(), target, attach_type, flags: 0 };
    // SAFETY: the attribute holds no pointers.
    unsafe { new(BPF_LINK_CREATE, &attr) }
}

/// Runs a traffic control program on a frame and the beginning of a `struct __sk_buff`, in the network namespace of the
/// calling thread. The program may change the frame. Returns what it returns.
pub(crate) fn test_run(program: BorrowedFd<'_>, frame: &mut [u8], context: &[u8]) -> io::Result<u32> {
    let at = frame.as_mut_ptr().expose_provenance() as u64;
    let size = frame.len() as u32;
    let mut attr = TestRunAttr {
        prog_fd: program.as_raw_fd(),
        data_size_in: size,
        data_size_out: size,
        data_in: at,
        data_out: at,
        ctx_in: address(context),
        ctx_size_in: context.len() as u32,
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes `size` bytes at `at`, which the frame has, reads the context, and writes `retval`
    // in `attr`.
    unsafe { call_mut(BPF_PROG_TEST_RUN, &mut attr) }?;
    Ok(attr.retval)
}

fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr().expose_provenance() as u64
}

/// # Safety
/// As [`call`], for a command that returns a new descriptor.
unsafe fn new<T>(command: libc::c_long, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: by this function's contract.
    let fd = unsafe { call(command, attr) }?;
    // SAFETY: the kernel has just created it, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// Every pointer in `attr` must be valid for what `command` does with it.
unsafe fn call<T>(command: libc::c_long, attr: &T) -> io::Result<i32> {
    // SAFETY: `attr` is readable for its size, and its pointers are valid by this function's contract.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attr, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

/// # Safety
/// As [`call`], for a command that answers in the attribute.
unsafe fn call_mut<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: as above, and `attr` is writable.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
