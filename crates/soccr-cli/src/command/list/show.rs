//! Rows as a table, or as JSON.

use std::io::{self, BufWriter, Write};
use std::time::Duration;

use super::row::Row;
use crate::show::table::{Align, Table, printable};

pub(super) fn json(rows: &[Row]) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    out.write_all(b"[")?;
    for (i, row) in rows.iter().enumerate() {
        out.write_all(if i == 0 { b"\n" } else { b",\n" })?;
        serde_json::to_writer(&mut out, row)?;
    }
    out.write_all(b"\n]\n")?;
    out.flush()
}

pub(super) fn table(rows: &[Row]) -> io::Result<()> {
    use Align::{Left, Right};
    let mut table = Table::new([
        ("PID", Right),
        ("FD", Right),
        ("PROCESS", Left),
        ("STATE", Left),
        ("LOCAL", Left),
        ("REMOTE", Left),
        ("RECV-Q", Right),
        ("SEND-Q", Right),
        ("IDLE", Right),
        ("RTT", Right),
        ("CWND", Right),
        ("RETR", Right),
        ("TIMER", Left),
        ("CC", Left),
        ("SAVE", Left),
    ]);
    table.narrow(&["TIMER", "CWND", "RTT", "RETR", "CC", "IDLE", "SEND-Q", "RECV-Q", "FD"]);
    for row in rows {
        let owner = row.processes.first();
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        let traffic = row.traffic.as_ref();
        let others = match row.processes.len() {
            0 | 1 => String::new(),
            count => format!(" +{}", count - 1),
        };
        table.row([
            or_dash(owner.map(|owner| owner.pid.to_string())),
            or_dash(owner.map(|owner| owner.fd.to_string())),
            or_dash(owner.map(|owner| printable(&owner.name) + &others)),
            row.state.into(),
            row.local.to_string(),
            row.remote.map_or("*".into(), |remote| remote.to_string()),
            row.receive_queue.to_string(),
            row.send_queue.to_string(),
            or_dash(traffic.map(|traffic| rough(traffic.idle()))),
            or_dash(traffic.map(|traffic| duration(traffic.rtt()))),
            or_dash(traffic.map(|traffic| traffic.cwnd().to_string())),
            or_dash(traffic.map(|traffic| traffic.retransmissions().to_string())),
            or_dash(row.timer.as_ref().map(|timer| {
                format!("{} {}", timer.name, duration(Duration::from_millis(timer.expires_ms)))
            })),
            or_dash(row.congestion_control.clone()),
            can_be_saved(row),
        ]);
    }
    table.print()
}

fn can_be_saved(row: &Row) -> String {
    let tls = row.tls.as_ref().map_or(String::new(), |tls| format!(" ({tls})"));
    match (&row.why_not, &row.nat) {
        (Some(reason), _) => format!("{reason}{tls}"),
        (None, Some(nat)) => format!("yes, but {nat}{tls}"),
        (None, None) => format!("yes{tls}"),
    }
}

/// `87µs`, `1.2ms`, `20ms`, `1.5s`.
pub(crate) fn duration(duration: Duration) -> String {
    let micros = duration.as_micros();
    match micros {
        0..1000 => format!("{micros}µs"),
        1000..10_000 => format!("{:.1}ms", micros as f64 / 1e3),
        10_000..1_000_000 => format!("{}ms", micros / 1000),
        _ => format!("{:.1}s", micros as f64 / 1e6),
    }
}

/// `0s`, `59s`, `5m`, `36h`, `20d`.
fn rough(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..3600 => format!("{}m", seconds / 60),
        seconds @ 3600..172_800 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86400),
    }
}
