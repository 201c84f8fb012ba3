//! A connection for people and for machines. Queue bytes only on demand, keys never.

use std::fmt::Write;

use serde_json::{Value as Json, json};
use soccr::connection::Tls;
use soccr::settings::Value;
use soccr::{Connection, Flow};

use super::width;

/// Whether the bytes in the queues are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    Hidden,
    Shown,
}

/// Everything about a connection as text, with a drawing of its sequence spaces.
pub(crate) fn text(connection: &Connection, data: Data) -> String {
    let control = &connection.control;
    let options = &control.options;
    let reset = if control.reset { ", reset by the peer" } else { "" };
    let mut out = format!("{} → {}  {}{reset}\n", connection.local, connection.remote, control.state);
    let mut negotiated = vec![format!("mss {}", options.mss_clamp)];
    if let Some(scale) = options.window_scale {
        negotiated.push(format!("window scale {} (peer {})", scale.rcv, scale.snd));
    }
    let clock = if options.microseconds { "timestamps (µs)" } else { "timestamps" };
    for (has, name) in [
        (options.sack, "sack"),
        (options.timestamps.is_some(), clock),
        (options.ecn, "ecn"),
        (options.syn_data, "data in the SYN"),
    ] {
        negotiated.extend(has.then(|| name.to_owned()));
    }
    // Writing to a String cannot fail.
    let _ = writeln!(out, "negotiated  {}", negotiated.join(", "));
    let _ = writeln!(
        out,
        "queues      {} bytes unread, {} unacknowledged, {} of them unsent",
        control.inq_len, control.outq_len, control.unsq_len
    );
    if let Some(tls) = &connection.tls {
        let _ = writeln!(out, "kernel      {}, {} bytes decrypted and unread", tls.summary(), decrypted(tls));
    }
    if let Some(urgent) = connection.urgent {
        let consumed = if urgent.consumed { ", read already" } else { "" };
        let _ = writeln!(out, "urgent      at byte {} of the receive queue{consumed}", urgent.offset);
    }
    if let Some(path) = connection.path {
        let _ = writeln!(
            out,
            "path        rtt {:?} ± {:?}, rto {:?}, cwnd {}, ssthresh {}, segments of {}",
            path.rtt,
            path.rttvar,
            path.rto,
            path.snd_cwnd,
            threshold(path.snd_ssthresh),
            path.snd_mss
        );
    }
    if let Some(buffers) = connection.buffers {
        let _ = writeln!(out, "buffers     send {}, receive {}", buffers.send, buffers.receive);
    }
    if let Some(tracked) = connection.tracked {
        let Flow { local, remote } = tracked.wire;
        let nat = if tracked.is_translated(connection.flow()) { " (NAT)" } else { "" };
        let begun = if tracked.initiator { "here" } else { "by the peer" };
        let mark = if tracked.mark == 0 { String::new() } else { format!(", mark {:#x}", tracked.mark) };
        let _ = writeln!(out, "tracked     on the wire {local} → {remote}{nat}, begun {begun}{mark}");
    }
    if let Some(owner) = connection.owner {
        let _ = writeln!(out, "owner       user {}, group {}", owner.user, owner.group);
    }
    let settings: Vec<String> =
        connection.settings.iter().map(|(name, value)| format!("{name}={}", setting(value))).collect();
    if !settings.is_empty() {
        let settings = width::wrap(&settings.join(" "), 12, width::of_terminal());
        let _ = writeln!(out, "settings    {settings}");
    }
    let _ = write!(out, "\n{}", soccr_image::draw(connection));
    if data == Data::Shown {
        for (name, queue) in queues(connection) {
            let _ = write!(out, "\n{name} queue, {} bytes\n{}", queue.len(), dump(queue));
        }
    }
    out
}

/// The slow start threshold: the kernel's largest one means that no segment has been lost yet.
fn threshold(segments: u32) -> String {
    if segments == i32::MAX as u32 { "∞".into() } else { segments.to_string() }
}

