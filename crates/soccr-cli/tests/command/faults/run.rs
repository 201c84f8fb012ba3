//! One run of a command with one fault.

use std::collections::HashMap;
use std::process::Command;

use soccr_lab::{End, Entry, LIMIT, Verdict, run_family};

use crate::programs::Said;

use super::calls::{Site, is_interruptible};

/// The call of this number at a site fails.
#[derive(Clone, Debug)]
pub struct Fault {
    pub site: Site,
    pub nth: usize,
    pub errno: i32,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let error = std::io::Error::from_raw_os_error(self.errno);
        write!(f, "{} no. {}: {error}", self.site, self.nth + 1)
    }
}

/// What fails in a run.
#[derive(Clone, Debug)]
pub enum Plan {
    Nothing,
    One(Fault),
    /// Every call that a signal may interrupt is interrupted once.
    EveryInterruption,
}

/// The processes that a run is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A command, and what it starts by a shell.
    Command,
    /// Two commands, one behind the other, which a shell connects.
    Pipe,
}

impl Shape {
    /// After how many programs a process of this lineage is one of ours; whatever it executes then gets the connections.
    fn programs(self, lineage: &[usize]) -> usize {
        match (self, lineage) {
            (Self::Pipe, []) => usize::MAX,
            (Self::Pipe, [0 | 1]) | (Self::Command, []) => 1,
            (Self::Command, [1]) => 2,
            _ => 0,
        }
    }

    fn source(self) -> &'static [usize] {
        if self == Self::Pipe { &[0] } else { &[] }
    }
}

/// What has come of a run.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub told: String,
    /// The fault has happened.
    pub is_met: bool,
    /// The sites of all calls that could have failed, in order.
    pub sites: Vec<Site>,
}

/// Runs a command by this plan. When it reads the first connection, or else behind it, the peer is to `speak`.
pub fn observed(command: &mut Command, shape: Shape, plan: &Plan, speak: impl FnOnce() + Send) -> Outcome {
    let told = Said::new();
    command.stderr(told.output()).stdout(told.output());
    let mut watch = Watch::new(shape, plan, speak);
    let end = run_family(command, LIMIT, |entry| watch.judge(entry));
    watch.speak();
    let (is_met, sites) = (watch.is_met, watch.sites);
    let code = match end {
        End::Exited(status) => status.code(),
        // It has become the program that gets the connection.
        End::Left => Some(0),
        End::Late => None,
    };
    Outcome { code, told: told.read(), is_met, sites }
}

/// What a run does at each call.
struct Watch<'a, F> {
    shape: Shape,
    plan: &'a Plan,
    speak: Option<F>,
    /// Processes whose libraries have begun.
    begun: Vec<Vec<usize>>,
    counts: usize,
    is_met: bool,
    sites: Vec<Site>,
    /// The calls of each thread that were interrupted last time.
    interrupted: HashMap<(i32, i64, u64), bool>,
}

impl<'a, F: FnOnce()> Watch<'a, F> {
    fn new(shape: Shape, plan: &'a Plan, speak: F) -> Self {
        Self {
            shape,
            plan,
            speak: Some(speak),
            begun: Vec::new(),
            counts: 0,
            is_met: false,
            sites: Vec::new(),
            interrupted: HashMap::new(),
        }
    }

    fn speak(&mut self) {
        if let Some(speak) = self.speak.take() {
            speak();
        }
    }

    fn judge(&mut self, entry: Entry<'_>) -> Verdict {
        let Entry { thread, lineage, programs, call } = entry;
        let own = self.shape.programs(lineage);
        if programs > own {
            return Verdict::Leave;
        }
        if programs < own {
            return Verdict::Pass;
        }
        // Nobody is interested in what happens before main().
        if own > 0 && !self.begun.iter().any(|one| one == lineage) {
            if call.number == libc::SYS_sigaltstack && call.arguments[0] != 0 {
                self.begun.push(lineage.to_vec());
            }
            return Verdict::Pass;
        }
        let sets_repair = call.number == libc::SYS_setsockopt
            && call.arguments[1..3] == [libc::SOL_TCP as u64, libc::TCP_REPAIR as u64];
        if sets_repair && lineage == self.shape.source() {
            self.speak();
        }
        let Some(site) = Site::of(&entry) else { return Verdict::Pass };
        match self.plan {
            Plan::Nothing => self.sites.push(site),
            Plan::One(fault) if !self.is_met && fault.site == site => {
                self.counts += 1;
                if self.counts > fault.nth {
                    self.is_met = true;
                    return Verdict::Fail(fault.errno);
                }
            }
            Plan::One(_) => {}
            Plan::EveryInterruption if is_interruptible(&call) => {
                // Whoever is interrupted makes the call again, or waits for the same once more.
                let again = self.interrupted.entry((thread, call.number, call.arguments[0])).or_default();
                *again = !*again;
                if *again {
                    self.is_met = true;
                    return Verdict::Fail(libc::EINTR);
                }
            }
            Plan::EveryInterruption => {}
        }
        Verdict::Pass
    }
}
