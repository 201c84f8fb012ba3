//! Connections that could not be given to anybody: each is saved in an image, and its socket is closed in silence.

use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use soccr::Connection;
use soccr::connection::Flow;
use soccr::lock::{Locker, Mode, SILENCE};
use soccr_handover::silence;

use crate::exit::{self, Coded, Exit};
use crate::signals::Deaf;

/// How long a peer may take to acknowledge what the kernel has encrypted.
const SETTLING: Duration = Duration::from_secs(2);

/// Saves each connection in the working directory, or else in the directory for temporary files. The error gives the `reason`,
/// then what became of the connections.
pub(crate) fn rescue(connections: &[TcpStream], reason: &anyhow::Error) -> anyhow::Error {
    let _deaf = Deaf::begin();
    let code = exit::code(reason);
    let mut lost = 0;
    let mut boat = None;
    for connection in connections {
        match Lifeboat::aboard(&mut boat).and_then(|boat| boat.save(connection)) {
            Ok((flow, path)) => exit::complain(&format!(
                "{} {}: saved in {}: see `soccr restore`",
                flow.local,
                flow.remote,
                path.display()
            )),
            Err(error) => {
                lost += 1;
                exit::complain(&format!("a connection is lost: {}", exit::line(&error)));
            }
        }
    }
    let reason = exit::line(reason);
    match (connections.len(), lost) {
        (0, _) => Coded(code, reason).into(),
        (_, 0) => Coded(code, format!("{reason}; no connection is lost: each is saved in an image")).into(),
        (count, lost) => {
            Coded(Exit::Lost, format!("{reason}; {lost} of {count} connections are lost")).into()
        }
    }
}

/// What saving needs, opened once for all connections.
struct Lifeboat {
    locker: Locker,
    /// The number of the last image.
    number: usize,
}

impl Lifeboat {
    fn aboard(boat: &mut Option<Self>) -> Result<&mut Self> {
        Ok(match boat {
            Some(boat) => boat,
            None => boat.insert(Self { locker: Locker::new(Mode::Drop)?, number: 0 }),
        })
    }

    fn save(&mut self, stream: &TcpStream) -> Result<(Flow, PathBuf)> {
        let flow = Flow::of(stream)?;
        soccr::tls::settle(stream, SETTLING)?;
        // Nothing may arrive between the image and the end of the socket; the peer sends it again.
        let _lock = self.locker.lock(&[flow])?;
        let paused = soccr::pause(stream)?.with_tls();
        let path = self.write(&paused.save()?)?;
        silence::begin(&[flow], SILENCE)?;
        if let Err(error) = paused.detach() {
            // The connection goes on in this process, until that ends.
            let _ = silence::lift(&[flow]);
            let _ = std::fs::remove_file(&path);
            return Err(error.into());
        }
        Ok((flow, path))
    }

    fn write(&mut self, connection: &Connection) -> Result<PathBuf> {
        let here = std::env::current_dir().unwrap_or_default();
        let mut failure = None;
        for directory in [here, std::env::temp_dir()] {
            let path = loop {
                self.number += 1;
                let name = format!("soccr-rescued-{}-{}.soccr", std::process::id(), self.number);
                let path = directory.join(name);
                if !path.exists() {
                    break path;
                }
            };
            match soccr_image::save_file(&path, connection) {
                Ok(()) => return Ok(path),
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.context("there is nowhere to save it")?.into())
    }
}
