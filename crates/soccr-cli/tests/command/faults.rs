//! Every system call of the command fails once: each connection is in one place, with every byte, and what is told is true.

mod calls;
mod run;
mod world;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::net::TcpListener;
use std::process::{Command, Stdio};

use soccr::Flow;
use soccr::lock::PersistentLock;
use soccr::steer::{Foreign, NextHop, Numbers, Steering, redirect, stop};
use soccr_lab::{Call, End as Ending, Host, LIMIT, Lan, Rtnetlink, Verdict, run_family};

use crate::adopt::adoption_works;
use crate::keeper::cannot_be_put_back;
use crate::programs::{Program, SOCCR, Said, hear, installed, soccr};
use crate::rescue::{all_rescued, broken_programs};
use crate::tls;
use calls::Site;
use run::{Fault, Outcome, Plan, Shape};
use world::{Goal, Place, World};

crate::tests![
    a_send_to_another_network,
    a_send_to_another_program,
    a_send_to_a_server_that_knows_nothing_of_it,
    a_send_through_a_unix_socket,
    a_send_of_several_connections,
    a_send_that_steers,
    a_send_that_hears_no_answers,
    a_save,
    a_save_of_what_goes_on,
    a_restore,
    a_restore_through_a_unix_socket,
    a_rescue_of_what_cannot_go_on,
    a_save_that_cannot_be_undone,
    a_lock_and_an_unlock,
    changes_of_the_steering,
];

/// The most faults that a test tries. With a number in SOCCR_FAULTS it tries so many of each site, and each error with `all`.
const SOME: usize = 16;

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
    Host,
    Program,
    Adopt,
    Socket,
    Several,
    Steer,
    Pipe,
    Save,
    Keep,
    Restore,
    RestoreSocket,
}

impl Scenario {
    fn world(self) -> World {
        let goal = match self {
            Self::Host | Self::Adopt | Self::Socket | Self::Several | Self::Pipe => Goal::Host,
            Self::Steer => Goal::Steered,
            _ => Goal::Program,
        };
        World::new(goal, if self == Self::Several { 3 } else { 1 })
    }

    fn command(self, world: &World, plan: &Plan) -> Command {
        let which = world.selection();
        // What waits in vain shall not wait long; what is only slow, as when each call is interrupted, has time.
        let limit = if matches!(plan, Plan::One(_)) { "5" } else { "60" };
        let with = |verb: &str, more: &[&str]| {
            let mut command = soccr(&[verb]);
            command.args(&which).args(more);
            command
        };
        let send = |recipient: &str, more: &[&str]| {
            let via = world.receive(recipient);
            with("send", &[&["--timeout", limit, "--via", &via], more].concat())
        };
        let program = format!("--detach {}", world.program());
        let image = world.image().display().to_string();
        match self {
            Self::Host | Self::Program | Self::Several => send(&program, &[]),
            Self::Adopt => send("--adopt", &[]),
            Self::Socket => send(&format!("--send-fd {}", world.unix().display()), &[]),
            Self::Steer => send(&program, &["--steer", &world.hop()]),
            Self::Pipe => {
                let mut shell = Command::new("bash");
                let (which, receive) = (which.join(" "), world.receive(&program));
                shell.args(["-o", "pipefail", "-c", &format!("{SOCCR} send {which} | {receive}")]);
                shell
            }
            Self::Save => with("save", &["-o", &image]),
            Self::Keep => with("save", &["--keep", "-o", &image]),
            Self::Restore | Self::RestoreSocket => {
                assert!(with("save", &["-o", &image]).status().unwrap().success());
                let mut restore = soccr(&["restore", &image, "--netns", &world.netns()]);
                match self {
                    Self::Restore => restore.arg("--").args(World::heir()),
                    _ => restore.arg("--send-fd").arg(world.unix()),
                };
                restore
            }
        }
    }

    fn restores(self) -> bool {
        matches!(self, Self::Restore | Self::RestoreSocket)
    }

    fn shape(self) -> Shape {
        if self == Self::Pipe { Shape::Pipe } else { Shape::Command }
    }

    /// Where a connection is without a fault.
    fn goal(self) -> Place {
        match self {
            Self::Save => Place::Image,
            // An image stays when it is restored.
            Self::Keep | Self::Restore | Self::RestoreSocket => Place::Copied,
            _ => Place::New,
        }
    }
}

