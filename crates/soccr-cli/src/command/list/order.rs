//! What `soccr list` shows first.

use std::cmp::Reverse;

use super::row::Row;

/// A column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Order {
    Pid,
    Local,
    Remote,
    RecvQ,
    SendQ,
    Idle,
    Rtt,
    Cwnd,
    Retr,
}

impl Order {
    /// Equal rows keep the order in which the kernel lists them.
    pub(super) fn sort(self, rows: &mut [Row]) {
        let traffic =
            |row: &Row, value: fn(&crate::traffic::Traffic) -> u64| Reverse(row.traffic.as_ref().map(value));
        match self {
            Self::Pid => rows.sort_by_key(|row| row.processes.first().map(|owner| (owner.pid, owner.fd))),
            Self::Local => rows.sort_by_key(|row| row.local),
            Self::Remote => rows.sort_by_key(|row| row.remote),
            Self::RecvQ => rows.sort_by_key(|row| Reverse(row.receive_queue)),
            Self::SendQ => rows.sort_by_key(|row| Reverse(row.send_queue)),
            Self::Idle => rows.sort_by_key(|row| traffic(row, |traffic| traffic.idle().as_millis() as u64)),
            Self::Rtt => rows.sort_by_key(|row| traffic(row, |traffic| traffic.rtt().as_micros() as u64)),
            Self::Cwnd => rows.sort_by_key(|row| traffic(row, |traffic| traffic.cwnd().into())),
            Self::Retr => rows.sort_by_key(|row| traffic(row, |traffic| traffic.retransmissions().into())),
        }
    }
}
