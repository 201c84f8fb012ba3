//! The congestion window, the slow start threshold and ECN: what `TCP_REPAIR` forgets and no socket option sets.
//!
//! A congestion control algorithm may write them, and the kernel takes algorithms as BPF programs (`struct_ops`).
//! When a socket changes to ours, it writes what a map holds for that socket, and does nothing else:
//!
//! ```text
//!  map[socket] = (snd_cwnd, snd_ssthresh, ecn_flags)
//!  TCP_CONGESTION = ours      init() writes them into struct tcp_sock
//!  TCP_CONGESTION = the connection's own
//! ```
//!
//! # References
//! `Documentation/bpf/map_sk_storage.rst`; kernel `net/ipv4/bpf_tcp_ca.c`: `struct_ops` links need Linux 6.4.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::bpf::{self, Assembler, Btf, Kind, Map, MapSpec, ProgramSpec, Register, Size, Type};
use crate::connection::Path;
use crate::sys::sockopt;
use crate::sys::tcp::SOL_TCP;

const MAP_TYPE_SK_STORAGE: u32 = 24;
const MAP_TYPE_STRUCT_OPS: u32 = 26;
const MAP_NO_PREALLOC: u32 = 1;
const MAP_LINK: u32 = 1 << 13;
const PROG_TYPE_STRUCT_OPS: u32 = 27;
const ATTACH_STRUCT_OPS: u32 = 44;
const HELPER_SK_STORAGE_GET: i32 = 107;

/// Bits of `ecn_flags`: ECN is in use, and a packet with an ECN codepoint has been seen.
const ECN_OK: u32 = 1;
const ECN_SEEN: u32 = 8;

/// Every kernel has it.
const RENO: &[u8] = b"reno";

/// How many names are tried.
const ATTEMPTS: u32 = 100;

/// Values in the map: `snd_cwnd`, `snd_ssthresh`, `ecn_flags`; zero leaves as it is.
const VALUES: usize = 3;

/// Why the congestion window, the slow start threshold and ECN could not be brought back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unavailable {
    step: &'static str,
    reason: String,
    remedy: &'static str,
    name_taken: bool,
    /// It may be otherwise in a moment.
    passing: bool,
}

impl Unavailable {
    fn at(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| {
            let remedy = match (error.kind(), step) {
                (io::ErrorKind::PermissionDenied, _) => {
                    "needs CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN in the initial user namespace"
                }
                (io::ErrorKind::NotFound, "BTF") => "needs a kernel with CONFIG_DEBUG_INFO_BTF",
                (_, "BPF_MAP_CREATE" | "BPF_LINK_CREATE") => "needs Linux 6.4",
                _ => "",
            };
            let name_taken = error.raw_os_error() == Some(libc::EEXIST);
            let passing = name_taken
                || matches!(
                    error.raw_os_error(),
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN | libc::EINTR)
                );
            Self { step, reason: error.to_string(), remedy, name_taken, passing }
        }
    }
}

impl std::fmt::Display for Unavailable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.step, self.reason)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, " — {}", self.remedy) }
    }
}

impl std::error::Error for Unavailable {}

/// Writes the congestion window, the slow start threshold and ECN of a connected socket, and leaves it with
/// `algorithm`.
///
/// The RTT should be seeded before: bbr derives its pacing from both. bbr keeps the window, not the threshold.
///
/// # Errors
/// [`Unavailable`]; the socket then has the algorithm that it had, or reno where its algorithm has become unavailable.
pub(crate) fn restore(
    fd: BorrowedFd<'_>,
    path: &Path,
    ecn: bool,
    ecn_seen: bool,
    algorithm: &[u8],
) -> Result<(), Unavailable> {
    // Unless it is prepared it is loaded for this call alone, and leaves no descriptor behind.
    let prepared = writer().clone();
    let writer = prepared.unwrap_or_else(|| Writer::load().map(Arc::new))?;
    let flags = if ecn { ECN_OK | if ecn_seen { ECN_SEEN } else { 0 } } else { 0 };
    let key = fd.as_raw_fd().to_ne_bytes();
    let value: [u32; VALUES] = [path.snd_cwnd, path.snd_ssthresh, flags];
    let value: Vec<u8> = value.iter().flat_map(|word| word.to_ne_bytes()).collect();
    writer.values.update(&key, &value).map_err(Unavailable::at("BPF_MAP_UPDATE_ELEM"))?;
    let outcome = change(fd, &writer.name, algorithm);
    // The kernel frees it with the socket, too; it is of no more use.
    let _ = writer.values.delete(&key);
    outcome.map_err(Unavailable::at("TCP_CONGESTION"))
}

