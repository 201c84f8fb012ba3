//! A server that is replaced by another process while its clients are connected: none of them notices.
//!
//! ```text
//! cargo build --example replace
//! sudo target/debug/examples/replace 127.0.0.1:7000 /run/replace.sock     # serves
//! sudo target/debug/examples/replace 127.0.0.1:7000 /run/replace.sock     # takes everything over from the first one, which ends
//! ```
//!
//! With a certificate and its key (PEM files) behind them, it speaks TLS, and `openssl s_client` or any other client stays connected:
//! see [`tls`]. The kernel must have it: `modprobe tls`.
//!
//! It numbers the lines that each client sends. The number goes along as the state of the connection, and half a line that
//! has been read goes back in front of the queue. HERE is the process that gives everything away, THERE the one that is started
//! later: another version of the program, or another program. Whoever may connect to the UNIX socket gets the clients.

mod tls;

use std::error::Error;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustls::ServerConfig;
use soccr_handover::{Mover, Outcome, Terms};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

struct Client {
    stream: TcpStream,
    /// How many lines it has sent.
    lines: u64,
    /// What has been read of the next one.
    half: Vec<u8>,
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(address), Some(path)) = (arguments.next(), arguments.next()) else {
        return Err("usage: replace ADDRESS:PORT UNIX_SOCKET [CERTIFICATE KEY]".into());
    };
    let encryption = match (arguments.next(), arguments.next()) {
        (Some(certificate), Some(key)) => Some(tls::configuration(&certificate, &key)?),
        _ => None,
    };
    let mover = Mover::new()?;
    // Before the predecessor closes its own, so that nobody is refused in between.
    let listener = listen(address.parse()?)?;
    let mut clients = match UnixStream::connect(&path) {
        Ok(channel) => take_over(&mover, channel)?,
        Err(_) => Vec::new(),
    };
    let _ = std::fs::remove_file(&path);
    let control = UnixListener::bind(&path)?;
    println!("serving {} clients", clients.len());
    loop {
        let channel = serve(&listener, encryption.as_ref(), &control, &mut clients)?;
        clients = give_away(&mover, channel, clients);
        if clients.is_empty() {
            println!("given away");
            return Ok(());
        }
    }
}

/// HERE: the successor gets all clients. Returns those that stay.
fn give_away(mover: &Mover, mut channel: UnixStream, clients: Vec<Client>) -> Vec<Client> {
    let (mut departing, mut kept) = (Vec::new(), Vec::new());
    for Client { stream, lines, half } in clients {
        // An error here: the client has just gone.
        let Ok(connection) = mover.take(stream) else { continue };
        let Ok(connection) = connection.unread(&half) else { continue };
        departing.push(connection.with_critical_state(lines.to_le_bytes()));
        kept.push((lines, half));
    }
    let mut staying = Vec::new();
    for (outcome, (lines, half)) in mover.send_all(departing, &mut channel).into_iter().zip(kept) {
        match outcome {
            Outcome::Moved => {}
            Outcome::Stays(stream, why) => {
                eprintln!("stays: {why}");
                staying.push(Client { stream, lines, half });
            }
            Outcome::Unknown(why) => eprintln!("the successor has it, or nobody: {why}"),
        }
    }
    staying
}

/// THERE: takes over what comes, until the predecessor closes the channel.
fn take_over(mover: &Mover, channel: UnixStream) -> Result<Vec<Client>> {
    // A state of another version is served best by whoever has it.
    let terms = Terms::default().accept_if(|offer| match offer.state.len() {
        8 => Ok(()),
        _ => Err("its state is of another version".into()),
    });
    let mut arriving = mover.listen_for(channel, terms);
    let mut clients = Vec::new();
    while let Some(arrived) = arriving.next()? {
        let lines = u64::from_le_bytes(arrived.state().try_into()?);
        clients.push(Client { stream: arrived.into_stream()?, lines, half: Vec::new() });
    }
    Ok(clients)
}

/// Serves until a successor comes.
fn serve(
    listener: &TcpListener,
    encryption: Option<&Arc<ServerConfig>>,
    control: &UnixListener,
    clients: &mut Vec<Client>,
) -> Result<UnixStream> {
    loop {
        let mut events = vec![PollFd::new(control, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        events.extend(clients.iter().map(|client| PollFd::new(&client.stream, PollFlags::IN)));
        poll(&mut events, None)?;
        let ready: Vec<bool> = events.iter().map(|event| !event.revents().is_empty()).collect();
        let mut served = ready[2..].iter();
        clients.retain_mut(|client| match served.next() {
            Some(true) => client.answer().is_ok(),
            _ => true,
        });
        // Those that wait to be accepted are ours, too.
        while let Ok((stream, _)) = listener.accept() {
            if let Some(Err(error)) = encryption.map(|configuration| tls::accept(configuration, &stream)) {
                eprintln!("no TLS with {:?}: {error}", stream.peer_addr());
                continue;
            }
            stream.set_nonblocking(true)?;
            clients.push(Client { stream, lines: 0, half: Vec::new() });
        }
        if ready[0] {
            return Ok(control.accept()?.0);
        }
    }
}

impl Client {
    /// Numbers the lines that have come; an error where the client has gone.
    fn answer(&mut self) -> std::io::Result<()> {
        let mut bytes = [0; 4096];
        let length = match self.stream.read(&mut bytes) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            read => read?,
        };
        self.half.extend(&bytes[..length]);
        while let Some(end) = self.half.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.half.drain(..=end).collect();
            self.lines += 1;
            write!(self.stream, "{}: {}", self.lines, String::from_utf8_lossy(&line))?;
        }
        Ok(())
    }
}

/// A listener beside which another process can listen.
fn listen(address: SocketAddr) -> Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket(family, SocketType::STREAM, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, 128)?;
    let listener = TcpListener::from(socket);
    listener.set_nonblocking(true)?;
    Ok(listener)
}
