//! Every system call of the command fails once: the connection is in one place, with every byte, and what is told is true.

mod calls;
mod run;

use std::collections::BTreeMap;
use std::process::Command;

use soccr::lock::PersistentLock;
use soccr_lab::{Lab, Side};

use crate::adopt::adoption_works;
use crate::programs::{installed, soccr};
use calls::Site;
use run::{Fault, Outcome, Place, Plan, World};

crate::tests![
    a_send_to_another_network,
    a_send_to_another_program,
    a_send_to_a_server_that_knows_nothing_of_it,
    a_save,
    a_restore,
    a_lock_and_an_unlock,
];

/// The most faults that a test tries. With a number in SOCCR_FAULTS it tries so many of each site, and each error with `all`.
const SOME: usize = 40;

fn faults(sites: &[Site]) -> Vec<Fault> {
    let mut counts: BTreeMap<&Site, usize> = BTreeMap::new();
    let mut order = Vec::new();
    for site in sites {
        let count = counts.entry(site).or_default();
        if *count == 0 {
            order.push(site);
        }
        *count += 1;
    }
    let wanted = std::env::var("SOCCR_FAULTS").unwrap_or_default();
    let all = wanted == "all";
    let most = if all { usize::MAX } else { wanted.parse().unwrap_or(2) };
    let mut faults = Vec::new();
    for (turn, site) in order.into_iter().enumerate() {
        let (count, errnos) = (counts[site], site.errnos());
        for step in 0..count.min(most) {
            let nth = if count <= most { step } else { step * (count - 1) / (most - 1).max(1) };
            let errnos = if all { errnos } else { &errnos[(turn + step) % errnos.len()..][..1] };
            faults.extend(errnos.iter().map(|errno| Fault { site: site.clone(), nth, errno: *errno }));
        }
    }
    let stride = if wanted.is_empty() { faults.len().div_ceil(SOME) } else { 1 };
    faults.into_iter().step_by(stride.max(1)).collect()
}

/// A kind of run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scenario {
    Send,
    Adopt,
    Save,
    Restore,
}

impl Scenario {
    fn command(self, world: &World) -> Command {
        let (pid, image) = (world.old.pid(), world.image().display().to_string());
        let save = || soccr(&["save", "--pid", &pid, "--fd", &world.fd(), "-o", &image]);
        let send = |recipient: &str| {
            let via = world.receive(recipient);
            soccr(&["send", "--pid", &pid, "--fd", &world.fd(), "--timeout", "3", "--via", &via])
        };
        match self {
            Self::Send => send(&format!("--detach {}", world.program())),
            Self::Adopt => send("--adopt"),
            Self::Save => save(),
            Self::Restore => {
                assert!(save().status().unwrap().success());
                let mut restore = soccr(&["restore", &image, "--netns", &world.netns(), "--"]);
                restore.args(World::heir());
                restore
            }
        }
    }

    /// Where the connection is without a fault.
    fn goal(self) -> Place {
        if self == Self::Save { Place::Image } else { Place::New }
    }

    /// What has become of it is what has been told.
    fn is_true(self, place: Place, outcome: &Outcome, fault: &Fault) -> bool {
        let told = |what: &str| outcome.told.contains(what) || fault.site.is_message();
        match (place, outcome.code) {
            (place, Some(0)) => place == self.goal(),
            // What is to be done behind it has failed.
            (Place::New, Some(1)) if self == Self::Restore => told("soccr: "),
            (Place::New, Some(3)) => told("soccr: "),
            (Place::New, Some(4)) => told("the target has it, or it is lost"),
            (Place::Old, Some(1 | 126 | 127)) => self != Self::Restore && told("soccr: "),
            (Place::Image, Some(1 | 126)) => told(if self == Self::Restore { "soccr: " } else { "saved in" }),
            (Place::Image, Some(3)) => told("saved in"),
            _ => false,
        }
    }
}

