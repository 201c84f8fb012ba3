//! Bare system calls, each without anything around it.
#![allow(unsafe_code)]

use std::mem::size_of_val;
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Reads an option into `value`.
pub(crate) fn get(fd: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> i32 {
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `value`.
    unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut length) }
}

/// Reads an integer option, or none at all.
pub(crate) fn get_int(fd: BorrowedFd<'_>, level: i32, name: i32) -> i32 {
    let mut bytes = [0; 4];
    get(fd, level, name, &mut bytes);
    i32::from_ne_bytes(bytes)
}

/// Writes an option.
pub(crate) fn set(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u32]) {
    let length = size_of_val(value) as libc::socklen_t;
    // SAFETY: `value` is readable for `length` bytes.
    let result = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
    assert_eq!(result, 0, "option {level}/{name}: {}", std::io::Error::last_os_error());
}

/// Asks an ioctl that answers with one `int`.
pub(crate) fn ioctl_int(fd: BorrowedFd<'_>, request: libc::Ioctl) -> i32 {
    let mut value = 0;
    // SAFETY: the callers name only ioctls that write one `int`.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) };
    assert_eq!(result, 0, "ioctl {request:#x}");
    value
}

/// `getsockname` and `getpeername`.
pub(crate) fn names(fd: BorrowedFd<'_>) -> [libc::sockaddr_storage; 2] {
    [libc::getsockname, libc::getpeername].map(|call| {
        // SAFETY: addresses are plain bytes, for which zero is a value.
        let mut address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        let mut length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes into `address`.
        unsafe { call(fd.as_raw_fd(), (&raw mut address).cast(), &mut length) };
        address
    })
}

/// `fcntl(F_GETFL)`.
pub(crate) fn flags(fd: BorrowedFd<'_>) -> i32 {
    // SAFETY: it takes no argument.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) }
}

/// Reads without consuming.
pub(crate) fn peek(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> usize {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most the length of `bytes`.
    let read = unsafe { libc::recv(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), flags) };
    usize::try_from(read).expect("recv")
}

/// Fresh memory, filled by a peek: what `malloc` does for a large block, when it has nothing left over.
pub(crate) fn peek_fresh(fd: BorrowedFd<'_>, length: usize) {
    // SAFETY: a new mapping of that length, which nothing else knows of and which ends here.
    unsafe {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let memory = libc::mmap(std::ptr::null_mut(), length, access, kind, -1, 0);
        assert_ne!(memory, libc::MAP_FAILED);
        let read = libc::recv(fd.as_raw_fd(), memory, length, libc::MSG_PEEK | libc::MSG_DONTWAIT);
        libc::munmap(memory, length);
        assert_eq!(read, length as isize);
    }
}

/// A TCP socket for IPv4.
pub(crate) fn socket() -> OwnedFd {
    open(libc::AF_INET, libc::SOCK_STREAM, 0)
}

/// A raw socket that is marked as the library marks its own.
pub(crate) fn raw_socket() -> OwnedFd {
    use std::os::fd::AsFd;
    let raw = open(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW);
    set(raw.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, &[0xc114]);
    raw
}

fn open(family: i32, kind: i32, protocol: i32) -> OwnedFd {
    // SAFETY: it takes numbers.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    assert!(fd >= 0, "socket: {}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just made it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn sockaddr(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
        sin_zero: [0; 8],
    }
}

/// `bind`.
pub(crate) fn bind(fd: BorrowedFd<'_>, address: SocketAddrV4) {
    let address = sockaddr(address);
    // SAFETY: `address` is readable for its size.
    let result = unsafe {
        libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
    };
    assert_eq!(result, 0, "bind: {}", std::io::Error::last_os_error());
}

/// `connect`.
pub(crate) fn connect(fd: BorrowedFd<'_>, address: SocketAddrV4) {
    let address = sockaddr(address);
    // SAFETY: `address` is readable for its size.
    let result = unsafe {
        libc::connect(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
    };
    assert_eq!(result, 0, "connect: {}", std::io::Error::last_os_error());
}

/// `connect` to nothing: the socket forgets its connection.
pub(crate) fn disconnect(fd: BorrowedFd<'_>) {
    let nothing = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    // SAFETY: `nothing` is readable for its size.
    let result = unsafe {
        libc::connect(fd.as_raw_fd(), &raw const nothing, size_of_val(&nothing) as libc::socklen_t)
    };
    assert_eq!(result, 0, "connect(AF_UNSPEC): {}", std::io::Error::last_os_error());
}

/// `send` of at most `chunk` bytes at once.
pub(crate) fn send_all(fd: BorrowedFd<'_>, bytes: &[u8], chunk: usize) {
    let mut rest = bytes;
    while !rest.is_empty() {
        let length = rest.len().min(chunk);
        // SAFETY: the kernel reads at most `length` bytes.
        let sent = unsafe {
            libc::send(fd.as_raw_fd(), rest.as_ptr().cast(), length, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
        };
        let sent = usize::try_from(sent).unwrap_or_else(|_| panic!("{}", std::io::Error::last_os_error()));
        rest = &rest[sent..];
    }
}

/// `shutdown(SHUT_WR)`.
pub(crate) fn shutdown(fd: BorrowedFd<'_>) {
    // SAFETY: it takes numbers.
    assert_eq!(unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_WR) }, 0);
}

/// Sends a packet through a raw socket.
pub(crate) fn inject(raw: BorrowedFd<'_>, packet: &[u8], destination: SocketAddrV4) {
    let address = sockaddr(SocketAddrV4::new(*destination.ip(), 0));
    // SAFETY: packet and address are readable for their sizes.
    let sent = unsafe {
        let length = size_of_val(&address) as libc::socklen_t;
        let (bytes, count) = (packet.as_ptr().cast(), packet.len());
        libc::sendto(raw.as_raw_fd(), bytes, count, libc::MSG_NOSIGNAL, (&raw const address).cast(), length)
    };
    assert_eq!(sent, packet.len() as isize, "sendto: {}", std::io::Error::last_os_error());
}

/// Gives the calling thread a table of descriptors of its own.
pub(crate) fn own_descriptors() {
    // SAFETY: this thread uses no descriptor that another one opens or closes later.
    let result = unsafe { libc::unshare(libc::CLONE_FILES) };
    assert_eq!(result, 0, "unshare(CLONE_FILES): {}", std::io::Error::last_os_error());
}
