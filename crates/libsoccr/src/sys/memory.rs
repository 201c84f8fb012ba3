//! Memory that C may free, and memory that C has given.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::slice;

use crate::failure::{Failure, Result};

/// Memory of `malloc`, freed by `free`.
#[derive(Debug)]
pub(crate) struct Memory {
    start: NonNull<u8>,
    length: usize,
}

impl Memory {
    /// Bytes that nobody has written to. Never null, even for none: a queue that is empty is no failure.
    pub(crate) fn new(length: usize) -> Result<Self> {
        // SAFETY: any size may be asked for.
        let mut memory = Self::of(unsafe { libc::malloc(length.max(1)) }, length)?;
        memory.populate();
        Ok(memory)
    }

    /// Has the pages of much memory made at once, which otherwise takes a fault for each: twice as long.
    fn populate(&mut self) {
        const MUCH: usize = 256 << 10;
        const PAGE: usize = 4096;
        const MADV_POPULATE_WRITE: c_int = 23;
        let start = self.start.as_ptr().wrapping_add(self.start.align_offset(PAGE));
        let skipped = start.addr() - self.start.addr().get();
        if self.length > MUCH {
            // SAFETY: whole pages of memory that is ours, and stays what it is. Older kernels than 5.14 refuse.
            unsafe {
                libc::madvise(start.cast(), (self.length - skipped) / PAGE * PAGE, MADV_POPULATE_WRITE)
            };
        }
    }

    /// Bytes that are zero.
    pub(crate) fn zeroed(length: usize) -> Result<Self> {
        // SAFETY: any size may be asked for.
        Self::of(unsafe { libc::calloc(length.max(1), 1) }, length)
    }

    fn of(start: *mut c_void, length: usize) -> Result<Self> {
        match NonNull::new(start.cast()) {
            Some(start) => Ok(Self { start, length }),
            None => Err(Failure::system(format!("out of memory for {length} bytes"), libc::ENOMEM)),
        }
    }

    /// Takes out one byte; those behind it move up.
    pub(crate) fn remove(&mut self, at: usize) {
        assert!(at < self.length);
        // SAFETY: both places are inside of the memory, which has been allocated as a whole.
        unsafe {
            let place = self.start.as_ptr().add(at);
            std::ptr::copy(place.add(1), place, self.length - at - 1);
        }
    }

    pub(crate) fn as_ptr(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Gives the memory away, to be freed by `free`.
    pub(crate) fn into_raw(self) -> *mut u8 {
        std::mem::ManuallyDrop::new(self).start.as_ptr()
    }
}

impl AsMut<[MaybeUninit<u8>]> for Memory {
    fn as_mut(&mut self) -> &mut [MaybeUninit<u8>] {
        // SAFETY: `length` bytes were allocated; nobody else has them while `self` is borrowed.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.length) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it comes from malloc or calloc and has not been given away.
        unsafe { libc::free(self.start.as_ptr().cast()) }
    }
}

/// A queue that C has set, of a length that its data tells later.
#[derive(Debug)]
pub(crate) struct Given {
    start: NonNull<u8>,
    owned: bool,
}

impl Given {
    /// Null for a queue that is taken back.
    ///
    /// # Safety
    /// The memory stays readable while this lives; if it is owned, it comes from `malloc`, and nobody else frees it.
    pub(crate) unsafe fn new(start: *mut u8, owned: bool) -> Option<Self> {
        Some(Self { start: NonNull::new(start)?, owned })
    }

    /// # Safety
    /// The queue must have `length` bytes, and outlive the slice.
    pub(crate) unsafe fn bytes<'a>(&self, length: u32) -> &'a [u8] {
        // SAFETY: the caller's promise.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), length as usize) }
    }

    /// Puts another queue in the place of this one, which is freed if it is owned.
    pub(crate) fn replace(slot: &mut Option<Self>, new: Option<Self>) {
        let old = std::mem::replace(slot, new);
        if let (Some(mut old), Some(new)) = (old, slot) {
            // The same memory once more: only its owner may be another one.
            old.owned &= old.start != new.start;
        }
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: it comes from malloc, and its owner has given it away.
            unsafe { libc::free(self.start.as_ptr().cast()) }
        }
    }
}
