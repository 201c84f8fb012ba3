//! A directory of images.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use soccr::Connection;

use super::network::{Dump, first_of};
use super::{Socket, Stream, container, rewrite, sockets};
use crate::error::{Error, Result};
use crate::{AddressMap, AtomicFile};

/// The largest `files.img` that is read: half a million files.
const FILES_LIMIT: u64 = 64 << 20;

/// The largest `tcp-stream` image: two full queues of 64 MiB, and what is before them.
const STREAM_LIMIT: u64 = 129 << 20;

/// A directory of CRIU images.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    files: Vec<u8>,
    sockets: Vec<Socket>,
}

impl Directory {
    /// Opens a directory and reads its sockets.
    ///
    /// # Errors
    /// [`Foreign`](crate::ErrorKind::Foreign) where it is no directory of CRIU images; those of its files.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let inventory = path.join("inventory.img");
        let bytes = read(&inventory, STREAM_LIMIT)?;
        container::open(&bytes, &[container::INVENTORY], "inventory.img")
            .and_then(|mut rest| container::entry(&mut rest))
            .map_err(|error| error.at(inventory.display()))?;
        let name = path.join("files.img");
        let files = read(&name, FILES_LIMIT)?;
        let sockets = sockets(&files).map_err(|error| error.at(name.display()))?;
        Ok(Self { path, files, sockets })
    }

    /// The Internet sockets, in the order of `files.img`.
    pub fn sockets(&self) -> &[Socket] {
        &self.sockets
    }

    /// Reads the stream of a socket; `None` where it has none, as listeners.
    ///
    /// # Errors
    /// The errors of [`Stream::parse`] and of the file.
    pub fn stream(&self, socket: &Socket) -> Result<Option<Stream>> {
        let path = self.path.join(format!("tcp-stream-{:x}.img", socket.inode));
        if !path.try_exists().map_err(|error| Error::io(path.display().to_string(), error))? {
            return Ok(None);
        }
        let bytes = read(&path, STREAM_LIMIT)?;
        Stream::parse(&bytes).map(Some).map_err(|error| error.at(path.display()))
    }

    /// The Internet socket with number `id`.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) where there is none.
    pub fn socket(&self, id: u32) -> Result<&Socket> {
        let found = self.sockets.iter().find(|socket| socket.id == id);
        found.ok_or_else(|| {
            Error::invalid(format!("no Internet socket has the number {id}")).at(self.path.display())
        })
    }

    /// Extracts the connection of a socket: see [`Socket::connection`].
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) where it has no stream; those of [`stream`](Self::stream).
    pub fn extract(&self, socket: &Socket) -> Result<Connection> {
        let stream = self.stream(socket)?.ok_or_else(|| {
            let what = format!("no tcp-stream image belongs to socket {}", socket.id);
            Error::invalid(what).at(self.path.display())
        })?;
        socket.connection(stream)
    }

    /// Gives every address that one of `maps` concerns its new value, in the files: those of sockets, and those that tasks
    /// with a network namespace of their own have configured, with their routes.
    ///
    /// Each file is replaced atomically, where anything changed, and keeps its mode; `files.img` is the last. Where it
    /// fails, once more does the rest.
    ///
    /// # Errors
    /// The errors of the files. Nothing is written before all of them have been read.
    pub fn rewrite(&mut self, maps: &[AddressMap]) -> Result<Rewritten> {
        let mut rewritten = Rewritten::default();
        let (mut configured, mut gateways) = (Vec::new(), Vec::new());
        let mut new_files = Vec::new();
        for (path, has_addresses) in self.network_images()? {
            let bytes = read(&path, FILES_LIMIT)?;
            // A namespace without any is saved as nothing at all.
            if bytes.is_empty() {
                continue;
            }
            let dump = Dump::rewrite(bytes, maps).map_err(|error| error.at(path.display()))?;
            *(if has_addresses { &mut rewritten.addresses } else { &mut rewritten.routes }) += dump.changed;
            configured.extend(dump.configured);
            gateways.extend(dump.gateways);
            if dump.changed > 0 {
                new_files.push((path, dump.bytes));
            }
        }
        let (files, changed) = rewrite(&self.files, maps)?;
        let new_sockets = sockets(&files)?;
        rewritten.sockets = changed;
        for (old, new) in self.sockets.iter().zip(&new_sockets) {
            let ip = new.local.ip().to_canonical();
            let is_configured =
                ip.is_loopback() || configured.iter().any(|(configured, _)| *configured == ip);
            if old.local.ip() != new.local.ip() && !is_configured && !rewritten.missing.contains(&ip) {
                rewritten.missing.push(ip);
            }
        }
        if rewritten.addresses > 0 {
            let is_near = |gateway: &IpAddr| {
                configured.iter().any(|(ip, prefix)| first_of(*ip, *prefix) == first_of(*gateway, *prefix))
            };
            gateways.retain(|gateway| !is_near(gateway));
            gateways.dedup();
            rewritten.unreachable = gateways;
        }
        if changed > 0 {
            new_files.push((self.path.join("files.img"), files.clone()));
        }
        for (path, bytes) in new_files {
            replace(&path, &bytes).map_err(|error| Error::io(path.display().to_string(), error))?;
        }
        self.sockets = new_sockets;
        self.files = files;
        Ok(rewritten)
    }

    /// The images of addresses and routes, and whether it is addresses.
    fn network_images(&self) -> Result<Vec<(PathBuf, bool)>> {
        let failed = |error| Error::io(self.path.display().to_string(), error);
        let mut images = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let kind = name.to_str().and_then(|name| name.strip_suffix(".img")?.split_once('-'));
            if let Some((kind @ ("ifaddr" | "route" | "route6"), _)) = kind {
                images.push((entry.path(), kind == "ifaddr"));
            }
        }
        images.sort();
        Ok(images)
    }
}

/// What [`Directory::rewrite`] has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rewritten {
    /// Sockets that have another address.
    pub sockets: usize,
    /// Addresses that network namespaces of tasks configure.
    pub addresses: usize,
    /// Routes of these namespaces.
    pub routes: usize,
    /// New addresses of sockets that no namespace in the images configures: the host that restores must have them.
    pub missing: Vec<IpAddr>,
    /// Gateways of these routes that lie in no network of a changed namespace any more: they need a rule as well.
    pub unreachable: Vec<IpAddr>,
}

/// Reads a file of at most `limit` bytes.
fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
        .map_err(|error| Error::io(path.display().to_string(), error))?;
    if bytes.len() as u64 > limit {
        return Err(Error::damaged("is larger than any image of its kind").at(path.display()));
    }
    Ok(bytes)
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes)?;
    file.set_mode(std::fs::metadata(path)?.permissions().mode() & 0o7777)?;
    file.commit().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_file_has_its_limit() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"0123456789").unwrap();
        assert_eq!(read(file.path(), 10).unwrap(), b"0123456789");
        assert_eq!(read(file.path(), 9).unwrap_err().kind(), ErrorKind::Damaged);
    }
}
