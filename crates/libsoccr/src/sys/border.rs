//! What every exported function does: checks its pointers, lets no panic out, and tells why it failed.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{c_int, c_uint};
use std::mem::size_of;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use soccr_core::Queue;

use crate::data::Data;
use crate::failure::{Failure, LastError, Result};
use crate::handle::Handle;
use crate::sys::cancel::WithoutCancellation;
use crate::sys::{errno, log};

/// What the structure had when it was first published.
pub(crate) const LEAST_DATA: usize = 68;

/// A larger size is a mistake: a negative number.
const LARGEST_DATA: usize = c_int::MAX as usize;

thread_local! {
    /// The last failure on this thread, whichever handle it was about, or none: what `errno` is to system calls. A
    /// handler of atexit(3) runs after it has ended: nothing is kept then.
    static LAST_ERROR: RefCell<Option<LastError>> = const { RefCell::new(None) };
}

/// Runs the body of a function without a handle.
pub(super) fn run<T>(failed: T, body: impl FnOnce() -> Result<T>) -> T {
    let before = errno::get();
    match outcome(body) {
        Ok(value) => {
            errno::set(before);
            value
        }
        Err(failure) => {
            report(&failure, record(&failure));
            failed
        }
    }
}

/// Runs the body of a function with a handle.
///
/// # Safety
/// `handle` is null or an open handle that no other thread is using.
pub(super) unsafe fn with<T>(
    handle: *mut Handle,
    failed: T,
    body: impl FnOnce(&mut Handle) -> Result<T>,
) -> T {
    // SAFETY: the caller's promise.
    let Some(handle) = (unsafe { handle.as_mut() }) else {
        return run(failed, || Err(Failure::null("sk")));
    };
    let before = errno::get();
    match outcome(|| body(handle)) {
        Ok(value) => {
            errno::set(before);
            value
        }
        Err(failure) => {
            let error = record(&failure);
            handle.last_error = Some(error.clone());
            // Behind the last use of the handle: the callback may ask for its error.
            report(&failure, error);
            failed
        }
    }
}

/// What there is to tell of the last failure of a handle, or of this thread; `none` if there is none.
pub(super) fn last_error<T: Copy>(handle: Option<&Handle>, none: T, tell: impl FnOnce(&LastError) -> T) -> T {
    let tell = |error: &Option<LastError>| error.as_ref().map_or(none, tell);
    match handle {
        Some(handle) => tell(&handle.last_error),
        None => LAST_ERROR.try_with(|error| tell(&error.borrow())).unwrap_or(none),
    }
}

/// A panic is a failure like others; the stage that a handle was in when it happened cannot be resumed.
fn outcome<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    let _uncancelled = WithoutCancellation::new();
    let outcome = catch_unwind(AssertUnwindSafe(body));
    // What has brought a congestion window back is not to stay in the host.
    soccr_core::close_prepared();
    outcome.unwrap_or_else(|panic| Err(Failure::system(panic_text(&*panic), libc::ENOTRECOVERABLE)))
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    format!("a defect of the library: {}", text.unwrap_or("panic"))
}

/// Keeps the failure for [`last_error`].
fn record(failure: &Failure) -> LastError {
    let error = LastError::new(failure, log::c_string(failure.to_string()));
    keep(error.clone());
    error
}

fn keep(error: LastError) {
    let _ = LAST_ERROR.try_with(|last| last.replace(Some(error)));
}

/// Hosts look for lines that begin like this. The callback may make calls that fail: afterwards this is the last failure again.
fn report(failure: &Failure, error: LastError) {
    log::line(log::ERROR, || format!("Error (libsoccr): {failure}"));
    keep(error);
    errno::set(failure.errno);
}

/// Logs what a call has done, unless it has failed: behind the last use of its handle, which the callback may use.
pub(super) fn told(result: c_int, text: impl FnOnce() -> String) -> c_int {
    if result >= 0 {
        let before = errno::get();
        log::line(log::DEBUG, || format!("libsoccr: {}", text()));
        errno::set(before);
    }
    result
}

/// Reads the caller's data: of a shorter structure what it has, of a longer one what this library knows.
///
/// # Safety
/// `data` is null or has `size` bytes.
pub(super) unsafe fn read_data(data: *const Data, size: c_uint) -> Result<Data> {
    check_data(data, size)?;
    let (mut known, size) = (Data::default(), size as usize);
    let length = size.min(size_of::<Data>());
    // SAFETY: both have `length` bytes or more, and the structure has no invalid values.
    unsafe { ptr::copy_nonoverlapping(data.cast::<u8>(), (&raw mut known).cast(), length) };
    Ok(known.within(size))
}

/// Zeroes the caller's memory, then fills in what `data` gives; returns how many bytes that were.
///
/// # Safety
/// `out` is null or has `size` bytes.
pub(super) unsafe fn write_data(
    out: *mut Data,
    size: c_uint,
    data: impl FnOnce() -> Result<Data>,
) -> Result<c_int> {
    check_data(out, size)?;
    let size = size as usize;
    // SAFETY: `out` has `size` bytes.
    unsafe { out.cast::<u8>().write_bytes(0, size) };
    let data = data()?.within(size);
    let length = size.min(size_of::<Data>());
    // SAFETY: both have `length` bytes or more.
    unsafe { ptr::copy_nonoverlapping((&raw const data).cast(), out.cast::<u8>(), length) };
    Ok(length as c_int)
}

fn check_data(data: *const Data, size: c_uint) -> Result<()> {
    if data.is_null() {
        return Err(Failure::null("data"));
    }
    if !(LEAST_DATA..=LARGEST_DATA).contains(&(size as usize)) {
        return Err(Failure::new(format!(
            "data_size is {size}, but struct libsoccr_sk_data has {LEAST_DATA} bytes or more"
        )));
    }
    Ok(())
}

/// `TCP_RECV_QUEUE` or `TCP_SEND_QUEUE`.
pub(super) fn queue(number: c_int) -> Result<Queue> {
    [Queue::Receive, Queue::Send]
        .into_iter()
        .find(|queue| *queue as c_int == number)
        .ok_or_else(|| Failure::new(format!("{number} is neither TCP_RECV_QUEUE nor TCP_SEND_QUEUE")))
}