/// Lets `algorithm` begin anew, so that it has not learned from the samples that seed the RTT: the first real ones would
/// look like congestion to cubic, which then ends its slow start at once.
///
/// # Errors
/// [`Unavailable`]; the socket then has the algorithm that it had, or reno.
pub(crate) fn restart(fd: BorrowedFd<'_>, algorithm: &[u8]) -> Result<(), Unavailable> {
    change(fd, RENO, algorithm).map_err(Unavailable::at("TCP_CONGESTION"))
}

/// Changes to one algorithm and then to another.
fn change(fd: BorrowedFd<'_>, first: &[u8], algorithm: &[u8]) -> io::Result<()> {
    let set = |name| sockopt::set_bytes(fd, SOL_TCP, libc::TCP_CONGESTION, name);
    // Ours never changes the window: no socket may be left with it.
    set(first)
        .and_then(|()| set(algorithm).or_else(|_| set(algorithm)).or_else(|error| set(RENO).and(Err(error))))
}

/// Does in advance what the first [`restore`](crate::Connection::restore) of a process takes about 10 ms for, while
/// packets wait: loading the BPF programs that bring the congestion window back.
///
/// Where that is not allowed, nothing happens, and the [`Report`](crate::Report) of each connection says why.
pub fn prepare() {
    let mut writer = writer();
    if writer.is_none() {
        let loaded = Writer::load().map(Arc::new);
        // A moment without memory or descriptors must not cost all later connections their windows.
        *writer = Some(loaded).filter(|loaded| !loaded.as_ref().is_err_and(|error| error.passing));
    }
}

/// Closes what [`prepare`], or the first restore, has opened: two descriptors, which a program may not want to keep
/// between its restores. The next restore opens them again.
pub fn close_prepared() {
    let mut writer = writer();
    // That it cannot be had stays known.
    if matches!(*writer, Some(Ok(_))) {
        *writer = None;
    }
}

/// The one of this process, once it has been tried.
fn writer() -> MutexGuard<'static, Option<Result<Arc<Writer>, Unavailable>>> {
    static WRITER: Mutex<Option<Result<Arc<Writer>, Unavailable>>> = Mutex::new(None);
    WRITER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The algorithm, registered with the kernel as long as this lives.
struct Writer {
    values: Map,
    name: Vec<u8>,
    _link: OwnedFd,
}

impl Writer {
    /// Takes milliseconds.
    fn load() -> Result<Self, Unavailable> {
        // Fails fast without CAP_BPF, before milliseconds go into parsing BTF.
        let types =
            bpf::load_btf(&bpf::describe_map(VALUES as u32)).map_err(Unavailable::at("BPF_BTF_LOAD"))?;
        let values = create_values(types.as_fd())?;
        let operations = Operations::load(Layout::of_kernel().map_err(Unavailable::at("BTF"))?, &values)?;
        let (name, link) = operations.register_anyhow(types.as_fd())?;
        Ok(Self { values, name, _link: link })
    }
}

/// A map with a value for each socket.
fn create_values(types: BorrowedFd<'_>) -> Result<Map, Unavailable> {
    Map::create(&MapSpec {
        map_type: MAP_TYPE_SK_STORAGE,
        key_size: size_of::<i32>() as u32,
        value_size: (VALUES * size_of::<u32>()) as u32,
        map_flags: MAP_NO_PREALLOC,
        btf_fd: types.as_raw_fd(),
        btf_key_type_id: 1,
        btf_value_type_id: 2,
        ..Default::default()
    })
    .map_err(Unavailable::at("BPF_MAP_CREATE"))
}

/// Where things are in the running kernel.
struct Layout {
    socket: Offsets,
    /// `struct tcp_congestion_ops`.
    structure: u32,
    /// The place of each of [`PROGRAMS`] among its members.
    indices: [u32; PROGRAMS.len()],
    /// The kernel wants the structure in a container.
    container: Type,
    /// Where in the container the programs are, and the name.
    places: [usize; PROGRAMS.len()],
    name: usize,
}

/// The members of the structure that are programs: the least that the kernel accepts as an algorithm, and `init`.
const PROGRAMS: [&str; 4] = ["init", "ssthresh", "undo_cwnd", "cong_avoid"];

