//! What came back of a connection, and what did not.

use std::borrow::Cow;
use std::fmt;

use crate::buffers;
use crate::connection::{Buffers, Path};
use crate::error::{Error, Result};
use crate::fidelity::Fidelity;
use crate::settings::{Settings, Skipped};
use crate::sys::tcp::{TcpInfo, info_option};

/// What a timestamp takes of each segment. connect() sets it aside in `tcpi_snd_mss` as the local sysctl says; the kernel
/// corrects that with every segment, not in what it tells.
const TIMESTAMP_ROOM: u32 = 12;

/// How a restored socket compares with the connection that was saved, value by value.
///
/// Only what can differ is in it: state, sequence numbers, bytes and the options of the header come back exactly, or
/// the restore fails. Values are named as the kernel names them: the fields of `struct tcp_info`, and socket options.
///
/// It prints as one line for each value that is not as it was, and as nothing where all are.
///
/// ```no_run
/// # fn main() -> soccr::Result<()> {
/// # let connection = soccr::Connection::empty();
/// let restored = connection.restore()?;
/// print!("{}", restored.report()); // snd_cwnd: 10 instead of 137 — BPF_BTF_LOAD: …
/// restored.report().strict()?; // here, dropping the socket is silent still
/// restored.resume().map(drop)
/// # }
/// ```
#[derive(Debug, Default)]
pub struct Report(Vec<Entry>);

/// One value of a [`Report`].
#[derive(Debug)]
pub struct Entry {
    name: Cow<'static, str>,
    fidelity: Fidelity,
    values: Option<[u64; 2]>,
    reason: Cow<'static, str>,
    is_option: bool,
}

impl Entry {
    /// The kernel's name of the value.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How well it came back.
    pub fn fidelity(&self) -> Fidelity {
        self.fidelity
    }

    /// The value before and after, where it is a number: bytes, segments, microseconds.
    pub fn values(&self) -> Option<[u64; 2]> {
        self.values
    }

    /// Why it is not as it was. Empty where there is nothing to say.
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.name)?;
        match (self.fidelity, self.values) {
            (Fidelity::Exact, Some([_, after])) => write!(f, "{after}, as before")?,
            (Fidelity::Exact, None) => f.write_str("as before")?,
            (_, Some([before, after])) => write!(f, "{after} instead of {before}")?,
            (Fidelity::Approximate, None) => f.write_str("changed")?,
            (Fidelity::Missing, None) => f.write_str("missing")?,
        }
        if self.reason.is_empty() { Ok(()) } else { write!(f, " — {}", self.reason) }
    }
}

