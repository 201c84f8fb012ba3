//! Segments that a lock holds, compared with the stream that they are of.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| soccr::fuzz::held(bytes));
