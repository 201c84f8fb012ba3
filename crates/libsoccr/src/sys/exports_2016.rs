//! The staged interface of 2016: the caller binds and connects. See [`exports`](super::exports) for the contract.

use std::ffi::{c_char, c_int, c_uint};

use soccr_core::Queue;

use crate::data::Data;
use crate::failure::{Failure, Result};
use crate::handle::Handle;
use crate::sys::border::{queue, read_data, with};
use crate::sys::exports::libsoccr_save;
use crate::sys::memory::Given;

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_get_sk_data(handle: *mut Handle, data: *mut Data, size: c_uint) -> c_int {
    // SAFETY: by contract.
    unsafe { libsoccr_save(handle, data, size) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_set_sk_data_unbound(
    handle: *mut Handle,
    data: *const Data,
    size: c_uint,
) -> c_int {
    let step =
        |handle: &mut Handle, data: Data| handle.restore_unbound(&data.control_block()?, &data.extras());
    // SAFETY: by contract.
    unsafe { stage(handle, data, size, step) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_set_sk_data_noq(handle: *mut Handle, data: *const Data, size: c_uint) -> c_int {
    // SAFETY: by contract.
    unsafe { stage(handle, data, size, |handle, _| handle.restore_connected()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_set_sk_data(handle: *mut Handle, data: *const Data, size: c_uint) -> c_int {
    // SAFETY: by contract.
    unsafe { stage(handle, data, size, |handle, _| handle.restore_last()) }
}

/// `libsoccr_set_queue_bytes` of this interface: it has other arguments than its successor, and so another symbol.
#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_set_queue_bytes_2016(
    handle: *mut Handle,
    data: *const Data,
    size: c_uint,
    id: c_int,
    bytes: *mut c_char,
) -> c_int {
    let step = |handle: &mut Handle, data: Data| {
        let queue = queue(id)?;
        let length = match queue {
            Queue::Receive => data.inq_len,
            Queue::Send => data.outq_len,
        };
        // SAFETY: by contract; it is not owned.
        let bytes = match unsafe { Given::new(bytes.cast(), false) } {
            // SAFETY: by contract.
            Some(given) => unsafe { given.bytes(length) },
            None if length == 0 => &[],
            None => return Err(Failure::null("buf")),
        };
        handle.restore_queue(queue, bytes)
    };
    // SAFETY: by contract.
    unsafe { stage(handle, data, size, step) }
}

unsafe fn stage(
    handle: *mut Handle,
    data: *const Data,
    size: c_uint,
    step: impl FnOnce(&mut Handle, Data) -> Result<()>,
) -> c_int {
    let checked = |handle: &mut Handle| {
        // SAFETY: by contract.
        let data = unsafe { read_data(data, size) }?;
        step(handle, data)?;
        Ok(0)
    };
    // SAFETY: by contract.
    unsafe { with(handle, -1, checked) }
}
