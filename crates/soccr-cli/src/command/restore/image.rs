//! Images in files, and what a killed `soccr save` has left behind.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::retry_on_intr;
use rustix::process::geteuid;
use soccr::Connection;
use soccr::diag::Diag;
use soccr_image::stream::{Message, Reader};

use crate::exit;

/// Refuses to replace an image, unless that is forced: it may be the only copy of a connection.
pub(crate) fn refuse_to_replace(path: &Path) -> Result<()> {
    // Opening anything else could wait for somebody, or do something.
    let is_file = fs::metadata(path).is_ok_and(|file| file.is_file());
    if is_file && File::open(path).is_ok_and(|file| Reader::new(file).is_ok()) {
        bail!(
            "{}: it is an image already, maybe all that is left of a connection: --force replaces it",
            path.display()
        );
    }
    Ok(())
}

/// The connections of an image, and their names.
type Saved = Vec<(String, Connection)>;

/// Reads an image from a file or, without a name, from standard input. Also returns the file in which it was found.
pub(crate) fn read(path: Option<&Path>) -> Result<(Option<PathBuf>, Saved)> {
    let Some(path) = path.filter(|path| *path != Path::new("-")) else {
        return Ok((None, all_of(stdin()?)?));
    };
    let at = || path.display().to_string();
    let left = left_behind(path);
    if !left.is_empty() && !path.exists() {
        return instead_of(path, left).map(|(left, saved)| (Some(left), saved));
    }
    let modified = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
    if let Some((later, _)) = left.iter().find(|(left, _)| modified(left) > modified(path)) {
        bail!(
            "{}: a later `soccr save` was killed before it could replace this image; its connections are in {}. Move the one \
             that is not to be restored out of the way",
            at(),
            later.display()
        );
    }
    let connections = all_of(File::open(path).with_context(at)?).with_context(at)?;
    for (left, found) in left {
        let mut gone = gone(found, |_| ())?;
        gone.retain(|(_, one)| connections.iter().all(|(_, other)| other.flow() != one.flow()));
        if !gone.is_empty() {
            exit::complain(&format!(
                "{}: a `soccr save` was killed, and has left connections that are not in this image: {} in {}",
                at(),
                gone.len(),
                left.display()
            ));
        }
    }
    Ok((Some(path.to_owned()), connections))
}

/// What a killed `soccr save` has left is restored where there is no image.
fn instead_of(path: &Path, left: Vec<(PathBuf, Saved)>) -> Result<(PathBuf, Saved)> {
    let mut with_gone = Vec::new();
    for (left, found) in left {
        let gone = gone(found, |Connection { local, remote, .. }| {
            exit::complain(&format!("{local} {remote}: it still is in its process"));
        })?;
        if !gone.is_empty() {
            with_gone.push((left, gone));
        }
    }
    if with_gone.len() > 1 {
        let all: Vec<_> = with_gone.iter().map(|(left, _)| left.display().to_string()).collect();
        bail!(
            "{}: several `soccr save` were killed before it was there; their connections are in {}. Move those that are not to be \
             restored out of the way",
            path.display(),
            all.join(", ")
        );
    }
    let (left, gone) = with_gone.pop().context("all connections still are in their processes")?;
    exit::complain(&format!(
        "{}: a `soccr save` was killed before it was there; {} is restored",
        path.display(),
        left.display()
    ));
    Ok((left, gone))
}

/// The unfinished files of each `soccr save` that was killed after it had taken a connection. (Killed earlier, its keeper removes the
/// file.) The end of a file may be missing.
pub(crate) fn left_behind(path: &Path) -> Vec<(PathBuf, Saved)> {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return Vec::new() };
    let prefix = format!(".{name}.");
    let directory = path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let is_left = |left: &PathBuf| {
        let name = left.file_name().and_then(|name| name.to_str());
        let pid = name.and_then(|name| name.strip_prefix(&prefix)?.strip_suffix(".tmp")?.parse().ok());
        pid.is_some_and(|pid| !is_being_written(left, pid))
    };
    let read = |left: PathBuf| {
        let mut connections = Vec::new();
        let _ = read_into(&mut connections, open_left(&left)?);
        (!connections.is_empty()).then_some((left, connections))
    };
    let files = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut all: Vec<_> = files.filter(is_left).filter_map(read).collect();
    all.sort_by(|(one, _), (other, _)| one.cmp(other));
    all
}

/// Opens what is ours or of root. Whoever may write in the directory may have put something else there under such a name.
fn open_left(path: &Path) -> Option<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path).ok()?;
    let about = file.metadata().ok()?;
    (about.is_file() && [0, geteuid().as_raw()].contains(&about.uid())).then_some(file)
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
fn gone(saved: Saved, mut lives: impl FnMut(&Connection)) -> Result<Saved> {
    let mut diag = Diag::open()?;
    let mut gone = Vec::with_capacity(saved.len());
    for (name, connection) in saved {
        match diag.find(connection.local, connection.remote, |_| ())? {
            Some(()) => lives(&connection),
            None => gone.push((name, connection)),
        }
    }
    Ok(gone)
}

/// Reads an image to its end, or several that come one behind the other, as from cat(1).
fn all_of(source: File) -> Result<Saved> {
    let mut connections = Vec::new();
    read_into(&mut connections, source)?;
    if connections.is_empty() { bail!("there is no connection in it") } else { Ok(connections) }
}

fn read_into(connections: &mut Saved, source: File) -> Result<()> {
    let mut reader = Reader::new(BufReader::new(source))?;
    loop {
        while let Some(message) = reader.receive()? {
            match message {
                Message::Connection { name, connection, .. } => connections.push((name, connection)),
                // Only a hand-over has a recipient for states.
                Message::State { critical: false, .. } => {}
                _ => bail!("it is a hand-over, not an image: give it to `soccr receive`"),
            }
        }
        match behind(reader)? {
            Some(next) => reader = next,
            None => return Ok(()),
        }
    }
}

/// Standard input, from which nothing has been read yet.
pub(crate) fn stdin() -> Result<File> {
    Ok(rustix::stdio::stdin().try_clone_to_owned().context("standard input")?.into())
}

/// How long whoever writes images into a pipe may take from one to the next. A parent that keeps the pipe open must not hold up a
/// connection for ever.
const NEXT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The image behind the end of this one, if anything is there.
pub(crate) fn behind(reader: Reader<BufReader<File>>) -> Result<Option<Reader<BufReader<File>>>> {
    let mut source = reader.into_inner();
    if source.buffer().is_empty() {
        let mut events = [PollFd::new(source.get_ref(), PollFlags::IN)];
        if retry_on_intr(|| poll(&mut events, Some(&NEXT)))? == 0 {
            exit::complain(
                "nothing has come behind the end of the image: whatever may still come is not read",
            );
            return Ok(None);
        }
    }
    let is_over = loop {
        match source.fill_buf() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            bytes => break bytes?.is_empty(),
        }
    };
    match is_over {
        true => Ok(None),
        false => {
            Ok(Some(Reader::new(source).context("behind the end of an image, what follows is no other")?))
        }
    }
}
