//! Programs that tests have started and no longer wait for.

use std::fs;
use std::io;

use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, wait};

/// From now on programs whose parent has ended become children of this process, not of init.
///
/// # Errors
/// The errors of `prctl(2)`.
pub(crate) fn adopt() -> io::Result<()> {
    set_child_subreaper(Some(getpid())).map_err(Into::into)
}

/// Ends all children, including those that become children meanwhile. Some are left where a test has failed, or where a
/// program waits for a peer whose network has gone.
pub(crate) fn end() {
    loop {
        for child in children() {
            // It may have ended by itself.
            let _ = kill_process(child, Signal::KILL);
        }
        // Fails when there are none.
        if wait(WaitOptions::empty()).is_err() {
            return;
        }
    }
}

fn children() -> Vec<Pid> {
    let us = format!("PPid:\t{}", getpid().as_raw_pid());
    let is_child = |pid: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line == us)
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = processes.filter_map(|process| process.file_name().into_string().ok());
    names.filter(|name| is_child(name)).filter_map(|name| Pid::from_raw(name.parse().ok()?)).collect()
}