impl Report {
    /// Every value that was compared.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.0.iter()
    }

    /// The value with this name, where the connection had one.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.iter().find(|entry| entry.name == name)
    }

    /// Everything is as it was.
    pub fn is_exact(&self) -> bool {
        self.iter().all(|entry| entry.fidelity == Fidelity::Exact)
    }

    /// Insists on the socket options of the application. What costs nothing but speed is not insisted on.
    ///
    /// # Errors
    /// Refused: the first socket option that is missing, and why.
    pub fn strict(&self) -> Result<()> {
        match self.iter().find(|entry| entry.is_option && entry.fidelity == Fidelity::Missing) {
            None => Ok(()),
            Some(entry) => Err(Error::refused(entry.name.clone(), entry.reason.clone()).at("restore")),
        }
    }

    /// Notes a number that came back for better or worse.
    pub(crate) fn approximate(&mut self, name: &'static str, values: [u64; 2], reason: &'static str) {
        self.number(name, values, Fidelity::Approximate, reason);
    }

    fn number(
        &mut self,
        name: &'static str,
        values: [u64; 2],
        fidelity: Fidelity,
        reason: impl Into<Cow<'static, str>>,
    ) {
        // A value of zero was not known.
        if values[0] == 0 {
            return;
        }
        let is_estimate = matches!(name, "rtt" | "rto" | "rcv_ssthresh");
        let tolerated = if is_estimate { values[0] / 20 } else { 0 };
        let is_exact = values[0].abs_diff(values[1]) <= tolerated;
        let (fidelity, reason) =
            if is_exact { (Fidelity::Exact, "".into()) } else { (fidelity, reason.into()) };
        self.0.push(Entry { name: name.into(), fidelity, values: Some(values), reason, is_option: false });
    }

    pub(crate) fn buffers(&mut self, saved: Buffers, restored: Buffers) {
        for (name, saved, restored) in
            [("SO_SNDBUF", saved.send, restored.send), ("SO_RCVBUF", saved.receive, restored.receive)]
        {
            // The kernel doubles what it is given.
            let saved = saved & !1;
            let reason = if restored > saved { "grown for the queue in it" } else { buffers::LIMITED };
            self.approximate(name, [saved.into(), restored.into()], reason);
        }
    }

    pub(crate) fn buffer_locks(&mut self, saved: Buffers, restored: Buffers) {
        if restored.lock != saved.lock {
            self.missing("SO_BUF_LOCK", buffers::LOCKED);
        }
    }

    /// Notes that the connection has another congestion control algorithm than before.
    pub(crate) fn algorithm(&mut self, now: &[u8], reason: Option<String>) {
        let now = String::from_utf8_lossy(now);
        let reason = reason.unwrap_or_else(|| "the kernel did not take it a second time".into());
        self.missing("TCP_CONGESTION", format!("it is {now} now: {reason}"));
    }

    /// Notes that the connection was not unlocked, or did not get all that was held for it.
    pub(crate) fn unlock(&mut self, error: &Error) {
        self.missing("unlock", error.to_string());
    }

    fn missing(&mut self, name: &'static str, reason: impl Into<Cow<'static, str>>) {
        let (name, reason) = (name.into(), reason.into());
        self.0.push(Entry { name, fidelity: Fidelity::Missing, values: None, reason, is_option: false });
    }

    pub(crate) fn skipped(&mut self, skipped: Vec<Skipped>) {
        self.0.extend(skipped.into_iter().map(|skipped| Entry {
            reason: skipped.reason(),
            name: skipped.name,
            fidelity: skipped.fidelity,
            values: None,
            is_option: true,
        }));
    }

    /// Notes options of a socket that another one has taken the place of.
    pub(crate) fn replaced(&mut self, settings: &Settings) {
        self.0.extend(settings.iter().map(|(name, _)| Entry {
            name: name.to_owned().into(),
            fidelity: Fidelity::Missing,
            values: None,
            reason: "the socket has the options of its listener".into(),
            is_option: true,
        }));
    }

    /// Compares the speed of the connection: `untimed` and `unwritten` say what kept the round-trip time and the
    /// congestion window from coming back.
    pub(crate) fn speed(
        &mut self,
        path: Option<&Path>,
        ecn: bool,
        info: &TcpInfo,
        untimed: Option<String>,
        unwritten: Option<String>,
    ) {
        let judged = |reason: &Option<String>| match reason {
            Some(reason) => (Fidelity::Missing, Cow::Owned(reason.clone())),
            None => (Fidelity::Approximate, Cow::Borrowed("")),
        };
        if let Some(path) = path {
            self.approximate(
                "snd_mss",
                [path.snd_mss.into(), info.snd_mss.into()],
                if path.snd_mss.abs_diff(info.snd_mss) == TIMESTAMP_ROOM {
                    "counted with or without room for timestamps, as net.ipv4.tcp_timestamps says: segments are as before"
                } else {
                    "another route, or another MTU"
                },
            );
            if !path.rtt.is_zero() {
                for (name, before, after) in [("rtt", path.rtt, info.rtt), ("rto", path.rto, info.rto)] {
                    let (fidelity, reason) = judged(&untimed);
                    self.number(name, [before.as_micros() as u64, after.into()], fidelity, reason);
                }
            }
            // A larger window is no loss, but a threshold that is not there is.
            let unwidened = unwritten.clone().filter(|_| info.snd_cwnd < path.snd_cwnd);
            for (name, before, after, unwritten) in [
                ("snd_cwnd", path.snd_cwnd, info.snd_cwnd, &unwidened),
                ("snd_ssthresh", path.snd_ssthresh, info.snd_ssthresh, &unwritten),
            ] {
                let (fidelity, reason) = judged(unwritten);
                self.number(name, [before.into(), after.into()], fidelity, reason);
            }
            self.approximate("rcv_ssthresh", [path.rcv_ssthresh.into(), info.rcv_ssthresh.into()], "");
        }
        if ecn {
            let back = info.options & info_option::ECN != 0;
            let (fidelity, reason) = if back { (Fidelity::Exact, "".into()) } else { judged(&unwritten) };
            self.0.push(Entry { name: "ecn".into(), fidelity, values: None, reason, is_option: false });
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iter()
            .filter(|entry| entry.fidelity != Fidelity::Exact)
            .try_for_each(|entry| writeln!(f, "{entry}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_prints_what_differs() {
        let mut report = Report::default();
        report.number("snd_mss", [1448, 1448], Fidelity::Approximate, "never said");
        assert!(report.is_exact());
        report.number("snd_cwnd", [137, 10], Fidelity::Missing, "no BPF");
        report.approximate("rto", [220_000, 244_000], "");
        report.approximate("rtt", [20_600, 20_650], "");
        assert_eq!(
            report.to_string(),
            "snd_cwnd: 10 instead of 137 — no BPF\nrto: 244000 instead of 220000\n"
        );
        assert_eq!(report.get("snd_mss").unwrap().to_string(), "snd_mss: 1448, as before");
        assert!(!report.is_exact());
        report.strict().unwrap();
    }
}
