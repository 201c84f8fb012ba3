//! `struct libsoccr_sk_data` and its meaning.

use std::mem::offset_of;
use std::time::Duration;

use soccr_core::connection::{Buffers, ControlBlock, Options, Path, State, Urgent, Window, WindowScale};

use crate::failure::{Failure, Result};

/// `SOCCR_FLAGS_*`: which groups of fields are valid, and what needs no field.
mod flag {
    pub(super) const WINDOW: u32 = 1;
    pub(super) const PATH: u32 = 2;
    pub(super) const BUFFERS: u32 = 4;
    pub(super) const URGENT: u32 = 8;
    pub(super) const URGENT_CONSUMED: u32 = 0x10;
    pub(super) const FIN_UNSENT: u32 = 0x20;
}

/// Where the groups behind the first 68 bytes end.
const PATH_END: usize = offset_of!(Data, sndbuf);
const BUFFERS_END: usize = offset_of!(Data, urgent);
const URGENT_END: usize = size_of::<Data>();

/// Bits of `opt_mask`: `TCPI_OPT_*` of `linux/tcp.h`. Others are passed over: newer kernels know more of them.
mod option {
    pub(super) const TIMESTAMPS: u32 = 1;
    pub(super) const SACK: u32 = 2;
    pub(super) const WINDOW_SCALE: u32 = 4;
    pub(super) const ECN: u32 = 8;
    pub(super) const ECN_SEEN: u32 = 16;
    pub(super) const SYN_DATA: u32 = 32;
    pub(super) const MICROSECONDS: u32 = 64;
    /// Reset by the peer, and the application has not been told; the state is then CLOSE.
    pub(super) const RESET: u32 = 0x100;
    /// Instead of a round-trip time: the peer's FIN had come before.
    pub(super) const RESET_BEHIND_FIN: u32 = 0x200;
    /// The kernel's bits end at 8; whoever keeps the word keeps what is above. The round-trip time: in units of 8 µs, 0 is
    /// unknown.
    pub(super) const SRTT_SHIFT: u32 = 9;
    pub(super) const SRTT_UNIT: u32 = 8;
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
    srtt: u32,
    rttvar: u32,
    rto: u32,
    snd_mss: u32,
    snd_cwnd: u32,
    snd_ssthresh: u32,
    rcv_ssthresh: u32,
    sndbuf: u32,
    rcvbuf: u32,
    buf_lock: u32,
    window_clamp: u32,
    urgent: u32,
}

/// What the structure tells beside the control block.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Extras {
    pub(crate) path: Option<Path>,
    /// And `TCP_WINDOW_CLAMP`.
    pub(crate) buffers: Option<(Buffers, u32)>,
    pub(crate) urgent: Option<Urgent>,
}

impl Extras {
    /// Checked before a socket is touched: the caller can mend the values, and try again.
    pub(crate) fn validate(&self, control: &ControlBlock) -> Result<()> {
        if let Some((buffers, window_clamp)) = self.buffers {
            buffers.validate()?;
            if !(1..=i32::MAX as u32).contains(&window_clamp) {
                return Err(out_of_range("window_clamp", window_clamp));
            }
        }
        if let Some(path) = self.path {
            path.validate()?;
        }
        match self.urgent {
            Some(urgent) if urgent.offset >= control.inq_len => Err(out_of_range("urgent", urgent.offset)),
            _ => Ok(()),
        }
    }
}

impl Data {
    /// The same for a caller whose structure has `size` bytes: without the groups that do not fit.
    pub(crate) fn within(mut self, size: usize) -> Self {
        for (flags, end) in [
            (flag::PATH, PATH_END),
            (flag::BUFFERS, BUFFERS_END),
            (flag::URGENT | flag::URGENT_CONSUMED, URGENT_END),
        ] {
            if size < end {
                self.flags &= !flags;
            }
        }
        self
    }

    /// A structure of `size` bytes tells the sizes of the buffers.
    pub(crate) fn has_buffers(size: usize) -> bool {
        size >= BUFFERS_END
    }

    /// It tells the urgent mark.
    pub(crate) fn has_urgent(size: usize) -> bool {
        size >= URGENT_END
    }

