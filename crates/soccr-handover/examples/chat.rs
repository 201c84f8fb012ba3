//! A chat room that moves to another process, here or on another host, while everybody talks: nobody notices.
//!
//! ```text
//! cargo build --features tokio --example chat
//! sudo target/debug/examples/chat 192.0.2.1:7000 127.0.0.1:9000            # HERE: the room; a successor may come on port 9000
//! sudo target/debug/examples/chat 192.0.2.1:7000 127.0.0.1:9000 take       # THERE: takes it over, and is the room from then on
//! ```
//!
//! The first line of a client is its nickname, every other one goes to all. What goes along with each connection are its nickname and
//! the messages that could not be sent to it yet; half a line that has been read goes back in front of the queue. For another host the
//! address moves there, too, and the channel goes through `ssh -L`: whoever may connect to it gets the room.
//!
//! Whoever connects while the room moves and nobody listens is refused and has to try again; on one host
//! the listener can go along, as in the example `replace`.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use soccr_handover::{Mover, Outcome};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;
use tokio::task::JoinSet;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Everybody who is here.
type Room = Arc<Mutex<Vec<UnboundedSender<String>>>>;

/// One who talks.
struct Client {
    stream: TcpStream,
    /// Empty until its first line.
    name: String,
    /// What it is still to be told.
    unsent: Vec<u8>,
    /// What has been read of its next line.
    half: Vec<u8>,
    messages: UnboundedReceiver<String>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (address, control): (SocketAddr, SocketAddr) = match &arguments[..] {
        [address, control] | [address, control, _] => (address.parse()?, control.parse()?),
        _ => return Err("usage: chat ADDRESS:PORT CONTROL_ADDRESS:PORT [take]".into()),
    };
    let (mover, room) = (Mover::new()?, Room::default());
    let mut clients = match arguments.len() {
        3 => take_over(&mover, &room, TcpStream::connect(control).await?).await,
        _ => Vec::new(),
    };
    loop {
        let (channel, all) = serve(address, control, &room, clients).await?;
        clients = give_away(&mover, channel, all).await;
        if clients.is_empty() {
            println!("moved");
            return Ok(());
        }
    }
}

/// HERE: everybody moves. Returns those who stay.
async fn give_away(mover: &Mover, mut channel: TcpStream, clients: Vec<Client>) -> Vec<Client> {
    let (mut departing, mut kept) = (Vec::new(), Vec::new());
    for mut client in clients {
        // Nobody talks any more: what there is has been said to everybody.
        while let Ok(message) = client.messages.try_recv() {
            client.unsent.extend(message.into_bytes());
        }
        let Client { stream, name, unsent, half, messages } = client;
        // An error here: the client has just gone.
        let Ok(connection) = mover.take(stream) else { continue };
        let Ok(connection) = connection.unread(&half) else { continue };
        departing.push(connection.with_critical_state([name.as_bytes(), b"\n", &unsent].concat()));
        kept.push((name, unsent, half, messages));
    }
    let outcomes = mover.send_all_async(departing, &mut channel).await;
    let mut staying = Vec::new();
    for (outcome, (name, unsent, half, messages)) in outcomes.into_iter().zip(kept) {
        match outcome {
            Outcome::Moved => {}
            Outcome::Stays(stream, why) => {
                eprintln!("{name} stays: {why}");
                staying.push(Client { stream, name, unsent, half, messages });
            }
            Outcome::Unknown(why) => eprintln!("{name} is there, or nowhere: {why}"),
        }
    }
    staying
}

/// THERE: takes over whoever comes, until the other end closes the channel.
async fn take_over(mover: &Mover, room: &Room, channel: TcpStream) -> Vec<Client> {
    let mut arrivals = mover.listen_async(channel);
    let mut clients = Vec::new();
    loop {
        let arrived = match arrivals.next().await {
            Ok(Some(arrived)) => arrived,
            Ok(None) => return clients,
            Err(error) => {
                // Those who have come are here.
                eprintln!("the other end: {error}");
                return clients;
            }
        };
        let mut parts = arrived.state().splitn(2, |byte| *byte == b'\n');
        let name = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
        let unsent = parts.next().unwrap_or_default().to_vec();
        match arrived.into_stream() {
            Ok(stream) => {
                clients.push(Client { stream, name, unsent, half: Vec::new(), messages: join(room) })
            }
            Err(error) => eprintln!("{name} is lost: {error}"),
        }
    }
}

/// The room, until a successor comes: then everybody who is in it, and the way to the successor.
async fn serve(
    address: SocketAddr,
    control: SocketAddr,
    room: &Room,
    clients: Vec<Client>,
) -> Result<(TcpStream, Vec<Client>)> {
    let (listener, control) = (TcpListener::bind(address).await?, TcpListener::bind(control).await?);
    println!("{} talk", clients.len());
    let (leave, told) = watch::channel(false);
    let mut talking = JoinSet::new();
    for client in clients {
        talking.spawn(talk(client, Arc::clone(room), told.clone()));
    }
    let channel = loop {
        tokio::select! {
            accepted = listener.accept() => {
                let messages = join(room);
                let (name, unsent, half) = Default::default();
                let client = Client { stream: accepted?.0, name, unsent, half, messages };
                talking.spawn(talk(client, Arc::clone(room), told.clone()));
            }
            accepted = control.accept() => break accepted?.0,
        }
    };
    leave.send(true)?;
    Ok((channel, talking.join_all().await.into_iter().flatten().collect()))
}

fn join(room: &Room) -> UnboundedReceiver<String> {
    let (send, messages) = unbounded_channel();
    room.lock().unwrap().push(send);
    messages
}

/// Talks with one client until it is `told` to stop; `None` where the client has gone.
async fn talk(mut client: Client, room: Room, mut told: watch::Receiver<bool>) -> Option<Client> {
    loop {
        let Client { stream, name, unsent, half, messages } = &mut client;
        let (mut reading, mut writing) = stream.split();
        tokio::select! {
            _ = told.wait_for(|told| *told) => return Some(client),
            Some(message) = messages.recv() => unsent.extend(message.into_bytes()),
            written = writing.write(unsent), if !unsent.is_empty() => drop(unsent.drain(..written.ok()?)),
            read = reading.read_buf(half) => if read.ok()? == 0 { return None },
        }
        while let Some(end) = half.iter().position(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(&half[..end]).into_owned();
            half.drain(..=end);
            match name.is_empty() {
                true => *name = line,
                false => {
                    let message = format!("{name}: {line}\n");
                    // Whoever has gone hears nothing any more.
                    room.lock().unwrap().retain(|everybody| everybody.send(message.clone()).is_ok());
                }
            }
        }
    }
}
