//! The lock: the network kept quiet around connections. See [`exports`](super::exports) for the contract.

use std::ffi::{c_int, c_uint};
use std::ptr;

use soccr_core::Lock;
use soccr_core::connection::Flow;

use crate::failure::{Failure, Result};
use crate::sys::address::{self, Address};
use crate::sys::border::run;
use crate::sys::log;

/// `SOCCR_LOCK_HOLD`.
const HOLD: c_uint = 1;

/// `struct libsoccr_flow`.
#[repr(C)]
struct AddressPair {
    own: Address,
    peer: Address,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_lock(pairs: *const AddressPair, count: c_uint, flags: c_uint) -> *mut Lock {
    run(ptr::null_mut(), || {
        // SAFETY: by contract.
        let flows = unsafe { read_flows(pairs, count) }?;
        let lock = match flags {
            0 => Lock::drop_traffic(&flows)?,
            HOLD => Lock::hold(&flows)?,
            _ => {
                return Err(Failure::new(format!(
                    "lock: flags are {flags:#x}, of which only SOCCR_LOCK_HOLD is known"
                )));
            }
        };
        log::line(log::DEBUG, || format!("lock: {count} connections"));
        Ok(Box::into_raw(Box::new(lock)))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_unlock(lock: *mut Lock) -> c_int {
    run(-1, || {
        if lock.is_null() {
            return Err(Failure::null("lock"));
        }
        // SAFETY: it comes from Box::into_raw in libsoccr_lock, and ends only once.
        unsafe { Box::from_raw(lock) }.release()?;
        Ok(0)
    })
}

/// # Safety
/// `pairs` is null or has `count` elements.
unsafe fn read_flows(pairs: *const AddressPair, count: c_uint) -> Result<Vec<Flow>> {
    if pairs.is_null() {
        return Err(Failure::null("flows"));
    }
    let flow = |index| {
        // SAFETY: the caller's promise.
        let pair = unsafe { pairs.add(index) };
        // SAFETY: both are unions of addresses.
        let (local, remote) =
            unsafe { (address::from_c(&raw const (*pair).own)?, address::from_c(&raw const (*pair).peer)?) };
        Ok(Flow { local, remote })
    };
    (0..count as usize).map(flow).collect()
}
