//! Tables for people: aligned, in colour on a terminal (unless `NO_COLOR` is set), cut nowhere.

use std::io::{self, BufWriter, Write};

use anstyle::Style;

const HEADING: Style = Style::new().bold();

/// Text of others, which may hold anything, without control characters, those that turn the direction of text included.
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
}

impl<const N: usize> Table<N> {
    pub(crate) fn new(columns: [(&'static str, Align); N]) -> Self {
        Self { columns, widths: columns.map(|(heading, _)| heading.len()), rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: [String; N]) {
        for (width, cell) in self.widths.iter_mut().zip(&cells) {
            *width = (*width).max(cell.chars().count());
        }
        self.rows.push(cells);
    }

    /// Prints the table on standard output.
    pub(crate) fn print(&self) -> io::Result<()> {
        let mut out = BufWriter::new(anstream::stdout().lock());
        write!(out, "{HEADING}")?;
        self.line(&mut out, self.columns.map(|(heading, _)| heading))?;
        write!(out, "{HEADING:#}")?;
        for row in &self.rows {
            self.line(&mut out, row.each_ref().map(String::as_str))?;
        }
        out.flush()
    }

    fn line(&self, out: &mut impl Write, cells: [&str; N]) -> io::Result<()> {
        for (i, cell) in cells.iter().enumerate() {
            let gap = if i == 0 { "" } else { "  " };
            match self.columns[i].1 {
                // Nothing but blanks would follow the last one.
                Align::Left if i == N - 1 => write!(out, "{gap}{cell}")?,
                Align::Left => write!(out, "{gap}{cell:<width$}", width = self.widths[i])?,
                Align::Right => write!(out, "{gap}{cell:>width$}", width = self.widths[i])?,
            }
        }
        writeln!(out)
    }
}
