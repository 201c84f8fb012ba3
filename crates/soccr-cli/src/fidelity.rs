//! What came back of a connection, and what did not: told, written down, or insisted on.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::{Value as Json, json};
use soccr::{Entry, Fidelity, Restored};
use soccr_image::AtomicFile;

use crate::exit;

/// How well connections must come back
#[derive(clap::Args, Debug)]
pub(crate) struct Demands {
    /// Fail where a socket option of the old program cannot be set here; else that is only said
    #[arg(long)]
    strict: bool,
    /// Write down how every value came back: a JSON array, an object for each connection
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Reports, as they are collected.
#[derive(Debug)]
pub(crate) struct Reports<'a> {
    demands: &'a Demands,
    all: Vec<Json>,
    /// What is missing and why: the first time in words, and how often.
    missing: BTreeMap<[String; 2], (String, usize)>,
}

impl Demands {
    pub(crate) fn reports(&self) -> Reports<'_> {
        Reports { demands: self, all: Vec::new(), missing: BTreeMap::new() }
    }
}

impl Reports<'_> {
    /// Takes in the report of a restored connection, which `name` tells from others.
    pub(crate) fn add(&mut self, name: &str, restored: &Restored) -> Result<()> {
        if self.demands.strict {
            restored.report().strict()?;
        }
        for missing in restored.report().iter().filter(|entry| entry.fidelity() == Fidelity::Missing) {
            let what = [missing.name(), missing.reason()].map(str::to_owned);
            self.missing.entry(what).or_insert_with(|| (missing.to_string(), 0)).1 += 1;
        }
        if self.demands.report.is_some() {
            let values: Vec<Json> = restored.report().iter().map(value).collect();
            self.all.push(json!({ "name": name, "values": values }));
        }
        Ok(())
    }

    /// Says what is missing, and writes the file, where one is asked for.
    pub(crate) fn tell(&self) -> Result<()> {
        for (first, count) in self.missing.values() {
            let more = if *count > 1 { format!(" ({count} connections)") } else { String::new() };
            exit::complain(&format!("not brought back: {first}{more}"));
        }
        let Some(path) = &self.demands.report else { return Ok(()) };
        let write = || {
            let mut file = AtomicFile::create(path)?;
            serde_json::to_writer_pretty(&mut file, &self.all)?;
            writeln!(file)?;
            file.commit()
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
