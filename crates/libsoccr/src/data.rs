//! `struct libsoccr_sk_data` and its meaning.

use soccr_core::connection::{ControlBlock, Options, State, Window, WindowScale};

use crate::failure::{Failure, Result};

/// The five window fields are valid.
const FLAGS_WINDOW: u32 = 1;

/// Bits of `opt_mask`: `TCPI_OPT_*` of `linux/tcp.h`. Others are passed over: newer kernels know more of them.
mod option {
    pub(super) const TIMESTAMPS: u32 = 1;
    pub(super) const SACK: u32 = 2;
    pub(super) const WINDOW_SCALE: u32 = 4;
    pub(super) const ECN: u32 = 8;
    pub(super) const ECN_SEEN: u32 = 16;
    pub(super) const SYN_DATA: u32 = 32;
    pub(super) const MICROSECONDS: u32 = 64;
}

/// `struct libsoccr_sk_data`. It may only grow at its end.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Data {
    state: u32,
    pub(crate) inq_len: u32,
    inq_seq: u32,
    pub(crate) outq_len: u32,
    outq_seq: u32,
    unsq_len: u32,
    opt_mask: u32,
    mss_clamp: u32,
    snd_wscale: u32,
    rcv_wscale: u32,
    timestamp: u32,
    flags: u32,
    snd_wl1: u32,
    snd_wnd: u32,
    max_window: u32,
    rcv_wnd: u32,
    rcv_wup: u32,
}

impl Data {
    /// What `libsoccr_save` tells of a connection.
    pub(crate) fn new(control: &ControlBlock) -> Self {
        let options = &control.options;
        let bits = [
            (options.timestamps.is_some(), option::TIMESTAMPS),
            (options.sack, option::SACK),
            (options.window_scale.is_some(), option::WINDOW_SCALE),
            (options.ecn, option::ECN),
            (options.ecn_seen, option::ECN_SEEN),
            (options.syn_data, option::SYN_DATA),
            (options.microseconds, option::MICROSECONDS),
        ];
        let scale = options.window_scale.unwrap_or(WindowScale { snd: 0, rcv: 0 });
        let window = control.window.unwrap_or_default();
        Self {
            state: control.state as u32,
            inq_len: control.inq_len,
            inq_seq: control.rcv_nxt,
            outq_len: control.outq_len,
            outq_seq: control.write_seq,
            unsq_len: control.unsq_len,
            opt_mask: bits.into_iter().filter(|(on, _)| *on).map(|(_, bit)| bit).sum(),
            mss_clamp: options.mss_clamp.into(),
            snd_wscale: scale.snd.into(),
            rcv_wscale: scale.rcv.into(),
            timestamp: options.timestamps.unwrap_or(0),
            flags: if control.window.is_some() { FLAGS_WINDOW } else { 0 },
            snd_wl1: window.snd_wl1,
            snd_wnd: window.snd_wnd,
            max_window: window.max_window,
            rcv_wnd: window.rcv_wnd,
            rcv_wup: window.rcv_wup,
        }
    }

    /// The connection that these values tell, each checked against the others.
    pub(crate) fn control_block(&self) -> Result<ControlBlock> {
        let has = |bit| self.opt_mask & bit != 0;
        let state = u8::try_from(self.state).ok().and_then(State::from_kernel);
        let state = state.ok_or_else(|| out_of_range("state", self.state))?;
        let control = ControlBlock {
            state,
            rcv_nxt: self.inq_seq,
            inq_len: self.inq_len,
            write_seq: self.outq_seq,
            outq_len: self.outq_len,
            unsq_len: self.unsq_len,
            // There is no field for it; a FIN is never sent before the bytes in front of it.
            fin_unsent: state.fin_queued() && self.unsq_len > 0,
            options: Options {
                // Images of old hosts have more in it than the 16 bits that the kernel takes.
                mss_clamp: self.mss_clamp as u16,
                window_scale: if has(option::WINDOW_SCALE) { Some(self.window_scale()?) } else { None },
                sack: has(option::SACK),
                timestamps: has(option::TIMESTAMPS).then_some(self.timestamp),
                microseconds: has(option::MICROSECONDS),
                ecn: has(option::ECN),
                ecn_seen: has(option::ECN_SEEN),
                syn_data: has(option::SYN_DATA),
            },
            window: (self.flags & FLAGS_WINDOW != 0).then_some(Window {
                snd_wl1: self.snd_wl1,
                snd_wnd: self.snd_wnd,
                max_window: self.max_window,
                rcv_wnd: self.rcv_wnd,
                rcv_wup: self.rcv_wup,
            }),
        };
        control.validate()?;
        Ok(control)
    }

    fn window_scale(&self) -> Result<WindowScale> {
        Ok(WindowScale {
            snd: narrow("snd_wscale", self.snd_wscale)?,
            rcv: narrow("rcv_wscale", self.rcv_wscale)?,
        })
    }
}

fn narrow<T: TryFrom<u32>>(field: &str, value: u32) -> Result<T> {
    T::try_from(value).map_err(|_| out_of_range(field, value))
}

fn out_of_range(field: &str, value: u32) -> Failure {
    Failure::new(format!("restore: {field} is {value}, which no connection has"))
}
