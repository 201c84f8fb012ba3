//! `soccr receive`: the target of a hand-over.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, anyhow, bail};
use soccr::connection::Flow;
use soccr::lock::{Held, Locker, Mode};
use soccr::{Connection, Fidelity, Lock, Restored};
use soccr_image::AddressMap;
use soccr_image::stream::{Message, Reader, Writer};

use crate::exit::{Coded, Exit};
use crate::handover::Handover;
use crate::send::raise_descriptor_limit;
use crate::{exit, lifeline, network, silence};

/// Receive connections from `soccr send`, and give them to a program
///
/// Reads standard input, and answers on standard output where the source listens (`soccr send --via`); the program then finds
/// /dev/null as both. It starts when the source has sent everything, or is gone, provided that a connection has arrived.
#[derive(clap::Args, Debug)]
#[command(
    override_usage = "\
soccr receive [OPTIONS] [--stdio] -- PROGRAM [ARGUMENT]...
       soccr receive [OPTIONS] --send-fd UNIX_SOCKET",
    after_help = "\
Examples:
  soccr send --pid 4711 --fd 5 --via 'ssh host soccr receive -- ./server'
  soccr send --port 443 --via 'ssh host soccr receive --send-fd /run/proxy.sock'"
)]
pub(crate) struct Receive {
    /// Receive under another address: each end that is OLD becomes NEW (IP, or IP:PORT)
    #[arg(long, value_name = "OLD=NEW")]
    map: Vec<AddressMap>,
    /// The network namespace to restore in: a path, or the number of a process
    #[arg(long, value_name = "PATH|PID")]
    netns: Option<String>,
    #[command(flatten)]
    handover: Handover,
}

impl Receive {
    pub(crate) fn run(&self) -> Result<Exit> {
        soccr::prepare();
        lifeline::claim()?;
        let recipient = self.handover.find()?;
        network::enter(self.netns.as_deref())?;
        raise_descriptor_limit();
        let input = File::from(rustix::stdio::stdin().try_clone_to_owned().context("standard input")?);
        let mut target = Target {
            locker: Locker::new(Mode::HOLD)?,
            maps: &self.map,
            room: recipient.capacity(),
            waiting: BTreeMap::new(),
            taken: BTreeMap::new(),
            silent: Vec::new(),
            answers: None,
            failed: 0,
            lost: 0,
        };
        let broken = target.listen(BufReader::new(input)).err();
        let Target { taken, answers, waiting, failed, lost, .. } = target;
        // What the source has not let go of is closed, silently.
        drop(waiting);
        if let Some(error) = &broken {
            exit::complain(&exit::line(error));
        }
        if let Some(answers) = answers {
            // Where the source is gone, nobody waits for it.
            let _ = answers.finish();
            leave_pipe()?;
        }
        if lost > 0 {
            exit::complain(&format!("{lost} of the connections are lost"));
        }
        match taken.len() {
            0 if lost > 0 => bail!(Coded(Exit::Lost, "no connection has arrived".into())),
            0 if failed > 0 || broken.is_some() => bail!("no connection has arrived"),
            0 => bail!("the source has sent no connection"),
            _ => recipient.give(taken.into_values().collect()),
        }
    }
}

/// Standard input and output were the pipes to the source, and it does not read the program's output.
fn leave_pipe() -> Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").context("/dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("dup2")?;
    rustix::stdio::dup2_stdout(&null).context("dup2")?;
    Ok(())
}

/// A connection that is complete, and silent until the source says COMMIT.
struct Waiting {
    restored: Restored,
    lock: Lock,
    flow: Flow,
    held: Vec<Vec<u8>>,
}

struct Target<'a> {
    locker: Locker,
    maps: &'a [AddressMap],
    /// How many more connections the recipient can take.
    room: usize,
    waiting: BTreeMap<u32, Waiting>,
    taken: BTreeMap<u32, TcpStream>,
    /// Restored since persistent locks were last looked for.
    silent: Vec<Flow>,
    answers: Option<Writer<Answers>>,
    failed: usize,
    lost: usize,
}

