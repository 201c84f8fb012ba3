//! Images that are restored once: two sockets that continue one sending state of kernel TLS would encrypt different bytes with
//! the same nonce, which gives both away. Such an image gets another name before its connections live.

use std::ffi::OsString;
use std::fs::File;
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
    let mut marked = OsString::from(path);
    marked.push(format!(".{ENDING}"));
    let marked = PathBuf::from(marked);
    let at = || format!("{}: it holds keys of kernel TLS, and cannot be marked as consumed", path.display());
    std::fs::rename(path, &marked).with_context(at)?;
    let directory = path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).with_context(at)?;
    exit::complain(&format!("the image is {} now: a second socket must not use its keys", marked.display()));
    Ok(())
}
