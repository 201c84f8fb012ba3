//! One run of a command with one fault, and what has come of it.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Seek, Write};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::process::Command;

use soccr::connection::State;
use soccr::diag::{Diag, Socket};
use soccr::lock::PersistentLock;
use soccr_lab::{End, Entry, Flags, Host, LIMIT, Lab, Side, Sniffer, Verdict, run_family, wait_until};

use super::calls::{Site, is_interruptible};
use crate::adopt::wait_for_listener;
use crate::programs::{Program, SOCCR, assert_runs, connect, python, soccr};

/// Answers a line when all of it is there: until then it is unread.
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
if len(sys.argv) > 2:
    listener = socket.create_server(("", 7), backlog=64)
    while True:
        threading.Thread(target=serve, args=[listener.accept()[0]]).start()
for fd in range(3, 3 + int(os.environ["LISTEN_FDS"])):
    threading.Thread(target=serve, args=[socket.socket(fileno=fd)]).start()
"#;

/// The call of this number at a site fails.
#[derive(Clone, Debug)]
pub struct Fault {
    pub site: Site,
    pub nth: usize,
    pub errno: i32,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let error = std::io::Error::from_raw_os_error(self.errno);
        write!(f, "{} no. {}: {error}", self.site, self.nth + 1)
    }
}

/// What fails in a run.
#[derive(Clone, Debug)]
pub enum Plan {
    Nothing,
    One(Fault),
    /// Every call that a signal may interrupt is interrupted once.
    EveryInterruption,
}

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Old,
    New,
    /// In an image of this directory.
    Image,
    Nowhere,
}

/// What has come of a run.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub told: String,
    /// The fault has happened.
    pub is_met: bool,
    /// The sites of all calls that could have failed, in order.
    pub sites: Vec<Site>,
}

/// A server with one connection at a time, and its network.
pub struct World {
    pub lab: Lab,
    pub goal: Side,
    pub old: Program,
    beside: Program,
    pub client: TcpStream,
    /// Segments with RST at the peer.
    resets: Sniffer,
    pub directory: tempfile::TempDir,
}

impl World {
    pub fn new(goal: Side) -> Self {
        let lab = Lab::new().unwrap();
        let old = lab.a.run(|| Program::start(&mut python(SERVER, &["old ", "listens"])));
        let client = lab.peer.run(|| connect((lab.a.v4, 7)));
        client.set_read_timeout(Some(LIMIT)).unwrap();
        let beside = lab.host(goal).run(|| Program::start(Command::new("sleep").arg("1000")));
        let resets = Sniffer::flagged(&lab.peer.namespace, "eth0", Flags::RST).unwrap();
        Self { lab, goal, old, beside, client, resets, directory: tempfile::tempdir().unwrap() }
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
        let path = self.directory.path().join("heir");
        fs::write(&path, SERVER).unwrap();
        format!("-- python3 {} 'new '", path.display())
    }

    /// The descriptor of the connection in the old server.
    pub fn fd(&self) -> String {
        let mut found = None;
        wait_until("it is accepted", || {
            let mut inode = 0;
            self.lab.a.run(|| {
                self.look(|socket| {
                    if socket.remote == self.client.local_addr().unwrap() {
                        inode = socket.inode;
                    }
                });
            });
            let link = PathBuf::from(format!("socket:[{inode}]"));
            let all = fs::read_dir(format!("/proc/{}/fd", self.old.pid())).unwrap();
            let mut all = all.map(|entry| entry.unwrap().path());
            found = all.find(|path| fs::read_link(path).is_ok_and(|to| to == link));
            found.is_some()
        });
        found.unwrap().file_name().unwrap().to_str().unwrap().to_owned()
    }

