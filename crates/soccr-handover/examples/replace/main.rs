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
//! later: another version of the program, or another program. On the same host the listener goes along, so that nobody who connects meanwhile
//! is refused or reset. Whoever may connect to the UNIX socket gets the clients.

mod tls;

use std::error::Error;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
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
    let address = address.parse()?;
    let (listener, mut clients) = match UnixStream::connect(&path) {
        Ok(channel) => {
            let theirs = receive_listener(&channel)?;
            // Where the predecessor is on another host, or in another network, its listener is of no use.
            let listener = match listen(address) {
                Err(error) if error.kind() == ErrorKind::AddrInUse => theirs,
                ours => ours?,
            };
            (listener, take_over(&mover, channel))
        }
        Err(_) => (listen(address)?, Vec::new()),
    };
    let _ = std::fs::remove_file(&path);
    let control = UnixListener::bind(&path)?;
    println!("serving {} clients", clients.len());
    let mut listeners = Some((listener, control));
    while let Some(channel) = serve(listeners.as_ref(), encryption.as_ref(), &mut clients)? {
        // Clients that connect from here on wait until the successor accepts them.
        let listener = listeners.as_ref().map(|(listener, _)| listener);
        if let Err(error) = listener.map_or(Ok(()), |listener| send_listener(&channel, listener)) {
            eprintln!("the successor is gone: {error}");
            continue;
        }
        let count = clients.len();
        clients = give_away(&mover, channel, clients);
        if clients.is_empty() || clients.len() < count {
            // The successor listens. Those who stay are served as long as they want.
            listeners = None;
        }
    }
    println!("given away");
    Ok(())
}

/// HERE: the successor listens with the same socket. With one of its own, it would lose clients that this one has not accepted.
fn send_listener(channel: &UnixStream, listener: &TcpListener) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [listener.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)), "there is room for it");
    sendmsg(channel, &[IoSlice::new(b"L")], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// THERE: the listener of the predecessor.
fn receive_listener(channel: &UnixStream) -> Result<TcpListener> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(channel, &mut [IoSliceMut::new(&mut [0])], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(descriptor.ok_or("the predecessor is of another version")?.into())
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
fn take_over(mover: &Mover, channel: UnixStream) -> Vec<Client> {
    // A state of another version is served best by whoever has it.
    let terms = Terms::default().accept_if(|offer| match offer.state.len() {
        8 => Ok(()),
        _ => Err("its state is of another version".into()),
    });
    let mut arriving = mover.listen_for(channel, terms);
    let mut clients = Vec::new();
    loop {
        match arriving.next() {
            Ok(Some(arrived)) => {
                let lines = u64::from_le_bytes(arrived.state().try_into().expect("it is of our version"));
                match arrived.into_stream() {
                    Ok(stream) => clients.push(Client { stream, lines, half: Vec::new() }),
                    Err(error) => eprintln!("lost: {error}"),
                }
            }
            Ok(None) => return clients,
            Err(error) => {
                // Those that have come are ours.
                eprintln!("the predecessor: {error}");
                return clients;
            }
        }
    }
}

/// Serves until a successor comes or, where nobody listens any more, until all clients have gone.
fn serve(
    listeners: Option<&(TcpListener, UnixListener)>,
    encryption: Option<&Arc<ServerConfig>>,
    clients: &mut Vec<Client>,
) -> Result<Option<UnixStream>> {
    while listeners.is_some() || !clients.is_empty() {
        let watch = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut events: Vec<_> = clients.iter().map(|client| watch(client.stream.as_fd())).collect();
        if let Some((listener, control)) = listeners {
            events.extend([watch(listener.as_fd()), watch(control.as_fd())]);
        }
        poll(&mut events, None)?;
        let ready: Vec<bool> = events.iter().map(|event| !event.revents().is_empty()).collect();
        let mut served = ready.iter();
        clients.retain_mut(|client| match served.next() {
            Some(true) => client.answer().is_ok(),
            _ => true,
        });
        let Some((listener, control)) = listeners else { continue };
        // Those that wait to be accepted are ours, too.
        while let Ok((stream, _)) = listener.accept() {
            if let Some(Err(error)) = encryption.map(|configuration| tls::accept(configuration, &stream)) {
                eprintln!("no TLS with {:?}: {error}", stream.peer_addr());
                continue;
            }
            stream.set_nonblocking(true)?;
            clients.push(Client { stream, lines: 0, half: Vec::new() });
        }
        if ready.last() == Some(&true) {
            return Ok(Some(control.accept()?.0));
        }
    }
    Ok(None)
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

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
