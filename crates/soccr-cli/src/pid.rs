//! Process numbers of the command line.

use rustix::process::Pid;

/// Reads one.
pub(crate) fn parse_pid(text: &str) -> Result<Pid, String> {
    text.parse()
        .ok()
        .filter(|number| *number > 0)
        .and_then(Pid::from_raw)
        .ok_or("the number of a process: 1 to 2147483647".into())
}
