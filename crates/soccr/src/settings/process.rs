//! What a socket has from its process cannot be given to another process, so it is noted and compared.
//!
//! Signals belong to a process (`F_SETOWN`, `F_SETSIG`), and whoever gets the connection has to ask for them again. Control group and security
//! label are those of the process that opened the socket: firewalls (`socket cgroupv2`) and security modules go by them.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::OFlags;

use super::{Name, Settings, Skipped, Value};
use crate::error::{Error, Result};
use crate::fidelity::Fidelity;
use crate::sys::sockopt;

const FIOGETOWN: u32 = 0x8903;

/// Names that are noted beside the options, and the files of a process that tell them.
const FILES: [(&str, &str); 2] = [("cgroup", "cgroup"), ("label", "attr/current")];
const SIGNALS: [&str; 3] = ["O_ASYNC", "F_SETOWN", "F_SETSIG"];
const NOTICES: &str = "MSG_ZEROCOPY";

impl Settings {
    /// Notes the control group and the security label of the process that has the socket: `"self"`, or the number of another.
    /// Who restores the connection compares them with its own.
    pub fn note_process(&mut self, process: &str) {
        for (name, file) in FILES {
            if let Some(value) = read(process, file) {
                self.set(name, Value::Bytes(value));
            }
        }
    }

    /// Notes that a process has asked for signals. `flags` are those of its descriptor.
    ///
    /// # Errors
    /// Those of `FIOGETOWN` and `F_GETSIG`.
    pub(crate) fn read_signals(&mut self, fd: BorrowedFd<'_>, flags: OFlags) -> Result<()> {
        let owner = sockopt::ioctl_int::<FIOGETOWN>(fd).map_err(|error| Error::system("FIOGETOWN", error))?;
        let signal = sockopt::signal(fd).map_err(|error| Error::system("fcntl(F_GETSIG)", error))?;
        for (name, number) in SIGNALS.into_iter().zip([flags.contains(OFlags::ASYNC).into(), owner, signal]) {
            if number != 0 {
                self.0.push((Name::Unknown(name.into()), Value::Number(number)));
            }
        }
        Ok(())
    }

    /// Notes that the application waits for notices about bytes that were not acknowledged (`MSG_ZEROCOPY`): they stay with the
    /// old socket. `option_memory` is what they take, as keys and filters do.
    pub(crate) fn note_notices(&mut self, option_memory: u32, unacknowledged: u32) {
        let asked_for = self.get("SO_ZEROCOPY") == Some(&Value::Number(1));
        if asked_for && option_memory > 0 && unacknowledged > 0 {
            self.0.push((Name::Unknown(NOTICES.into()), Value::Number(1)));
        }
    }
}

/// What there is to say of a name that no row of the table has.
pub(super) fn compare(name: &str, value: &Value) -> Option<Skipped> {
    let told = |error, fidelity| Some(Skipped { name: name.to_owned().into(), error, fidelity });
    if SIGNALS.contains(&name) {
        let reason = "signals belong to a process: the new one must ask for them itself";
        return told(io::Error::other(reason), Fidelity::Missing);
    }
    if name == NOTICES {
        let reason = "notices about what was not acknowledged yet never come: its buffers are free now";
        return told(io::Error::other(reason), Fidelity::Missing);
    }
    match (FILES.iter().find(|(known, _)| *known == name), value) {
        (Some((_, file)), Value::Bytes(before)) if read("self", file).as_ref() == Some(before) => None,
        (Some(_), Value::Bytes(before)) => {
            let before = String::from_utf8_lossy(before);
            let reason = format!("it is that of the process that restored it, and was {before}");
            told(io::Error::other(reason), Fidelity::Approximate)
        }
        _ => told(io::Error::from_raw_os_error(libc::ENOPROTOOPT), Fidelity::Missing),
    }
}

/// The lines of a file that concern sockets.
fn read(process: &str, file: &str) -> Option<Vec<u8>> {
    let text = fs::read_to_string(format!("/proc/{process}/{file}")).ok()?;
    let concerns = |line: &&str| file != "cgroup" || line.starts_with("0::") || line.contains("net_cls");
    let text = text.trim_end_matches('\0').lines().filter(concerns).collect::<Vec<_>>().join(" ");
    (!text.is_empty()).then(|| text.into_bytes())
}