impl Layout {
    /// Read once: that takes milliseconds.
    fn of_kernel() -> io::Result<&'static Self> {
        static KNOWN: OnceLock<Layout> = OnceLock::new();
        if KNOWN.get().is_none() {
            // Whoever is faster is right, too. Waiting for another thread would be for ever in a process that was forked.
            let _ = KNOWN.set(Self::find(&mut Btf::kernel()?)?);
        }
        KNOWN.get().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn find(btf: &mut Btf) -> io::Result<Self> {
        let socket = Offsets::find(btf)?;
        let structure = btf.find(Kind::Struct, "tcp_congestion_ops")?;
        let container = btf.find(Kind::Struct, "bpf_struct_ops_tcp_congestion_ops")?;
        let data = btf.member(&container, "data")?.offset;
        let mut layout = Self {
            socket,
            structure: structure.number,
            indices: [0; PROGRAMS.len()],
            container,
            places: [0; PROGRAMS.len()],
            name: data + btf.member(&structure, "name")?.offset,
        };
        for (position, program) in PROGRAMS.iter().enumerate() {
            let member = btf.member(&structure, program)?;
            layout.indices[position] = member.index;
            layout.places[position] = data + member.offset;
        }
        Ok(layout)
    }
}

/// The [`PROGRAMS`], loaded.
struct Operations {
    layout: &'static Layout,
    programs: Vec<OwnedFd>,
}

impl Operations {
    fn load(layout: &'static Layout, values: &Map) -> Result<Self, Unavailable> {
        let socket = &layout.socket;
        let sources =
            [socket.init(values), socket.get(socket.snd_ssthresh), socket.get(socket.snd_cwnd), nothing()];
        let load = |(instructions, index): (&Vec<u64>, &u32)| {
            bpf::load_program(&ProgramSpec {
                prog_type: PROG_TYPE_STRUCT_OPS,
                expected_attach_type: *index,
                attach_btf_id: layout.structure,
                instructions,
            })
        };
        let programs = sources.iter().zip(&layout.indices).map(load).collect::<io::Result<_>>();
        Ok(Self { layout, programs: programs.map_err(Unavailable::at("BPF_PROG_LOAD"))? })
    }

    /// Registers under a name that is free: the algorithms of all processes share one space of names, but processes
    /// of several namespaces may have one number.
    fn register_anyhow(&self, types: BorrowedFd<'_>) -> Result<(Vec<u8>, OwnedFd), Unavailable> {
        let mut attempts = 0..ATTEMPTS;
        loop {
            let name = name(std::process::id(), attempts.start);
            let outcome = self.register(types, &name);
            attempts.next();
            match outcome {
                Err(error) if error.name_taken && !attempts.is_empty() => {}
                outcome => return outcome.map(|link| (name, link)),
            }
        }
    }

    /// Fills a `struct tcp_congestion_ops` and registers it.
    fn register(&self, types: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Unavailable> {
        let value = self.value(name).map_err(Unavailable::at("BTF"))?;
        let map = Map::create(&MapSpec {
            map_type: MAP_TYPE_STRUCT_OPS,
            key_size: size_of::<u32>() as u32,
            value_size: value.len() as u32,
            max_entries: 1,
            map_flags: MAP_LINK,
            // Of no use here, but the kernel insists on some types of our own.
            btf_fd: types.as_raw_fd(),
            btf_vmlinux_value_type_id: self.layout.container.number,
            ..Default::default()
        })
        .map_err(Unavailable::at("BPF_MAP_CREATE"))?;
        map.update(&0_u32.to_ne_bytes(), &value).map_err(Unavailable::at("BPF_MAP_UPDATE_ELEM"))?;
        bpf::link(map.as_fd(), 0, ATTACH_STRUCT_OPS).map_err(Unavailable::at("BPF_LINK_CREATE"))
    }

    /// The container: programs by their descriptors, everything else as it is.
    fn value(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        let mut value = vec![0; self.layout.container.size];
        let mut put = |at: usize, bytes: &[u8]| {
            let place = value.get_mut(at..at + bytes.len()).ok_or(io::ErrorKind::InvalidData)?;
            place.copy_from_slice(bytes);
            io::Result::Ok(())
        };
        for (place, program) in self.layout.places.iter().zip(&self.programs) {
            put(*place, &(program.as_raw_fd() as usize).to_ne_bytes())?;
        }
        put(self.layout.name, name)?;
        Ok(value)
    }
}

/// Where the kernel keeps in `struct tcp_sock` what we write.
struct Offsets {
    snd_cwnd: i16,
    snd_ssthresh: i16,
    ecn_flags: i16,
}

impl Offsets {
    fn find(btf: &mut Btf) -> io::Result<Self> {
        let structure = btf.find(Kind::Struct, "tcp_sock")?;
        let mut offset = |name| {
            let offset = btf.member(&structure, name)?.offset;
            i16::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
        };
        Ok(Self {
            snd_cwnd: offset("snd_cwnd")?,
            snd_ssthresh: offset("snd_ssthresh")?,
            ecn_flags: offset("ecn_flags")?,
        })
    }

