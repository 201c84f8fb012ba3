//! Any process of a hand-over killed at any time: no connection is in two places, and none is reset or lost but where that is documented.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use soccr_lab::{Side, wait_until};

use crate::kill::{End, children};
use crate::programs::{SOCCR, Said, ask, hear, installed, json};
use crate::transfer::Move;

crate::tests![whoever_is_killed_whenever];

/// What all processes of one hand-over have in their environment.
const MARK: &str = "SOCCR_TEST_RUN";

const VICTIMS: [End; 4] = [End::Source, End::Keeper, End::Starter, End::Target];
const CONNECTIONS: usize = 3;
/// The exit code where nobody knows.
const LOST: i32 = 4;

/// How often. `SOCCR_KILLS=500` makes the test long.
fn runs() -> usize {
    std::env::var("SOCCR_KILLS").map_or(16, |number| number.parse().unwrap())
}

fn whoever_is_killed_whenever() {
    if !installed("python3") {
        return;
    }
    let (mut killed, mut lost, mut lasts) = (0, 0, Duration::from_millis(100));
    for run in 0..runs() {
        let goal = if run % 2 == 0 { Side::B } else { Side::A };
        let victim = VICTIMS[run / 2 % VICTIMS.len()];
        let random = RandomState::new().hash_one(run);
        // From before the target starts until after everything has moved.
        let delay = Duration::from_micros(random % lasts.as_micros() as u64);
        let moving = Move::to(goal, CONNECTIONS);
        let mark = format!("{MARK}={}-{random}", std::process::id());
        let begin = Instant::now();
        let mut source = start(&moving, &mark);
        thread::sleep(delay);
        let is_killed = kill(&mut source.0, victim);
        let status = source.0.wait().unwrap();
        if !is_killed {
            lasts = begin.elapsed().mul_f32(0.9);
        }
        wait_until("all of it has ended", || processes(&mark).is_empty());
        killed += usize::from(is_killed);
        let told = source.1.read();
        let what = format!("{victim:?} after {delay:?} ({is_killed}), to {goal:?}: {status}, {told:?}");
        lost += judge(moving, victim, is_killed, status, &told, &what);
    }
    eprintln!("{killed} of {} hand-overs met a kill, {lost} connections were lost with a process", runs());
    assert!(killed > 0, "the kills came too late");
}

fn start(moving: &Move, mark: &str) -> (Child, Said) {
    let (name, value) = mark.split_once('=').unwrap();
    let said = Said::new();
    // It ends when the program runs.
    let receive = moving.receive().replace("receive ", "receive --detach ");
    let mut send = moving.send(&["--all", "--via", &format!("exec {receive}")]);
    let child = send.env(name, value).stdout(said.output()).stderr(said.output());
    (child.spawn().unwrap(), said)
}

/// The processes of a hand-over that are still this command: neither dead nor the program that got the connections.
fn processes(mark: &str) -> Vec<PathBuf> {
    let all = fs::read_dir("/proc").unwrap().filter_map(|entry| Some(entry.ok()?.path()));
    all.filter(|path| {
        fs::read_link(path.join("exe")).is_ok_and(|exe| exe == Path::new(SOCCR))
            && fs::read(path.join("environ"))
                .is_ok_and(|text| text.split(|byte| *byte == 0).any(|one| one == mark.as_bytes()))
    })
    .collect()
}

/// False where there is no such process, or not any more.
fn kill(source: &mut Child, victim: End) -> bool {
    let is_soccr =
        |pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == Path::new(SOCCR));
    if source.try_wait().unwrap().is_some() {
        return false;
    }
    let below =
        |pid| if fs::exists(format!("/proc/{pid}/task/{pid}")).unwrap() { children(pid) } else { Vec::new() };
    // The target takes the place of the shell that starts it; the keeper is what the source has become by a fork.
    let receives = |pid: &u32| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(|b| *b == 0).nth(1) == Some(b"receive"))
    };
    let family: Vec<u32> = below(source.id());
    let starter = || family.iter().copied().find(|pid| receives(pid));
    let pid = match victim {
        End::Source => Some(source.id()),
        End::Keeper => family.iter().copied().find(|pid| !receives(pid)),
        End::Starter => starter(),
        End::Target => starter().and_then(|starter| below(starter).first().copied()),
    };
    let Some(pid) = pid.filter(is_soccr) else { return false };
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).is_ok()
}

/// Each connection is in one place, and goes on there; how many went with the process that had them.
fn judge(
    mut moving: Move,
    victim: End,
    is_killed: bool,
    status: ExitStatus,
    told: &str,
    what: &str,
) -> usize {
    let open = |list: Vec<serde_json::Value>| -> Vec<String> {
        let open = list.iter().filter(|socket| socket["savable"] == true);
        open.map(|socket| socket["remote"].as_str().unwrap().to_owned()).collect()
    };
    let here = open(moving.lab.a.run(|| json(&["list", "--json"])));
    let there = open(json(&["list", "--json", "--netns", &moving.beside.pid()]));
    let has = |list: &[String], client: &TcpStream| list.contains(&client.local_addr().unwrap().to_string());
    let mut lost = 0;
    for mut client in std::mem::take(&mut moving.clients) {
        match (has(&here, &client), has(&there, &client)) {
            (true, true) if moving.goal == Side::B => panic!("in two places: {what}"),
            (true, true) => {
                std::io::Write::write_all(&mut client, b"more").unwrap();
                let answer = hear(&mut client, 8);
                assert!(["old more", "new more"].contains(&answer.as_str()), "{answer}: {what}");
            }
            (true, false) => {
                moving.lab.steer(Side::A).unwrap();
                assert_eq!(ask(&mut client, "more", "old "), "old more", "{what}");
            }
            (false, true) => {
                moving.lab.steer(Side::B).unwrap();
                assert_eq!(ask(&mut client, "more", "new "), "new more", "{what}");
            }
            (false, false) => lost += 1,
        }
    }
    let left = told.split(" left").next().and_then(|text| text.lines().last()?.parse().ok()).unwrap_or(0);
    let may_be_lost = match victim {
        // What was in its memory alone.
        End::Source => CONNECTIONS,
        _ if status.code() == Some(LOST) => CONNECTIONS,
        // It had them.
        End::Target | End::Starter => left,
        End::Keeper => 0,
    };
    assert!(lost <= if is_killed { may_be_lost } else { 0 }, "{lost} are lost: {what}");
    moving.end();
    lost
}