/// Where each connection is behind a run.
#[derive(Debug)]
struct End {
    places: Vec<Place>,
    outcome: Outcome,
    /// How messages name them.
    names: Vec<[String; 2]>,
}

impl End {
    fn is_all(&self, goal: Place) -> bool {
        self.outcome.code == Some(0) && self.places.iter().all(|place| *place == goal)
    }

    /// What has become of the connections is what has been told.
    fn is_true(&self, scenario: Scenario, fault: &Fault) -> bool {
        let Outcome { code, told, .. } = &self.outcome;
        let is_told = |what: &dyn Fn(&str) -> bool| fault.site.is_message() || told.lines().any(what);
        let is_error_told = || is_told(&|line| line.starts_with("soccr: "));
        let (goal, restores, is_one_way) = (scenario.goal(), scenario.restores(), scenario == Scenario::Pipe);
        let stays = self.places.iter().filter(|place| **place == Place::Old).count();
        let is_true = |place: Place, [name, peer]: &[String; 2]| {
            let is_named = |what: &str| is_told(&|line| line.contains(name) && line.contains(what));
            match (place, code) {
                (place, Some(0)) => place == goal,
                (Place::Old, _) if restores => false,
                (Place::Old, Some(1 | 126 | 127)) => is_error_told(),
                (Place::Old, Some(3 | 4)) => is_named(""),
                // What is to be done behind it has failed, or another stays.
                (Place::New, Some(3)) => stays > 0 || is_error_told(),
                (Place::Copied, Some(1)) | (Place::Image, Some(1 | 126)) if restores => is_error_told(),
                (Place::New, Some(4)) if is_one_way => is_told(&|line| line.contains("is unknown: ")),
                (Place::New, Some(4)) => self.names.len() > 1 || is_named("the target has it, or it is lost"),
                // Nobody has heard the target fail: before it has begun to read, or behind that.
                (Place::Nowhere, Some(1)) if is_one_way => is_error_told() && !told.contains("connection 1:"),
                (Place::Nowhere, Some(4)) if is_one_way => {
                    is_told(&|line| line.contains("connection 1: lost:"))
                }
                (Place::Image, Some(1 | 3 | 4 | 126)) => {
                    is_told(&|line| line.contains(peer) && line.contains("saved in"))
                }
                _ => false,
            }
        };
        let is_summary_true = told.lines().all(|line| {
            let count = |what: &str| {
                let part = line.split([',', ';']).find_map(|part| part.trim().strip_suffix(what));
                part.map_or(0, |count| count.trim().parse().unwrap_or(0))
            };
            !line.contains(" left") || line.starts_with("soccr: ") || count("stay") + count("stays") >= stays
        });
        let is_none_belied = self.places.iter().zip(&self.names).all(|(place, [name, _])| {
            *place != Place::New || !told.lines().any(|line| line.contains(&format!("{name} stays")))
        });
        let mut each = self.places.iter().zip(&self.names);
        each.all(|(place, names)| is_true(*place, names)) && is_summary_true && is_none_belied
    }
}

fn every_fault(scenario: Scenario) {
    if !installed("python3") {
        return;
    }
    let world = &mut scenario.world();
    let goal = scenario.goal();
    let _server = match scenario {
        Scenario::Adopt => Some(world.serve()),
        Scenario::Socket | Scenario::RestoreSocket => Some(world.wait()),
        _ => None,
    };
    let end = turn(world, scenario, &Plan::Nothing).unwrap();
    assert!(end.is_all(goal), "{end:?}");
    let mut violations = Vec::new();
    match turn(world, scenario, &Plan::EveryInterruption) {
        Ok(end) if end.is_all(goal) && end.outcome.is_met => {}
        other => violations.push(format!("interrupted: {other:?}")),
    }
    let faults = faults(&end.outcome.sites);
    let (mut met, mut harmless) = (0, 0);
    for fault in &faults {
        match turn(world, scenario, &Plan::One(fault.clone())) {
            Ok(end) => {
                let (places, Outcome { code, told, is_met, .. }) = (&end.places, &end.outcome);
                met += usize::from(*is_met);
                harmless += usize::from(*is_met && *code == Some(0));
                let what = format!("{fault}: {places:?} {code:?} {told:?}");
                if !end.is_true(scenario, fault) {
                    violations.push(what);
                } else if std::env::var_os("SOCCR_FAULTS_SHOW").is_some() {
                    eprintln!("{what}");
                }
            }
            Err(what) => violations.push(format!("{fault}: {what}")),
        }
    }
    eprintln!(
        "{scenario:?}: {} calls; {met} of {} faults met, {harmless} of them harmless",
        end.outcome.sites.len(),
        faults.len()
    );
    assert!(violations.is_empty(), "{} of {}:\n{}", violations.len(), faults.len(), violations.join("\n"));
}

