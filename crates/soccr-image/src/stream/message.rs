//! What the two ends of a stream say to each other.

use std::net::IpAddr;

use soccr::steer::Tunnel;
use soccr::{Connection, Flow};

/// Where connections are: two ends at the same place see each other's sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The machine since it was booted: `/proc/sys/kernel/random/boot_id`.
    pub host: [u8; 16],
    /// The network namespace: device and inode, as stat(2) tells them of `/proc/PID/ns/net`.
    pub namespace: [u64; 2],
}

/// How packets follow connections that leave a host, see [`soccr::steer`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Steered {
    /// Addresses of the source, as the target reaches it: one for each address family, at most.
    pub from: Vec<IpAddr>,
    /// They go through this tunnel, as the source sees it. The target has to make its end.
    pub tunnel: Option<Tunnel>,
    /// What the target answers has to go back through the source.
    pub answers: bool,
}

/// A record of a stream, taken apart. `connection` is its number in the stream; 0 is the stream as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(clippy::large_enum_variant, reason = "most are connections: a box would cost more than it saves")]
pub enum Message {
    /// A hand-over begins.
    Begin {
        /// How many connections will come, as far as the source knows.
        connections: u32,
        /// There is a way back, and the source waits for what comes on it.
        answers: bool,
        /// The source passes on what the target has to tell people: see [`Note`](Self::Note).
        notes: bool,
        /// Where the connections are now, as far as the source can tell.
        place: Option<Place>,
        /// How packets follow the connections that leave the source, if they do.
        steered: Option<Steered>,
    },
    /// A connection.
    Connection {
        /// Its number in this stream, not 0.
        id: u32,
        /// What people call it, such as `pid 4711 fd 5`; may be empty.
        name: String,
        /// The connection itself.
        connection: Connection,
    },
    /// What the application knows about a connection: bytes that only it understands. It comes right before the connection.
    State {
        /// Whose state.
        connection: u32,
        /// A target that cannot pass it on must not take the connection.
        critical: bool,
        /// Up to [`STATE_LIMIT`](super::STATE_LIMIT).
        bytes: Vec<u8>,
    },
    /// Raw IP packets of the connection that the lock has held back, in their order. There may be several of these.
    Held {
        /// Whose packets.
        connection: u32,
        /// From the first byte of the IP header on.
        packets: Vec<Vec<u8>>,
    },
    /// The source has let the connection go: it is the target's.
    Commit {
        /// Which one.
        connection: u32,
    },
    /// The source keeps the connection: the target forgets it.
    Abort {
        /// Which one.
        connection: u32,
        /// Why, for people.
        reason: String,
    },
    /// The target has the connection restored and silent: the source may let it go.
    Ready {
        /// Which one.
        connection: u32,
    },
    /// The target cannot take the connection: it stays with the source.
    Refused {
        /// Which one.
        connection: u32,
        /// Why, for people.
        reason: String,
    },
    /// The target resumes the connection now: the source forgets it.
    Taken {
        /// Which one.
        connection: u32,
    },
    /// The target is at the place that the source has named. There a connection is never without a socket or a lock.
    Here {
        /// The place.
        place: Place,
    },
    /// Something that the target has to tell people, who may only see what the source tells.
    Note {
        /// Up to [`NOTE_LIMIT`](super::NOTE_LIMIT), for people.
        text: String,
        /// The target has failed: it has not done with all connections what it was to do.
        failed: bool,
    },
    /// Would the target have this connection? It answers as if it had come, and nothing happens. Targets that do not know the question do
    /// not answer.
    Trial {
        /// Which one.
        connection: u32,
        /// What people call it.
        name: String,
        /// The addresses that it has at the source.
        flow: Flow,
    },
}
