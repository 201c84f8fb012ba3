//! The system calls that no library wraps safely: the only place for `unsafe` in this crate.
#![allow(unsafe_code)]

pub(crate) mod bpf;
pub(crate) mod descriptor;
pub(crate) mod filter;
pub(crate) mod ipv4;
pub(crate) mod ipv6;
pub(crate) mod message;
pub(crate) mod namespace;
pub(crate) mod owner;
pub(crate) mod raw;
pub(crate) mod route;
pub(crate) mod signals;
pub(crate) mod sockopt;
pub(crate) mod tcp;
pub(crate) mod tls;

/// The firewall mark (`SO_MARK`) of every packet sent here: a lock lets it pass.
pub(crate) const MARK: u32 = 0xc114;

/// The index of `lo` in every network namespace.
pub(crate) const LOOPBACK: u32 = 1;
