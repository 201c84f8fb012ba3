//! Live TCP connections, and what their owners know about them, move between programs.
//!
//! [`protocol`] has the two ends of a hand-over as state machines without I/O, and the table of who has a connection when;
//! [`channel`] is what they talk through. The words and their bytes are those of [`soccr_image::stream`].
#![forbid(unsafe_code)]

pub mod channel;
pub mod protocol;

#[cfg(not(target_os = "linux"))]
compile_error!("soccr-handover rests on TCP_REPAIR, which only Linux has");