impl Target<'_> {
    fn listen(&mut self, input: BufReader<File>) -> Result<()> {
        let mut reader = Reader::new(input).context("standard input")?;
        loop {
            let message = match reader.receive() {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(()),
                Err(error) => match error.connection() {
                    Some(id) => {
                        self.refuse(id, &anyhow::Error::new(error));
                        continue;
                    }
                    None => return Err(anyhow::Error::new(error).context("the source")),
                },
            };
            match message {
                Message::Begin { answers: true, .. } if self.answers.is_none() => {
                    self.answers = Some(Writer::new(Answers)?);
                }
                Message::Begin { .. } => {}
                Message::Connection { id, name, connection } => match self.restore(id, connection) {
                    Ok(()) => self.answer(&Message::Ready { connection: id }),
                    Err(error) => self.refuse(id, &error.context(name)),
                },
                Message::Held { connection, packets } => self.keep(connection, packets),
                Message::Commit { connection } => self.take(connection)?,
                Message::Abort { connection, .. } => {
                    if self.waiting.remove(&connection).is_some() {
                        self.room += 1;
                    }
                }
                _ => return Err(anyhow!("the source does not know its part")),
            }
        }
    }

    fn restore(&mut self, id: u32, mut connection: Connection) -> Result<()> {
        if self.room == 0 {
            bail!("--stdio takes one connection");
        }
        if self.waiting.contains_key(&id) || self.taken.contains_key(&id) {
            bail!("its number is taken by another one");
        }
        AddressMap::apply_to_connection(self.maps, &mut connection);
        let flow = connection.flow();
        let lock = self.locker.lock(&[flow])?;
        let restored = connection.restore()?;
        for lost in restored.report().iter().filter(|entry| entry.fidelity() == Fidelity::Missing) {
            exit::complain(&format!("not brought back: {lost}"));
        }
        self.waiting.insert(id, Waiting { restored, lock, flow, held: Vec::new() });
        self.silent.push(flow);
        self.room -= 1;
        Ok(())
    }

    fn keep(&mut self, id: u32, packets: Vec<Vec<u8>>) {
        if let Some(waiting) = self.waiting.get_mut(&id) {
            waiting.held.extend(packets);
        }
    }

    /// The connection is ours.
    fn take(&mut self, id: u32) -> Result<()> {
        let Some(waiting) = self.waiting.remove(&id) else { return Ok(()) };
        if !self.silent.is_empty() {
            // They may have left this host not long ago. Our own locks keep them silent from here on.
            silence::lift(&std::mem::take(&mut self.silent))?;
        }
        self.answer(&Message::Taken { connection: id });
        match waiting.resume() {
            Ok(stream) => {
                self.taken.insert(id, stream);
            }
            Err(error) => {
                self.lost += 1;
                exit::complain(&format!("connection {id}: lost: {}", exit::line(&error)));
            }
        }
        Ok(())
    }

    fn refuse(&mut self, id: u32, error: &anyhow::Error) {
        let reason = exit::line(error);
        exit::complain(&format!("connection {id}: {reason}"));
        self.failed += 1;
        self.answer(&Message::Refused { connection: id, reason });
    }

    /// Where the source does not hear it, it has gone on without us: its end of the stream tells what it has decided.
    fn answer(&mut self, message: &Message) {
        if let Some(answers) = &mut self.answers {
            let _ = answers.send(message);
        }
    }
}

/// Standard output without a buffer: the source waits for every answer.
struct Answers;

impl Write for Answers {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(rustix::stdio::stdout(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Waiting {
    fn resume(self) -> Result<TcpStream> {
        // What cannot be delivered the peer sends again.
        let _ = Held { flow: self.flow, packets: self.held }.replay(&self.restored);
        let _ = self.lock.release();
        Ok(self.restored.resume()?)
    }
}
