//! Tables for people: aligned, in colour on a terminal (unless `NO_COLOR` is set), no cell cut.

use std::io::{self, BufWriter, Write};

use anstyle::Style;

use super::width;

const HEADING: Style = Style::new().bold();

/// Foreign text without control characters, including the Unicode characters that change the direction of text.
pub(crate) fn printable(text: &str) -> String {
    let turns = |c| matches!(c, '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().map(|c| if c.is_control() || turns(c) { '?' } else { c }).collect()
}

/// How a column is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Rows of text under headings.
#[derive(Debug)]
pub(crate) struct Table<const N: usize> {
    columns: [(&'static str, Align); N],
    widths: [usize; N],
    rows: Vec<[String; N]>,
    dispensable: &'static [&'static str],
}

impl<const N: usize> Table<N> {
    pub(crate) fn new(columns: [(&'static str, Align); N]) -> Self {
        Self {
            columns,
            widths: columns.map(|(heading, _)| heading.len()),
            rows: Vec::new(),
            dispensable: &[],
        }
    }

    pub(crate) fn row(&mut self, cells: [String; N]) {
        for (width, cell) in self.widths.iter_mut().zip(&cells) {
            *width = (*width).max(cell.chars().count());
        }
        self.rows.push(cells);
    }

    /// The columns to leave out, one after the other, until the table fits the terminal.
    pub(crate) fn narrow(&mut self, dispensable: &'static [&'static str]) {
        self.dispensable = dispensable;
    }

    /// Prints the table on standard output.
    pub(crate) fn print(&self) -> io::Result<()> {
        let room = width::of_terminal();
        let shown = self.fitting(room);
        let mut out = BufWriter::new(anstream::stdout().lock());
        write!(out, "{HEADING}")?;
        self.line(&mut out, room, &shown, &self.columns.map(|(heading, _)| heading))?;
        write!(out, "{HEADING:#}")?;
        for row in &self.rows {
            self.line(&mut out, room, &shown, row)?;
        }
        out.flush()
    }

    /// The columns that fit into `room` characters.
    fn fitting(&self, room: Option<usize>) -> Vec<usize> {
        let mut shown: Vec<usize> = (0..N).collect();
        let mut dispensable = self.dispensable.iter();
        let width = |shown: &[usize]| shown.iter().map(|column| self.widths[*column] + 2).sum::<usize>() - 2;
        while room.is_some_and(|room| width(&shown) > room) {
            let Some(next) = dispensable.next() else { break };
            shown.retain(|column| self.columns[*column].0 != *next);
        }
        shown
    }

    fn line(
        &self,
        out: &mut impl Write,
        room: Option<usize>,
        shown: &[usize],
        cells: &[impl AsRef<str>; N],
    ) -> io::Result<()> {
        let mut line = String::new();
        for (i, &column) in shown.iter().enumerate() {
            line.push_str(if i == 0 { "" } else { "  " });
            let (cell, width) = (cells[column].as_ref(), self.widths[column]);
            match self.columns[column].1 {
                Align::Left if column == N - 1 => {
                    line.push_str(&width::wrap(cell, line.chars().count(), room));
                }
                Align::Left => line.push_str(&format!("{cell:<width$}")),
                Align::Right => line.push_str(&format!("{cell:>width$}")),
            }
        }
        writeln!(out, "{}", line.trim_end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_narrow_terminal_gets_fewer_columns() {
        let mut table = Table::new([("A", Align::Left), ("B", Align::Right), ("C", Align::Left)]);
        table.row(["1234".into(), "1".into(), "123456".into()]);
        table.narrow(&["B", "A"]);
        for (room, shown) in [
            (None, &[0, 1, 2][..]),
            (Some(15), &[0, 1, 2]),
            (Some(14), &[0, 2]),
            (Some(12), &[0, 2]),
            (Some(11), &[2]),
            (Some(1), &[2]),
        ] {
            assert_eq!(table.fitting(room), shown, "{room:?}");
        }
    }
}
