//! A server with connections, the networks around it, and where the connections are.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use soccr::connection::State;
use soccr::diag::{Diag, Socket};
use soccr::lock::PersistentLock;
use soccr::steer::{Foreign, Steering};
use soccr_image::stream::{Message, Reader};
use soccr_lab::{Flags, Host, LIMIT, Lab, Lan, Side, Sniffer, wait_until};

use super::run::{Outcome, Plan, Shape, observed};
use crate::adopt::wait_for_listener;
use crate::programs::{Program, SOCCR, assert_runs, connect, python, soccr};

/// Answers a line when all of it is there: until then it is unread. Gets connections as descriptors, from accept(2), or through a
/// UNIX socket.
const SERVER: &str = r#"
import os, socket, sys, threading, time
def serve(connection):
    try:
        while True:
            data = connection.recv(65536, socket.MSG_PEEK)
            if not data:
                break
            if b"\n" in data:
                connection.sendall(sys.argv[1].encode() + connection.recv(len(data)))
            else:
                time.sleep(0.002)
    except OSError:
        pass
def begin(connection):
    threading.Thread(target=serve, args=[connection]).start()
if len(sys.argv) < 3:
    for fd in range(3, 3 + int(os.environ["LISTEN_FDS"])):
        begin(socket.socket(fileno=fd))
elif sys.argv[2] == "listens":
    listener = socket.create_server(("", 7), backlog=64)
    while True:
        begin(listener.accept()[0])
else:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[2] + ".new")
    listener.listen()
    os.rename(sys.argv[2] + ".new", sys.argv[2])
    while True:
        source = listener.accept()[0]
        while True:
            text, fds, _, _ = socket.recv_fds(source, 65536, 253)
            if not text:
                break
            for fd in fds:
                begin(socket.socket(fileno=fd))
"#;

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Old,
    New,
    /// In an image of the working directory.
    Image,
    /// In its program, and in an image.
    Copied,
    Nowhere,
}

impl Place {
    pub fn is_old(self) -> bool {
        matches!(self, Self::Old | Self::Copied)
    }
}

/// Where connections are to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// To another program in the same network.
    Program,
    /// To another host, which has the address as well. The network leads packets there.
    Host,
    /// To another host, to which the first one steers packets.
    Steered,
}

enum Network {
    Shared(Lab),
    Steered(Lan),
}

/// A server with connections, and its network.
pub struct World {
    network: Network,
    goal: Goal,
    pub old: Program,
    beside: Program,
    /// Who has got connections out of images.
    heirs: Vec<Program>,
    clients: Vec<TcpStream>,
    /// Segments with RST at the peer.
    resets: Sniffer,
    /// Where the command works.
    pub directory: tempfile::TempDir,
    /// What others need.
    tools: tempfile::TempDir,
}

impl World {
    pub fn new(goal: Goal, connections: usize) -> Self {
        let network = match goal {
            Goal::Steered => Network::Steered(Lan::new().unwrap()),
            _ => Network::Shared(Lab::new().unwrap()),
        };
        let home = network.home();
        let old = home.run(|| Program::start(&mut python(SERVER, &["old ", "listens"])));
        let clients = network.connect(connections);
        let beside = network.at(goal).run(|| Program::start(Command::new("sleep").arg("1000")));
        let resets = Sniffer::flagged(&network.peer().namespace, "eth0", Flags::RST).unwrap();
        let [directory, tools] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        Self { network, goal, old, beside, heirs: Vec::new(), clients, resets, directory, tools }
    }

    /// The program that gets a connection.
    pub fn heir() -> Vec<String> {
        ["python3", "-c", SERVER, "new "].map(str::to_owned).to_vec()
    }

    pub fn netns(&self) -> String {
        self.beside.pid()
    }

    pub fn receive(&self, arguments: &str) -> String {
        format!("exec {SOCCR} receive --netns {} {arguments}", self.beside.pid())
    }

    /// How a shell starts the program that gets a connection.
    pub fn program(&self) -> String {
        let path = self.tools.path().join("heir");
        fs::write(&path, SERVER).unwrap();
        format!("-- python3 {} 'new '", path.display())
    }

