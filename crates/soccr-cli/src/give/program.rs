//! A program that this one becomes: it finds the connections as its descriptors.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::fs::{Access, OFlags, access, fcntl_getfl, fcntl_setfl};

use crate::exit::{Coded, Exit};
use crate::signals::{self, Deaf};
use crate::{descriptors, lifeline, sys};

use super::Live;
use super::parting::Parting;
use super::state::State;

/// The number of the first descriptor given (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// Finds a program as execvp(3) does.
pub(super) fn find(name: &str) -> Result<PathBuf> {
    let candidates: Vec<PathBuf> = match name.contains('/') {
        true => vec![name.into()],
        false => {
            let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
            std::env::split_paths(&path).map(|directory| directory.join(name)).collect()
        }
    };
    let is_program = |path: &&PathBuf| path.is_file() && access(path.as_path(), Access::EXEC_OK).is_ok();
    if let Some(program) = candidates.iter().find(is_program) {
        if let Some(interpreter) = interpreter(program).filter(|path| !is_program(&path)) {
            let missing = interpreter.display();
            bail!(Coded(Exit::NotStarted, format!("{name}: its interpreter {missing} cannot be executed")));
        }
        return Ok(program.clone());
    }
    if candidates.iter().any(|path| Path::exists(path)) {
        bail!(Coded(Exit::NotStarted, format!("{name}: it is no program that may be executed")));
    }
    bail!(Coded(Exit::NotFound, format!("{name}: there is no such program")))
}

/// What the `#!` line of a script names.
fn interpreter(script: &Path) -> Option<PathBuf> {
    let mut start = Vec::new();
    File::open(script).ok()?.take(256).read_to_end(&mut start).ok()?;
    let line = start.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let name = line.split(|byte| b" \t".contains(byte)).find(|word| !word.is_empty())?;
    Some(OsStr::from_bytes(name).into())
}

/// Becomes the program.
pub(super) fn execute(
    path: &Path,
    arguments: &[String],
    stdio: bool,
    connections: &mut [Live],
    states: &[State],
    deaf: Deaf,
    parting: &mut Parting,
) -> Result<Exit> {
    let mut command = Command::new(path);
    lifeline::hide(&mut command);
    signals::hide(&mut command);
    signals::restore_for(&mut command);
    descriptors::keep_limit_from(&mut command);
    command.arg0(&arguments[0]).args(&arguments[1..]);
    let end = FIRST + (connections.len() + states.len()) as RawFd;
    parting.make_room(end)?;
    for Live { stream, .. } in &mut *connections {
        // As systemd and inetd give them. A program that wants another mode sets it.
        let flags = fcntl_getfl(&*stream).context("fcntl(F_GETFL)")?;
        fcntl_setfl(&*stream, flags - OFlags::NONBLOCK).context("fcntl(F_SETFL)")?;
        // First to numbers above all that they will get, so that none overwrites another.
        *stream = beyond(stream.as_fd(), end)?.into();
    }
    let mut files = Vec::with_capacity(states.len());
    for (_, state) in states {
        files.push(beyond(state.as_fd(), end)?);
    }
    match stdio {
        true => {
            let connection = connections.first().context("there is no connection to give")?;
            rustix::stdio::dup2_stdin(&connection.stream).context("dup2")?;
            rustix::stdio::dup2_stdout(&connection.stream).context("dup2")?;
        }
        false => {
            let connections = connections.iter().map(|connection| connection.stream.as_raw_fd());
            let placed: Vec<RawFd> = connections.chain(files.iter().map(AsRawFd::as_raw_fd)).collect();
            sys::place(&placed, FIRST).context("dup2")?;
            let names = names(placed.len() - files.len(), states.iter().map(|(of, _)| *of));
            command
                .env("LISTEN_FDS", placed.len().to_string())
                .env("LISTEN_PID", std::process::id().to_string())
                .envs(names.map(|names| ("LISTEN_FDNAMES", names)));
        }
    }
    parting.leave()?;
    // The program would inherit ignored signals.
    drop(deaf);
    let error = command.exec();
    signals::ignore_again();
    // And it has lowered the limit for the program: a rescue needs more descriptors than that.
    descriptors::raise_limit();
    bail!(Coded(Exit::NotStarted, format!("{}: {error}", path.display())))
}

/// A duplicate with a number from `end` on.
fn beyond(fd: BorrowedFd<'_>, end: RawFd) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, end).context("fcntl(F_DUPFD_CLOEXEC): see RLIMIT_NOFILE (ulimit -n)")
}

/// The most descriptors that have names.
const MOST_NAMES: usize = 11_000;

/// The names of the descriptors of connections and states; empty where they exceed what the kernel takes (`MAX_ARG_STRLEN`,
/// 128 KiB).
fn names(connections: usize, states: impl ExactSizeIterator<Item = usize>) -> Option<String> {
    if connections + states.len() > MOST_NAMES {
        return None;
    }
    let states = states.map(|of| format!("state-{}", FIRST as usize + of));
    let names = std::iter::repeat_n("connection".to_owned(), connections).chain(states);
    Some(names.collect::<Vec<_>>().join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_starts_with_the_names_of_as_many_descriptors_as_have_some() {
        assert_eq!(names(2, [1].into_iter()).unwrap(), "connection:connection:state-4");
        assert_eq!(names(MOST_NAMES, [1].into_iter()), None);
        let longest = names(MOST_NAMES / 2, 0..MOST_NAMES / 2).unwrap();
        assert!(Command::new("true").env("LISTEN_FDNAMES", longest).status().unwrap().success());
    }
}
