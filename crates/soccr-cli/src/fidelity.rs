//! How well connections came back: the reports are summed up on standard error, written to a file, or turned into a failure.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::{Value as Json, json};
use soccr::connection::State;
use soccr::{Connection, Entry, Fidelity, Restored};
use soccr_image::AtomicFile;

use crate::exit;

/// Which socket options of an image are set here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Trust {
    /// All that this process may set
    All,
    /// Those that concern nothing but the connection: no mark (nor that of connection tracking), filter, device, foreign address or IP option
    Safe,
    /// None
    None,
}

impl Trust {
    fn takes(self, name: &str) -> bool {
        const SAFE: [&str; 27] = [
            "SHUT_RD",
            "SO_REUSEADDR",
            "SO_KEEPALIVE",
            "SO_LINGER",
            "SO_OOBINLINE",
            "SO_RCVLOWAT",
            "SO_RCVTIMEO",
            "SO_SNDTIMEO",
            "SO_MAX_PACING_RATE",
            "SO_TXREHASH",
            "SO_ZEROCOPY",
            "SO_BUSY_POLL",
            "SO_PRIORITY",
            "IP_TOS",
            "IP_TTL",
            "IP_MTU_DISCOVER",
            "IP_MINTTL",
            "IP_BIND_ADDRESS_NO_PORT",
            "IP_PKTINFO",
            "IPV6_V6ONLY",
            "IPV6_TCLASS",
            "IPV6_UNICAST_HOPS",
            "IPV6_MTU_DISCOVER",
            "IPV6_DONTFRAG",
            "IPV6_FLOWINFO_SEND",
            "IPV6_AUTOFLOWLABEL",
            "IPV6_MINHOPCOUNT",
        ];
        /// These are only compared and reported, never set.
        const TOLD: [&str; 6] = ["O_ASYNC", "F_SETOWN", "F_SETSIG", "MSG_ZEROCOPY", "cgroup", "label"];
        const FAMILIES: [&str; 4] = ["TCP_", "IP_RECV", "IPV6_RECV", "SO_TIMESTAMP"];
        match self {
            _ if TOLD.contains(&name) => true,
            Self::All => true,
            Self::Safe => SAFE.contains(&name) || FAMILIES.iter().any(|family| name.starts_with(family)),
            Self::None => false,
        }
    }
}

