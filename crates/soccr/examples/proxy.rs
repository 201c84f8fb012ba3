//! An HTTP server on tokio that hands its idle keep-alive connections to another process, here or on another host.
//!
//! ```text
//! sudo cargo run --example proxy -- serve 127.0.0.1:8080 127.0.0.1:9000   # answers requests; connections on port 9000
//! sudo cargo run --example proxy -- take 127.0.0.1:9000                   # takes all of them over, and answers from now on
//! ```
//!
//! A connection moves between two requests, when nothing of it is in the memory of the process. Whoever takes it over
//! confirms each one; without that it stays where it was.

use std::error::Error;
use std::net::SocketAddr;

use soccr::lock::{Locker, Mode};
use soccr::{Connection, Flow};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Says that a connection is in place.
const TAKEN: u8 = 1;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", address, control] => serve(address.parse()?, control.parse()?).await,
        ["take", control] => take(control.parse()?).await,
        _ => Err("usage: proxy serve ADDRESS CONTROL | proxy take CONTROL".into()),
    }
}

/// Answers requests until somebody takes the connections over.
async fn serve(address: SocketAddr, control: SocketAddr) -> Result<()> {
    let (listener, control) = (TcpListener::bind(address).await?, TcpListener::bind(control).await?);
    println!("serving");
    // Every connection has a task; what they hold when they are told to give it up comes back through `idle`.
    let (leave, told) = tokio::sync::watch::channel(false);
    let (give, mut idle) = mpsc::unbounded_channel();
    let mut successor = loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (give, told) = (give.clone(), told.clone());
                tokio::spawn(async move {
                    if let Ok(Some(stream)) = answer(accepted?.0, told).await {
                        let _ = give.send(stream);
                    }
                    Ok::<_, std::io::Error>(())
                });
            }
            accepted = control.accept() => break accepted?.0,
        }
    };
    drop((listener, give));
    leave.send(true)?;
    let locker = Locker::new(Mode::HOLD)?;
    while let Some(stream) = idle.recv().await {
        hand_over(&stream.into_std()?, &locker, &mut successor).await?;
    }
    println!("handed over");
    Ok(())
}

/// Answers requests on one connection. Returns it when it is idle and `told` to leave; `None` where the client has closed it.
async fn answer(
    mut stream: TcpStream,
    mut told: tokio::sync::watch::Receiver<bool>,
) -> Result<Option<TcpStream>> {
    let mut request = Vec::new();
    loop {
        tokio::select! {
            read = stream.read_buf(&mut request) => if read? == 0 { return Ok(None) },
            // Half a request is in our memory, not in the connection: it is answered first.
            _ = told.wait_for(|told| *told), if request.is_empty() => return Ok(Some(stream)),
        }
        if request.ends_with(b"\r\n\r\n") {
            request.clear();
            let body = format!("process {}\n", std::process::id());
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            stream.write_all(answer.as_bytes()).await?;
        }
    }
}

/// Sends a connection to the successor. What its client sends meanwhile is held, and delivered to whoever has it then.
async fn hand_over(stream: &std::net::TcpStream, locker: &Locker, successor: &mut TcpStream) -> Result<()> {
    let lock = locker.lock(&[Flow::of(stream)?])?;
    let paused = soccr::pause(stream)?;
    let connection = paused.save()?;
    paused.detach()?;
    let mut image = Vec::new();
    soccr_image::write(&mut image, &connection)?;
    let sent = async {
        successor.write_u32(image.len().try_into()?).await?;
        successor.write_all(&image).await?;
        Ok::<_, Box<dyn Error + Send + Sync>>(successor.read_u8().await? == TAKEN)
    };
    let taken = matches!(sent.await, Ok(true));
    // Only the value is left here. Where the successor does not have it, it becomes a connection again.
    let ours = if taken { None } else { Some(connection.restore()?) };
    lock.release()?;
    match ours {
        Some(restored) => Err(format!("{:?} came back", restored.resume()?.peer_addr()).into()),
        None => Ok(()),
    }
}

/// Takes connections over and answers their requests.
async fn take(control: SocketAddr) -> Result<()> {
    let mut predecessor = TcpStream::connect(control).await?;
    let (_never, told) = tokio::sync::watch::channel(false);
    let mut tasks = Vec::new();
    while let Ok(length) = predecessor.read_u32().await {
        let mut image = Vec::new();
        (&mut predecessor).take(length.into()).read_to_end(&mut image).await?;
        let connection: Connection = soccr_image::read(&image[..])?;
        let restored = connection.restore()?;
        predecessor.write_u8(TAKEN).await?;
        let stream = restored.resume()?;
        stream.set_nonblocking(true)?;
        tasks.push(tokio::spawn(answer(TcpStream::from_std(stream)?, told.clone())));
    }
    println!("took over {}", tasks.len());
    for task in tasks {
        task.await??;
    }
    Ok(())
}