    /// The address of the other host.
    pub fn hop(&self) -> String {
        self.network.at(self.goal).v4.to_string()
    }

    /// A server at the goal that takes what is adopted.
    pub fn serve(&self) -> Program {
        self.network.at(self.goal).run(|| {
            let server = Program::start(&mut python(SERVER, &["new ", "listens"]));
            wait_for_listener(true);
            server
        })
    }

    /// A server at the goal that waits at [`unix`](Self::unix).
    pub fn wait(&self) -> Program {
        let path = self.unix();
        let server = Program::start(&mut python(SERVER, &["new ", path.to_str().unwrap()]));
        wait_until("it waits", || path.exists());
        server
    }

    pub fn unix(&self) -> PathBuf {
        self.tools.path().join("socket")
    }

    /// The name of an image.
    pub fn image(&self) -> PathBuf {
        self.directory.path().join("image.soccr")
    }

    /// What names the connections in the old server.
    pub fn selection(&self) -> Vec<String> {
        let fds = (0..self.clients.len()).flat_map(|number| ["--fd".into(), self.fd(number)]);
        ["--pid".into(), self.old.pid()].into_iter().chain(fds).collect()
    }

    /// How messages name a connection: in the old server, and by its peer.
    pub fn names(&self) -> Vec<[String; 2]> {
        let names = (0..self.clients.len()).map(|number| {
            let peer = self.clients[number].local_addr().unwrap();
            [format!("pid {} fd {}:", self.old.pid(), self.fd(number)), format!(" {peer}: ")]
        });
        names.collect()
    }

    /// The descriptor of a connection in the old server.
    fn fd(&self, number: usize) -> String {
        let client = self.clients[number].local_addr().unwrap();
        let mut found = None;
        wait_until("it is accepted", || {
            let mut inode = 0;
            look(self.network.home(), |socket| {
                if socket.remote == client {
                    inode = socket.inode;
                }
            });
            let link = PathBuf::from(format!("socket:[{inode}]"));
            let all = fs::read_dir(format!("/proc/{}/fd", self.old.pid())).unwrap();
            let mut all = all.map(|entry| entry.unwrap().path());
            found = all.find(|path| fs::read_link(path).is_ok_and(|to| to == link));
            found.is_some()
        });
        found.unwrap().file_name().unwrap().to_str().unwrap().to_owned()
    }

    /// The peers send the first part of a line.
    pub fn begin(&mut self) {
        let mut waiting = HashSet::new();
        for client in &mut self.clients {
            client.write_all(b"half ").unwrap();
            waiting.insert(client.local_addr().unwrap());
        }
        wait_until("it is there", || {
            look(self.network.home(), |socket| {
                if socket.receive_queue == 5 {
                    waiting.remove(&socket.remote);
                }
            });
            waiting.is_empty()
        });
    }

    /// Runs a command, while the peers send the second part.
    pub fn run(&mut self, command: &mut Command, shape: Shape, plan: &Plan) -> Outcome {
        command.current_dir(&self.directory).env_remove("RUST_BACKTRACE");
        let clients = &self.clients;
        observed(command, shape, plan, || {
            clients.iter().for_each(|mut client| client.write_all(b"mid ").unwrap());
        })
    }