/// One run, and where the connections are behind it.
fn turn(world: &mut World, scenario: Scenario, plan: &Plan) -> Result<End, String> {
    world.begin();
    let names = world.names();
    let outcome = world.run(&mut scenario.command(world, plan), scenario.shape(), plan);
    let told = format!("{:?} {:?}", outcome.code, outcome.told);
    let places = world.places();
    let left = world.leftovers(places.as_deref().unwrap_or_default());
    match places {
        Ok(places) if left.is_empty() => {
            if scenario.restores() || places.iter().any(|place| !place.is_old()) {
                world.renew(&places);
            }
            Ok(End { places, outcome, names })
        }
        Ok(places) => {
            world.forget();
            Err(format!("left ({places:?}): {left:?}: {told}"))
        }
        Err(what) => {
            world.forget();
            Err(format!("{what}: {told}"))
        }
    }
}

fn a_send_to_another_network() {
    every_fault(Scenario::Host);
}

fn a_send_to_another_program() {
    every_fault(Scenario::Program);
}

fn a_send_to_a_server_that_knows_nothing_of_it() {
    if adoption_works() {
        every_fault(Scenario::Adopt);
    }
}

fn a_send_through_a_unix_socket() {
    every_fault(Scenario::Socket);
}

fn a_send_of_several_connections() {
    every_fault(Scenario::Several);
}

fn a_send_that_steers() {
    every_fault(Scenario::Steer);
}

fn a_send_that_hears_no_answers() {
    if installed("bash") {
        every_fault(Scenario::Pipe);
    }
}

fn a_save() {
    every_fault(Scenario::Save);
}

fn a_save_of_what_goes_on() {
    every_fault(Scenario::Keep);
}

fn a_restore() {
    every_fault(Scenario::Restore);
}

fn a_restore_through_a_unix_socket() {
    every_fault(Scenario::RestoreSocket);
}

/// What has been decrypted is in the image alone, so it stays, though this host cannot be silent about the connection.
fn a_rescue_of_what_cannot_go_on() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let image = directory.join("image").display().to_string();
    let Some(mut peer) = tls::saved(&image, || {}) else { return };
    let [_, hidden] = broken_programs(directory);
    let mut restore = soccr(&["restore", &image, "--", &hidden]);
    let said = Said::new();
    let mut is_met = false;
    run_family(restore.current_dir(directory).stderr(said.output()), LIMIT, |entry| {
        if is_met || !opens_netlink(&entry.call) || all_rescued(directory).next().is_none() {
            return Verdict::Pass;
        }
        is_met = true;
        Verdict::Fail(libc::EMFILE)
    });
    assert!(is_met);
    let said = said.read();
    assert!(said.contains("EMFILE") && said.contains("no connection is lost"), "{said}");
    let rescued = all_rescued(directory).next().expect(&said);
    let restore = ["restore", rescued.to_str().unwrap(), "--stdio", "--", "cat"];
    let _cat = Program::start(soccr(&restore).stdin(Stdio::null()));
    assert_eq!(hear(&mut peer, 6), "unread");
}

/// What cannot be put back is told, and its image stays, though the locks cannot be looked at any more.
fn a_save_that_cannot_be_undone() {
    if !installed("python3") {
        return;
    }
    cannot_be_put_back("EMFILE", |save, watch| {
        let mut has_left = false;
        let end = run_family(save, LIMIT, |entry| {
            if !entry.lineage.is_empty() {
                return Verdict::Pass;
            }
            watch(&entry.call);
            has_left |= entry.call.number == libc::SYS_connect;
            if has_left && opens_netlink(&entry.call) { Verdict::Fail(libc::EMFILE) } else { Verdict::Pass }
        });
        match end {
            Ending::Exited(status) => status.code(),
            _ => None,
        }
    });
}

