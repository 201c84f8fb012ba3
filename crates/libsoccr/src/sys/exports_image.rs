//! Whole connections as bytes. See [`exports`](super::exports) for the contract.

use std::ffi::c_int;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};
use std::ptr;

use crate::failure::{Failure, Result};
use crate::handle::Handle;
use crate::sys::border::{run, told, with};
use crate::sys::sigpipe::WithoutSigpipe;

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_write(handle: *mut Handle, fd: c_int) -> c_int {
    let write = |handle: &mut Handle| {
        let file = file("write", fd)?;
        let _quiet = WithoutSigpipe::new();
        handle.write(&*file).map(|()| 0)
    };
    // SAFETY: by contract.
    let written = unsafe { with(handle, -1, write) };
    told(written, || format!("write: the connection is in descriptor {fd}"))
}

#[unsafe(no_mangle)]
extern "C" fn libsoccr_read(fd: c_int) -> *mut Handle {
    run(ptr::null_mut(), || {
        let handle = Handle::read(&*file("read", fd)?)?;
        Ok(Box::into_raw(Box::new(handle)))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn libsoccr_open(handle: *mut Handle) -> c_int {
    let (mut socket, mut report) = (-1, String::new());
    let open = |handle: &mut Handle| {
        report = handle.open(|fd| {
            socket = fd.into_raw_fd();
            // SAFETY: it is the caller's now, who keeps it open as long as the handle, by contract.
            unsafe { BorrowedFd::borrow_raw(socket) }
        })?;
        Ok(0)
    };
    // SAFETY: by contract.
    let opened = unsafe { with(handle, -1, open) };
    told(opened, || format!("open: descriptor {socket}; {}", report.trim_end().replace('\n', "; ")));
    if opened == 0 { socket } else { -1 }
}

/// The file of a descriptor, which stays the caller's. To close a duplicate would end the locks that he has on the file (fcntl(2)).
fn file(step: &str, fd: c_int) -> Result<ManuallyDrop<File>> {
    if fd < 0 {
        return Err(Failure::new(format!("{step}: {fd} is no descriptor")));
    }
    // SAFETY: it is open, by contract, and never closed here; a closed one is told by the kernel.
    let file = ManuallyDrop::new(unsafe { File::from_raw_fd(fd) });
    rustix::io::fcntl_getfd(&*file).map_err(|error| {
        Failure::system(format!("{step}: descriptor {fd}: {error}"), error.raw_os_error())
    })?;
    Ok(file)
}
