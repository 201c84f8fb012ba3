//! The lock: the network kept quiet around connections. See [`exports`](super::exports) for the contract.

use std::ffi::{c_int, c_uint};
use std::ptr;

use soccr_core::connection::Flow;
use soccr_core::lock::{Lock, Locker, Mode};

use crate::failure::{Failure, Result};
use crate::sys::address::{self, Address};
use crate::sys::border::{run, told};

/// `SOCCR_LOCK_HOLD`.
const HOLD: c_uint = 1;

/// `struct libsoccr_lock`.
struct Held {
    lock: Lock,
    locker: Locker,
}

/// `struct libsoccr_flow`.
#[repr(C)]
struct AddressPair {
    own: Address,
    peer: Address,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_lock(pairs: *const AddressPair, count: c_uint, flags: c_uint) -> *mut Held {
    let lock = run(ptr::null_mut(), || {
        // SAFETY: by contract.
        let flows = unsafe { read_flows(pairs, count) }?;
        let mode = match flags {
            0 => Mode::Drop,
            HOLD => Mode::HOLD,
            _ => {
                return Err(Failure::new(format!(
                    "lock: flags are {flags:#x}, of which only SOCCR_LOCK_HOLD is known"
                )));
            }
        };
        let locker = Locker::new(mode)?;
        match locker.lock(&flows) {
            Ok(lock) => Ok(Box::into_raw(Box::new(Held { lock, locker }))),
            Err(error) => {
                locker.close();
                Err(error.into())
            }
        }
    });
    told(if lock.is_null() { -1 } else { 0 }, || format!("lock: {count} connections"));
    lock
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_unlock(lock: *mut Held) -> c_int {
    run(-1, || {
        if lock.is_null() {
            return Err(Failure::null("lock"));
        }
        // SAFETY: it comes from Box::into_raw in libsoccr_lock, and ends only once.
        let Held { lock, locker } = *unsafe { Box::from_raw(lock) };
        let released = lock.release();
        // Nothing of the library stays behind a call.
        locker.close();
        Ok(released.map(|_| 0)?)
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
        for end in [local, remote] {
            if end.port() == 0 || end.ip().is_unspecified() {
                return Err(Failure::new(format!("lock: {end} is no end of a connection")));
            }
        }
        Ok(Flow { local, remote })
    };
    (0..count as usize).map(flow).collect()
}
