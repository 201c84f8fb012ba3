//! The stream: connections one behind the other, in a file or through a pipe, and the words of a hand-over.
//!
//! # Format
//!
//! All numbers are little-endian. A stream is a preamble, records, and an end record:
//!
//! ```text
//!  0        8       10      12          16
//!  ├────────┼───────┼───────┼───────────┤
//!  │ magic  │ major │ minor │ CRC-32    │   "\x89SOCCR\r\n", 1, 0, CRC-32 of the 12 bytes before it
//!  ├────────┴───────┴───────┴───────────┤
//!  │ record                             │
//!  │ …                                  │
//!  │ END record                         │   without it, the stream was cut off
//!  └────────────────────────────────────┘
//!
//!  a record
//!  0      2       4            8        12       16                 16 + length
//!  ├──────┼───────┼────────────┼────────┼────────┼──────────────────┼────────┤
//!  │ type │ flags │ connection │ length │ CRC-32 │ payload: fields  │ CRC-32 │
//!  └──────┴───────┴────────────┴────────┴────────┴──────────────────┴────────┘
//!           │       │                     │                           └ of header and payload
//!           │       │                     └ of the 12 bytes before it: a length is checked before it is believed
//!           │       └ which connection of the stream; 0: the stream as a whole
//!           └ bit 0: critical, must not be skipped where the type is unknown
//!
//!  a field
//!  0     2        6         6 + length
//!  ├─────┼────────┼─────────┤
//!  │ tag │ length │ value   │   tag, bit 15: critical, must not be skipped where the tag is unknown
//!  └─────┴────────┴─────────┘
//! ```
//!
//! | Record | | Fields |
//! |---|---|---|
//! | 1 | CONNECTION | 1 name · 16 local, 17 remote address · 18 control block · 19 options · 20 window scale · 21 timestamp clock · 22 window · 23 urgent mark · 24 buffers · 25 path · 26 setting, each · 27 receive queue · 28 send queue · 40 tracked · 41 owner · 42 TLS |
//! | 2 | HELD | 5 packet, each |
//! | 3 | BEGIN | 3 count of connections · 4 answers are expected · 12 notes are passed on · 7 place · 8 packets are steered · 9 address of the source, each · 10 tunnel · 11 answers go back |
//! | 4, 6, 8 | COMMIT, READY, TAKEN | |
//! | 5, 7 | ABORT, REFUSED | 2 reason |
//! | 9 | END | 3 count of records before it |
//! | 10 | STATE | 6 state; critical where a target that cannot pass it on must refuse the connection |
//! | 11 | HERE, not critical | 7 place |
//! | 12 | NOTE, not critical | 13 text · 14 the target has failed |
//! | 13 | TRIAL, not critical | 1 name · 16 local, 17 remote address |
//!
//! An address is `family` (u8: 4 or 6), `port` (u16), 4 or 16 bytes; IPv6 appends flow information and scope (u32 each). A
//! control block is `state` (u8, the kernel's number), `fin_unsent` (u8), then `rcv_nxt`, `inq_len`, `write_seq`,
//! `outq_len`, `unsq_len` (u32 each). Options are `mss_clamp` (u16) and bits (u16): 1 SACK, 2 ECN, 4 ECN seen, 8 data in the SYN,
//! 16 microsecond clock, 32 `O_NONBLOCK`, 64 reset by the peer, which the application has not been told. A window is `snd_wl1`, `snd_wnd`, `max_window`, `rcv_wnd`, `rcv_wup` (u32 each). A path is `rtt`,
//! `rttvar`, `rto` (u64 nanoseconds each), `snd_mss`, `snd_cwnd`, `snd_ssthresh`, `rcv_ssthresh` (u32 each). Buffers are the
//! three u32 of [`Buffers`](soccr::connection::Buffers); an urgent mark is an u32 and a flag. A setting is `kind` (u8: 0 an i32, 1 bytes, 2 secret bytes),
//! length of the name (u8), name, value. A place is the boot id of the host (16 bytes), device and inode of the network namespace (u64 each).
//! A tunnel is its number (u32), and the addresses of source and target with the UDP port.
//! Tracked are the local and the remote address on the wire (NAT), a flag (our end has begun
//! the connection) and the mark of connection tracking (u32); an owner is a user and a group (u32 each).
//! TLS is what the kernel encrypts and decrypts (kTLS): `version`, `cipher` (u16 each, as in `linux/tls.h`), bits (u8): 1 it encrypts, 2 it
//! decrypts, 4 `TLS_TX_ZEROCOPY_RO`, 8 `TLS_RX_EXPECT_NO_PAD`; the keys of the directions that there are, as the structures of
//! `linux/tls.h` have them behind version and cipher: IV, key, salt, number of the next record; then for each record that is decrypted and not read its
//! type (u8) and length (u32). The bytes of those records come first in the receive queue; `inq_len` counts what follows them.
//!
//! **Growing.** Nothing that is there changes its meaning. A minor version adds records and fields: what can be ignored comes without
//! the critical bit and is skipped by older readers, what cannot be ignored comes with it and is refused by them. A new
//! major version is refused as a whole.
//!
//! **Limits.** A queue is at most 64 MiB, everything else of a connection 1 MiB together, with 256 settings; a text 255 bytes, a note 2 KiB, a state 16 MiB. A reader takes memory
//! as bytes arrive, never as a length promises.
//!
//! # Hand-over
//!
//! ```text
//!   source                                              target
//!     │─── BEGIN (answers expected) ─────────────────────▶│ whatever takes time, or can be refused by now
//!     │◀───────────────────────────────────── preamble ───│ ready to begin
//!     │ lock, stop the process, pause, save               │
//!     │─── CONNECTION 1 ─────────────────────────────────▶│ restore, in repair and locked: silent
//!     │◀───────────────────────────────────── READY 1 ────│
//!     │─── CONNECTION 2 ─────────────────────────────────▶│ cannot
//!     │◀────────────────────────── REFUSED 2 (reason) ────│
//!     │ resume 2: it stays here                           │
//!     │─── HELD 1 (packets that the lock held) ──────────▶│ kept
//!     │ detach 1: only its value is left here             │
//!     │─── COMMIT 1 ─────────────────────────────────────▶│
//!     │◀───────────────────────────────────── TAKEN 1 ────│ then resume, let the held packets in
//!     │ unlock 1                                          │
//!     │─── END ──────────────────────────────────────────▶│
//!     │◀───────────────────────────────────────── END ────│
//! ```
//!
//! The state that an application keeps about a connection is a record right before the CONNECTION. Both directions are streams of
//! their own, each with preamble and END. The target answers BEGIN with its preamble, and the source disturbs nobody before that has come. Any number of connections is under way at once, numbered in ascending order; each goes
//! its own way, by number. The source says ABORT instead of COMMIT to keep a connection that the target has ready.
//! A sender must read the answers meanwhile: with both pipes full, both ends would wait for ever.
//!
//! Which end has the connection when the other one is gone (its stream has ended before END):
//!
//! | The last word that passed | source gone | target gone |
//! |---|---|---|
//! | nothing, CONNECTION | target closes it, silently | source resumes it |
//! | READY | target closes it, silently | source resumes it |
//! | COMMIT | target says TAKEN, which nobody hears, and has it, if it can | source restores it from its value: nothing was resumed there |
//! | TAKEN | target has it | it had it |
//!
//! So the target resumes only what it has said TAKEN for, and the source never lets both go and stay: once it has said
//! COMMIT, it takes a connection back only from a target that is *gone* or says REFUSED, not from a slow one. A relay between the two that
//! breaks while both ends live on, between COMMIT and TAKEN, leaves no certainty to anybody; a source that knows of such a relay
//! reports the connection lost rather than risk two.
//!
//! **In one network namespace** the socket of the source is in the way of a new one until the COMMIT. There the target says READY for
//! what is valid, restores it behind the COMMIT, and answers TAKEN then; or REFUSED, and the source restores it from its value.
//!
//! **REFUSED is final.** The target may say it of any connection that it has not said TAKEN of: of one whose STATE or HELD record is damaged,
//! or needs a newer version; of all that wait when the source takes too long, or somebody ends the target. Whatever comes about that
//! connection afterwards is passed over, a COMMIT that is on its way too: then the source takes the connection back.
//!
//! BEGIN tells the place of the source. Only at the same place the socket that is in the way of a new one can be the source's;
//! elsewhere the target refuses what it finds in use before it locks anything.
//!
//! At the place of the source the target says so (HERE): both share its locks, and the source need not stay silent about what has
//! left. Elsewhere it keeps its place to itself, so that nobody can pretend to be there. What the target has to tell people it tells
//! the source (NOTE), where that passes it on: up to its END.
//!
//! A source that only asks sends TRIAL instead of CONNECTION: the target says READY or REFUSED, and nothing has happened.
//!
//! Without a way back (BEGIN without answers) the source detaches and commits unasked; it cannot know what became of it.
//!
//! ```
//! use soccr_image::stream::{Message, Reader, Writer};
//!
//! let mut answers = Writer::new(Vec::new())?;
//! answers.send(&Message::Ready { connection: 1 })?;
//! answers.send(&Message::Refused { connection: 2, reason: "the port is taken here".into() })?;
//! let bytes = answers.finish()?;
//!
//! let mut reader = Reader::new(&bytes[..])?;
//! assert_eq!(reader.receive()?, Some(Message::Ready { connection: 1 }));
//! assert!(matches!(reader.receive()?, Some(Message::Refused { connection: 2, .. })));
//! assert_eq!(reader.receive()?, None);
//! # Ok::<(), soccr_image::Error>(())
//! ```

