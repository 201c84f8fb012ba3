//! An image that must not be restored again is renamed:
//!
//! - with keys of kernel TLS, before the connections live: two sockets that continue one sending state would encrypt different bytes
//!   with the same nonce, which gives both away;
//! - after its connections lived, but nobody took them: they are in newer images, and the old one does not know what has arrived since.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use soccr::Connection;

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

/// Marks the image, where one of its connections must not be restored twice. Nothing has been sent by then: without a mark there
/// is no restore.
pub(crate) fn mark<'a>(
    path: Option<&Path>,
    mut connections: impl Iterator<Item = &'a Connection>,
) -> Result<()> {
    if !connections.any(is_once) {
        return Ok(());
    }
    let Some(path) = path else {
        exit::complain(
            "the image holds keys of kernel TLS, and came from standard input: never restore it again",
        );
        return Ok(());
    };
    let at = || format!("{}: it holds keys of kernel TLS, and cannot be marked as consumed", path.display());
    let marked = rename(path).with_context(at)?;
    exit::complain(&format!("the image is {} now: a second socket must not use its keys", marked.display()));
    Ok(())
}

/// Sets an image aside whose connections have lived, but were not given away.
pub(crate) fn set_aside(path: Option<&Path>) {
    let Some(path) = path else { return };
    match rename(path) {
        Ok(aside) => exit::complain(&format!(
            "{} is {} now: it does not know what has arrived since, the new images do",
            path.display(),
            aside.display()
        )),
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
    let directory = path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()?;
    Ok(name)
}
