//! The border to C: the only place for `unsafe` in this crate. See the pointer contract in the crate's documentation.
#![allow(unsafe_code)]

pub(crate) mod address;
pub(crate) mod border;
mod cancel;
pub(crate) mod claim;
mod errno;
mod exports;
mod exports_2016;
mod exports_image;
mod exports_lock;
pub(crate) mod log;
pub(crate) mod memory;
mod sigpipe;
