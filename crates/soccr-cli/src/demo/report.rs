//! The account of the demonstration: for people as it happens, for machines at the end.

use std::io::Write;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use serde::Serialize;
use soccr_lab::Host;

use crate::exit;

use super::mover::{Ends, Move};
use super::network::{Network, name};

pub(super) const DIM: Style = Style::new().dimmed();
pub(super) const BOLD: Style = Style::new().bold();
pub(super) const GOOD: Style = AnsiColor::Green.on_default().bold();
pub(super) const BAD: Style = AnsiColor::Red.on_default().bold();

/// The most rows for people: of many moves only some are printed.
const ROWS: u32 = 40;

/// Collects the moves, and prints them unless the account is for a machine.
#[derive(Debug)]
pub(crate) struct Report {
    json: bool,
    moves: Vec<Move>,
    /// The longest silence between each two moves.
    rests: Vec<Duration>,
}

impl Report {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, moves: Vec::new(), rests: Vec::new() }
    }

    /// The same traffic without a move had this silence.
    pub(crate) fn rested(&mut self, silence: Duration) {
        self.rests.push(silence);
    }

    /// Draws the network.
    pub(crate) fn network(&self, network: &Network) -> Result<()> {
        if self.json {
            return Ok(());
        }
        let (peer, hosts) = (network.peer().v4, network.hosts());
        let what = match network {
            Network::Shared(_) => "two hosts with one address",
            Network::Steered(_) => {
                "three hosts with three addresses, of which A keeps that of the connection"
            }
        };
        say(format_args!("One TCP connection, {what}, a new process for every move."))?;
        let router = format!("{:─<35}", format!("  peer  {peer} ─── router "));
        let last = hosts.len() - 1;
        for (place, host) in hosts.iter().enumerate() {
            let before = if place == last / 2 { &*router } else { "" };
            let corner = match place {
                0 => "┌",
                _ if place == last => "└",
                _ => "├",
            };
            let corner = if before.is_empty() {
                corner
            } else if place == 0 {
                "┬"
            } else {
                "┼"
            };
            say(format_args!("{DIM}{before:<35}{corner}── {}  host {}{DIM:#}", host.v4, name(place)))?;
        }
        say(format_args!(""))?;
        say(format_args!(
            "{BOLD}{:>5}  {:<5}  {:>10}  {:>12}  {:>12}  {:>14}{BOLD:#}",
            "move", "host", "locked", "unread", "unacked", "peer's silence"
        ))
    }

    /// Adds a move.
    pub(crate) fn moved(&mut self, number: u32, moved: &Move) -> Result<()> {
        self.moves.push(*moved);
        if self.json || (number > ROWS && !number.is_multiple_of(50)) {
            return Ok(());
        }
        let arrow = format!("{} → {}", name(moved.from), name(moved.to));
        say(format_args!(
            "{number:>5}  {arrow:<5}  {:>7.2} ms  {:>12}  {:>12}  {:>11.2} ms",
            milliseconds(moved.lock),
            bytes(moved.unread.into()),
            bytes(moved.unacknowledged.into()),
            milliseconds(moved.silence),
        ))
    }

    /// The figures of all moves.
    pub(crate) fn summary(&self, summary: &Summary) -> Result<()> {
        if self.json {
            // A struct of numbers cannot fail to become JSON.
            return say(format_args!("{}", serde_json::to_string(summary).unwrap_or_default()));
        }
        let Summary { moves, bytes_lost, resets, mss_before, mss_after, .. } = summary;
        let style = if summary.is_clean() { GOOD } else { BAD };
        say(format_args!(""))?;
        say(format_args!(
            "{style}{moves} moves, {} carried and compared, {bytes_lost} bytes lost, {resets} resets{style:#}",
            bytes(summary.bytes)
        ))?;
        say(format_args!(
            "locked for {:.2} ms (median); the peer's longest silence {:.2} ms (median), {:.2} ms (maximum),",
            summary.lock_ms_median, summary.stall_ms_median, summary.stall_ms_max,
        ))?;
        say(format_args!(
            "without a move {:.2} ms (median), {:.2} ms (maximum); MSS {mss_before} before, {mss_after} after",
            summary.rest_ms_median, summary.rest_ms_max,
        ))
    }
}

/// The result.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    moves: usize,
    bytes: u64,
    bytes_lost: u64,
    resets: u64,
    stall_ms_median: f64,
    stall_ms_max: f64,
    rest_ms_median: f64,
    rest_ms_max: f64,
    lock_ms_median: f64,
    lock_ms_max: f64,
    mss_before: u32,
    mss_after: u32,
}

impl Summary {
    pub(crate) fn new(network: &Network, report: &Report, ends: &Ends) -> Self {
        let Ends { peer, program, mss_before, mss_after } = *ends;
        let lost = [peer.written.abs_diff(program.read), program.written.abs_diff(peer.read)];
        let moves = report.moves.iter();
        let locks = sorted(moves.clone().map(|moved| moved.lock));
        let stalls = sorted(moves.clone().map(|moved| moved.silence));
        let rests = sorted(report.rests.iter().copied());
        Self {
            moves: moves.len(),
            bytes: peer.read + program.read,
            bytes_lost: lost.iter().sum::<u64>() + peer.differences + program.differences,
            resets: network.hosts().into_iter().chain([network.peer()]).map(resets_sent).sum(),
            stall_ms_median: median(&stalls),
            stall_ms_max: stalls.last().copied().unwrap_or_default(),
            rest_ms_median: median(&rests),
            rest_ms_max: rests.last().copied().unwrap_or_default(),
            lock_ms_median: median(&locks),
            lock_ms_max: locks.last().copied().unwrap_or_default(),
            mss_before,
            mss_after,
        }
    }

    /// Nothing was lost and nobody was reset.
    pub(crate) fn is_clean(&self) -> bool {
        self.bytes_lost == 0 && self.resets == 0
    }
}

/// Resets that a host has sent, by the kernel's own count (`OutRsts` in snmp(5)); counted as one where it cannot be read.
pub(super) fn resets_sent(host: &Host) -> u64 {
    let table = host.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp")).unwrap_or_default();
    let mut rows = table.lines().filter(|line| line.starts_with("Tcp:")).map(|line| line.split_whitespace());
    let (Some(names), Some(mut values)) = (rows.next(), rows.next()) else { return 1 };
    let column = names.into_iter().position(|name| name == "OutRsts");
    column.and_then(|column| values.nth(column)?.parse().ok()).unwrap_or(1)
}

fn sorted(times: impl Iterator<Item = Duration>) -> Vec<f64> {
    let mut times: Vec<f64> = times.map(milliseconds).collect();
    times.sort_by(f64::total_cmp);
    times
}

fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn bytes(count: u64) -> String {
    match count {
        0..10_000 => format!("{count} B"),
        10_000..10_000_000 => format!("{} kB", count / 1000),
        _ => format!("{} MB", count / 1_000_000),
    }
}

/// Prints a line, in colour on a terminal only.
pub(super) fn say(line: std::fmt::Arguments<'_>) -> Result<()> {
    let mut out = anstream::AutoStream::auto(std::io::stdout());
    exit::written(writeln!(out, "{line}")).map(drop)
}
