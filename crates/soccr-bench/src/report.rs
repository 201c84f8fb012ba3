//! The table, and the JSON object.

use std::time::Duration;

use serde_json::{Value, json};

use crate::machine::Machine;
use crate::statistics::Samples;

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Row {
    scenario: &'static str,
    what: String,
    samples: usize,
    median: Duration,
    p99: Duration,
    max: Duration,
    floor: Option<Duration>,
    ratio: Option<f64>,
    bytes: Option<usize>,
    /// Bits per second before and after a move.
    goodput: Option<[f64; 2]>,
}

impl Row {
    pub(crate) fn new(scenario: &'static str, what: impl Into<String>, samples: &Samples) -> Self {
        Self {
            scenario,
            what: what.into(),
            samples: samples.count(),
            median: samples.median(),
            p99: samples.p99(),
            max: samples.max(),
            floor: None,
            ratio: None,
            bytes: None,
            goodput: None,
        }
    }

    /// Not a time, but memory, against what it had to be at least without streaming.
    pub(crate) fn bytes(scenario: &'static str, what: impl Into<String>, bytes: usize, floor: usize) -> Self {
        let none = Self::new(scenario, what, &Samples::default());
        Self { bytes: Some(bytes), ratio: Some(bytes as f64 / floor as f64), samples: 1, ..none }
    }

    /// Beside the bare system calls, or what there is without a move.
    pub(crate) fn against(self, floor: &Samples) -> Self {
        let floor = floor.median();
        Self { floor: Some(floor), ratio: Some(self.median.as_secs_f64() / floor.as_secs_f64()), ..self }
    }

    /// Not a time, but bits per second before and after a move.
    pub(crate) fn goodput(
        scenario: &'static str,
        what: impl Into<String>,
        samples: usize,
        goodput: [f64; 2],
    ) -> Self {
        let none = Self::new(scenario, what, &Samples::default());
        Self { goodput: Some(goodput), ratio: Some(goodput[1] / goodput[0]), samples, ..none }
    }

    fn json(&self) -> Value {
        let microseconds = |time: Duration| time.as_nanos() as f64 / 1e3;
        json!({
            "scenario": self.scenario,
            "what": self.what,
            "samples": self.samples,
            "median_us": microseconds(self.median),
            "p99_us": microseconds(self.p99),
            "max_us": microseconds(self.max),
            "floor_us": self.floor.map(microseconds),
            "ratio": self.ratio,
            "bytes": self.bytes,
            "goodput_bits": self.goodput,
        })
    }
}

/// Rows, printed as they come or all at once as JSON.
#[derive(Debug)]
pub(crate) struct Report {
    machine: Machine,
    json: bool,
    rows: Vec<Row>,
    notes: Vec<String>,
}

const WIDTHS: [usize; 2] = [8, 48];

impl Report {
    pub(crate) fn new(machine: Machine, json: bool) -> Self {
        if !json {
            println!("{machine}\n");
            let [scenario, what] = WIDTHS;
            println!(
                "{:scenario$} {:what$} {:>6} {:>10} {:>10} {:>10} {:>10} {:>6}",
                "scenario", "", "n", "median", "p99", "max", "floor", "ratio"
            );
        }
        Self { machine, json, rows: Vec::new(), notes: Vec::new() }
    }

    pub(crate) fn add(&mut self, row: Row) {
        if !self.json {
            print(&row);
        }
        self.rows.push(row);
    }

    /// What could not be measured, and why.
    pub(crate) fn note(&mut self, note: String) {
        if !self.json {
            println!("{note}");
        }
        self.notes.push(note);
    }

    pub(crate) fn finish(self) {
        if self.json {
            let rows: Vec<Value> = self.rows.iter().map(Row::json).collect();
            println!("{}", json!({ "machine": self.machine.json(), "results": rows, "notes": self.notes }));
        } else {
            println!(
                "\nfloor: the same bare system calls, interleaved in the same run (stall: the same traffic without a move); \
                 ratio: of the medians"
            );
        }
    }
}

fn print(row: &Row) {
    let [scenario, what] = WIDTHS;
    let mut median = time(row.median);
    let [mut p99, mut max] = [row.p99, row.max].map(time);
    let mut floor = row.floor.map_or(String::new(), time);
    if row.bytes.is_some() || row.goodput.is_some() {
        (p99, max) = Default::default();
    }
    if let Some(bytes) = row.bytes {
        median = format!("{} KiB", bytes >> 10);
    }
    if let Some(goodput) = row.goodput {
        [floor, median] = goodput.map(|bits| format!("{:.1} Mb/s", bits / 1e6));
    }
    let ratio = row.ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"));
    println!(
        "{:scenario$} {:what$} {:>6} {median:>10} {p99:>10} {max:>10} {floor:>10} {ratio:>6}",
        row.scenario, row.what, row.samples,
    );
}

fn time(time: Duration) -> String {
    match time.as_nanos() as f64 {
        nanoseconds if nanoseconds < 1e6 => format!("{:.1} µs", nanoseconds / 1e3),
        nanoseconds if nanoseconds < 1e9 => format!("{:.2} ms", nanoseconds / 1e6),
        nanoseconds => format!("{:.2} s", nanoseconds / 1e9),
    }
}
