//! The command line.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// Of the workspace.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// What is to be measured, and how it is told.
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    /// One JSON object instead of a table.
    pub(crate) json: bool,
    /// As many runs as the numbers deserve, not as many as fit into minutes.
    pub(crate) full: bool,
    /// Where the plots go.
    pub(crate) plots: Option<PathBuf>,
    names: Vec<String>,
}

impl Arguments {
    pub(crate) fn parse() -> Result<Self> {
        let mut parsed = Self::default();
        let mut given = std::env::args().skip(1);
        while let Some(argument) = given.next() {
            match argument.as_str() {
                // What cargo passes to every benchmark.
                "--bench" => {}
                "--json" => parsed.json = true,
                "--full" => parsed.full = true,
                "--plots" => match given.next() {
                    // cargo has gone to the directory of the package; who calls it has not.
                    Some(directory) => parsed.plots = Some(Path::new(ROOT).join(directory)),
                    None => bail!("--plots wants a directory"),
                },
                option if option.starts_with('-') => {
                    bail!(
                        "{option}: unknown; known are --json, --full, --plots DIRECTORY and names of scenarios"
                    )
                }
                name => parsed.names.push(name.to_owned()),
            }
        }
        Ok(parsed)
    }

    /// The scenario is to be run.
    pub(crate) fn selects(&self, scenario: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|name| scenario.contains(name.as_str()))
    }
}
