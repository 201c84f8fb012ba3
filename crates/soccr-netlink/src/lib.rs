//! Netlink, as far as soccr needs it: messages with nested attributes are appended to a [`Batch`],
//! a [`Socket`] sends the batch in one system call and hears every answer.
//!
//! One small builder serves nftables, `sock_diag` and `rtnetlink` alike.
//!
//! # References
//! `netlink(7)`, `rtnetlink(7)`, `sock_diag(7)`, RFC 3549.
#![forbid(unsafe_code)]

mod message;
mod route;
mod socket;

pub use message::{Attributes, Batch, Message, attributes};
pub use route::{Link, Neighbour, Packet, Policy, Rtnetlink, Vxlan, Way, link_header};
pub use socket::{Family, Socket};

/// The message is a request (`NLM_F_REQUEST`).
pub const REQUEST: u16 = 0x1;
/// The kernel shall acknowledge the message (`NLM_F_ACK`).
pub const ACK: u16 = 0x4;
/// Delete the object only where nothing is in it (`NLM_F_NONREC`).
pub const NOT_RECURSIVE: u16 = 0x100;
/// Fail where the object exists (`NLM_F_EXCL`).
pub const EXCLUSIVE: u16 = 0x200;
/// Create the object where it does not exist (`NLM_F_CREATE`).
pub const CREATE: u16 = 0x400;
/// Add behind what exists (`NLM_F_APPEND`).
pub const APPEND: u16 = 0x800;
/// Answer with every object, not with one (`NLM_F_DUMP`).
pub const DUMP: u16 = 0x300;
