//! An answer of sock_diag.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| soccr::fuzz::sock_diag(bytes));
