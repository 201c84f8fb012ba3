//! `union libsoccr_addr`: the socket addresses of C.

use std::mem::{offset_of, size_of};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};

use crate::failure::{Failure, Result};
use crate::sys::memory::Memory;

/// `union libsoccr_addr`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) union Address {
    any: libc::sockaddr,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

/// Reads no more than the family of the address has.
///
/// # Safety
/// `address` points to a `sockaddr_in`, a `sockaddr_in6` or at least to a family.
pub(crate) unsafe fn from_c(address: *const Address) -> Result<SocketAddr> {
    let family_at = offset_of!(libc::sockaddr, sa_family);
    // SAFETY: every address has a family.
    let family = unsafe { address.byte_add(family_at).cast::<libc::sa_family_t>().read_unaligned() };
    match i32::from(family) {
        libc::AF_INET => {
            // SAFETY: the family tells the type.
            let v4 = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            let ip = u32::from_be(v4.sin_addr.s_addr).into();
            Ok(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: the family tells the type.
            let v6 = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            let (ip, flow) = (v6.sin6_addr.s6_addr.into(), u32::from_be(v6.sin6_flowinfo));
            Ok(SocketAddrV6::new(ip, u16::from_be(v6.sin6_port), flow, v6.sin6_scope_id).into())
        }
        other => Err(Failure::new(format!("{other} is no address family of TCP (AF_INET, AF_INET6)"))),
    }
}

/// A union of its own, zeroed where the address has nothing to say.
pub(crate) fn to_c(address: SocketAddr) -> Result<Memory> {
    let mut memory = Memory::zeroed(size_of::<Address>())?;
    let start = memory.as_ptr().cast::<Address>();
    match address {
        SocketAddr::V4(address) => {
            let v4 = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: address.ip().to_bits().to_be() },
                sin_zero: [0; 8],
            };
            // SAFETY: the memory has the size of the union, and malloc aligns for every type.
            unsafe { (&raw mut (*start).v4).write(v4) };
        }
        SocketAddr::V6(address) => {
            let v6 = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo().to_be(),
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: address.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut (*start).v6).write(v6) };
        }
    }
    Ok(memory)
}
