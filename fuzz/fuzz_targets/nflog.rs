//! A message of a log group: a packet that a lock holds.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| soccr::fuzz::nflog(bytes));
