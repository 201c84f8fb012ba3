//! An image that must not be restored again is renamed:
//!
//! - with keys of kernel TLS, before the connections live: two sockets that continue one sending state would encrypt different bytes
//!   with the same nonce, which gives both away;
//! - after its connections lived, but nobody took them: they are in newer images, and the old one does not know what has arrived since.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use soccr::Connection;
use soccr_image::sync_name;

use crate::exit;

const ENDING: &str = "consumed";

/// Whether this connection must not be restored twice.
fn is_once(connection: &Connection) -> bool {
    connection.tls.as_ref().is_some_and(|tls| tls.transmit.is_some())
}

/// Refuses an image that has been restored already.
pub(crate) fn check<'a>(
    path: Option<&Path>,
    mut connections: impl Iterator<Item = &'a Connection>,
) -> Result<()> {
    let path = path.filter(|path| path.extension().is_some_and(|ending| ending == ENDING));
    if let Some(path) = path.filter(|_| connections.any(is_once)) {
        bail!(
            "{}: it has been restored, and holds keys that a second socket must not go on with (kernel TLS)",
            path.display()
        );
    }
    Ok(())
}

/// An image that has got its mark.
#[derive(Default)]
pub(crate) struct Mark(Option<[PathBuf; 2]>);

impl Mark {
    /// Nothing has been sent, and nothing will be: the image is as good as before.
    pub(crate) fn undo(&self) {
        let Some([path, marked]) = &self.0 else { return };
        match std::fs::rename(marked, path) {
            Ok(()) => exit::complain(&format!("the image is {} again", path.display())),
            Err(error) => exit::complain(&format!("{}: it is as good as before: {error}", marked.display())),
        }
    }
}

/// Marks the image, where one of its connections must not be restored twice. Nothing has been sent by then: without a mark there
/// is no restore.
pub(crate) fn mark<'a>(
    path: Option<&Path>,
    mut connections: impl Iterator<Item = &'a Connection>,
) -> Result<Mark> {
    if !connections.any(is_once) {
        return Ok(Mark::default());
    }
    let Some(path) = path else {
        exit::complain(
            "the image holds keys of kernel TLS, and came from standard input: never restore it again",
        );
        return Ok(Mark::default());
    };
    let at = || format!("{}: it holds keys of kernel TLS, and cannot be marked as consumed", path.display());
    let marked = rename(path).with_context(at)?;
    let mark = Mark(Some([path.to_owned(), marked.clone()]));
    exit::complain(&format!("the image is {} now: a second socket must not use its keys", marked.display()));
    match sync_name(&marked) {
        Some(error) => {
            mark.undo();
            Err(error).with_context(at)
        }
        None => Ok(mark),
    }
}

/// Sets an image aside whose connections have lived, but were not given away.
pub(crate) fn set_aside(path: Option<&Path>) {
    let Some(path) = path else { return };
    match rename(path) {
        Ok(aside) => {
            exit::complain(&format!(
                "{} is {} now: it does not know what has arrived since, the new images do",
                path.display(),
                aside.display()
            ));
            if let Some(error) = sync_name(&aside) {
                let name = aside.display();
                exit::complain(&format!("{name}: its name may not survive a power failure: {error}"));
            }
        }
        // It was marked before the connections lived.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => exit::complain(&format!(
            "{}: do not restore it again, it does not know what has arrived since (it cannot be renamed: {error})",
            path.display()
        )),
    }
}

fn rename(path: &Path) -> io::Result<PathBuf> {
    let mut name = OsString::from(path);
    name.push(format!(".{ENDING}"));
    let name = PathBuf::from(name);
    std::fs::rename(path, &name)?;
    Ok(name)
}
