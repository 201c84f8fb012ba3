//! Images in files, and what a `soccr save` has left behind that was killed.

use std::fs::{self, File};
use std::io::{BufReader, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use soccr::Connection;
use soccr::diag::Diag;
use soccr_image::stream::{Message, Reader};

use crate::exit;

/// The connections of an image, and their names.
type Saved = Vec<(String, Connection)>;

/// Reads an image from a file or, without a name, from standard input. Also returns the file in which it was found.
pub(crate) fn read(path: Option<&Path>) -> Result<(Option<PathBuf>, Saved)> {
    let Some(path) = path.filter(|path| *path != Path::new("-")) else {
        return Ok((None, all_of(File::from(rustix::stdio::stdin().try_clone_to_owned()?))?));
    };
    let at = || path.display().to_string();
    let modified = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
    match left_behind(path) {
        Some((left, _)) if path.exists() && modified(&left) > modified(path) => bail!(
            "{}: a later `soccr save` was killed before it could replace this image; its connections are in {}. Move the one \
             that is not to be restored out of the way",
            at(),
            left.display()
        ),
        Some((left, found)) if !path.exists() => {
            exit::complain(&format!(
                "{}: a `soccr save` was killed before it was there; {} is restored",
                at(),
                left.display()
            ));
            Ok((Some(left), gone(found)?))
        }
        _ => {
            let connections = all_of(File::open(path).with_context(at)?).with_context(at)?;
            Ok((Some(path.to_owned()), connections))
        }
    }
}

/// The unfinished file of a `soccr save` that was killed after it had taken a connection. (Killed earlier, its keeper removes the
/// file.) The end of the file may be missing.
fn left_behind(path: &Path) -> Option<(PathBuf, Saved)> {
    let prefix = format!(".{}.", path.file_name()?.to_str()?);
    let directory = path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let left = fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path()).find(|left| {
        let name = left.file_name().and_then(|name| name.to_str());
        let pid = name.and_then(|name| name.strip_prefix(&prefix)?.strip_suffix(".tmp")?.parse().ok());
        pid.is_some_and(|pid| !is_being_written(left, pid))
    })?;
    let mut connections = Vec::new();
    let _ = read_into(&mut connections, File::open(&left).ok()?);
    (!connections.is_empty()).then_some((left, connections))
}

/// Whether the process has the file open. Another process may have got the number of one that was killed.
fn is_being_written(file: &Path, pid: u32) -> bool {
    let place = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(open) => open.flatten().any(|open| place(&open.path()) == place(file)),
        Err(error) => error.kind() != ErrorKind::NotFound,
    }
}

/// Of what a killed `soccr save` has left, the connections that had left their processes.
fn gone(saved: Saved) -> Result<Saved> {
    let mut diag = Diag::open()?;
    let mut gone = Vec::with_capacity(saved.len());
    for (name, connection) in saved {
        match diag.find(connection.local, connection.remote, |_| ())? {
            Some(()) => {
                exit::complain(&format!(
                    "{} {}: it still is in its process",
                    connection.local, connection.remote
                ));
            }
            None => gone.push((name, connection)),
        }
    }
    if gone.is_empty() { bail!("all connections still are in their processes") } else { Ok(gone) }
}

/// Reads an image to its end.
fn all_of(source: impl Read) -> Result<Saved> {
    let mut connections = Vec::new();
    read_into(&mut connections, source)?;
    if connections.is_empty() { bail!("there is no connection in it") } else { Ok(connections) }
}

fn read_into(connections: &mut Saved, source: impl Read) -> Result<()> {
    let mut reader = Reader::new(BufReader::new(source))?;
    while let Some(message) = reader.receive()? {
        match message {
            Message::Connection { name, connection, .. } => connections.push((name, connection)),
            // Only a hand-over has a recipient for states.
            Message::State { critical: false, .. } => {}
            _ => bail!("it is a hand-over, not an image: give it to `soccr receive`"),
        }
    }
    Ok(())
}
