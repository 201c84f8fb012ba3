//! The functions of `soccr.h`, in its order. What they do stands there, and in the manual pages.
//!
//! # Safety
//! Of all functions here: the pointer contract in the crate's documentation.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::os::fd::BorrowedFd;
use std::ptr;

use soccr_core::connection::State;

use crate::data::Data;
use crate::failure::{Failure, LastError, Result};
use crate::handle::{End, Handle, Owner, PerQueue};
use crate::sys::address::{self, Address};
use crate::sys::border::{last_error, queue, read_data, run, told, with, write_data};
use crate::sys::log::{self, Callback};
use crate::sys::memory::Given;

/// `SOCCR_MEM_EXCL`.
const MEM_EXCL: c_uint = 1;

fn owner(flags: c_uint) -> Result<Owner> {
    match flags {
        0 => Ok(Owner::Handle),
        MEM_EXCL => Ok(Owner::Caller),
        _ => Err(Failure::new(format!("flags are {flags:#x}, of which only SOCCR_MEM_EXCL (0x1) is known"))),
    }
}

fn end(is_self: c_int) -> End {
    if is_self != 0 { End::Own } else { End::Peer }
}

#[unsafe(no_mangle)]
extern "C" fn libsoccr_set_log(level: c_uint, callback: Option<Callback>) {
    run((), || {
        log::set(level, callback);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn libsoccr_pause(fd: c_int) -> *mut Handle {
    let handle = run(ptr::null_mut(), || {
        if fd < 0 {
            return Err(Failure::new(format!("pause: {fd} is no descriptor")));
        }
        // SAFETY: the descriptor stays open as long as the handle, by contract; a closed one is told by the kernel.
        let handle = Handle::pause(unsafe { BorrowedFd::borrow_raw(fd) })?;
        Ok(Box::into_raw(Box::new(handle)))
    });
    told(if handle.is_null() { -1 } else { 0 }, || format!("pause: descriptor {fd} is in repair mode"));
    handle
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_resume(handle: *mut Handle) {
    // SAFETY: by contract.
    unsafe { end_handle(handle, Handle::resume) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_release(handle: *mut Handle) {
    let release = |handle: Handle| {
        handle.release();
        Ok(())
    };
    // SAFETY: by contract.
    unsafe { end_handle(handle, release) }
}

unsafe fn end_handle(handle: *mut Handle, how: impl FnOnce(Handle) -> Result<()>) {
    run((), || {
        if handle.is_null() {
            return Err(Failure::null("sk"));
        }
        // SAFETY: it comes from Box::into_raw in libsoccr_pause, and ends only once.
        how(*unsafe { Box::from_raw(handle) })
    })
}

#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn libsoccr_save(handle: *mut Handle, data: *mut Data, size: c_uint) -> c_int {
    let mut note = None;
    let save = |handle: &mut Handle| {
        let read = || {
            let (data, told) = handle.save(size as usize)?;
            note = told;
            Ok(data)
        };
        // SAFETY: by contract.
        unsafe { write_data(data, size, read) }
    };
    // SAFETY: by contract.
    let filled = unsafe { with(handle, -1, save) };
    if let Some(note) = note {
        told(filled, || note.to_owned());
    }
    told(filled, || "save: the connection has been read".to_owned())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_get_queue_bytes(handle: *mut Handle, id: c_int, flags: c_uint) -> *mut c_char {
    let get = |handle: &mut Handle| Ok(handle.queue_bytes(queue(id)?, owner(flags)?)?.cast());
    // SAFETY: by contract.
    unsafe { with(handle, ptr::null_mut(), get) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_get_addr(handle: *mut Handle, is_self: c_int, flags: c_uint) -> *mut Address {
    let get = |handle: &mut Handle| Ok(handle.address(end(is_self), owner(flags)?)?.cast());
    // SAFETY: by contract.
    unsafe { with(handle, ptr::null_mut(), get) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_set_queue_bytes(
    handle: *mut Handle,
    id: c_int,
    bytes: *mut c_char,
    flags: c_uint,
) -> c_int {
    let set = |handle: &mut Handle| {
        let (queue, owner) = (queue(id)?, owner(flags)?);
        // SAFETY: by contract.
        let given = unsafe { Given::new(bytes.cast(), owner == Owner::Caller) };
        Given::replace(handle.given.of(queue), given);
        Ok(0)
    };
    // SAFETY: by contract.
    unsafe { with(handle, -1, set) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_set_addr(
    handle: *mut Handle,
    is_self: c_int,
    address: *mut Address,
    flags: c_uint,
) -> c_int {
    let set = |handle: &mut Handle| {
        let owner = owner(flags)?;
        if address.is_null() {
            return Err(Failure::null("addr"));
        }
        // SAFETY: by contract.
        handle.set_address(end(is_self), unsafe { address::from_c(address) }?);
        if owner == Owner::Caller {
            // SAFETY: the caller has given it to us, and it has been copied.
            unsafe { libc::free(address.cast::<c_void>()) };
        }
        Ok(0)
    };
    // SAFETY: by contract.
    unsafe { with(handle, -1, set) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_restore(handle: *mut Handle, data: *const Data, size: c_uint) -> c_int {
    let mut state: Option<State> = None;
    let mut differences = String::new();
    let restore = |handle: &mut Handle| {
        // SAFETY: by contract.
        let data = unsafe { read_data(data, size) }?;
        let control = data.control_block()?;
        state = Some(control.state);
        let bytes = |given: &Option<Given>, length| match given {
            // SAFETY: by contract; the handle keeps the queue until it is restored.
            Some(given) => unsafe { given.bytes(length) },
            None => &[],
        };
        let receive = bytes(handle.given.of(soccr_core::Queue::Receive), data.inq_len);
        let send = bytes(handle.given.of(soccr_core::Queue::Send), data.outq_len);
        differences = handle.restore(&control, &data.extras(), receive, send)?;
        // Many a host never ends its handles after a restore.
        handle.given = PerQueue::default();
        Ok(0)
    };
    // SAFETY: by contract.
    let restored = unsafe { with(handle, -1, restore) };
    for line in differences.lines() {
        told(restored, || format!("restore: {line}"));
    }
    told(restored, || state.map_or_else(String::new, |state| format!("restore: a connection in {state}")))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_last_error(handle: *const Handle) -> *const c_char {
    // SAFETY: by contract.
    last_error(unsafe { handle.as_ref() }, ptr::null(), LastError::text)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_last_errno(handle: *const Handle) -> c_int {
    // SAFETY: by contract.
    last_error(unsafe { handle.as_ref() }, 0, LastError::errno)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_last_kind(handle: *const Handle) -> c_int {
    // SAFETY: by contract.
    last_error(unsafe { handle.as_ref() }, 0, LastError::kind)
}

#[unsafe(no_mangle)]
extern "C" fn libsoccr_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