/// How well connections must come back
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Demands {
    /// Which socket options are set here: a mark or a filter concerns more than the connection; `receive` takes the safe ones, `restore`
    /// all
    #[arg(long, value_name = "WHICH")]
    settings: Option<Trust>,
    /// Fail where a socket option of the old program cannot be set here; else that is only said
    #[arg(long)]
    strict: bool,
    /// Write down how every value came back: a JSON array, an object for each connection
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Reports, as they are collected.
#[derive(Debug)]
pub(crate) struct Reports {
    demands: Demands,
    trust: Trust,
    all: Vec<Json>,
    missing: Missing,
}

/// Why something that an image says is not set.
const UNTRUSTED: &str = "it is not taken from an image (see --settings)";

/// What is missing and why: the message of the first connection, and how many others share it.
#[derive(Debug, Default)]
struct Missing(BTreeMap<[String; 2], (String, usize)>);

impl Missing {
    fn count(&mut self, name: &str, reason: &str, message: impl FnOnce() -> String) {
        /// More than all options of all kernels: names come from a source, which may make up any number of them.
        const MOST: usize = 256;
        let what = [name, reason].map(str::to_owned);
        if self.0.len() < MOST || self.0.contains_key(&what) {
            self.0.entry(what).or_insert_with(|| (message(), 0)).1 += 1;
        } else {
            self.0.entry(Default::default()).or_insert_with(|| ("other options".into(), 0)).1 += 1;
        }
    }
}

impl Demands {
    /// `trust` decides which options are set, unless the command line does.
    pub(crate) fn reports(&self, trust: Trust) -> Reports {
        let trust = self.settings.unwrap_or(trust);
        Reports { demands: self.clone(), trust, all: Vec::new(), missing: Missing::default() }
    }
}

impl Reports {
    /// Removes what an image says of a connection and is not trusted: options, and the mark by which firewalls may know it.
    pub(crate) fn distrust(&mut self, connection: &mut Connection) -> Result<()> {
        const RESERVED: u16 = 1024;
        if self.trust != Trust::All {
            if connection.control.state == State::SynSent && connection.local.port() < RESERVED {
                bail!("it begins at a port that services trust: --settings all takes it");
            }
            let mark = connection.tracked.as_mut().map_or(0, |tracked| std::mem::take(&mut tracked.mark));
            if mark != 0 {
                self.missing.count("ct mark", UNTRUSTED, || format!("ct mark: {UNTRUSTED}"));
            }
        }
        connection.settings.retain(|name, _| {
            let takes = self.trust.takes(name);
            if !takes {
                self.missing.count(name, UNTRUSTED, || format!("{name}: {UNTRUSTED}"));
            }
            takes
        });
        Ok(())
    }

    /// Adds the report of the restored connection `name`.
    pub(crate) fn add(&mut self, name: &str, restored: &Restored) -> Result<()> {
        if self.demands.strict {
            restored.report().strict()?;
        }
        for missing in restored.report().iter().filter(|entry| entry.fidelity() == Fidelity::Missing) {
            self.missing.count(missing.name(), missing.reason(), || missing.to_string());
        }
        if self.demands.report.is_some() {
            let values: Vec<Json> = restored.report().iter().map(value).collect();
            self.all.push(json!({ "name": name, "values": values }));
        }
        Ok(())
    }

    /// Prints what is missing, and writes the file if one was asked for.
    pub(crate) fn tell(&self) -> Result<()> {
        for (first, count) in self.missing.0.values() {
            let more = if *count > 1 { format!(" ({count} connections)") } else { String::new() };
            exit::complain(&format!("not brought back: {first}{more}"));
        }
        let Some(path) = &self.demands.report else { return Ok(()) };
        let write = || {
            let mut file = AtomicFile::create(path)?;
            serde_json::to_writer_pretty(&mut file, &self.all)?;
            writeln!(file)?;
            file.commit().map(drop)
        };
        write().with_context(|| path.display().to_string())
    }
}

fn value(entry: &Entry) -> Json {
    let fidelity = match entry.fidelity() {
        Fidelity::Exact => "exact",
        Fidelity::Approximate => "approximate",
        Fidelity::Missing => "missing",
    };
    json!({
        "name": entry.name(),
        "fidelity": fidelity,
        "before": entry.values().map(|[before, _]| before),
        "after": entry.values().map(|[_, after]| after),
        "reason": Some(entry.reason()).filter(|reason| !reason.is_empty()),
    })
}

#[cfg(test)]
mod tests {
    use soccr::Flow;
    use soccr::connection::Tracked;
    use soccr::settings::Value;

    use super::*;

    fn reports(trust: Trust) -> Reports {
        Demands { settings: None, strict: false, report: None }.reports(trust)
    }

    #[test]
    fn names_that_are_made_up_take_limited_memory() {
        let mut reports = reports(Trust::Safe);
        for number in 0..1000 {
            let mut connection = Connection::empty();
            connection.settings.set(&format!("made up {number}"), Value::Number(1));
            reports.distrust(&mut connection).unwrap();
            assert_eq!(connection.settings.iter().count(), 0);
        }
        assert!(reports.missing.0.len() < 300);
        assert_eq!(reports.missing.0.values().map(|(_, count)| count).sum::<usize>(), 1000);
    }

    #[test]
    fn firewalls_know_it_by_no_mark_that_a_source_says() {
        let flow = Flow { local: ([192, 0, 2, 1], 80).into(), remote: ([192, 0, 2, 2], 1000).into() };
        for (trust, mark, told) in [(Trust::All, 7, 0), (Trust::Safe, 0, 1), (Trust::None, 0, 1)] {
            let mut connection = Connection::empty();
            connection.tracked = Some(Tracked { wire: flow, initiator: true, mark: 7 });
            let mut reports = reports(trust);
            reports.distrust(&mut connection).unwrap();
            assert_eq!(connection.tracked, Some(Tracked { wire: flow, initiator: true, mark }));
            assert_eq!(reports.missing.0.len(), told);
        }
    }
}
