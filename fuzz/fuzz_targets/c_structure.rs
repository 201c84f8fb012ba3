//! `struct libsoccr_sk_data` of a C caller: what is accepted is a connection, and comes back as the same structure.
#![no_main]
#![allow(dead_code)]

extern crate soccr as soccr_core;

#[path = "../../crates/libsoccr/src/data.rs"]
mod data;
#[path = "../../crates/libsoccr/src/failure.rs"]
mod failure;

use std::mem::size_of;

use data::Data;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut given = Data::default();
    let length = bytes.len().min(size_of::<Data>());
    // SAFETY: both have so many bytes, and the structure has no invalid values.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut given).cast(), length) };
    let given = given.within(length);
    let Ok(control) = given.control_block() else { return };
    control.validate().unwrap();
    let told = Data::new(&control, &given.extras());
    assert_eq!(told.control_block().unwrap(), control);
});
