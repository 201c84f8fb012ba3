//! What a container runtime does: the connections of a process that knows nothing of it move to another program, in another network
//! namespace or on another host.
//!
//! ```text
//! cargo build --features foreign --example container
//! sudo target/debug/examples/container take /run/move.sock /run/netns/new ./server
//! sudo target/debug/examples/container give /run/move.sock 4711
//! ```
//!
//! HERE is the runtime of the old container: process 4711 and those that it has started are stopped only while their connections are on
//! their way, and keep whatever cannot leave. THERE is that of the new one, whose program finds the numbers of its descriptors in the
//! variable `CONNECTIONS`. Between two hosts the channel is ssh(1), or TLS, instead of a UNIX socket.

use std::collections::HashSet;
use std::error::Error;
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::Pid;
use soccr::{Flow, Lock};
use soccr_handover::foreign::{Captive, Keeper, Process, Sharing, namespace, process};
use soccr_handover::{ErrorKind, Mover, Outcome, Terms};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["give", path, pid] => give(Pid::from_raw(pid.parse()?).ok_or("no process has this number")?, path),
        ["take", path, netns, program @ ..] if !program.is_empty() => take(path, netns, program),
        _ => {
            Err("usage: container give UNIX_SOCKET PID | take UNIX_SOCKET NETNS PROGRAM [ARGUMENT]...".into())
        }
    }
}

/// HERE: all connections of a process, and of those that it has started, leave.
fn give(pid: Pid, path: &str) -> Result<()> {
    let mut captives = captives(pid)?;
    captives.retain(|captive| match captive.flow() {
        Ok(_) => true,
        // It has ended, and the kernel has forgotten its peer.
        Err(why) => {
            eprintln!("stays: {why}");
            false
        }
    });
    let Some(first) = captives.first() else { return Err("it has no connections".into()) };
    let sockets: Vec<_> = captives.iter().map(AsFd::as_fd).collect();
    let inodes: Vec<u64> = captives.iter().map(Captive::inode).collect();
    // Both before a thread is started, as a mover does.
    let keeper = Keeper::start(&sockets, Sharing::find(&inodes)?, None)?;
    namespace::enter_of(first.as_fd())?;
    let mover = Mover::new()?;
    let mut departing = Vec::new();
    for captive in captives {
        let name = captive.name().to_owned();
        // The keeper knows each by its place: none is left out here. An error: it has just ended, and nothing has happened yet.
        departing.push(mover.take_seat(captive.into_seat()?).named(name));
    }
    let mut channel = UnixStream::connect(path)?;
    let outcomes = mover.sending(departing).used_by(keeper).through(&mut channel);
    println!(
        "{} of {} have moved",
        outcomes.iter().filter(|outcome| outcome.is_moved()).count(),
        outcomes.len()
    );
    for outcome in outcomes {
        match outcome {
            Outcome::Moved => {}
            // Its process has lost it: it would end with this one.
            Outcome::Stays(stream, why) if why.kind() == ErrorKind::Adrift => {
                eprintln!("{why}");
                save(&stream)?;
            }
            // Its process goes on with it.
            Outcome::Stays(_, why) => eprintln!("stays: {why}"),
            Outcome::Unknown(why) => eprintln!("the target has it, or nobody: {why}"),
        }
    }
    Ok(())
}

/// Saves a connection that nobody has any more, for `soccr restore`.
fn save(stream: &TcpStream) -> Result<()> {
    let flow = Flow::of(stream)?;
    let path = format!("adrift-{}-{}.soccr", flow.local, flow.remote);
    let _lock = Lock::hold(&[flow])?;
    let paused = soccr::pause(stream)?.with_tls();
    soccr_image::save_file(&path, &paused.save()?)?;
    paused.detach()?;
    eprintln!("saved in {path}");
    Ok(())
}

fn captives(pid: Pid) -> Result<Vec<Captive>> {
    let (mut captives, mut seen) = (Vec::new(), HashSet::new());
    for pid in [vec![pid], process::descendants(pid)?].concat() {
        let process = match Process::open(pid) {
            Err(_) if process::has_ended(pid) => continue,
            opened => opened?,
        };
        let mut descriptors = Vec::new();
        process::sockets(pid, |fd, inode| {
            if seen.insert(inode) {
                descriptors.push(fd);
            }
        })?;
        for fd in descriptors {
            captives.extend(Captive::find(&process, fd)?);
        }
    }
    Ok(captives)
}

/// THERE: becomes the program, with whatever has arrived.
fn take(path: &str, netns: &str, program: &[&str]) -> Result<()> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    // Before a thread is started.
    namespace::enter(Path::new(netns))?;
    let mover = Mover::new()?;
    println!("waiting");
    let (mut channel, _) = listener.accept()?;
    let received = mover.receive_all(&mut channel, Terms::default());
    if let Err(error) = &received.outcome {
        eprintln!("{error}");
    }
    let streams = received.arrived.into_iter().map(|arrived| arrived.into_stream());
    let streams: Vec<TcpStream> = streams.collect::<std::io::Result<_>>()?;
    for stream in &streams {
        // The program inherits them, and no other descriptor.
        fcntl_setfd(stream, FdFlags::empty())?;
        stream.set_nonblocking(false)?;
    }
    // The source ends when the connections are where they are to be.
    channel.write_all(&received.end.into_bytes())?;
    let numbers: Vec<String> = streams.iter().map(|stream| stream.as_raw_fd().to_string()).collect();
    Err(Command::new(program[0]).args(&program[1..]).env("CONNECTIONS", numbers.join(",")).exec().into())
}
