//! The sequence spaces of a connection, drawn.

mod svg;
mod text;

use soccr::Connection;

pub use svg::draw_svg;

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
    lanes(connection).map(|lane| text::draw(&lane)).join("\n")
}

fn lanes(connection: &Connection) -> [Lane; 2] {
    let control = &connection.control;
    let mut send = Lane::new("send", control.snd_una(), control.write_seq);
    send.mark("snd_una", control.snd_una());
    send.mark("snd_nxt", control.snd_nxt());
    send.mark("write_seq", control.write_seq);
    if control.state.fin_queued() && !control.state.fin_acknowledged() {
        send.fin(control.write_seq);
    }
    let mut receive = Lane::new("receive", control.copied_seq(), control.rcv_nxt);
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
    send.divide(|end| if after(end, control.snd_nxt()) { Kind::Unsent } else { Kind::Sent });
    receive.divide(|_| Kind::Unread);
    [send, receive]
}

/// `a` lies after `b` in sequence space.
fn after(a: u32, b: u32) -> bool {
    (b.wrapping_sub(a) as i32) < 0
}

/// One direction: marks on a line, and the pieces between them.
struct Lane {
    title: &'static str,
    base: u32,
    /// Where the queue ends. What lies beyond, the window still allows.
    end: u32,
    marks: Vec<Mark>,
    fin: Option<i32>,
    pieces: Vec<Piece>,
}

struct Mark {
    /// Distance from `base`.
    at: i32,
    /// All that lies in this place.
    names: Vec<&'static str>,
}

struct Piece {
    length: u32,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Sent,
    Unsent,
    Unread,
    Allowed,
    Fin,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Unsent => "unsent",
            Self::Unread => "unread",
            Self::Allowed => "allowed",
            Self::Fin => "FIN",
        }
    }
}

impl Piece {
    fn label(&self) -> String {
        match self.kind {
            Kind::Fin => Kind::Fin.name().into(),
            kind => format!("{} {}", self.length, kind.name()),
        }
    }
}

impl Lane {
    fn new(title: &'static str, base: u32, end: u32) -> Self {
        Self { title, base, end, marks: Vec::new(), fin: None, pieces: Vec::new() }
    }

    fn mark(&mut self, name: &'static str, at: u32) {
        let at = at.wrapping_sub(self.base) as i32;
        match self.marks.iter_mut().find(|mark| mark.at == at) {
            Some(mark) => mark.names.push(name),
            None => self.marks.push(Mark { at, names: vec![name] }),
        }
    }

    /// A FIN lies just before `end`.
    fn fin(&mut self, end: u32) {
        let at = end.wrapping_sub(1).wrapping_sub(self.base) as i32;
        self.fin = Some(at);
        if !self.marks.iter().any(|mark| mark.at == at) {
            self.marks.push(Mark { at, names: Vec::new() });
        }
    }

    /// Puts the marks in order. `queued` tells what the bytes of the queue are, by where their piece ends.
    fn divide(&mut self, queued: impl Fn(u32) -> Kind) {
        self.marks.sort_by_key(|mark| mark.at);
        let piece = |pair: &[Mark]| {
            let (from, to) = (pair[0].at, pair[1].at);
            let seq = self.base.wrapping_add(to as u32);
            let length = to.wrapping_sub(from) as u32;
            let kind = match length {
                1 if self.fin == Some(from) => Kind::Fin,
                _ if after(seq, self.end) => Kind::Allowed,
                _ => queued(seq),
            };
            Piece { length, kind }
        };
        self.pieces = self.marks.windows(2).map(piece).collect();
    }

    /// What stands above a mark: its names, and its sequence number.
    fn label(&self, mark: &Mark) -> [String; 2] {
        let number = self.base.wrapping_add(mark.at as u32);
        match mark.names.is_empty() {
            true => Default::default(),
            false => [mark.names.join(" = "), number.to_string()],
        }
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
    fn a_single_byte_is_no_fin() {
        let drawing = draw(&connection(State::Established, [700, 1, 2600, 1, 1], [8192, 8192, 3000, 600]));
        assert!(drawing.contains("1 unread") && drawing.contains("1 unsent"), "{drawing}");
        assert!(!drawing.contains("FIN"), "{drawing}");
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
