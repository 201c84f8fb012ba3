//! `files.img`: read, and rewritten there and back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use soccr_image::criu::{rewrite, sockets};

fuzz_target!(|bytes: &[u8]| {
    let there = ["127.0.0.1=10.1.2.3".parse().unwrap(), "::1=fd00::1".parse().unwrap()];
    let (files, sockets) = (rewrite(bytes, &there), sockets(bytes));
    let (Ok((files, changed)), Ok(sockets)) = (files, sockets) else { return };
    assert!(changed > 0 || files == bytes);
    let read = soccr_image::criu::sockets(&files).unwrap();
    assert_eq!(read.len(), sockets.len());
    for (new, old) in read.iter().zip(sockets) {
        let concerned = [old.local, old.remote].iter().any(|end| {
            there.iter().any(|map| map.apply(*end).is_some())
        });
        assert_eq!(*new != old, concerned);
    }
});
