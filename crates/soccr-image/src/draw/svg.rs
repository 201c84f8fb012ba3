//! The drawing as SVG.

use std::fmt::Write;

use soccr::Connection;

use super::{Kind, Lane, lanes};

const MARGIN: usize = 16;
/// Of a lane, with its title, its marks and its pieces.
const HEIGHT: usize = 112;
/// Of a character, at most.
const CHARACTER: usize = 8;

/// Legible on light and on dark ground.
const STYLE: &str = "text{font:13px system-ui,sans-serif;fill:#57606a}.title{font-weight:600}.sent{fill:#2383e2}\
.unsent{fill:#8ec1f5}.unread{fill:#d9730d}.fin{fill:#8250df}.allowed{fill:none;stroke-dasharray:3}\
rect{fill-opacity:.6;stroke:#8c959f}path{stroke:#8c959f}@media(prefers-color-scheme:dark){text{fill:#adbac7}}";

/// The same as [`draw`](super::draw) as an SVG document, for all of these connections, one below the other; distances are not
/// to scale.
///
/// ```
/// let svg = soccr_image::draw_svg(&[]);
/// assert!(svg.starts_with("<svg xmlns="));
/// ```
pub fn draw_svg(connections: &[&Connection]) -> String {
    let mut body = String::new();
    let (mut top, mut width) = (MARGIN, 0);
    for connection in connections {
        top += 14;
        let Connection { local, remote, control, .. } = connection;
        let title = format!("{local} → {remote}, {}", control.state);
        text(&mut body, "title", MARGIN, top, &title);
        width = width.max(title.chars().count() * CHARACTER);
        for lane in lanes(connection) {
            width = width.max(draw(&mut body, &lane, top));
            top += HEIGHT;
        }
        top += MARGIN;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {top}\" role=\"img\">\n<style>{STYLE}</style>\n{body}</svg>\n",
        width + 2 * MARGIN
    )
}

/// Draws a lane, and returns where it ends on the right.
fn draw(body: &mut String, lane: &Lane, top: usize) -> usize {
    let row = |number: usize| top + 24 + 18 * number;
    text(body, "", MARGIN, row(0), lane.title);
    let mut left = MARGIN;
    for (number, mark) in lane.marks.iter().enumerate() {
        let label = lane.label(mark);
        text(body, "", left + 4, row(1), &label[0]);
        text(body, "", left + 4, row(2), &label[1]);
        let _ = writeln!(body, r#"<path d="M{left} {}V{}"/>"#, row(1) - 12, row(4));
        let above = label.iter().map(String::len).max().unwrap_or(0);
        let Some(piece) = lane.pieces.get(number) else { return left + above * CHARACTER };
        let within = piece.label();
        let width = (above.max(within.len()) + 2) * CHARACTER;
        let class = if piece.kind == Kind::Fin { "fin" } else { piece.kind.name() };
        let _ = writeln!(
            body,
            r#"<rect class="{class}" x="{left}" y="{}" width="{width}" height="28"/>"#,
            row(4) - 28
        );
        text(body, "", left + CHARACTER, row(4) - 9, &within);
        left += width;
    }
    left
}

/// All text is our own, so nothing needs escaping.
fn text(body: &mut String, class: &str, x: usize, y: usize, text: &str) {
    let class = if class.is_empty() { String::new() } else { format!(r#" class="{class}""#) };
    let _ = writeln!(body, r#"<text{class} x="{x}" y="{y}">{text}</text>"#);
}
