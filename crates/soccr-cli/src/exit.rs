//! How the command ends: exit codes, and one line for what went wrong.

use std::collections::HashMap;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Error, Result};
use soccr_handover::Notes;

use crate::show::table::printable;

/// The exit codes, as `--help` and the man pages explain them.
pub(crate) const HELP: &str = "\
Exit codes:
  0    done
  1    failed; nothing has changed, or standard error names the images that hold the connections now
  2    the command line is wrong
  3    some of several connections failed, or one that has moved was not given to its program, or nobody knows: standard error names each
  4    what became of a connection is unknown, or it is lost
  126  the program was found but could not be started; the connections are as with 1
  127  the program was not found";

/// How the command ended, by exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Done = 0,
    Failed = 1,
    /// Beside what the parser of the command line finds.
    Usage = 2,
    SomeFailed = 3,
    Lost = 4,
    NotStarted = 126,
    NotFound = 127,
}

/// An error with an exit code of its own.
#[derive(Debug)]
pub(crate) struct Coded(pub(crate) Exit, pub(crate) String);

impl std::fmt::Display for Coded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.1)
    }
}

impl std::error::Error for Coded {}

/// Prints the error, if there is one, and tells the exit code.
pub(crate) fn report(outcome: Result<Exit>) -> ExitCode {
    let exit = match outcome {
        Ok(exit) => exit,
        // The reader of our output, such as head(1), has closed the pipe.
        Err(error) if error.is::<OutputClosed>() => Exit::Done,
        Err(error) => {
            complain(&line(&error));
            code(&error)
        }
    };
    ExitCode::from(exit as u8)
}

/// The exit code of an error.
pub(crate) fn code(error: &Error) -> Exit {
    error.downcast_ref::<Coded>().map_or(Exit::Failed, |coded| coded.0)
}

/// The source of a hand-over, which prints our messages as long as its stream is open.
static NOTES: OnceLock<Notes> = OnceLock::new();

/// Sends complaints to the source of a hand-over from now on, as long as it passes them on.
pub(crate) fn complain_by(notes: &Notes) {
    let _ = NOTES.set(notes.clone());
}

/// Lets the source of a hand-over print that this command has failed; returns whether it does.
pub(crate) fn fail_by_source(error: &Error) -> bool {
    NOTES.get().is_some_and(|notes| notes.fail(line(error)))
}

/// Complaints that wait to be printed, as long as that is to wait.
static HELD: Mutex<Option<Held>> = Mutex::new(None);

#[derive(Default)]
struct Held {
    lines: Vec<String>,
    length: usize,
    /// How many more there were than may wait.
    dropped: usize,
}

impl Held {
    /// The most bytes that wait.
    const MOST: usize = 4 << 20;

    fn push(&mut self, line: &str) {
        if self.length + line.len() > Self::MOST {
            self.dropped += 1;
            return;
        }
        self.length += line.len();
        self.lines.push(line.to_owned());
    }
}

/// As long as it lives, complaints wait, so that a reader of standard error who does not read holds up nobody else.
#[derive(Debug)]
#[must_use = "dropping it prints what has waited"]
pub(crate) struct Quiet(());

impl Quiet {
    pub(crate) fn begin() -> Self {
        held().get_or_insert_default();
        Self(())
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        let Some(Held { lines, dropped, .. }) = held().take() else { return };
        lines.iter().for_each(|line| print_complaint(line));
        if dropped > 0 {
            print_complaint(&format!("{dropped} more messages came at the same time, and are left out"));
        }
    }
}

fn held() -> MutexGuard<'static, Option<Held>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Prints one line: on standard error, or through the source of a hand-over.
pub(crate) fn complain(line: &str) {
    let line = &printable(line);
    if NOTES.get().is_some_and(|notes| notes.say(line)) {
        return;
    }
    if let Some(held) = held().as_mut() {
        return held.push(line);
    }
    print_complaint(line);
}

/// Whether complaints [wait](Quiet), and whatever else is to be seen on standard error.
pub(crate) fn is_quiet() -> bool {
    held().is_some()
}

fn print_complaint(line: &str) {
    // A closed standard error must not cost connections.
    let _ = writeln!(anstream::stderr(), "soccr: {line}");
}

/// Prints a line for each name. Where more than a few names share a text, it prints the text once, with the first name and a count.
pub(crate) fn complain_of_all(all: impl IntoIterator<Item = (String, String)>) {
    /// Up to this number, each has a line of its own.
    const FEW: usize = 3;
    let mut texts: Vec<(String, Vec<String>)> = Vec::new();
    let mut places = HashMap::new();
    for (name, text) in all {
        let place = *places.entry(text.clone()).or_insert_with(|| {
            texts.push((text, Vec::new()));
            texts.len() - 1
        });
        texts[place].1.push(name);
    }
    for (text, names) in texts {
        match names.len() {
            ..=FEW => names.iter().for_each(|name| complain(&format!("{name}: {text}"))),
            count => complain(&format!("{} and {} more: {text}", names[0], count - 1)),
        }
    }
}

/// An error with all its contexts. The errors of the libraries include their causes already.
pub(crate) fn line(error: &Error) -> String {
    let mut parts = Vec::new();
    for cause in error.chain() {
        parts.push(cause.to_string());
        if cause.is::<soccr::Error>()
            || cause.is::<soccr_handover::Error>()
            || cause.is::<soccr_image::Error>()
        {
            break;
        }
    }
    printable(&parts.join(": "))
}

/// Standard output is a pipe that nobody reads any longer.
#[derive(Debug)]
struct OutputClosed;

impl std::fmt::Display for OutputClosed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("standard output is closed")
    }
}

impl std::error::Error for OutputClosed {}

/// Prints text on standard output.
pub(crate) fn print(text: &str) -> Result<Exit> {
    written(io::stdout().write_all(text.as_bytes()))
}

/// Treats the outcome of writing to standard output.
pub(crate) fn written(result: io::Result<()>) -> Result<Exit> {
    match result {
        Ok(()) => Ok(Exit::Done),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(OutputClosed.into()),
        Err(error) => Err(Error::new(error).context("standard output")),
    }
}