    /// What `libsoccr_save` tells of a connection.
    pub(crate) fn new(control: &ControlBlock, extras: &Extras) -> Self {
        let path = extras.path.unwrap_or_default();
        let (buffers, window_clamp) = extras.buffers.unwrap_or((Buffers { send: 0, receive: 0, lock: 0 }, 0));
        let groups = [
            (control.window.is_some(), flag::WINDOW),
            (extras.path.is_some(), flag::PATH),
            (extras.buffers.is_some(), flag::BUFFERS),
            (extras.urgent.is_some(), flag::URGENT),
            (extras.urgent.is_some_and(|urgent| urgent.consumed), flag::URGENT_CONSUMED),
            (control.fin_unsent, flag::FIN_UNSENT),
        ];
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
            state: if control.reset { State::Close } else { control.state } as u32,
            inq_len: control.inq_len,
            inq_seq: control.rcv_nxt,
            outq_len: control.outq_len,
            outq_seq: control.write_seq,
            unsq_len: control.unsq_len,
            opt_mask: sum(&bits)
                | if control.reset { reset_bits(control.state) } else { srtt_bits(path.rtt) },
            mss_clamp: options.mss_clamp.into(),
            snd_wscale: scale.snd.into(),
            rcv_wscale: scale.rcv.into(),
            timestamp: options.timestamps.unwrap_or(0),
            flags: sum(&groups),
            snd_wl1: window.snd_wl1,
            snd_wnd: window.snd_wnd,
            max_window: window.max_window,
            rcv_wnd: window.rcv_wnd,
            rcv_wup: window.rcv_wup,
            srtt: microseconds(path.rtt),
            rttvar: microseconds(path.rttvar),
            rto: microseconds(path.rto),
            snd_mss: path.snd_mss,
            snd_cwnd: path.snd_cwnd,
            snd_ssthresh: path.snd_ssthresh,
            rcv_ssthresh: path.rcv_ssthresh,
            sndbuf: buffers.send,
            rcvbuf: buffers.receive,
            buf_lock: buffers.lock,
            window_clamp,
            urgent: extras.urgent.map_or(0, |urgent| urgent.offset),
        }
    }

    /// What is told beside the control block. Of the path at least the round-trip time is known to those who keep no more
    /// than `opt_mask`.
    pub(crate) fn extras(&self) -> Extras {
        let has = |flag| self.flags & flag != 0;
        let time = |value: u32| Duration::from_micros(value.into());
        let srtt = time((self.opt_mask >> option::SRTT_SHIFT) * option::SRTT_UNIT);
        let path = if self.opt_mask & option::RESET != 0 {
            None
        } else if has(flag::PATH) {
            Some(Path {
                rtt: time(self.srtt),
                rttvar: time(self.rttvar),
                rto: time(self.rto),
                snd_mss: self.snd_mss,
                snd_cwnd: self.snd_cwnd,
                snd_ssthresh: self.snd_ssthresh,
                rcv_ssthresh: self.rcv_ssthresh,
            })
        } else {
            (!srtt.is_zero()).then(|| Path { rtt: srtt, ..Path::default() })
        };
        let buffers = Buffers { send: self.sndbuf, receive: self.rcvbuf, lock: self.buf_lock };
        let urgent = Urgent { offset: self.urgent, consumed: has(flag::URGENT_CONSUMED) };
        Extras {
            path,
            buffers: has(flag::BUFFERS).then_some((buffers, self.window_clamp)),
            urgent: has(flag::URGENT).then_some(urgent),
        }
    }

    /// The connection that these values tell, each checked against the others.
    pub(crate) fn control_block(&self) -> Result<ControlBlock> {
        let has = |bit| self.opt_mask & bit != 0;
        let state = u8::try_from(self.state).ok().and_then(State::from_kernel);
        let mut state = state.ok_or_else(|| out_of_range("state", self.state))?;
        let reset = has(option::RESET);
        if reset {
            state = if has(option::RESET_BEHIND_FIN) { State::CloseWait } else { State::Established };
        }
        let control = ControlBlock {
            state,
            rcv_nxt: self.inq_seq,
            inq_len: self.inq_len,
            write_seq: self.outq_seq,
            outq_len: self.outq_len,
            unsq_len: self.unsq_len,
            // Not all who keep the data keep its flags; a FIN is never sent before the bytes in front of it.
            fin_unsent: state.fin_queued() && (self.unsq_len > 0 || self.flags & flag::FIN_UNSENT != 0),
            reset,
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
            window: (self.flags & flag::WINDOW != 0).then_some(Window {
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

/// The bits that are on.
fn sum(bits: &[(bool, u32)]) -> u32 {
    bits.iter().filter(|(on, _)| *on).map(|(_, bit)| bit).sum()
}

fn microseconds(time: Duration) -> u32 {
    time.as_micros().try_into().unwrap_or(u32::MAX)
}

/// In what state it was before.
fn reset_bits(state: State) -> u32 {
    option::RESET | if state.fin_received() { option::RESET_BEHIND_FIN } else { 0 }
}

/// The round-trip time in the bits of `opt_mask` that are free for it.
fn srtt_bits(rtt: Duration) -> u32 {
    let units = microseconds(rtt).div_ceil(option::SRTT_UNIT);
    units.min(u32::MAX >> option::SRTT_SHIFT) << option::SRTT_SHIFT
}

fn narrow<T: TryFrom<u32>>(field: &str, value: u32) -> Result<T> {
    T::try_from(value).map_err(|_| out_of_range(field, value))
}

fn out_of_range(field: &str, value: u32) -> Failure {
    Failure::new(format!("restore: {field} is {value}, which no connection has"))
}
