//! Connections to measure.

use std::time::Duration;

use anyhow::Result;
use soccr::Connection;
use soccr::connection::Flow;
use soccr_lab::{Case, Family, Made, Pair, State};

/// The queues that are tried: their name, bytes received, bytes written and not sent.
pub(crate) const QUEUES: [(&str, usize, usize); 5] = [
    ("empty", 0, 0),
    ("64 KiB to read", 64 << 10, 0),
    ("1 MiB to read", 1 << 20, 0),
    ("64 KiB to send", 0, 64 << 10),
    ("1 MiB to send", 0, 1 << 20),
];

/// The states that are tried, and their names.
pub(crate) const STATES: [(State, &str); 8] = [
    (State::Established, "ESTABLISHED"),
    (State::CloseWait, "CLOSE_WAIT"),
    (State::FinWait1, "FIN_WAIT1"),
    (State::FinWait2, "FIN_WAIT2"),
    (State::Closing, "CLOSING"),
    (State::LastAck, "LAST_ACK"),
    (State::Close, "CLOSE"),
    (State::SynSent, "SYN_SENT"),
];

/// How long one line of the table may take.
pub(crate) fn budget(full: bool) -> Duration {
    Duration::from_millis(if full { 2000 } else { 300 })
}

/// Every state with every queue that it can have, over IPv4.
pub(crate) fn cases() -> impl Iterator<Item = (String, Case)> {
    STATES
        .into_iter()
        .flat_map(|(state, name)| {
            QUEUES.into_iter().map(move |(queue, received, unsent)| {
                let case = Case { family: Family::V4, state, received, sent: 0, unsent };
                (format!("{name}, {queue}"), case)
            })
        })
        .filter(|(_, case)| case.is_possible())
}

/// Makes a connection, our end in the calling thread's namespace `pair.a`.
pub(crate) fn make(pair: &Pair, case: &Case) -> (Made, Flow) {
    let made = case.make(&pair.a, &pair.b);
    let flow = Flow { local: made.local, remote: made.remote };
    (made, flow)
}

/// Reads a connection.
pub(crate) fn value(made: &Made, flow: Flow) -> Result<Connection> {
    let paused = soccr::pause(&made.socket)?.with_peer(flow.remote);
    Ok(paused.save()?)
}