    fn look(&self, each: impl FnMut(&Socket<'_>)) {
        Diag::open().unwrap().visit(each).unwrap();
    }

    fn is_at(&self, host: &Host) -> bool {
        self.state_at(host) == Some(State::Established)
    }

    fn state_at(&self, host: &Host) -> Option<State> {
        let (client, mut state) = (self.client.local_addr().unwrap(), None);
        host.run(|| {
            self.look(|socket| state = if socket.remote == client { Some(socket.state) } else { state });
        });
        state
    }

    /// A fresh connection, where the last has moved.
    pub fn renew(&mut self) {
        // Its end goes to where it is.
        self.client.shutdown(Shutdown::Both).unwrap_or_default();
        self.lab.steer(Side::A).unwrap();
        self.client = self.lab.peer.run(|| connect((self.lab.a.v4, 7)));
        self.client.set_read_timeout(Some(LIMIT)).unwrap();
    }

    /// The peer sends the first part of a line.
    pub fn begin(&mut self) {
        self.client.write_all(b"half ").unwrap();
        wait_until("it is there", || {
            let (mut unread, client) = (0, self.client.local_addr().unwrap());
            self.lab.a.run(|| {
                self.look(|socket| unread += if socket.remote == client { socket.receive_queue } else { 0 });
            });
            unread == 5
        });
    }

    /// Runs a command, while the peer sends the second part.
    pub fn run(&mut self, command: &mut Command, plan: &Plan) -> Outcome {
        command.current_dir(&self.directory).env_remove("RUST_BACKTRACE");
        let client = &self.client;
        observed(command, plan, || (&*client).write_all(b"mid ").unwrap())
    }

    /// A server at the goal that takes what is adopted.
    pub fn serve(&self) -> Program {
        self.lab.host(self.goal).run(|| {
            let server = Program::start(&mut python(SERVER, &["new ", "listens"]));
            wait_for_listener(true);
            server
        })
    }

    /// The name of an image.
    pub fn image(&self) -> PathBuf {
        self.directory.path().join("image.soccr")
    }

    /// The image of a connection that could not be given to anybody, or else that of the scenario.
    fn newest_image(&self) -> Option<PathBuf> {
        let all = fs::read_dir(&self.directory).unwrap().map(|entry| entry.unwrap().path());
        let mut images: Vec<_> =
            all.filter(|path| path.extension().is_some_and(|end| end == "soccr")).collect();
        images.sort_by_key(|path| *path == self.image());
        images.into_iter().next()
    }

    /// Where the connection is. It goes on there, with every byte; out of an image it is restored.
    pub fn place(&mut self) -> Result<Place, String> {
        let (here, there) = (self.is_at(&self.lab.a), self.is_at(self.lab.host(self.goal)));
        let image = self.newest_image();
        // It lives until it has answered.
        let mut heir = None;
        let place = match (here, there) {
            (true, true) if self.goal == Side::B => return Err("it is in two places".into()),
            (false, false) => match &image {
                None => Place::Nowhere,
                Some(path) => {
                    let mut restore =
                        soccr(&["restore", path.to_str().unwrap(), "--netns", &self.netns(), "--"]);
                    let heir =
                        heir.insert(Program::start(restore.args(Self::heir()).current_dir(&self.directory)));
                    wait_until("it is restored, or nothing is", || {
                        heir.0.try_wait().unwrap().is_some()
                            || self.state_at(self.lab.host(self.goal)).is_some()
                    });
                    Place::Image
                }
            },
            (true, false) => Place::Old,
            (false, true) | (true, true) => Place::New,
        };
        if place == Place::Nowhere {
            return Ok(place);
        }
        self.lab.steer(if place == Place::Old { Side::A } else { self.goal }).unwrap();
        let mut answer = [0; 18];
        let asked = self.client.write_all(b"rest\n").and_then(|()| self.client.read_exact(&mut answer));
        if let Err(error) = asked {
            return Err(format!("no answer where it is ({place:?}): {error}"));
        }
        match &answer {
            b"old half mid rest\n" => Ok(Place::Old),
            b"new half mid rest\n" if place != Place::Image => Ok(Place::New),
            b"new half mid rest\n" => Ok(Place::Image),
            other => Err(format!("bytes are lost: {}", String::from_utf8_lossy(other))),
        }
    }

    /// What is left that should not be.
    pub fn leftovers(&mut self, place: Place) -> Vec<String> {
        let mut left = Vec::new();
        assert_runs(&self.old.pid());
        let client = self.client.local_addr().unwrap();
        for host in [&self.lab.a, &self.lab.b] {
            for lock in host.run(PersistentLock::list).unwrap() {
                let is_ours = lock.flows.iter().any(|flow| flow.remote == client);
                let is_silence =
                    place != Place::Old && std::ptr::eq(host, &self.lab.a) && self.goal == Side::B;
                if is_ours && !is_silence {
                    left.push(format!("the lock {}", lock.name));
                }
            }
        }
        for entry in fs::read_dir(&self.directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if name != "heir" {
                if !name.ends_with("soccr") || place == Place::Old {
                    left.push(format!("the file {name}"));
                }
                fs::remove_file(path).unwrap();
            }
        }
        // One that has gone before may have been reset since.
        let mut resets = self.resets.segments().unwrap();
        resets.retain(|segment| segment.destination == client);
        if !resets.is_empty() {
            left.push(format!("a reset: {resets:?}"));
        }
        left
    }
}

/// Runs a command by this plan. When it reads the first connection, or else behind it, the peer is to `speak`.
pub fn observed(command: &mut Command, plan: &Plan, speak: impl FnOnce() + Send) -> Outcome {
    let mut told = tempfile::tempfile().unwrap();
    command.stderr(told.try_clone().unwrap()).stdout(told.try_clone().unwrap());
    let mut watch = Watch::new(plan, speak);
    let end = run_family(command, LIMIT, |entry| watch.judge(entry));
    watch.speak();
    let (is_met, sites) = (watch.is_met, watch.sites);
    let mut text = String::new();
    told.rewind().unwrap();
    told.read_to_string(&mut text).unwrap();
    let code = match end {
        End::Exited(status) => status.code(),
        // It has become the program that gets the connection.
        End::Left => Some(0),
        End::Late => None,
    };
    Outcome { code, told: text, is_met, sites }
}

/// What a run does at each call.
struct Watch<'a, F> {
    plan: &'a Plan,
    speak: Option<F>,
    /// Processes whose libraries have begun.
    begun: Vec<Vec<usize>>,
    counts: usize,
    is_met: bool,
    sites: Vec<Site>,
    /// The calls of each thread that were interrupted last time.
    interrupted: HashMap<(i32, i64, u64), bool>,
}

