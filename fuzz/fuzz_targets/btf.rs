//! The description of the types of the kernel.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| soccr::fuzz::btf(bytes));