    /// Where each connection is. It goes on there, with every byte; out of an image it is restored.
    pub fn places(&mut self) -> Result<Vec<Place>, String> {
        let (here, there) = (alive(self.network.home()), alive(self.network.at(self.goal)));
        let images = images(self.directory.path());
        let place = |client: &SocketAddr| {
            let is_saved = images.iter().any(|(_, peers)| peers.contains(client));
            match (here.contains(client), there.contains(client), is_saved) {
                (false, false, false) => Ok(Place::Nowhere),
                (false, false, true) => Ok(Place::Image),
                (true, false, false) => Ok(Place::Old),
                (false, true, false) => Ok(Place::New),
                // Its answer tells.
                (true, true, false) if self.goal == Goal::Program => Ok(Place::New),
                (true, there, true) if there == (self.goal == Goal::Program) => Ok(Place::Copied),
                _ => Err("it is in two places".to_owned()),
            }
        };
        let peers: Vec<SocketAddr> = self.clients.iter().map(|client| client.local_addr().unwrap()).collect();
        let mut places = peers.iter().map(place).collect::<Result<Vec<_>, _>>()?;
        let mut saved: HashSet<SocketAddr> =
            peers.iter().zip(&places).filter(|(_, at)| **at == Place::Image).map(|(peer, _)| *peer).collect();
        for (image, its) in &images {
            if !saved.is_disjoint(its) {
                saved.retain(|peer| !its.contains(peer));
                self.heirs.push(self.restore(image, its));
            }
        }
        self.network.lead(Goal::Program);
        self.ask(&mut places, true)?;
        if places.iter().all(|place| place.is_old()) {
            return Ok(places);
        }
        // What the network leads elsewhere from now on would be reset there.
        wait_until("the answers are acknowledged", || {
            let mut is_done = true;
            look(self.network.home(), |socket| {
                is_done &= !peers.contains(&socket.remote) || socket.send_queue == 0;
            });
            is_done
        });
        self.network.lead(self.goal);
        self.ask(&mut places, false)?;
        Ok(places)
    }

    fn restore(&self, image: &Path, peers: &HashSet<SocketAddr>) -> Program {
        let mut restore = soccr(&["restore", image.to_str().unwrap(), "--netns", &self.netns(), "--"]);
        let mut heir = Program::start(restore.args(Self::heir()).current_dir(&self.directory));
        wait_until("they are restored, or nothing is", || {
            heir.0.try_wait().unwrap().is_some() || alive(self.network.at(self.goal)).is_superset(peers)
        });
        heir
    }

    /// The peers send the end of the line, to where the connections are.
    fn ask(&mut self, places: &mut [Place], old: bool) -> Result<(), String> {
        for (client, place) in self.clients.iter_mut().zip(places) {
            if *place == Place::Nowhere || place.is_old() != old {
                continue;
            }
            let mut answer = [0; 18];
            if let Err(error) = client.write_all(b"rest\n").and_then(|()| client.read_exact(&mut answer)) {
                return Err(format!("no answer where it is ({place:?}): {error}"));
            }
            *place = match (&answer, *place) {
                (b"old half mid rest\n", Place::New) if self.goal == Goal::Program => Place::Old,
                (b"old half mid rest\n", Place::Old | Place::Copied) => *place,
                (b"new half mid rest\n", Place::New | Place::Image | Place::Copied) => *place,
                _ => return Err(format!("{place:?}: it answers {:?}", String::from_utf8_lossy(&answer))),
            };
        }
        Ok(())
    }

    /// What is left that should not be.
    pub fn leftovers(&mut self, places: &[Place]) -> Vec<String> {
        let mut left = Vec::new();
        assert_runs(&self.old.pid());
        let (home, goal) = (self.network.home(), self.network.at(self.goal));
        for (client, place) in self.clients.iter().zip(places) {
            let client = client.local_addr().unwrap();
            for host in self.network.hosts() {
                for lock in host.run(PersistentLock::list).unwrap() {
                    let is_ours = lock.flows.iter().any(|flow| flow.remote == client);
                    let is_silence = !place.is_old() && self.goal == Goal::Host && std::ptr::eq(host, home);
                    if is_ours && !is_silence {
                        left.push(format!("the lock {}", lock.name));
                    }
                }
            }
            let steered: Vec<Steering> = home.run(Steering::list).unwrap();
            let entries = steered.iter().flat_map(|steering| home.run(|| steering.contents()).unwrap());
            let is_steered = entries.into_iter().any(|entry| entry.flow.remote == client);
            if is_steered && place.is_old() {
                left.push("the steering of a connection that stays".into());
            }
        }
        if places.iter().all(|place| place.is_old()) && !goal.run(Foreign::list).unwrap().is_empty() {
            left.push("the delivery of an address".into());
        }
        for entry in fs::read_dir(&self.directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let is_image = name.ends_with("soccr") || name.ends_with("soccr.consumed");
            if !is_image || places.iter().all(|place| *place == Place::Old) {
                left.push(format!("the file {name}"));
            }
            fs::remove_file(path).unwrap();
        }
        // One that has gone before may have been reset since.
        let mut resets = self.resets.segments().unwrap();
        resets.retain(|segment| {
            self.clients.iter().any(|client| client.local_addr().unwrap() == segment.destination)
        });
        if !resets.is_empty() {
            left.push(format!("a reset: {resets:?}"));
        }
        left
    }

