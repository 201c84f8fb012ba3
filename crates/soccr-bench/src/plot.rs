//! Line plots as SVG, legible on light and on dark ground.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// How the horizontal axis is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    Linear,
    Logarithmic,
}

/// A plot with a few lines.
#[derive(Debug)]
pub(crate) struct Plot {
    title: &'static str,
    labels: [&'static str; 2],
    scale: Scale,
    series: Vec<(&'static str, Vec<(f64, f64)>)>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 700.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 312.0;
/// Of the same brightness, so that neither ground swallows one.
const COLOURS: [&str; 3] = ["#d9730d", "#2383e2", "#448361"];

const STYLE: &str = "text{font:13px system-ui,sans-serif;fill:#57606a}.title{font-size:15px;font-weight:600}\
.grid{stroke:#8c959f;stroke-opacity:.35}.line{fill:none;stroke-width:2;stroke-linejoin:round}\
@media(prefers-color-scheme:dark){text{fill:#adbac7}}";

impl Plot {
    pub(crate) fn new(title: &'static str, x: &'static str, y: &'static str, scale: Scale) -> Self {
        Self { title, labels: [x, y], scale, series: Vec::new() }
    }

    pub(crate) fn series(&mut self, name: &'static str, points: Vec<(f64, f64)>) {
        self.series.push((name, points));
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let svg = self.svg().context("writing to a string")?;
        fs::write(path, svg).with_context(|| path.display().to_string())
    }

    fn svg(&self) -> Result<String, std::fmt::Error> {
        let points = || self.series.iter().flat_map(|(_, points)| points);
        let along = |x: f64| if self.scale == Scale::Logarithmic { x.log10() } else { x };
        let (first, last) = points()
            .fold((f64::MAX, f64::MIN), |(low, high), (x, _)| (low.min(along(*x)), high.max(along(*x))));
        let highest = points().fold(0.0, |high: f64, (_, y)| high.max(*y));
        let step = step(highest);
        let top = (highest / step).ceil().max(1.0) * step;
        let x_at = |x: f64| LEFT + (along(x) - first) / (last - first).max(1e-9) * (RIGHT - LEFT);
        let y_at = |y: f64| BOTTOM - y / top * (BOTTOM - TOP);

        let mut svg = String::new();
        writeln!(
            svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">"#
        )?;
        writeln!(svg, "<title>{}</title><style>{STYLE}</style>", self.title)?;
        writeln!(svg, r#"<text class="title" x="{LEFT}" y="22">{}</text>"#, self.title)?;
        let mut y = 0.0;
        while y <= top * 1.001 {
            let at = y_at(y);
            writeln!(svg, r#"<path class="grid" d="M{LEFT} {at:.1}H{RIGHT}"/>"#)?;
            writeln!(svg, r#"<text x="{}" y="{:.1}" text-anchor="end">{y}</text>"#, LEFT - 8.0, at + 4.0)?;
            y += step;
        }
        for x in self.ticks(first, last) {
            let at = x_at(x);
            writeln!(svg, r#"<path class="grid" d="M{at:.1} {TOP}V{BOTTOM}"/>"#)?;
            writeln!(svg, r#"<text x="{at:.1}" y="{}" text-anchor="middle">{x}</text>"#, BOTTOM + 18.0)?;
        }
        let [x_label, y_label] = self.labels;
        writeln!(svg, r#"<text x="{RIGHT}" y="{}" text-anchor="end">{x_label}</text>"#, BOTTOM + 38.0)?;
        writeln!(svg, r#"<text x="8" y="{}">{y_label}</text>"#, TOP - 14.0)?;
        let mut legend = LEFT + 130.0;
        for ((name, points), colour) in self.series.iter().zip(COLOURS) {
            let mut line = String::new();
            for (number, (x, y)) in points.iter().enumerate() {
                write!(line, "{}{:.1} {:.1}", if number == 0 { "M" } else { "L" }, x_at(*x), y_at(*y))?;
            }
            writeln!(svg, r#"<path class="line" stroke="{colour}" d="{line}"/>"#)?;
            let at = TOP - 18.0;
            writeln!(svg, r#"<path class="line" stroke="{colour}" d="M{legend} {at}h22"/>"#)?;
            writeln!(svg, r#"<text x="{}" y="{}">{name}</text>"#, legend + 28.0, at + 4.0)?;
            legend += 60.0 + 6.6 * name.len() as f64;
        }
        writeln!(svg, "</svg>")?;
        Ok(svg)
    }

    /// Where the horizontal axis has numbers.
    fn ticks(&self, first: f64, last: f64) -> Vec<f64> {
        match self.scale {
            Scale::Logarithmic => {
                (first.ceil() as i32..=last.floor() as i32).map(|n| 10f64.powi(n)).collect()
            }
            Scale::Linear => {
                let step = step(last - first);
                let count = |x: f64| (x / step) as i32;
                (count(first)..=count(last)).map(|n| f64::from(n) * step).collect()
            }
        }
    }
}

/// A round number that divides a range into a few parts.
fn step(range: f64) -> f64 {
    let power = 10f64.powf((range.max(1e-9) / 4.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|step| range / step <= 6.0).unwrap_or(range)
}
