//! `soccr inspect`: an image for people.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value as Json, json};
use soccr::Connection;
use soccr_image::criu::{Directory, Protocol};
use soccr_image::stream::{Message, Reader};

use crate::command::restore::image::{behind, stdin};
use crate::exit::{self, Exit};
use crate::show::describe::{self, Data};
use crate::show::table::printable;

/// Show what is in an image: addresses, state, options, and a drawing of the sequence spaces
///
/// Understands the images of soccr, with one connection or many, also several images one behind the other, and directories of CRIU images. Damaged and contradictory
/// connections are shown as far as they can be read.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  soccr inspect c.soccr
  soccr inspect --svg c.soccr > c.svg
  soccr inspect --json /var/lib/criu/dump | jq '.[].remote'
  soccr save --pid 4711 --fd 5 --keep | soccr inspect -")]
pub(crate) struct Inspect {
    /// An image of soccr, a directory of CRIU images, or - for standard input
    #[arg(value_name = "FILE|DIR")]
    image: PathBuf,
    /// One JSON array, an object for each connection
    #[arg(long)]
    json: bool,
    /// One SVG document: the drawings of all connections
    #[arg(long, conflicts_with_all = ["json", "data"])]
    svg: bool,
    /// Show the bytes in the queues too
    #[arg(long)]
    data: bool,
}

/// A connection of an image, and what else the image says about it.
#[derive(Debug)]
struct Found {
    name: String,
    connection: Connection,
    held_packets: usize,
}

impl Inspect {
    pub(crate) fn run(&self) -> Result<Exit> {
        let (found, failed) = if self.image.is_dir() {
            let directory = self.image.display();
            read_criu(&self.image).with_context(|| format!("{directory}, read as images of CRIU"))?
        } else if self.image == Path::new("-") {
            read_stream(stdin()?)?
        } else {
            let file = File::open(&self.image).with_context(|| self.image.display().to_string())?;
            read_stream(file).with_context(|| self.image.display().to_string())?
        };
        let data = if self.data { Data::Shown } else { Data::Hidden };
        exit::written(match (self.json, self.svg) {
            (true, _) => print_json(&found, data),
            (_, true) => print_svg(&found),
            _ => print_text(&found, data),
        })?;
        for failure in &failed {
            exit::complain(&exit::line(failure));
        }
        Ok(if failed.is_empty() { Exit::Done } else { Exit::SomeFailed })
    }
}

/// The connections of an image, and the part that could not be read.
fn read_stream(source: File) -> Result<(Vec<Found>, Vec<anyhow::Error>)> {
    let mut reader = Reader::new(BufReader::new(source))?.without_validation();
    let (mut all, mut failed) = (Vec::<Found>::new(), Vec::new());
    let mut numbers = Vec::new();
    // Each image has its own numbers.
    let mut first = 0;
    loop {
        match reader.receive() {
            Ok(None) => match behind(reader) {
                Ok(Some(next)) => {
                    (reader, first) = (next.without_validation(), all.len());
                    numbers.clear();
                }
                Ok(None) => break,
                Err(error) => {
                    failed.push(error);
                    break;
                }
            },
            Ok(Some(Message::Connection { id, name, connection })) => {
                if let Err(error) = connection.validate() {
                    failed.push(anyhow::Error::new(error).context(format!("connection {id}")));
                }
                numbers.push(id);
                all.push(Found { name, connection, held_packets: 0 });
            }
            Ok(Some(Message::Held { connection, packets })) => {
                if let Some(at) = numbers.iter().position(|id| *id == connection) {
                    all[first + at].held_packets += packets.len();
                }
            }
            Ok(Some(_)) => {}
            Err(error) if error.connection().is_some() => failed.push(error.into()),
            Err(error) if all.is_empty() => return Err(error.into()),
            Err(error) => {
                failed.push(error.into());
                break;
            }
        }
    }
    Ok((all, failed))
}

/// The connections of a directory of CRIU images.
fn read_criu(path: &Path) -> Result<(Vec<Found>, Vec<anyhow::Error>)> {
    let directory = Directory::open(path)?;
    let (mut all, mut failed) = (Vec::new(), Vec::new());
    for socket in directory.sockets().iter().filter(|socket| socket.protocol == Protocol::Tcp) {
        let name = format!("socket {}", socket.id);
        match directory.stream(socket) {
            Ok(None) => {}
            Ok(Some(stream)) => match socket.connection(stream) {
                Ok(connection) => all.push(Found { name, connection, held_packets: 0 }),
                Err(error) => failed.push(anyhow::Error::new(error).context(name)),
            },
            Err(error) => failed.push(anyhow::Error::new(error).context(name)),
        }
    }
    Ok((all, failed))
}

fn print_json(all: &[Found], data: Data) -> io::Result<()> {
    let object = |found: &Found| {
        let mut object = describe::json(&found.connection, data);
        object["name"] = found.name.clone().into();
        object["held_packets"] = json!(found.held_packets);
        object
    };
    let objects: Vec<Json> = all.iter().map(object).collect();
    let mut out = BufWriter::new(io::stdout().lock());
    serde_json::to_writer_pretty(&mut out, &objects)?;
    writeln!(out)?;
    out.flush()
}

fn print_svg(all: &[Found]) -> io::Result<()> {
    let connections: Vec<&Connection> = all.iter().map(|found| &found.connection).collect();
    io::stdout().write_all(soccr_image::draw_svg(&connections).as_bytes())
}

fn print_text(all: &[Found], data: Data) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    for (i, found) in all.iter().enumerate() {
        if i > 0 {
            writeln!(out)?;
        }
        if !found.name.is_empty() {
            writeln!(out, "{}", printable(&found.name))?;
        }
        out.write_all(describe::text(&found.connection, data).as_bytes())?;
        if found.held_packets > 0 {
            writeln!(out, "\n{} held packets", found.held_packets)?;
        }
    }
    out.flush()
}
