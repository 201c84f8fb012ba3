//! What the kernel must be told of a connection that it makes of one segment: `struct bpf_tcp_req_attrs`, carried to the
//! program in a TCP option.
//!
//! ```text
//!  option   254 · 24 · AD 07 · attributes               RFC 4727: kind 254 is for experiments
//!  attributes   rcv_tsval u32 · rcv_tsecr u32 · mss u16 · rcv_wscale · snd_wscale
//!               ecn_ok · wscale_ok · sack_ok · tstamp_ok · usec_ts_ok · three zeros      (one byte each)
//! ```

use crate::connection::Options;

/// The length of the attributes.
pub(super) const LENGTH: usize = 20;
/// The length of the option.
pub(super) const OPTION: usize = HEADER.len() + LENGTH;
/// Kind, length and a number of our own.
pub(super) const HEADER: [u8; 4] = [254, 24, 0xad, 0x07];

/// The option that carries what was negotiated.
pub(super) fn option(options: &Options) -> [u8; OPTION] {
    let scale = options.window_scale;
    let mut bytes = [0; OPTION];
    bytes[..4].copy_from_slice(&HEADER);
    // rcv_tsval stays zero: the peer's clock is learned from its next segment. rcv_tsecr sets ours.
    bytes[8..12].copy_from_slice(&options.timestamps.unwrap_or(0).to_ne_bytes());
    bytes[12..14].copy_from_slice(&options.mss_clamp.to_ne_bytes());
    bytes[14..21].copy_from_slice(&[
        scale.map_or(0, |scale| scale.rcv),
        scale.map_or(0, |scale| scale.snd),
        options.ecn.into(),
        scale.is_some().into(),
        options.sack.into(),
        options.timestamps.is_some().into(),
        (options.timestamps.is_some() && options.microseconds).into(),
    ]);
    bytes
}