mod connection;
mod decoder;
mod field;
mod message;
mod reader;
mod record;
mod tls;
mod writer;

use std::io::{Read, Write};

use soccr::Connection;

pub use decoder::{Decoded, Decoder};
pub use message::{Message, Place, Steered};
pub use reader::Reader;
pub use writer::Writer;

use crate::error::{Error, Result};

/// The longest name or reason, in bytes.
pub const TEXT_LIMIT: usize = 255;

/// The longest note, in bytes.
pub const NOTE_LIMIT: usize = 2048;

/// The longest state of an application that goes with a connection, in bytes.
pub const STATE_LIMIT: usize = 16 << 20;

/// Writes one connection, as a stream of one.
///
/// Everything but the queues goes out in few small writes: a file or a pipe needs no buffer around it.
///
/// # Errors
/// [`Invalid`](crate::ErrorKind::Invalid) and nothing written where the connection contradicts itself; else what `writer` says.
pub fn write(writer: impl Write, connection: &Connection) -> Result<()> {
    Writer::of_one(writer, connection).map_err(Error::of_all)?.finish().map(drop)
}

/// Reads a stream of exactly one connection, as [`write()`] makes it, and nothing beyond its end.
///
/// # Errors
/// Bytes of another format, damaged, cut off, or of a connection that contradicts itself: see [`ErrorKind`](crate::ErrorKind).
pub fn read(reader: impl Read) -> Result<Connection> {
    let mut reader = Reader::new(reader)?;
    let mut found = None;
    while let Some(message) = reader.receive().map_err(Error::of_all)? {
        match message {
            Message::Connection { connection, .. } if found.is_none() => found = Some(connection),
            // Only a hand-over has somebody to give it to.
            Message::State { critical: false, .. } => {}
            Message::Connection { .. } => return Err(Error::invalid("holds more than one connection")),
            _ => return Err(Error::invalid("is a hand-over in progress, no image of one connection")),
        }
    }
    found.ok_or_else(|| Error::invalid("holds no connection"))
}
