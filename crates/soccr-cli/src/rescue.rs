//! Connections that nobody can be given: they are saved in images of their own, and leave this process in silence.

use std::net::TcpStream;
use std::path::PathBuf;

use anyhow::{Context, Result};
use soccr::connection::Flow;
use soccr::lock::{Locker, Mode, SILENCE};
use soccr::{Connection, Paused};

use crate::exit::{self, Coded, Exit};
use crate::signals::Deaf;
use crate::silence::Silence;

/// Saves the connections, each in the working directory or else in that for temporary files. The error says what became of
/// them, after the `reason`.
pub(crate) fn rescue(connections: &[TcpStream], reason: &anyhow::Error) -> anyhow::Error {
    let _deaf = Deaf::begin();
    let code = reason.downcast_ref::<Coded>().map_or(Exit::Failed, |coded| coded.0);
    let mut lost = 0;
    for connection in connections {
        match save(connection) {
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

fn save(stream: &TcpStream) -> Result<(Flow, PathBuf)> {
    let flow = Flow::of(stream)?;
    // Nothing may arrive between the image and the end of the socket; the peer sends it again.
    let lock = Locker::new(Mode::Drop)?.lock(&[flow])?;
    let paused: Paused<'_> = soccr::pause(stream)?;
    let path = write(&paused.save()?)?;
    let silence = Silence::begin(lock, SILENCE)?;
    paused.detach()?;
    silence.stay();
    Ok((flow, path))
}

fn write(connection: &Connection) -> Result<PathBuf> {
    let here = std::env::current_dir().unwrap_or_default();
    let mut failure = None;
    for directory in [here, std::env::temp_dir()] {
        let name = |number| directory.join(format!("soccr-rescued-{}-{number}.soccr", std::process::id()));
        let path = (1..).map(name).find(|path| !path.exists()).context("there is a free name")?;
        match soccr_image::save_file(&path, connection) {
            Ok(()) => return Ok(path),
            Err(error) => failure = Some(error),
        }
    }
    Err(failure.context("there is nowhere to save it")?.into())
}