fn opens_netlink(call: &Call) -> bool {
    call.number == libc::SYS_socket && call.arguments[0] == libc::AF_NETLINK as u64
}

/// A command changes the host all at once, or not at all, or in part, as its exit code says.
fn every_fault_of_a_change<S: PartialEq + Debug>(
    host: &Host,
    prepare: impl Fn(),
    look: impl Fn() -> S,
    arguments: &[&str],
) {
    let run = |plan: &Plan| {
        host.run(|| {
            prepare();
            let before = look();
            let outcome =
                run::observed(soccr(arguments).env_remove("RUST_BACKTRACE"), Shape::Command, plan, || {});
            (before, outcome, look())
        })
    };
    let (_, Outcome { sites, .. }, done) = run(&Plan::Nothing);
    let (before, outcome, behind) = run(&Plan::EveryInterruption);
    assert!(outcome.code == Some(0) && behind == done && before != done, "{outcome:?}: {behind:?}");
    let mut violations = Vec::new();
    for fault in faults(&sites) {
        let (before, outcome, behind) = run(&Plan::One(fault.clone()));
        let is_told = outcome.told.contains("soccr: ") || fault.site.is_message();
        let is_true = match outcome.code {
            Some(0) => behind == done,
            Some(1) => behind == before && is_told,
            // The same command does what is left to do.
            Some(3) => is_told && host.run(|| soccr(arguments).status().unwrap().success() && look() == done),
            _ => false,
        };
        if !is_true {
            violations.push(format!("{fault}: {behind:?} {:?} {:?}", outcome.code, outcome.told));
        }
    }
    assert!(violations.is_empty(), "{arguments:?}: {}:\n{}", violations.len(), violations.join("\n"));
}

fn a_lock_and_an_unlock() {
    let flow = "192.0.2.1:7-198.51.100.1:4711";
    let lan = Lan::new().unwrap();
    let names = || PersistentLock::list().unwrap().into_iter().map(|lock| lock.name).collect::<Vec<_>>();
    let [lock, unlock] = [&["lock", "--name", "name", flow][..], &["unlock", "name"]];
    let other = |of: &[&str], is_there: bool| {
        if names().is_empty() != is_there {
            return;
        }
        assert!(soccr(of).status().unwrap().success());
    };
    every_fault_of_a_change(&lan.hosts[0], || other(unlock, false), names, lock);
    every_fault_of_a_change(&lan.hosts[0], || other(lock, true), names, unlock);
}

fn changes_of_the_steering() {
    let flow = "192.0.2.1:7-198.51.100.1:4711";
    let [local, remote] = ["192.0.2.1:7", "198.51.100.1:4711"].map(|end| end.parse().unwrap());
    let steered = Flow { local, remote };
    let lan = &Lan::new().unwrap();
    let [old, new, third] = &lan.hosts;
    let to = |host: &Host| redirect(&[steered], &NextHop::new(host.v4.into()).unwrap()).unwrap();
    let hops = || -> Vec<_> {
        let all = Steering::list().unwrap();
        let entries = all.iter().flat_map(|steering| steering.contents().unwrap());
        entries.map(|entry| (entry.flow, entry.next_hop)).collect()
    };
    let third = third.v4.to_string();
    every_fault_of_a_change(
        old,
        || assert!(stop(&[steered]).unwrap() < 2),
        hops,
        &["steer", "--to", &third, flow],
    );
    every_fault_of_a_change(old, || to(new), hops, &["steer", "--to", &third, flow]);
    every_fault_of_a_change(old, || to(new), hops, &["steer", "--remove", flow]);
    // The new host, that takes over the address.
    let has_address = || TcpListener::bind((local.ip(), 0)).is_ok();
    let deliver = || {
        if has_address() {
            let prefix = Rtnetlink::here().unwrap().remove_address("eth0", local.ip(), 24);
            prefix.unwrap();
        }
        Foreign::deliver(local.ip(), Numbers::default()).unwrap();
    };
    let delivered =
        || (Foreign::list().unwrap().is_empty(), Steering::list().unwrap().is_empty(), has_address());
    let adopt = ["steer", "--adopt-address", "192.0.2.1/24", "--device", "eth0"];
    every_fault_of_a_change(new, deliver, delivered, &adopt);
    let all = || {
        deliver();
        to(old);
    };
    every_fault_of_a_change(new, all, delivered, &["steer", "--remove", "--all"]);
}