/// Everything about a connection as a JSON object.
pub(crate) fn json(connection: &Connection, data: Data) -> Json {
    let control = &connection.control;
    let options = &control.options;
    let settings: serde_json::Map<String, Json> =
        connection.settings.iter().map(|(name, value)| (name.to_owned(), json_setting(value))).collect();
    let mut object = json!({
        "local": connection.local,
        "remote": connection.remote,
        "state": control.state.name(),
        "rcv_nxt": control.rcv_nxt,
        "copied_seq": control.copied_seq(),
        "inq_len": control.inq_len,
        "snd_una": control.snd_una(),
        "snd_nxt": control.snd_nxt(),
        "write_seq": control.write_seq,
        "outq_len": control.outq_len,
        "unsq_len": control.unsq_len,
        "fin_unsent": control.fin_unsent,
        "reset": control.reset,
        "options": {
            "mss_clamp": options.mss_clamp,
            "snd_wscale": options.window_scale.map(|scale| scale.snd),
            "rcv_wscale": options.window_scale.map(|scale| scale.rcv),
            "sack": options.sack,
            "timestamps": options.timestamps,
            "microseconds": options.microseconds,
            "ecn": options.ecn,
            "ecn_seen": options.ecn_seen,
            "syn_data": options.syn_data,
        },
        "window": control.window.map(|window| json!({
            "snd_wl1": window.snd_wl1,
            "snd_wnd": window.snd_wnd,
            "max_window": window.max_window,
            "rcv_wnd": window.rcv_wnd,
            "rcv_wup": window.rcv_wup,
        })),
        "urgent": connection.urgent.map(|urgent| json!({
            "offset": urgent.offset,
            "consumed": urgent.consumed,
        })),
        "path": connection.path.map(|path| json!({
            "rtt_us": path.rtt.as_micros() as u64,
            "rttvar_us": path.rttvar.as_micros() as u64,
            "rto_us": path.rto.as_micros() as u64,
            "snd_mss": path.snd_mss,
            "snd_cwnd": path.snd_cwnd,
            "snd_ssthresh": path.snd_ssthresh,
            "rcv_ssthresh": path.rcv_ssthresh,
        })),
        "buffers": connection.buffers.map(|buffers| json!({
            "send": buffers.send,
            "receive": buffers.receive,
            "lock": buffers.lock,
        })),
        "nonblocking": connection.nonblocking,
        "tracked": connection.tracked.map(|tracked| json!({
            "local": tracked.wire.local,
            "remote": tracked.wire.remote,
            "translated": tracked.is_translated(connection.flow()),
            "initiator": tracked.initiator,
            "mark": tracked.mark,
        })),
        "owner": connection.owner.map(|owner| json!({ "user": owner.user, "group": owner.group })),
        "tls": connection.tls.as_ref().map(|tls| json!({
            "version": tls.version.to_string(),
            "cipher": tls.cipher.to_string(),
            "transmit": tls.transmit.is_some(),
            "receive": tls.receive.is_some(),
            "decrypted_len": decrypted(tls),
        })),
        "settings": settings,
    });
    if data == Data::Shown {
        for (name, queue) in queues(connection) {
            object[format!("{name}_queue_hex")] = hex(queue).into();
        }
    }
    object
}

fn queues(connection: &Connection) -> [(&'static str, &[u8]); 2] {
    [("receive", &connection.receive_queue), ("send", &connection.send_queue)]
}

fn decrypted(tls: &Tls) -> usize {
    tls.unread.iter().map(|record| record.bytes.len()).sum()
}

fn setting(value: &Value) -> String {
    match value {
        Value::Number(number) => number.to_string(),
        Value::Bytes(bytes) => as_text(bytes).unwrap_or_else(|| hex(bytes)),
        Value::Secret(_) => "(secret)".into(),
    }
}

fn json_setting(value: &Value) -> Json {
    match value {
        Value::Number(number) => (*number).into(),
        _ => setting(value).into(),
    }
}

/// Options such as the name of a congestion control.
fn as_text(bytes: &[u8]) -> Option<String> {
    let text = bytes.split(|byte| *byte == 0).next()?;
    let padding = &bytes[text.len()..];
    let is_text =
        !text.is_empty() && text.iter().all(u8::is_ascii_graphic) && padding.iter().all(|byte| *byte == 0);
    is_text.then(|| String::from_utf8_lossy(text).into_owned())
}

fn hex(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let _ = write!(out, "{byte:02x}");
    }
    out
}

/// Sixteen bytes a line: offset, hexadecimal, text.
fn dump(bytes: &[u8]) -> String {
    let mut out = String::new();
    for (i, line) in bytes.chunks(16).enumerate() {
        let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let text: String = line
            .iter()
            .map(|byte| if (0x20..0x7f).contains(byte) { char::from(*byte) } else { '.' })
            .collect();
        let _ = writeln!(out, "  {:08x}  {:<47}  {text}", i * 16, hex.join(" "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::threshold;

    #[test]
    fn a_threshold_that_nothing_has_lowered_is_infinite() {
        assert_eq!((threshold(0x7fff_ffff), threshold(10)), ("∞".into(), "10".into()));
    }
}
