//! The C library: `include/soccr.h` over the `soccr` crate. It decides nothing by itself.
//!
//! # The pointer contract
//! What every function of the header asks of its caller, beyond what it checks:
//!
//! - A handle comes from `libsoccr_pause`, is used by one thread at a time, and not after `libsoccr_resume` or
//!   `libsoccr_release`. Its descriptor is open while the connection is paused, saved, asked for its addresses,
//!   restored or resumed.
//! - A pointer to an object is null or points to one of that type; with a size, to that many bytes. No alignment is
//!   asked for. What is only read is never written.
//! - A queue given by `libsoccr_set_queue_bytes` has the length that the data of the restore tells, and stays readable
//!   until the restore; with `SOCCR_MEM_EXCL` it comes from `malloc`, and is ours.
//! - What a function returns comes from `malloc`; it belongs to the caller with `SOCCR_MEM_EXCL`, and else to the
//!   handle, which frees it when it ends.
//!
//! Null and nonsense are answered by −1 or null, a log line and `libsoccr_last_error`. No panic crosses the border.

mod data;
mod failure;
mod handle;
mod staged;
mod sys;
