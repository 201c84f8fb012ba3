//! The sequence spaces of a connection, drawn.

use soccr::Connection;

/// Columns of a drawing.
const WIDTH: usize = 78;

/// Draws the two sequence spaces of a connection, at most 80 columns wide; distances are not to scale.
///
/// Marks that lie in one place are joined by `=`. It draws contradictory connections as well.
///
/// ```text
/// send
///   snd_una            snd_nxt               write_seq              window edge
///   1000               1600                  2600                   9192
///   ├──── 600 sent ────┼──── 1000 unsent ────┼──── 6592 allowed ────┤
///
/// receive
///   copied_seq                     rcv_nxt                          window edge
///   500                            700                              3600
///   ├───────── 200 unread ─────────┼───────── 2900 allowed ─────────┤
/// ```
///
/// ```
/// # let bytes = include_bytes!("../tests/criu/images/tcp-stream-a919e.img");
/// # let files = include_bytes!("../tests/criu/images/files.img");
/// # let sockets = soccr_image::criu::sockets(files)?;
/// # let socket = sockets.into_iter().find(|socket| socket.inode == 0xa919e).unwrap();
/// # let connection = socket.connection(soccr_image::criu::Stream::parse(bytes)?)?;
/// let drawing = soccr_image::draw(&connection);
/// assert!(drawing.contains("5000 unread"));
/// # Ok::<(), soccr_image::Error>(())
/// ```
pub fn draw(connection: &Connection) -> String {
    let control = &connection.control;
    let mut send = Lane::new("send", control.snd_una());
    send.mark("snd_una", control.snd_una());
    send.mark("snd_nxt", control.snd_nxt());
    send.mark("write_seq", control.write_seq);
    if control.state.fin_queued() && !control.state.fin_acknowledged() {
        send.fin(control.write_seq);
    }
    let mut receive = Lane::new("receive", control.copied_seq());
    receive.mark("copied_seq", control.copied_seq());
    if let Some(urgent) = connection.urgent {
        receive.mark("urgent", control.copied_seq().wrapping_add(urgent.offset));
    }
    receive.mark("rcv_nxt", control.rcv_nxt);
    if control.state.fin_received() {
        receive.fin(control.rcv_nxt);
    }
    if let Some(window) = control.window {
        send.mark("window edge", control.snd_una().wrapping_add(window.snd_wnd));
        receive.mark("window edge", window.rcv_wup.wrapping_add(window.rcv_wnd));
    }
    let sent = control.snd_nxt();
    let mut drawing = send.draw(control.write_seq, |end| if after(end, sent) { "unsent" } else { "sent" });
    drawing.push('\n');
    drawing + &receive.draw(control.rcv_nxt, |_| "unread")
}

/// `a` lies after `b` in sequence space.
fn after(a: u32, b: u32) -> bool {
    (b.wrapping_sub(a) as i32) < 0
}

/// One direction: marks on a line.
struct Lane {
    title: &'static str,
    base: u32,
    /// Distance from `base`, and names.
    marks: Vec<(i32, Vec<&'static str>)>,
    fin: Option<i32>,
}

impl Lane {
    fn new(title: &'static str, base: u32) -> Self {
        Self { title, base, marks: Vec::new(), fin: None }
    }

    fn mark(&mut self, name: &'static str, at: u32) {
        let at = at.wrapping_sub(self.base) as i32;
        match self.marks.iter_mut().find(|mark| mark.0 == at) {
            Some(mark) => mark.1.push(name),
            None => self.marks.push((at, vec![name])),
        }
    }

    /// A FIN lies just before `end`.
    fn fin(&mut self, end: u32) {
        let start = end.wrapping_sub(1).wrapping_sub(self.base) as i32;
        self.fin = Some(start);
        if !self.marks.iter().any(|mark| mark.0 == start) {
            self.marks.push((start, Vec::new()));
        }
    }

