//! `OLD=NEW` as people write it, and what it makes of addresses.
#![no_main]

use libfuzzer_sys::fuzz_target;
use soccr_image::AddressMap;

fuzz_target!(|text: &str| {
    let Ok(map) = text.parse::<AddressMap>() else { return };
    for address in ["192.0.2.1:80", "[2001:db8::1]:80", "[::ffff:192.0.2.1]:80"] {
        let address = address.parse().unwrap();
        let mapped = map.apply(address).unwrap_or(address);
        assert!(mapped.is_ipv6() || address.is_ipv4(), "{text}: {address} became {mapped}");
    }
});
