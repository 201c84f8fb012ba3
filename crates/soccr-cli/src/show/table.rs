//! Tables for people: in the width of the terminal, in colour on one (unless `NO_COLOR` is set), no cell cut.

use std::io::{self, BufWriter, Write};

use anstyle::Style;

use super::width;

const HEADING: Style = Style::new().bold();

/// Columns that go below their row where the table is too wide with them: two of IPv6 fill a terminal.
const ADDRESSES: [&str; 2] = ["LOCAL", "REMOTE"];

/// How far that is indented which is below its row.
const INDENT: usize = 4;

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

/// Where the columns go.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    row: Vec<usize>,
    below: Vec<usize>,
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
        let layout = self.layout(room);
        let mut out = BufWriter::new(anstream::stdout().lock());
        write!(out, "{HEADING}")?;
        self.line(&mut out, room, &layout, &self.columns.map(|(heading, _)| heading))?;
        write!(out, "{HEADING:#}")?;
        for row in &self.rows {
            self.line(&mut out, room, &layout, row)?;
        }
        out.flush()
    }

    /// Finds room for the columns in `room` characters.
    fn layout(&self, room: Option<usize>) -> Layout {
        let room = room.unwrap_or(usize::MAX);
        let row = self.without_dispensable((0..N).collect(), room);
        if self.least(&row) <= room {
            return Layout { row, below: Vec::new() };
        }
        let (below, row) = (0..N).partition(|column| self.is_address(*column));
        Layout { row: self.without_dispensable(row, room), below }
    }

    /// Leaves out columns until the others fit, or until none is dispensable.
    fn without_dispensable(&self, mut shown: Vec<usize>, room: usize) -> Vec<usize> {
        for name in self.dispensable {
            if self.width(&shown) > room {
                shown.retain(|column| self.columns[*column].0 != *name);
            }
        }
        shown
    }

    fn width(&self, shown: &[usize]) -> usize {
        shown.iter().map(|column| self.widths[*column] + 2).sum::<usize>() - 2
    }

    /// The width with which these columns are still a table: long text in the last one can be wrapped, or go below.
    fn least(&self, shown: &[usize]) -> usize {
        match shown {
            [.., last] if *last == N - 1 && !self.is_address(*last) => {
                self.width(shown) - self.widths[*last] + self.columns[*last].0.len()
            }
            _ => self.width(shown),
        }
    }

    fn is_address(&self, column: usize) -> bool {
        ADDRESSES.contains(&self.columns[column].0)
    }

    fn line(
        &self,
        out: &mut impl Write,
        room: Option<usize>,
        layout: &Layout,
        cells: &[impl AsRef<str>; N],
    ) -> io::Result<()> {
        let mut line = String::new();
        let addresses: Vec<&str> = layout.below.iter().map(|column| cells[*column].as_ref()).collect();
        let mut below = vec![addresses.join(" → ")];
        for (i, &column) in layout.row.iter().enumerate() {
            line.push_str(if i == 0 { "" } else { "  " });
            let (cell, width) = (cells[column].as_ref(), self.widths[column]);
            match self.columns[column].1 {
                Align::Left if column == N - 1 => {
                    let begin = line.chars().count();
                    match width::holds(cell, begin, room) {
                        true => line.push_str(&width::wrap(cell, begin, room)),
                        false => below.push(cell.to_owned()),
                    }
                }
                Align::Left => line.push_str(&format!("{cell:<width$}")),
                Align::Right => line.push_str(&format!("{cell:>width$}")),
            }
        }
        writeln!(out, "{}", line.trim_end())?;
        for text in below.iter().filter(|text| !text.is_empty()) {
            writeln!(out, "{:INDENT$}{}", "", width::wrap(text, INDENT, room))?;
        }
        Ok(())
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
        for (room, row) in [
            (None, &[0, 1, 2][..]),
            (Some(15), &[0, 1, 2]),
            (Some(14), &[0, 2]),
            (Some(12), &[0, 2]),
            (Some(11), &[2]),
            (Some(1), &[2]),
        ] {
            assert_eq!(table.layout(room), Layout { row: row.into(), below: Vec::new() }, "{room:?}");
        }
    }

    #[test]
    fn addresses_go_below_where_they_do_not_fit() {
        let columns = ["PID", "LOCAL", "REMOTE", "IDLE", "SAVE"].map(|name| (name, Align::Left));
        let mut table = Table::new(columns);
        table.row(["1", "127.0.0.1:1", "127.0.0.1:23456", "1s", "yes"].map(str::to_owned));
        table.row(["2", "127.0.0.1:1", "*", "-", "a reason that takes more than a line"].map(str::to_owned));
        table.narrow(&["IDLE"]);
        for (room, expected) in [
            (
                40,
                "\
PID  LOCAL        REMOTE           SAVE
1    127.0.0.1:1  127.0.0.1:23456  yes
2    127.0.0.1:1  *
    a reason that takes more than a line
",
            ),
            (
                38,
                "\
PID  SAVE
    LOCAL → REMOTE
1    yes
    127.0.0.1:1 → 127.0.0.1:23456
2    a reason that takes more than a
     line
    127.0.0.1:1 → *
",
            ),
            (
                30,
                "\
PID  SAVE
    LOCAL → REMOTE
1    yes
    127.0.0.1:1 →
    127.0.0.1:23456
2    a reason that takes more
     than a line
    127.0.0.1:1 → *
",
            ),
        ] {
            let (layout, mut out) = (table.layout(Some(room)), Vec::new());
            table.line(&mut out, Some(room), &layout, &table.columns.map(|(heading, _)| heading)).unwrap();
            for row in &table.rows {
                table.line(&mut out, Some(room), &layout, row).unwrap();
            }
            assert_eq!(String::from_utf8(out).unwrap(), expected, "{room}");
        }
    }
}