    /// `queued` names the bytes before `end`, by where their piece ends; beyond is what the window still allows.
    fn draw(mut self, end: u32, queued: impl Fn(u32) -> &'static str) -> String {
        self.marks.sort_by_key(|mark| mark.0);
        let pieces: Vec<String> = self
            .marks
            .windows(2)
            .map(|pair| {
                let (from, to) = (pair[0].0, pair[1].0);
                let seq = self.base.wrapping_add(to as u32);
                match to.wrapping_sub(from) as u32 {
                    1 if self.fin == Some(from) => "FIN".into(),
                    length if after(seq, end) => format!(" {length} allowed "),
                    length => format!(" {length} {} ", queued(seq)),
                }
            })
            .collect();
        let names: Vec<String> = self.marks.iter().map(|mark| mark.1.join(" = ")).collect();
        let numbers: Vec<String> = (self.marks.iter().zip(&names))
            .map(|(mark, name)| match name.is_empty() {
                true => String::new(),
                false => self.base.wrapping_add(mark.0 as u32).to_string(),
            })
            .collect();
        // Each piece is as wide as what stands in it and above its left mark; what is left over is shared.
        let label = |i: usize| names[i].len().max(numbers[i].len());
        let mut widths: Vec<usize> =
            (0..pieces.len()).map(|i| (label(i) + 2).max(pieces[i].chars().count() + 3)).collect();
        let last = label(self.marks.len() - 1);
        let spare = WIDTH.saturating_sub(2 + last + widths.iter().sum::<usize>());
        let stretched = pieces.iter().filter(|piece| *piece != "FIN").count().max(1);
        for (width, piece) in widths.iter_mut().zip(&pieces) {
            *width += if piece == "FIN" { 0 } else { spare / stretched };
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
        format!("{}\n{}\n{}\n{line}\n", self.title, row(&names), row(&numbers))
    }
}

#[cfg(test)]
mod tests {
    use soccr::connection::{ControlBlock, Options, State, Window};

    use super::*;

    fn connection(state: State, control: [u32; 5], window: [u32; 4]) -> Connection {
        let [rcv_nxt, inq_len, write_seq, outq_len, unsq_len] = control;
        let [snd_wnd, max_window, rcv_wnd, rcv_wup] = window;
        Connection {
            local: "10.0.0.1:1".parse().unwrap(),
            remote: "10.0.0.2:2".parse().unwrap(),
            control: ControlBlock {
                state,
                rcv_nxt,
                inq_len,
                write_seq,
                outq_len,
                unsq_len,
                fin_unsent: unsq_len > 0 && state.fin_queued(),
                reset: false,
                options: Options { mss_clamp: 1460, ..Options::default() },
                window: Some(Window { snd_wl1: rcv_nxt, snd_wnd, max_window, rcv_wnd, rcv_wup }),
            },
            receive_queue: vec![0; inq_len as usize],
            send_queue: vec![0; outq_len as usize],
            ..Connection::empty()
        }
    }

    #[test]
    fn both_lanes_in_order() {
        let drawing =
            draw(&connection(State::Established, [700, 200, 2600, 1600, 1000], [8192, 8192, 3000, 600]));
        let expected = "\
send
  snd_una            snd_nxt               write_seq              window edge
  1000               1600                  2600                   9192
  ├──── 600 sent ────┼──── 1000 unsent ────┼──── 6592 allowed ────┤

receive
  copied_seq                     rcv_nxt                          window edge
  500                            700                              3600
  ├───────── 200 unread ─────────┼───────── 2900 allowed ─────────┤
";
        assert_eq!(drawing, expected, "\n{drawing}");
    }

    #[test]
    fn fins_have_their_place() {
        let drawing = draw(&connection(State::Closing, [4, 10, 2, 7, 0], [8192, 8192, 3000, 4]));
        let expected = "\
send
  snd_una                        snd_nxt = write_seq               window edge
  4294967290                     2                                 8186
  ├──────── 7 sent ────────┼─FIN─┼───────── 8184 allowed ──────────┤

receive
  copied_seq                        rcv_nxt                        window edge
  4294967289                        4                              3004
  ├──────── 10 unread ────────┼─FIN─┼──────── 3000 allowed ────────┤
";
        assert_eq!(drawing, expected, "\n{drawing}");
    }

    #[test]
    fn marks_in_one_place_are_joined() {
        let drawing = draw(&connection(State::Established, [700, 0, 2600, 0, 0], [0, 8192, 0, 700]));
        let expected = "\
send
  snd_una = snd_nxt = write_seq = window edge
  2600
  │

receive
  copied_seq = rcv_nxt = window edge
  700
  │
";
        assert_eq!(drawing, expected, "\n{drawing}");
    }

    #[test]
    fn contradictions_are_drawn_as_well() {
        for numbers in
            [[0, u32::MAX, 0, u32::MAX, 5], [1, 2, 3, 4, u32::MAX], [0x8000_0000, 7, 9, 0x8000_0001, 1]]
        {
            for state in [State::Closing, State::Established, State::SynSent, State::Close] {
                let mut connection =
                    connection(State::Established, [0; 5], [u32::MAX, 5, 0x7fff_ffff, 0x8000_0000]);
                connection.control.state = state;
                let c = &mut connection.control;
                [c.rcv_nxt, c.inq_len, c.write_seq, c.outq_len, c.unsq_len] = numbers;
                assert!(draw(&connection).lines().all(|line| line.chars().count() <= 90));
            }
        }
    }
}