fn every_fault(goal: Side, scenario: Scenario) {
    if !installed("python3") {
        return;
    }
    let world = &mut World::new(goal);
    let _server = (scenario == Scenario::Adopt).then(|| world.serve());
    let (place, outcome) = turn(world, scenario, &Plan::Nothing).unwrap();
    assert_eq!((place, outcome.code), (scenario.goal(), Some(0)), "{}", outcome.told);
    let mut violations = Vec::new();
    match turn(world, scenario, &Plan::EveryInterruption) {
        Ok((place, Outcome { code: Some(0), is_met: true, .. })) if place == scenario.goal() => {}
        other => violations.push(format!("interrupted: {other:?}")),
    }
    let faults = faults(&outcome.sites);
    let (mut met, mut harmless) = (0, 0);
    for fault in &faults {
        match turn(world, scenario, &Plan::One(fault.clone())) {
            Ok((place, outcome)) => {
                met += usize::from(outcome.is_met);
                harmless += usize::from(outcome.is_met && outcome.code == Some(0));
                if !scenario.is_true(place, &outcome, fault) {
                    violations.push(format!("{fault}: {place:?} {:?} {:?}", outcome.code, outcome.told));
                } else if std::env::var_os("SOCCR_FAULTS_SHOW").is_some() {
                    eprintln!("{fault}: {place:?} {:?} {:?}", outcome.code, outcome.told);
                }
            }
            Err(what) => violations.push(format!("{fault}: {what}")),
        }
    }
    eprintln!(
        "{scenario:?} to {goal:?}: {} calls; {met} of {} faults met, {harmless} of them harmless",
        outcome.sites.len(),
        faults.len()
    );
    assert!(violations.is_empty(), "{} of {}:\n{}", violations.len(), faults.len(), violations.join("\n"));
}

/// One run, and where the connection is behind it.
fn turn(world: &mut World, scenario: Scenario, plan: &Plan) -> Result<(Place, Outcome), String> {
    world.begin();
    let outcome = world.run(&mut scenario.command(world), plan);
    let told = format!("{:?} {:?}", outcome.code, outcome.told);
    let place = world.place();
    let left = world.leftovers(place.clone().unwrap_or(Place::Nowhere));
    if place != Ok(Place::Old) {
        world.renew();
    }
    match place {
        Ok(place) if left.is_empty() => Ok((place, outcome)),
        Ok(place) => Err(format!("left ({place:?}): {left:?}: {told}")),
        Err(what) => Err(format!("{what}: {told}")),
    }
}

fn a_send_to_another_network() {
    every_fault(Side::B, Scenario::Send);
}

fn a_send_to_another_program() {
    every_fault(Side::A, Scenario::Send);
}

fn a_send_to_a_server_that_knows_nothing_of_it() {
    if adoption_works() {
        every_fault(Side::B, Scenario::Adopt);
    }
}

fn a_save() {
    every_fault(Side::A, Scenario::Save);
}

fn a_restore() {
    every_fault(Side::A, Scenario::Restore);
}

/// The lock is there, or not, as the exit code says.
fn a_lock_and_an_unlock() {
    let lab = Lab::new().unwrap();
    let exists = || !lab.a.run(PersistentLock::list).unwrap().is_empty();
    let lock = || soccr(&["lock", "--name", "name", "192.0.2.1:7-198.51.100.1:4711"]);
    let unlock = || soccr(&["unlock", "name"]);
    for (command, makes) in [(&lock as &dyn Fn() -> Command, true), (&unlock, false)] {
        let prepare = || {
            if exists() == makes {
                let mut other = if makes { unlock() } else { lock() };
                assert!(lab.a.run(|| other.status().unwrap().success()));
            }
        };
        let run = |plan: &Plan| {
            prepare();
            lab.a.run(|| run::observed(command().env_remove("RUST_BACKTRACE"), plan, || {}))
        };
        let sites = run(&Plan::Nothing).sites;
        assert_eq!(run(&Plan::EveryInterruption).code, Some(0));
        for fault in faults(&sites) {
            let outcome = run(&Plan::One(fault.clone()));
            let is_true = match outcome.code {
                Some(0) => exists() == makes,
                Some(1) => exists() != makes && (outcome.told.contains("soccr: ") || fault.site.is_message()),
                _ => false,
            };
            assert!(is_true, "{fault}: {outcome:?}, and the lock is there: {}", exists());
        }
    }
}
