//! Text in the width of the terminal.

use std::io::{self, IsTerminal};

/// How many characters a line of the terminal has; `None` if standard output is none, or does not know.
pub(crate) fn of_terminal() -> Option<usize> {
    let terminal = Some(io::stdout()).filter(IsTerminal::is_terminal)?;
    let size = rustix::termios::tcgetwinsize(terminal).ok()?;
    (size.ws_col != 0).then_some(size.ws_col.into())
}

/// Less than this would be a ribbon of single words.
const LEAST: usize = 24;

fn room_after(column: usize, width: Option<usize>) -> usize {
    width.map_or(usize::MAX, |width| width.saturating_sub(column))
}

/// Whether text that begins in this column can be read there: in one line or, wrapped, in several.
pub(crate) fn holds(text: &str, column: usize, width: Option<usize>) -> bool {
    let room = room_after(column, width);
    let longest = if room < LEAST {
        text
    } else {
        text.split(' ').max_by_key(|word| word.chars().count()).unwrap_or(text)
    };
    longest.chars().count() <= room
}

/// Breaks text between words, for a line that has `column` characters before it: further lines begin in that column. Words are
/// never cut; where hardly any room is left, nothing is broken.
pub(crate) fn wrap(text: &str, column: usize, width: Option<usize>) -> String {
    let room = room_after(column, width);
    if room < LEAST {
        return text.to_owned();
    }
    let (mut wrapped, mut used) = (String::new(), 0);
    for word in text.split(' ') {
        let length = word.chars().count();
        if used > 0 && length.saturating_add(used + 1) > room {
            wrapped.push('\n');
            wrapped.extend(std::iter::repeat_n(' ', column));
            used = 0;
        } else if used > 0 {
            wrapped.push(' ');
            used += 1;
        }
        wrapped.push_str(word);
        used += length;
    }
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_between_words() {
        let text = "twelve words that do not fit into one line of thirty characters";
        assert_eq!(wrap(text, 4, None), text);
        assert_eq!(wrap(text, 90, Some(100)), text, "a ribbon");
        let wrapped = wrap(text, 4, Some(34));
        assert_eq!(wrapped.lines().count(), 3);
        assert!(
            wrapped.lines().enumerate().all(|(i, line)| line.chars().count() <= if i == 0 { 30 } else { 34 })
        );
        assert!(wrapped.lines().skip(1).all(|line| line.starts_with("    ") && !line.ends_with(' ')));
        assert_eq!(wrapped.split_whitespace().collect::<Vec<_>>().join(" "), text);
        let long = "x".repeat(50);
        assert!(holds("short", 30, Some(35)) && !holds(text, 30, Some(53)) && holds(text, 30, Some(54)));
        assert!(!holds(&long, 0, Some(40)) && holds(&long, 0, Some(50)));
        assert_eq!(wrap(&format!("a {long} b"), 0, Some(40)), format!("a\n{long}\nb"));
    }
}