    /// `void init(struct sock *sk)`: writes what the map holds for the socket, unless it is zero.
    fn init(&self, values: &Map) -> Vec<u64> {
        use Register::{R0, R1, R2, R3, R4, R6};
        let mut program = Assembler::default();
        program.load(Size::Double, R6, R1, 0);
        program.map(R1, values);
        program.copy(R2, R6);
        program.set(R3, 0);
        program.set(R4, 0);
        program.call(HELPER_SK_STORAGE_GET);
        let no_value = program.jump_if_zero(R0);
        let members =
            [(self.snd_cwnd, Size::Word), (self.snd_ssthresh, Size::Word), (self.ecn_flags, Size::Byte)];
        for (place, (member, size)) in members.into_iter().enumerate() {
            program.load(Size::Word, R1, R0, (place * size_of::<u32>()) as i16);
            let keep = program.jump_if_zero(R1);
            program.store(size, R6, member, R1);
            program.land(keep);
        }
        program.land(no_value);
        program.set(R0, 0);
        program.exit();
        program.finish()
    }

    /// `u32 f(struct sock *sk)`: the value of a member.
    fn get(&self, member: i16) -> Vec<u64> {
        let mut program = Assembler::default();
        program.load(Size::Double, Register::R1, Register::R1, 0);
        program.load(Size::Word, Register::R0, Register::R1, member);
        program.exit();
        program.finish()
    }
}

/// At most 15 bytes, of which the kernel takes letters, digits, `_` and `.`.
fn name(process: u32, attempt: u32) -> Vec<u8> {
    let mut name = format!("soccr{process:x}");
    if attempt > 0 {
        name += &format!("_{attempt}");
    }
    name.truncate(15);
    name.into_bytes()
}

/// `void f(…)` that does nothing.
fn nothing() -> Vec<u64> {
    let mut program = Assembler::default();
    program.set(Register::R0, 0);
    program.exit();
    program.finish()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::sys::tcp::{self, info_option};

    const CUBIC: &[u8] = b"cubic";

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (ours, listener.accept().unwrap().0)
    }

    /// The writer, where this kernel has links of `struct_ops` and this user may load programs.
    fn writer() -> Option<Writer> {
        let writer = Writer::load();
        writer.map_err(|reason| soccr_lab::skip(soccr_lab::obstacle_to_bpf([6, 4], reason))).ok()
    }

    #[test]
    fn window_threshold_and_ecn_come_back() {
        if writer().is_none() {
            return;
        }
        let (socket, _peer) = connected();
        let fd = socket.as_fd();
        let path = Path { snd_cwnd: 137, snd_ssthresh: 99, ..Path::default() };
        for algorithm in [CUBIC, b"reno"] {
            restore(fd, &path, true, true, algorithm).unwrap();
            let info = tcp::info(fd).unwrap();
            assert_eq!((info.snd_cwnd, info.snd_ssthresh), (137, 99));
            let ecn = info_option::ECN | info_option::ECN_SEEN;
            assert_eq!(info.options & ecn, ecn);
            let mut name = [0; 16];
            let length = sockopt::get_bytes(fd, SOL_TCP, libc::TCP_CONGESTION, &mut name).unwrap();
            assert_eq!(name[..length].split(|byte| *byte == 0).next().unwrap(), algorithm);
        }
    }

    #[test]
    fn a_socket_without_values_is_left_alone() {
        let Some(writer) = writer() else { return };
        let (socket, _peer) = connected();
        let before = tcp::info(socket.as_fd()).unwrap();
        for name in [writer.name.as_slice(), CUBIC] {
            sockopt::set_bytes(socket.as_fd(), SOL_TCP, libc::TCP_CONGESTION, name).unwrap();
        }
        let after = tcp::info(socket.as_fd()).unwrap();
        assert_eq!((after.snd_cwnd, after.options), (before.snd_cwnd, before.options));
    }

    #[test]
    fn a_name_that_is_taken_is_avoided() {
        let Some(first) = writer() else { return };
        // This process has the first one's name already.
        assert_ne!(first.name, writer().unwrap().name);
    }

    #[test]
    fn a_name_fits_whatever_the_number_of_the_process() {
        assert_eq!(name((1 << 22) - 1, ATTEMPTS - 1), b"soccr3fffff_99");
    }
}
