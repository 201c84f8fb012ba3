//! What a terminal sends to all programs of a command line (Ctrl-C, Ctrl-Z, its end) neither cuts a move nor keeps it from ending.

use std::fs::read_to_string;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, getpgid, kill_process, kill_process_group};
use soccr_lab::{Side, run_and_watch, wait_until};

use crate::kill::wait_until_dead;
use crate::programs::{HEIR, SOCCR, Said, installed};
use crate::transfer::Move;

crate::tests![
    a_terminal_does_not_cut_a_move_through_a_relay,
    who_ends_a_source_ends_its_target_with_it,
    a_program_heeds_the_signals_of_its_terminal,
    how_a_child_ends_is_known_to_those_who_inherit_ignorance,
];

/// In a group of its own, which a terminal would send signals to. What runs in the background of a shell ignores some; this does not.
fn send(moving: &Move, via: &str) -> Command {
    let mut send = Command::new("env");
    send.args(["--default-signal=INT,HUP,QUIT,TSTP,TERM", SOCCR, "send", "--pid", &moving.old.pid()]);
    send.args(["--all", "--via", via]).current_dir(&moving.directory).process_group(0);
    send
}

fn a_terminal_does_not_cut_a_move_through_a_relay() {
    if !installed("python3") {
        return;
    }
    for signal in [Signal::INT, Signal::HUP, Signal::TSTP] {
        let mut moving = Move::new(1);
        // Like ssh(1): it passes bytes on, and the target is in no group of ours.
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let target = format!("setsid env -u SOCCR_LIFELINE {}", moving.receive());
        let via = format!("echo $$ > {}; cat | {target} | cat", pid.display());
        let said = Said::new();
        let mut lets_go = 0;
        let code = run_and_watch(send(&moving, &via).stderr(said.output()), |call| {
            lets_go += u32::from(call.number == libc::SYS_connect);
            if call.number == libc::SYS_connect && lets_go == 1 {
                let shell = Pid::from_raw(read_to_string(&pid).unwrap().trim().parse().unwrap());
                kill_process_group(getpgid(shell).unwrap(), signal).unwrap();
            }
        });
        assert_eq!((code, said.read()), (Some(0), String::new()), "{signal:?}");
        moving.assert_lives_at(Side::B, "new ");
        moving.end();
    }
}

/// Before anything has left, there is nothing to wait for.
fn who_ends_a_source_ends_its_target_with_it() {
    if !installed("python3") {
        return;
    }
    for (signal, is_typed) in
        [(Signal::INT, true), (Signal::HUP, true), (Signal::TERM, false), (Signal::INT, false)]
    {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let mut moving = Move::new(1);
        let via = format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 1000", pid.display());
        let mut sending = send(&moving, &via).stderr(Stdio::null()).spawn().unwrap();
        wait_until("the target has started", || pid.exists());
        let target = read_to_string(pid).unwrap().trim().parse().unwrap();
        let source = Pid::from_child(&sending);
        if is_typed { kill_process_group(source, signal) } else { kill_process(source, signal) }.unwrap();
        assert_eq!(sending.wait().unwrap().code(), None, "{signal:?}: killed");
        wait_until_dead(target);
        moving.assert_lives_at(Side::A, "old ");
    }
}

/// The signals that a process ignores, as bits.
fn ignored(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
    u64::from_str_radix(line, 16).unwrap()
}

fn a_program_heeds_the_signals_of_its_terminal() {
    if !installed("python3") {
        return;
    }
    // The second is what sudo(8) does to the environment.
    for relay in ["", "env -i PATH=\"$PATH\""] {
        let directory = tempfile::tempdir().unwrap();
        let status = directory.path().join("status");
        let mut moving = Move::new(1);
        let program = format!("cat /proc/$$/status > {}; exec python3 -c \"$0\" \"new \"", status.display());
        let receive =
            format!("{relay} {SOCCR} receive --netns {} -- sh -c '{program}' '{HEIR}'", moving.beside.pid());
        assert!(send(&moving, &receive).status().unwrap().success());
        moving.assert_lives_at(Side::B, "new ");
        let signals = [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TSTP, Signal::TERM, Signal::XFSZ];
        let mask = signals.iter().fold(0, |mask, signal| mask | 1 << (signal.as_raw() - 1));
        let ours =
            ignored(&read_to_string("/proc/self/status").unwrap()) & (1 << (Signal::XFSZ.as_raw() - 1));
        assert_eq!(ignored(&read_to_string(&status).unwrap()) & mask, ours, "{relay}");
        moving.end();
    }
}

/// A parent that ignores SIGCHLD hands that down.
fn how_a_child_ends_is_known_to_those_who_inherit_ignorance() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    let ignoring = |arguments: &[&str]| {
        let mut command = Command::new("env");
        command.args(["--ignore-signal=CHLD", SOCCR]).args(arguments);
        command
    };
    let pid = moving.old.pid();
    let output = ignoring(&["send", "--pid", &pid, "--all", "--via", "exit 7"]).output().unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{complaint}");
    assert!(complaint.contains("exit status: 7"), "{complaint}");
    moving.assert_lives_at(Side::A, "old ");
    let stream = tempfile::NamedTempFile::new().unwrap();
    assert!(moving.send(&["--all"]).stdout(stream.reopen().unwrap()).status().unwrap().success());
    let mut receive = ignoring(&["receive", "--netns", &moving.beside.pid(), "--", "sh", "-c", "exit 5"]);
    let output = receive.stdin(stream.reopen().unwrap()).output().unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", String::from_utf8_lossy(&output.stderr));
}
