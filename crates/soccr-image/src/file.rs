//! Image files: readable by their owner only, and never half written.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use soccr::Connection;

use crate::error::{Error, Result};

/// A file that appears under its name only when it is complete: until then it has another name beside it, and is
/// removed when dropped.
///
/// It is readable by its owner only (mode 0600): an image holds what two programs say to each other.
///
/// ```
/// use std::io::Write;
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("connections");
/// let mut file = soccr_image::AtomicFile::create(&path)?;
/// file.write_all(b"all of it")?;
/// assert!(!path.exists());
/// file.commit()?;
/// assert_eq!(std::fs::read(&path)?, b"all of it");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    /// What was at the path when this was created: device and inode.
    before: Option<(u64, u64)>,
    /// It stays where it is.
    is_left: bool,
}

impl AtomicFile {
    /// Creates the file beside `path`. What is at `path` stays there until [`commit`](Self::commit). A symbolic link
    /// stays in any case: the file to which it leads is replaced, unless the link belongs to another user.
    ///
    /// # Errors
    /// `InvalidInput` where `path` is there and no regular file, such as a device or a pipe, which a rename would
    /// destroy; `PermissionDenied` for the link of another user; those of open(2).
    pub fn create(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = destination(path.as_ref())?;
        let before = identity(&path)?;
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let mut number = std::process::id();
        loop {
            let mut temporary = std::ffi::OsString::from(".");
            temporary.push(name);
            temporary.push(format!(".{number}.tmp"));
            let temporary = path.with_file_name(temporary);
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary) {
                Ok(file) => return Ok(Self { file, temporary, path, before, is_left: false }),
                // Another thread's, or left behind by a process that was killed.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    number = number.wrapping_add(1);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Where the file is until it is committed.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Gives the file the mode of the one that it replaces.
    pub(crate) fn set_mode(&self, mode: u32) -> io::Result<()> {
        self.file.set_permissions(Permissions::from_mode(mode))
    }

    /// Makes durable what has been written so far (fsync): then [`commit`](Self::commit) has little left to do that can
    /// fail.
    ///
    /// # Errors
    /// The errors of fsync(2).
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Makes the file durable (fsync) and puts it in its place (rename), where it replaces what is there.
    ///
    /// Returns why the new name may not survive a power failure: the file is in its place in any case.
    ///
    /// # Errors
    /// The errors of fsync(2) and rename(2); then nothing has changed at the path.
    pub fn commit(&self) -> io::Result<Option<io::Error>> {
        self.file.sync_all()?;
        std::fs::rename(&self.temporary, &self.path)?;
        Ok(self.sync_name())
    }

    /// As [`commit`](Self::commit), but leaves alone what somebody else has put at the path since [`create`](Self::create):
    /// it may be the only copy of a connection.
    ///
    /// # Errors
    /// `AlreadyExists` where another file is there now; those of `commit`.
    pub fn commit_unless_replaced(&self) -> io::Result<Option<io::Error>> {
        self.file.sync_all()?;
        let now = identity(&self.path)?;
        if now.is_some() && now != self.before {
            return Err(replaced());
        }
        match now {
            Some(_) => std::fs::rename(&self.temporary, &self.path)?,
            None => put(&self.temporary, &self.path)?,
        }
        Ok(self.sync_name())
    }

    /// Gives it up, and leaves it where it [is](Self::temporary).
    pub fn leave(mut self) {
        self.is_left = true;
    }

    fn sync_name(&self) -> Option<io::Error> {
        sync_name(&self.path)
    }
}

/// Makes the name of a file durable (fsync of its directory), as far as the filesystem and the rights of this user allow that.
///
/// Returns why the name may not survive a power failure.
pub fn sync_name(path: &Path) -> Option<io::Error> {
    let directory = Path::new(".").join(path.parent().unwrap_or("".as_ref()));
    let synced = File::open(directory).and_then(|file| file.sync_all());
    let denied = [io::ErrorKind::InvalidInput, io::ErrorKind::PermissionDenied];
    synced.err().filter(|error| !denied.contains(&error.kind()))
}

/// Gives a file a name that nobody else has.
fn put(file: &Path, name: &Path) -> io::Result<()> {
    let put = match renameat_with(CWD, file, CWD, name, RenameFlags::NOREPLACE) {
        // Not every filesystem knows this. The first name is removed later.
        Err(Errno::INVAL | Errno::NOSYS) => std::fs::hard_link(file, name),
        put => put.map_err(io::Error::from),
    };
    put.map_err(|error| if error.kind() == io::ErrorKind::AlreadyExists { replaced() } else { error })
}

fn replaced() -> io::Error {
    io::Error::new(io::ErrorKind::AlreadyExists, "somebody else has put a file there meanwhile")
}

/// Device and inode of what is there.
fn identity(path: &Path) -> io::Result<Option<(u64, u64)>> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some((metadata.dev(), metadata.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The file that is to be replaced or made.
fn destination(path: &Path) -> io::Result<PathBuf> {
    match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
        }
        Ok(_) if path.is_symlink() => {
            let owner = path.symlink_metadata()?.uid();
            if ![0, std::fs::metadata("/proc/self")?.uid()].contains(&owner) {
                let message = format!("a symbolic link that belongs to user {owner} is not followed");
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
            }
            path.canonicalize()
        }
        Err(error) if path.is_symlink() => Err(error),
        _ => Ok(path.to_owned()),
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.file.write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        // Nothing is buffered in this process.
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.is_left {
            return;
        }
        // Gone already after a commit.
        let _ = std::fs::remove_file(&self.temporary);
    }
}

/// Saves a connection in a file, mode 0600, atomically: the file is there whole or not at all.
///
/// ```
/// # fn example(connection: soccr::Connection) -> soccr_image::Result<()> {
/// soccr_image::save_file("connection.soccr", &connection)?;
/// assert_eq!(soccr_image::load_file("connection.soccr")?, connection);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// The errors of [`write`](crate::write()) and of the file.
pub fn save_file(path: impl AsRef<Path>, connection: &Connection) -> Result<()> {
    let path = path.as_ref();
    let at = |error: io::Error| Error::io(path.display().to_string(), error);
    let mut file = AtomicFile::create(path).map_err(at)?;
    crate::write(&mut file, connection).map_err(|error| error.at(path.display()))?;
    file.commit().map(drop).map_err(at)
}

/// Loads a connection that [`save_file`] has saved.
///
/// # Errors
/// The errors of [`read`](crate::read()) and of the file.
pub fn load_file(path: impl AsRef<Path>) -> Result<Connection> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|error| Error::io(path.display().to_string(), error))?;
    let mut reader = BufReader::new(file);
    let connection = crate::read(&mut reader).map_err(|error| error.at(path.display()))?;
    match reader.read(&mut [0]).map_err(Error::reading)? {
        0 => Ok(connection),
        _ => Err(Error::damaged("bytes follow the end of the image").at(path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_given_up_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, b"old").unwrap();
        let mut first = AtomicFile::create(&path).unwrap();
        let second = AtomicFile::create(&path).unwrap();
        first.write_all(b"new").unwrap();
        drop(second);
        drop(first);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    /// Others who may write in the folder could otherwise have any file replaced, through a link.
    #[test]
    fn the_link_of_another_user_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        std::fs::write(path("file"), b"old").unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        if let Err(error) = std::os::unix::fs::lchown(path("link"), Some(65533), None) {
            soccr_lab::skip(format_args!("this user may give no file away: {error}"));
            return;
        }
        let error = AtomicFile::create(path("link")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        assert!(error.to_string().contains("user 65533"), "{error}");
        assert_eq!(std::fs::read(path("file")).unwrap(), b"old");
        // A regular file of another user is replaced like any other.
        std::os::unix::fs::lchown(path("file"), Some(65533), None).unwrap();
        AtomicFile::create(path("file")).unwrap().commit().unwrap();
        assert_eq!(std::fs::read(path("file")).unwrap(), b"");
    }

    #[test]
    fn a_file_that_is_left_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let file = AtomicFile::create(directory.path().join("image")).unwrap();
        let temporary = file.temporary().to_owned();
        file.leave();
        assert!(temporary.exists());
    }

    #[test]
    fn a_file_that_cannot_be_made_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let error = AtomicFile::create(directory.path().join("none/image")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
    }

    #[test]
    fn what_is_no_file_is_left_alone() {
        use std::os::unix::fs::FileTypeExt;
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        assert!(std::process::Command::new("mkfifo").arg(path("fifo")).status().unwrap().success());
        std::os::unix::fs::symlink("fifo", path("to-fifo")).unwrap();
        std::os::unix::fs::symlink("nothing", path("to-nothing")).unwrap();
        for name in ["fifo", "to-fifo", "to-nothing"] {
            assert!(AtomicFile::create(path(name)).is_err(), "{name}");
        }
        assert!(std::fs::metadata(path("fifo")).unwrap().file_type().is_fifo());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_link_stays_and_leads_to_the_new_file() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        std::fs::write(&file, b"old").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        let mut new = AtomicFile::create(&link).unwrap();
        new.write_all(b"new").unwrap();
        new.commit().unwrap();
        assert!(link.is_symlink());
        assert_eq!(std::fs::read(&file).unwrap(), b"new");
    }

    #[test]
    fn what_another_has_put_there_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let with = |bytes: &[u8]| {
            let mut file = AtomicFile::create(&path).unwrap();
            file.write_all(bytes).unwrap();
            file
        };
        for there in [false, true] {
            let [first, second] = [with(b"first"), with(b"second")];
            second.commit_unless_replaced().unwrap();
            let error = first.commit_unless_replaced().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{there}: {error}");
            assert_eq!(std::fs::read(&path).unwrap(), b"second");
        }
        let error = put(&path, &path.with_file_name(".")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{error}");
        // What was there from the beginning is replaced, and who is asked to replaces anything.
        with(b"third").commit_unless_replaced().unwrap();
        let first = with(b"first");
        with(b"second").commit().unwrap();
        first.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"first");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_the_owner_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        AtomicFile::create(&path).unwrap().commit().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
