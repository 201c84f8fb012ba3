//! SIGHUP, SIGINT and SIGTERM, which must not end a command while connections are in its memory only; and what must not stop it while
//! others stand still for it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use rustix::pipe::{PipeFlags, pipe_with};
use soccr_handover::Users;

use crate::exit::Quiet;
use crate::sys;

/// What SIGXFSZ did when this command was started.
static TOO_LARGE: OnceLock<sys::Disposition> = OnceLock::new();

/// To be called at the start, which may have been by a program that ignores SIGCHLD: then nobody could tell how a child has ended.
/// A file that grows too large (`ulimit -f`) is an error like any other: SIGXFSZ would cost what is to be saved.
pub(crate) fn prepare() {
    sys::heed(libc::SIGCHLD, libc::SIG_DFL);
    let _ = TOO_LARGE.set(sys::ignore(libc::SIGXFSZ));
}

/// Has a program start with what [`prepare`] has changed as it was. Where it cannot be executed, [`ignore_again`].
pub(crate) fn restore_for(command: &mut Command) {
    if let Some(before) = TOO_LARGE.get() {
        sys::set_signals(command, vec![(libc::SIGXFSZ, *before)]);
    }
}

/// This process has not become another program: it goes on as before.
pub(crate) fn ignore_again() {
    // The attempt to execute a program has reset SIGPIPE to its default: a message to a closed pipe would cost the connections.
    let _ = [libc::SIGPIPE, libc::SIGXFSZ].map(sys::ignore);
}

/// The signals that [`spare`] has made a target ignore, by their numbers.
const VARIABLE: &str = "SOCCR_SIGNALS";

/// Has a target, with the relay to it, ignore what a terminal sends to all programs of a command line (Ctrl-C, Ctrl-Z): a relay such as
/// ssh(1) that ended or stopped in the middle of a move would cut it. Programs inherit this; ssh(1) keeps to it.
pub(crate) fn spare(command: &mut Command) {
    let heeded = sys::TERMINAL.into_iter().filter(|signal| sys::disposition(*signal) != libc::SIG_IGN);
    let heeded: Vec<libc::c_int> = heeded.collect();
    // Otherwise the variable is that of a source around this one.
    if !heeded.is_empty() {
        let numbers: Vec<String> = heeded.iter().map(libc::c_int::to_string).collect();
        command.env(VARIABLE, numbers.join(","));
    }
    sys::set_signals(command, heeded.into_iter().map(|signal| (signal, libc::SIG_IGN)).collect());
}

/// Heeds again what a source on this host has [made](spare) this process ignore, so that programs do not inherit it. To be called where no
/// signals of its terminal come.
pub(crate) fn heed_terminal() {
    let told = std::env::var(VARIABLE).ok();
    // A relay such as sudo(8) removes the variable. Nobody else ignores what Ctrl-Z sends: nohup(1) and shells leave it alone.
    let is_lost = told.is_none() && sys::disposition(libc::SIGTSTP) == libc::SIG_IGN;
    let numbers: Vec<libc::c_int> =
        told.iter().flat_map(|numbers| numbers.split(',')).filter_map(|number| number.parse().ok()).collect();
    for signal in sys::TERMINAL.into_iter().filter(|signal| is_lost || numbers.contains(signal)) {
        sys::heed(signal, libc::SIG_DFL);
    }
}

/// Keeps the variable from the program that gets the connections.
pub(crate) fn hide(command: &mut Command) {
    command.env_remove(VARIABLE);
}

/// SIGHUP, SIGINT and SIGTERM make it readable, instead of ending the process.
#[derive(Debug)]
pub(crate) struct Bell {
    bell: OwnedFd,
    _rope: OwnedFd,
    before: [sys::Disposition; 3],
}

impl Bell {
    /// Set once in the life of a process.
    pub(crate) fn hang() -> Result<Self> {
        let (bell, rope) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).context("pipe2")?;
        let before = sys::ENDING.map(|signal| sys::catch(signal, rope.as_fd()));
        Ok(Self { bell, _rope: rope, before })
    }

    /// From now on the signals are ignored.
    pub(crate) fn deafen(self) -> Deaf {
        let _ = sys::ENDING.map(sys::ignore);
        Deaf { before: self.before }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// SIGHUP, SIGINT and SIGTERM are ignored as long as it lives.
#[derive(Debug)]
#[must_use = "dropping it heeds the signals at once"]
pub(crate) struct Deaf {
    before: [sys::Disposition; 3],
}

impl Deaf {
    /// To be called when connections are about to be in the memory of this process only.
    pub(crate) fn begin() -> Self {
        Self { before: sys::ENDING.map(sys::ignore) }
    }
}

impl Drop for Deaf {
    fn drop(&mut self) {
        for (signal, before) in sys::ENDING.into_iter().zip(self.before) {
            sys::heed(signal, before);
        }
    }
}

/// Users of connections. While they are stopped, the terminal cannot stop this command (Ctrl-Z), and it prints nothing, since nobody may
/// read that (Ctrl-S): they would stand still until somebody makes it go on.
pub(crate) struct Unstoppable<U> {
    users: U,
    before: Option<[sys::Disposition; 3]>,
    /// Declared last, so that it is dropped last: the users have gone on.
    quiet: Option<Quiet>,
}

impl<U> Unstoppable<U> {
    pub(crate) fn new(users: U) -> Self {
        Self { users, before: None, quiet: None }
    }

    fn heed(&mut self) {
        for (signal, before) in sys::STOPPING.into_iter().zip(self.before.take().into_iter().flatten()) {
            sys::heed(signal, before);
        }
    }
}

impl<U: Users> Users for Unstoppable<U> {
    fn stop(&mut self) -> soccr_handover::Result<()> {
        self.before.get_or_insert_with(|| sys::STOPPING.map(sys::ignore));
        self.quiet.get_or_insert_with(Quiet::begin);
        self.users.stop()
    }

    fn go_on(&mut self) -> soccr_handover::Result<()> {
        self.users.go_on()?;
        self.heed();
        self.quiet = None;
        Ok(())
    }

    fn filling(&mut self, number: usize) -> soccr_handover::Result<()> {
        self.users.filling(number)
    }

    fn have(&mut self, number: usize) -> soccr_handover::Result<bool> {
        self.users.have(number)
    }

    fn filled(&mut self, number: usize) -> soccr_handover::Result<()> {
        self.users.filled(number)
    }
}