impl<'a, F: FnOnce()> Watch<'a, F> {
    fn new(plan: &'a Plan, speak: F) -> Self {
        Self {
            plan,
            speak: Some(speak),
            begun: Vec::new(),
            counts: 0,
            is_met: false,
            sites: Vec::new(),
            interrupted: HashMap::new(),
        }
    }

    fn speak(&mut self) {
        if let Some(speak) = self.speak.take() {
            speak();
        }
    }

    fn judge(&mut self, entry: Entry<'_>) -> Verdict {
        let Entry { thread, lineage, programs, call } = entry;
        // A shell starts the target; what either end executes then gets the connection.
        let own = match lineage {
            [] | [1] => 1 + lineage.len(),
            _ => 0,
        };
        if programs > own {
            return Verdict::Leave;
        }
        if programs < own {
            return Verdict::Pass;
        }
        // Nobody is interested in what happens before main().
        if own > 0 && !self.begun.iter().any(|one| one == lineage) {
            if call.number == libc::SYS_sigaltstack && call.arguments[0] != 0 {
                self.begun.push(lineage.to_vec());
            }
            return Verdict::Pass;
        }
        let sets_repair = call.number == libc::SYS_setsockopt
            && call.arguments[1..3] == [libc::SOL_TCP as u64, libc::TCP_REPAIR as u64];
        if sets_repair && lineage.is_empty() {
            self.speak();
        }
        let Some(site) = Site::of(&entry) else { return Verdict::Pass };
        match self.plan {
            Plan::Nothing => self.sites.push(site),
            Plan::One(fault) if !self.is_met && fault.site == site => {
                self.counts += 1;
                if self.counts > fault.nth {
                    self.is_met = true;
                    return Verdict::Fail(fault.errno);
                }
            }
            Plan::One(_) => {}
            Plan::EveryInterruption if is_interruptible(&call) => {
                // Whoever is interrupted makes the call again, or waits for the same once more.
                let again = self.interrupted.entry((thread, call.number, call.arguments[0])).or_default();
                *again = !*again;
                if *again {
                    self.is_met = true;
                    return Verdict::Fail(libc::EINTR);
                }
            }
            Plan::EveryInterruption => {}
        }
        Verdict::Pass
    }
}
