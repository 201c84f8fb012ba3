//! The drawing as text.

use super::{Kind, Lane};

/// Columns of a drawing.
const WIDTH: usize = 78;

pub(super) fn draw(lane: &Lane) -> String {
    let pieces: Vec<String> = (lane.pieces.iter())
        .map(|piece| match piece.kind {
            Kind::Fin => piece.label(),
            _ => format!(" {} ", piece.label()),
        })
        .collect();
    let (names, numbers): (Vec<String>, Vec<String>) =
        lane.marks.iter().map(|mark| lane.label(mark).into()).unzip();
    // Each piece is as wide as its label and the label above its left mark; the rest of the width is shared.
    let label = |i: usize| names[i].len().max(numbers[i].len());
    let mut widths: Vec<usize> =
        (0..pieces.len()).map(|i| (label(i) + 2).max(pieces[i].chars().count() + 3)).collect();
    let last = label(lane.marks.len() - 1);
    let spare = WIDTH.saturating_sub(2 + last + widths.iter().sum::<usize>());
    let stretched = lane.pieces.iter().filter(|piece| piece.kind != Kind::Fin).count().max(1);
    for (width, piece) in widths.iter_mut().zip(&lane.pieces) {
        *width += if piece.kind == Kind::Fin { 0 } else { spare / stretched };
    }
    let row = |cells: &[String]| {
        let mut line = String::from("  ");
        for (i, cell) in cells.iter().enumerate() {
            line += &format!("{cell:<width$}", width = widths.get(i).copied().unwrap_or(0));
        }
        line.trim_end().to_owned()
    };
    let mut line = String::from("  ");
    for (i, (piece, width)) in pieces.iter().zip(&widths).enumerate() {
        line.push(if i == 0 { '├' } else { '┼' });
        line += &format!("{piece:─^width$}", width = width - 1);
    }
    line.push(if pieces.is_empty() { '│' } else { '┤' });
    format!("{}\n{}\n{}\n{line}\n", lane.title, row(&names), row(&numbers))
}
