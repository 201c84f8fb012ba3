//! Packet sockets: frames of a link as they are, received through memory shared with the kernel (`packet(7)`,
//! `PACKET_RX_RING`). A ring holds far more than a receive buffer may, so that a thread that has to wait for its turn
//! on a busy processor loses nothing.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{attach_filter, check, option, set_option};

/// Where `struct tpacket2_hdr` has what we read, behind its status word.
const SNAPLEN: usize = 4;
const MAC: usize = 8;
const SECONDS: usize = 12;
const NANOSECONDS: usize = 16;
const STATUS: usize = 4;
/// `struct virtio_net_hdr`, which precedes each frame where the ring was opened for whole frames.
const VNET_HEADER: usize = 10;

const SLOT_OF_THE_USER: u32 = 1;
const SLOT_OF_THE_KERNEL: u32 = 0;

/// What a ring shall receive.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Frame {
    /// Frames that arrive on the link, with the header that says what is left to do for their checksum. They can be
    /// sent on as they are through a socket of [`Ring::sender`].
    Whole,
    /// The beginning of frames, as many bytes as fit.
    Headers { outgoing: bool },
}

/// A packet socket and the slots that the kernel fills for it.
#[derive(Debug)]
pub(crate) struct Ring {
    socket: OwnedFd,
    memory: NonNull<u8>,
    slot: usize,
    slots: usize,
    next: usize,
    /// How many bytes we want from before the Ethernet header.
    before: usize,
}

// SAFETY: the memory is a mapping of the whole process, used by the owner of the Ring alone.
unsafe impl Send for Ring {}

impl Ring {
    /// Receives frames of link `index` in the calling thread's network into `slots` slots of `slot` bytes each, both
    /// powers of two. `filter` is a classic BPF program; without instructions it lets everything pass.
    pub(crate) fn open(
        index: u32,
        kind: Frame,
        slot: usize,
        slots: usize,
        filter: &[libc::sock_filter],
    ) -> io::Result<Self> {
        assert!(slot.is_power_of_two() && slots.is_power_of_two());
        let socket = packet_socket()?;
        set_int(&socket, libc::PACKET_VERSION, libc::tpacket_versions::TPACKET_V2 as c_int)?;
        let (outgoing, before) = match kind {
            Frame::Whole => (false, VNET_HEADER),
            Frame::Headers { outgoing } => (outgoing, 0),
        };
        set_int(&socket, libc::PACKET_IGNORE_OUTGOING, (!outgoing).into())?;
        if before > 0 {
            set_int(&socket, libc::PACKET_VNET_HDR, 1)?;
        }
        // Blocks are what the kernel allocates at once; slots follow each other without gaps across them.
        let length = slot * slots;
        let block = slot.max(1 << 16).min(length);
        let request =
            [block, length / block, slot, slots].map(|number| (number as u32).to_ne_bytes()).concat();
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_RX_RING, &request)?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping, of the length that the ring has, anywhere.
        let memory = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, socket.as_raw_fd(), 0) };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).expect("mmap gives no null");
        let ring = Self { socket, memory, slot, slots, next: 0, before };
        if !filter.is_empty() {
            attach_filter(&ring.socket, filter)?;
        }
        bind(&ring.socket, index, libc::ETH_P_ALL as u16)?;
        Ok(ring)
    }

    /// A socket that sends whole frames, as [`Frame::Whole`] receives them, out of link `index`.
    pub(crate) fn sender(index: u32) -> io::Result<OwnedFd> {
        let socket = packet_socket()?;
        set_int(&socket, libc::PACKET_VNET_HDR, 1)?;
        set_int(&socket, libc::PACKET_QDISC_BYPASS, 1)?;
        bind(&socket, index, 0)?;
        Ok(socket)
    }

    /// Gives the next frame to `look`, with the time of day when it arrived, and its slot back to the kernel. `None`
    /// where no frame is waiting.
    ///
    /// The frame begins with the Ethernet header; where the ring is for whole frames, with the header before that.
    pub(crate) fn next<T>(&mut self, look: impl FnOnce(&[u8], SystemTime) -> T) -> Option<T> {
        // SAFETY: next is smaller than slots, so the slot lies in the mapping.
        let slot = unsafe { self.memory.add(self.next * self.slot) };
        // SAFETY: a slot begins with its status word, aligned as slots are, which both sides change atomically.
        let status = unsafe { AtomicU32::from_ptr(slot.as_ptr().cast()) };
        if status.load(Ordering::Acquire) & SLOT_OF_THE_USER == 0 {
            return None;
        }
        // SAFETY: the slot is ours until the status word says otherwise; the kernel does not write to it meanwhile.
        let bytes = unsafe { slice::from_raw_parts(slot.as_ptr().add(STATUS), self.slot - STATUS) };
        let number = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let start = usize::from(u16::from_ne_bytes([bytes[MAC], bytes[MAC + 1]])) - STATUS;
        let end = start + number(SNAPLEN) as usize;
        let arrival = UNIX_EPOCH + Duration::new(number(SECONDS).into(), number(NANOSECONDS));
        let result = look(&bytes[start - self.before..end], arrival);
        status.store(SLOT_OF_THE_KERNEL, Ordering::Release);
        self.next = (self.next + 1) % self.slots;
        Some(result)
    }

    /// The part of a whole frame that begins with the Ethernet header.
    pub(crate) fn ethernet(whole: &[u8]) -> &[u8] {
        &whole[VNET_HEADER..]
    }

    /// How many frames found no free slot since the last call (`PACKET_STATISTICS`).
    pub(crate) fn overflow(&self) -> io::Result<u32> {
        let mut statistics = [0; 8];
        option(&self.socket, libc::SOL_PACKET, libc::PACKET_STATISTICS, &mut statistics)?;
        Ok(u32::from_ne_bytes([statistics[4], statistics[5], statistics[6], statistics[7]]))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, this long, and nothing refers to it any more.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.slot * self.slots) };
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn packet_socket() -> io::Result<OwnedFd> {
    // Protocol zero: nothing is received before bind says which link and which packets.
    socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, None).map_err(Into::into)
}

fn set_int(socket: &OwnedFd, name: c_int, value: c_int) -> io::Result<()> {
    set_option(socket, libc::SOL_PACKET, name, &value.to_ne_bytes())
}

fn bind(socket: &OwnedFd, index: u32, protocol: u16) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: index as c_int,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let size = size_of_val(&address) as u32;
    // SAFETY: the kernel reads one sockaddr_ll.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) })
}
