//! One move as a time–sequence diagram: every segment that the peer saw around it, as SVG.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use soccr_lab::{Host, Sniffer};

use super::mover::Move;
use super::network::name;
use super::wire::now;

/// Records what passes at the peer.
#[derive(Debug)]
pub(crate) struct Camera {
    sniffer: Sniffer,
    /// Nanoseconds of the clock of packets at the beginning of the programs' clock.
    epoch: i128,
}

/// A move, as the peer's link showed it.
#[derive(Debug)]
pub(crate) struct Picture {
    moved: Move,
    to_program: Lane,
    to_peer: Lane,
}

/// One direction. Times are milliseconds after the lock, positions are bytes after the first.
#[derive(Debug, Default)]
struct Lane {
    data: Vec<(f64, f64, f64)>,
    acknowledged: Vec<(f64, f64)>,
    origin: Option<u32>,
}

impl Camera {
    pub(crate) fn at(peer: &Host) -> Result<Self> {
        let sniffer = Sniffer::on(&peer.namespace, "eth0").context("a look at the peer's link")?;
        let real = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as i128;
        Ok(Self { sniffer, epoch: real - i128::from(now()) })
    }

    /// What has passed since the last call, around this move.
    pub(crate) fn shoot(&mut self, peer: &Host, moved: Move) -> Result<Picture> {
        let segments = self.sniffer.timed_segments().context("a look at the peer's link")?;
        let mut picture = Picture { moved, to_program: Lane::default(), to_peer: Lane::default() };
        let around = picture.around();
        for (time, segment) in segments {
            let nanoseconds = time.duration_since(UNIX_EPOCH)?.as_nanos() as i128 - self.epoch;
            let time = (nanoseconds - i128::from(moved.locked_at)) as f64 / 1e6;
            if time < -around || time > picture.locked() + around {
                continue;
            }
            let from_peer = segment.source.ip() == peer.v4;
            let Picture { to_program, to_peer, .. } = &mut picture;
            let (lane, opposite) = if from_peer { (to_program, to_peer) } else { (to_peer, to_program) };
            lane.data(time, segment.seq, segment.payload_len);
            opposite.acknowledged(time, segment.ack);
        }
        Ok(picture)
    }
}

impl Lane {
    fn position(&mut self, sequence: u32) -> f64 {
        let origin = *self.origin.get_or_insert(sequence);
        f64::from(sequence.wrapping_sub(origin).cast_signed())
    }

    fn data(&mut self, time: f64, sequence: u32, length: usize) {
        if length != 0 {
            let start = self.position(sequence);
            self.data.push((time, start, start + length as f64));
        }
    }

    fn acknowledged(&mut self, time: f64, sequence: u32) {
        let position = self.position(sequence);
        self.acknowledged.push((time, position));
    }

    /// The lowest and the highest position.
    fn range(&self) -> (f64, f64) {
        let ends = self.data.iter().flat_map(|(_, start, end)| [*start, *end]);
        let positions = ends.chain(self.acknowledged.iter().map(|(_, position)| *position));
        positions.fold((f64::MAX, f64::MIN), |(low, high), position| (low.min(position), high.max(position)))
    }
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 470.0;
const LEFT: f64 = 24.0;
const RIGHT: f64 = 700.0;
const LANES: [(f64, f64); 2] = [(76.0, 236.0), (270.0, 430.0)];

/// Legible on light and on dark ground.
const STYLE: &str = "text{font:13px system-ui,sans-serif;fill:#57606a}.title{font-size:15px;font-weight:600}\
.data{stroke:#2383e2;stroke-width:3}.ack{fill:none;stroke:#d9730d;stroke-width:1.5}.lock{fill:#8c959f;fill-opacity:.25}\
.grid{fill:none;stroke:#8c959f;stroke-opacity:.35}@media(prefers-color-scheme:dark){text{fill:#adbac7}}";

impl Picture {
    pub(crate) fn moved(&self) -> Move {
        self.moved
    }

    /// Milliseconds.
    fn locked(&self) -> f64 {
        self.moved.lock.as_secs_f64() * 1e3
    }

    /// How many milliseconds before and after the lock are shown.
    fn around(&self) -> f64 {
        (self.locked() * 2.0).max(4.0)
    }

    pub(crate) fn write(&self, file: &mut impl std::io::Write) -> Result<()> {
        let svg = self.svg().context("writing to a string")?;
        Ok(file.write_all(svg.as_bytes())?)
    }

    fn svg(&self) -> Result<String, std::fmt::Error> {
        let (locked, around) = (self.locked(), self.around());
        let x = |time: f64| LEFT + (time + around) / (locked + 2.0 * around) * (RIGHT - LEFT);
        let [from, to] = [self.moved.from, self.moved.to].map(name);
        let mut svg = String::new();
        writeln!(
            svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">"#
        )?;
        let title = format!("A connection moves from host {from} to host {to}, as its peer sees it");
        writeln!(svg, "<title>{title}</title><style>{STYLE}</style>")?;
        writeln!(svg, r#"<text class="title" x="{LEFT}" y="22">{title}</text>"#)?;
        writeln!(
            svg,
            r#"<path class="data" d="M{LEFT} 42h22"/><text x="{}" y="46">a segment with data</text>"#,
            LEFT + 30.0
        )?;
        writeln!(svg, r#"<path class="ack" d="M210 42h22"/><text x="240" y="46">acknowledged</text>"#)?;
        let lanes = [("from the peer", &self.to_program), ("to the peer", &self.to_peer)];
        for ((label, lane), (top, bottom)) in lanes.into_iter().zip(LANES) {
            let (low, high) = lane.range();
            let y = |position: f64| bottom - (position - low) / (high - low).max(1.0) * (bottom - top);
            let [start, end] = [x(0.0), x(locked)];
            writeln!(
                svg,
                r#"<rect class="lock" x="{start:.1}" y="{top}" width="{:.1}" height="{}"/>"#,
                end - start,
                bottom - top
            )?;
            writeln!(svg, r#"<path class="grid" d="M{LEFT} {top}H{RIGHT}V{bottom}H{LEFT}Z"/>"#)?;
            writeln!(
                svg,
                r#"<text x="{LEFT}" y="{}">{label}: {:.0} kB</text>"#,
                top - 8.0,
                (high - low) / 1e3
            )?;
            let mut line = String::new();
            for (number, (time, position)) in lane.acknowledged.iter().enumerate() {
                match number {
                    0 => write!(line, "M{:.1} {:.1}", x(*time), y(*position))?,
                    _ => write!(line, "H{:.1}V{:.1}", x(*time), y(*position))?,
                }
            }
            writeln!(svg, r#"<path class="ack" d="{line}"/>"#)?;
            let mut data = String::new();
            for (time, start, end) in &lane.data {
                write!(data, "M{:.1} {:.1}V{:.1}", x(*time), y(*start), y(*end))?;
            }
            writeln!(svg, r#"<path class="data" d="{data}"/>"#)?;
        }
        let middle = x(locked / 2.0);
        writeln!(
            svg,
            r#"<text x="{middle:.1}" y="{}" text-anchor="middle">locked for {locked:.2} ms</text>"#,
            LANES[0].0 - 8.0
        )?;
        let bottom = LANES[1].1 + 20.0;
        writeln!(svg, r#"<text x="{LEFT}" y="{bottom}">{:.1} ms before: host {from}</text>"#, around)?;
        writeln!(
            svg,
            r#"<text x="{RIGHT}" y="{bottom}" text-anchor="end">host {to}: {:.1} ms after</text>"#,
            around
        )?;
        writeln!(svg, "</svg>")?;
        Ok(svg)
    }
}
