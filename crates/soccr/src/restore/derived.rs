//! Values that connect() has taken from local sysctls and routes, or that the kernel derives from others: put right, and compared
//! in the end.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use rustix::net::getsockname;

use crate::connection::{ControlBlock, Flow, Options, Window};
use crate::error::{Error, Result};
use crate::sys::sockopt;
use crate::sys::tcp::{self, TcpInfo, info_option};

/// The kernel takes no smaller `TCP_MAXSEG`, though a peer may have announced less.
const MIN_SEGMENT_LIMIT: u32 = 88;

/// The kernel takes no larger `TCP_MAXSEG`, though loopback connections have a larger MSS.
const MAX_SEGMENT_LIMIT: u32 = 32767;

/// The smallest segments that the kernel makes, however small the peer's window (`TCP_MIN_SND_MSS`).
const LEAST_SEGMENT: u32 = 48;

/// The largest window that a segment can announce without a shift count (RFC 7323 §2).
const LARGEST_UNSCALED: u32 = 65535;

/// Limits the segment size that connect() derives; without, the connection would stay at 524 bytes.
pub(super) fn limit_segments(fd: BorrowedFd<'_>, options: &Options) -> Result<()> {
    tcp::set_max_segment(fd, u32::from(options.mss_clamp).clamp(MIN_SEGMENT_LIMIT, MAX_SEGMENT_LIMIT))
}

/// connect() has derived another segment size than the peer's MSS and its largest window ask for.
pub(super) fn segments_differ(options: &Options, max_window: u32) -> bool {
    let clamp = u32::from(options.mss_clamp);
    clamp > MAX_SEGMENT_LIMIT || largest_segment(max_window) < clamp
}

/// The longest segment for a peer that has never opened its window further (`tcp_bound_to_half_wnd()`): one that is longer
/// waits for the timer each time.
fn largest_segment(max_window: u32) -> u32 {
    match max_window {
        0 => u32::MAX,
        1..=536 => max_window.max(LEAST_SEGMENT),
        _ => max_window / 2,
    }
}

/// Makes the kernel derive the segment size anew (`tcp_sync_mss()`). Neither `TCP_REPAIR_WINDOW` nor the MSS option makes it
/// do that; setting the options of the IP header does, even to what they are already.
pub(super) fn derive_segment_size(fd: BorrowedFd<'_>, flow: Flow) -> Result<()> {
    let rewrite = |level, name, text| -> Result<bool> {
        let mut header = [0; 2048];
        let written = sockopt::get_bytes(fd, level, name, &mut header).and_then(|length| {
            if length == 0 && level == libc::IPPROTO_IPV6 {
                return Ok(false);
            }
            sockopt::set_bytes(fd, level, name, &header[..length]).map(|()| true)
        });
        written.map_err(|error| Error::system(text, error))
    };
    if flow.is_ipv4() {
        return rewrite(libc::IPPROTO_IP, libc::IP_OPTIONS, "IP_OPTIONS").map(drop);
    }
    for (name, text) in [
        (libc::IPV6_HOPOPTS, "IPV6_HOPOPTS"),
        (libc::IPV6_RTHDR, "IPV6_RTHDR"),
        (libc::IPV6_DSTOPTS, "IPV6_DSTOPTS"),
        (libc::IPV6_RTHDRDSTOPTS, "IPV6_RTHDRDSTOPTS"),
    ] {
        if rewrite(libc::IPPROTO_IPV6, name, text)? {
            return Ok(());
        }
    }
    // There are none: a message too short to name any sets none.
    sockopt::set_bytes(fd, libc::IPPROTO_IPV6, libc::IPV6_2292PKTOPTIONS, &[0; 4])
        .map_err(|error| Error::system("IPV6_2292PKTOPTIONS", error))
}

/// Where the local sysctl allows no scaling, or the route no such window, connect() has limited the receive window for good. The
/// limit is never below `rcv_ssthresh`, and the kernel rounds a window up to what its shift count can tell. True where that was to
/// be changed.
pub(super) fn widen_receive_window(
    fd: BorrowedFd<'_>,
    options: &Options,
    window: &Window,
    info: &TcpInfo,
) -> Result<bool> {
    let shift = options.window_scale.unwrap_or_default().rcv;
    let is_within = |limit: u32| u64::from(window.rcv_wnd) <= u64::from(limit).next_multiple_of(1 << shift);
    let (level, name, text) = (tcp::SOL_TCP, libc::TCP_WINDOW_CLAMP, "TCP_WINDOW_CLAMP");
    if is_within(info.rcv_ssthresh) || is_within(tcp::get_int(fd, level, name, text)? as u32) {
        return Ok(false);
    }
    tcp::set_int(fd, level, name, text, (LARGEST_UNSCALED << shift) as i32).map(|()| true)
}

/// The socket has these addresses, whatever the kernel has made of what bind() and connect() were told.
pub(super) fn check_flow(fd: BorrowedFd<'_>, flow: Flow) -> Result<()> {
    let now = Flow::of(&fd)?;
    if is_same(now.local, flow.local) && is_same(now.remote, flow.remote) {
        return Ok(());
    }
    let Flow { local, remote } = flow;
    differs(format!("a socket from {} to {}, not from {local} to {remote}", now.local, now.remote))
}

/// The same for a socket that is only bound.
pub(super) fn check_local(fd: BorrowedFd<'_>, local: SocketAddr) -> Result<()> {
    let now = getsockname(fd).and_then(SocketAddr::try_from);
    let now = now.map_err(|error| Error::system("getsockname", error))?;
    if is_same(now, local) {
        return Ok(());
    }
    differs(format!("a socket at {now}, not at {local}"))
}

fn differs(what: String) -> Result<()> {
    Err(Error::refused(
        what,
        "bind it to the address of the connection; a BPF program of its cgroup may have changed that, too",
    ))
}

/// The kernel tells the scope of link-local addresses alone.
fn is_same(a: SocketAddr, b: SocketAddr) -> bool {
    let scope = |address: SocketAddr| match address {
        SocketAddr::V6(address) if address.ip().is_unicast_link_local() => address.scope_id(),
        _ => 0,
    };
    (a.ip(), a.port(), scope(a)) == (b.ip(), b.port(), scope(b))
}

/// Compares what the two ends had agreed upon, and what follows from it.
pub(super) fn check_negotiated(control: &ControlBlock, info: &TcpInfo) -> Result<()> {
    let options = &control.options;
    let scale = options.window_scale.unwrap_or_default();
    let has = |bit| info.options & bit != 0;
    let differing = [
        ("window scale", info.window_scales == scale.snd | scale.rcv << 4),
        ("SACK", has(info_option::SACK) == options.sack),
        ("timestamps", has(info_option::TIMESTAMPS) == options.timestamps.is_some()),
        (
            "segment size",
            control.window.is_none_or(|window| info.snd_mss <= largest_segment(window.max_window)),
        ),
    ];
    match differing.iter().find(|(_, same)| !same) {
        None => Ok(()),
        Some((name, _)) => Err(Error::refused(
            format!("a socket with another {name} than its connection"),
            "this kernel does not take what the two ends had agreed upon",
        )),
    }
}
