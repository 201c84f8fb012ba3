//! Tables for people: aligned, in colour on a terminal (unless `NO_COLOR` is set), no cell cut.

use std::io::{self, BufWriter, IsTerminal, Write};

use anstyle::Style;

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
        let terminal = Some(io::stdout()).filter(IsTerminal::is_terminal);
        let room = terminal.and_then(|terminal| rustix::termios::tcgetwinsize(terminal).ok());
        let shown = self.fitting(room.map_or(usize::MAX, |size| size.ws_col.into()));
        let mut out = BufWriter::new(anstream::stdout().lock());
        write!(out, "{HEADING}")?;
        self.line(&mut out, &shown, &self.columns.map(|(heading, _)| heading))?;
        write!(out, "{HEADING:#}")?;
        for row in &self.rows {
            self.line(&mut out, &shown, row)?;
        }
        out.flush()
    }

    /// The columns that fit into `room` characters. 0 is a terminal that does not know its width.
    fn fitting(&self, room: usize) -> Vec<usize> {
        let mut shown: Vec<usize> = (0..N).collect();
        let mut dispensable = self.dispensable.iter();
        let width = |shown: &[usize]| shown.iter().map(|column| self.widths[*column] + 2).sum::<usize>() - 2;
        while room != 0 && width(&shown) > room {
            let Some(next) = dispensable.next() else { break };
            shown.retain(|column| self.columns[*column].0 != *next);
        }
        shown
    }

    fn line(&self, out: &mut impl Write, shown: &[usize], cells: &[impl AsRef<str>; N]) -> io::Result<()> {
        for (i, &column) in shown.iter().enumerate() {
            let gap = if i == 0 { "" } else { "  " };
            let (cell, width) = (cells[column].as_ref(), self.widths[column]);
            match self.columns[column].1 {
                // Nothing but blanks would follow the last one.
                Align::Left if column == N - 1 => write!(out, "{gap}{cell}")?,
                Align::Left => write!(out, "{gap}{cell:<width$}")?,
                Align::Right => write!(out, "{gap}{cell:>width$}")?,
            }
        }
        writeln!(out)
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
        for (room, shown) in
            [(0, &[0, 1, 2][..]), (15, &[0, 1, 2]), (14, &[0, 2]), (12, &[0, 2]), (11, &[2]), (1, &[2])]
        {
            assert_eq!(table.fitting(room), shown, "{room}");
        }
    }
}
