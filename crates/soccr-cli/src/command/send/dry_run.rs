//! `soccr send --dry-run`: what the target would say.

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use soccr::Flow;
use soccr_handover::foreign::{Captive, namespace};
use soccr_handover::try_out;

use super::Send;
use super::via::{Left, Via};
use crate::exit::{self, Exit};
use crate::show::table::{Align, Table};

/// What would become of a connection.
#[derive(Serialize)]
struct Answer {
    name: String,
    local: String,
    remote: String,
    moves: bool,
    /// Why the target would refuse it.
    reason: Option<String>,
}

impl Send {
    /// Asks the target about the connections, of which `failed` more could not be found.
    pub(super) fn ask(&self, line: &str, captives: Vec<Captive>, failed: usize) -> Result<Exit> {
        let Some(first) = captives.first() else { bail!("no connection is there") };
        let mut via = Via::start(line, None)?;
        namespace::enter_of(first.as_fd())?;
        let named = captives.iter().map(|captive| {
            let flow = captive.flow().with_context(|| captive.name().to_owned())?;
            Ok((captive.name().to_owned(), flow))
        });
        let named: Vec<(String, Flow)> = named.collect::<Result<_>>()?;
        via.listen()?;
        let asked = try_out(named.clone(), &mut via, Duration::from_secs(self.timeout), exit::complain);
        let has_failed = !via.part(if asked.is_ok() { Left::All } else { Left::None }, true);
        let answers: Vec<Answer> = named
            .into_iter()
            .zip(asked?)
            .map(|((name, Flow { local, remote }), answer)| Answer {
                name,
                local: local.to_string(),
                remote: remote.to_string(),
                moves: answer.is_ok(),
                reason: answer.err(),
            })
            .collect();
        let moves = answers.iter().filter(|answer| answer.moves).count();
        if self.json {
            exit::print(&format!("{}\n", serde_json::to_string_pretty(&answers)?))?;
        } else {
            exit::written(print(&answers))?;
            exit::print(&format!("{moves} of {} would move; nothing was done\n", answers.len()))?;
        }
        Ok(match (moves, answers.len() - moves + failed + usize::from(has_failed)) {
            (_, 0) => Exit::Done,
            (0, _) => Exit::Failed,
            _ => Exit::SomeFailed,
        })
    }
}

fn print(answers: &[Answer]) -> std::io::Result<()> {
    let columns = ["CONNECTION", "LOCAL", "REMOTE", "MOVES", "REASON"].map(|name| (name, Align::Left));
    let mut table = Table::new(columns);
    for Answer { name, local, remote, moves, reason } in answers {
        let word = if *moves { "yes" } else { "no" };
        let reason = reason.clone().unwrap_or_default();
        table.row([name.clone(), local.clone(), remote.clone(), word.into(), reason]);
    }
    table.print()
}