    /// Fresh connections, where one of the last has moved.
    pub fn renew(&mut self, places: &[Place]) {
        for (goal, old) in [(Goal::Program, true), (self.goal, false)] {
            self.network.lead(goal);
            // The end of each goes to where it is.
            let mut ended = HashSet::new();
            for (client, place) in self.clients.iter().zip(places) {
                if place.is_old() == old {
                    client.shutdown(Shutdown::Both).unwrap_or_default();
                    ended.insert(client.local_addr().unwrap());
                }
            }
            let host = self.network.at(goal);
            wait_until("they have ended", || {
                let mut is_over = true;
                look(host, |socket| is_over &= !ended.contains(&socket.remote));
                is_over
            });
        }
        self.forget();
    }

    /// Fresh connections, wherever the last are.
    pub fn forget(&mut self) {
        self.network.lead(Goal::Program);
        for host in self.network.hosts() {
            host.run(|| {
                Steering::list().unwrap().iter().for_each(|steering| steering.remove().unwrap());
                Foreign::list().unwrap().iter().for_each(|foreign| foreign.remove().unwrap());
            });
        }
        self.clients = self.network.connect(self.clients.len());
        self.heirs.clear();
    }
}

impl Network {
    fn peer(&self) -> &Host {
        match self {
            Self::Shared(lab) => &lab.peer,
            Self::Steered(lan) => &lan.peer,
        }
    }

    fn home(&self) -> &Host {
        self.hosts()[0]
    }

    fn at(&self, goal: Goal) -> &Host {
        self.hosts()[usize::from(goal != Goal::Program)]
    }

    fn hosts(&self) -> [&Host; 2] {
        match self {
            Self::Shared(lab) => [&lab.a, &lab.b],
            Self::Steered(lan) => [&lan.hosts[0], &lan.hosts[1]],
        }
    }

    /// Packets go there from now on, unless the hosts see to that.
    fn lead(&self, goal: Goal) {
        if let Self::Shared(lab) = self {
            lab.steer(if goal == Goal::Program { Side::A } else { Side::B }).unwrap();
        }
    }

    fn connect(&self, connections: usize) -> Vec<TcpStream> {
        let one = || {
            let client = self.peer().run(|| connect((self.home().v4, 7)));
            client.set_read_timeout(Some(LIMIT)).unwrap();
            client
        };
        (0..connections).map(|_| one()).collect()
    }
}

fn look(host: &Host, each: impl FnMut(&Socket<'_>)) {
    host.run(|| Diag::open().unwrap().visit(each).unwrap());
}

/// The peers of the connections that are on a host.
fn alive(host: &Host) -> HashSet<SocketAddr> {
    let mut all = HashSet::new();
    look(host, |socket| {
        if socket.state == State::Established {
            all.insert(socket.remote);
        }
    });
    all
}

/// The images in a directory, the newest first, and the peers of the connections in each. An older one does not know what has arrived
/// since.
fn images(directory: &Path) -> Vec<(PathBuf, HashSet<SocketAddr>)> {
    let peers = |path: &Path| {
        let mut reader = Reader::new(File::open(path).ok()?).ok()?;
        let mut peers = HashSet::new();
        while let Some(message) = reader.receive().ok()? {
            if let Message::Connection { connection, .. } = message {
                peers.insert(connection.remote);
            }
        }
        Some(peers)
    };
    let all = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let images = all.filter(|path| path.extension().is_some_and(|end| end == "soccr"));
    let mut images: Vec<_> = images.filter_map(|path| peers(&path).map(|peers| (path, peers))).collect();
    images.sort_by_key(|(path, _)| Reverse(fs::metadata(path).unwrap().modified().unwrap()));
    images
}
