//! [`Mover`]: what a process needs once to let connections go and to take them in.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use soccr::Flow;
use soccr::bulk::Kit;
use soccr::connection::State;
use soccr::diag::Diag;
use soccr::lock::{Locker, Mode, SILENCE};
use soccr::steer::{Homecoming, Steerer};
use soccr_image::stream::Place;

use crate::error::{Error, Rejected, Result};
use crate::protocol::Fate;
use crate::silence::{Lifted, Silencer};

/// Moves connections of the network namespace in which it was made. A process needs one.
///
/// It makes its nftables table (see [`Locker`]) and loads the BPF program that restores congestion windows once, so that no silent
/// connection waits for either. It is a handle: clones share everything.
#[derive(Clone)]
pub struct Mover {
    pub(crate) shared: Arc<Shared>,
}

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// To wait for the target to be there. Nothing is locked before that.
    pub start: Duration,
    /// To wait for each answer of the other end, and for it to read on.
    pub answer: Duration,
    /// For the source to decide about connections that are ready. After that they are refused. Also for it to go on where all of them are
    /// taken, none of them is served before the stream ends ([`Mover::receive_all`]), and more are to come, or another stream has begun.
    pub decision: Duration,
    /// For the source to wait for the target's last word once all connections have come to rest: the target may be passing them on.
    /// Nothing is silent meanwhile.
    pub end: Duration,
    /// How long this host stays silent about connections that have left it, so that late packets draw no reset.
    pub silence: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            start: Duration::from_secs(60),
            answer: Duration::from_secs(10),
            decision: Duration::from_secs(60),
            end: Duration::from_secs(60),
            silence: SILENCE,
        }
    }
}

/// What a hand-over has to tell while it is under way.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The fate of a connection of ours is known.
    Settled {
        /// Its name, as the source gave it.
        name: &'a str,
        /// What has become of it.
        fate: Fate,
    },
    /// From here on connections may be in the memory of this process alone, until the target has them: do not end it. Told once,
    /// before the first one leaves.
    Leaving,
    /// From now on this host is silent about connections that leave, for this time: see [`Limits::silence`].
    Silent(Duration),
    /// A connection has been restored here, but is not ours yet.
    Restored {
        /// Its name, as the source gave it.
        name: &'a str,
        /// What came back exactly, what approximately, what not and why.
        report: &'a soccr::Report,
    },
    /// A connection that was to arrive here does not. It stays at its source, if that listens.
    Refused {
        /// Its number in the stream of the source.
        number: u32,
        /// Why, as the source is told.
        reason: &'a str,
    },
    /// A connection is lost: it had left its source, and could not be brought to life here.
    Lost {
        /// Its number in the stream of the source.
        number: u32,
        /// Why.
        reason: &'a str,
    },
    /// The target has something to tell people, and tells nobody else.
    Note {
        /// What it is.
        text: &'a str,
        /// The target has not done with all connections what it was to do.
        failed: bool,
    },
    /// The target has connections, and has not said its last word, for this reason: nobody knows whether it could pass them on. Told once,
    /// in the end.
    Unfinished(&'a str),
    /// Something could have gone better. No connection is lost by it.
    Warning(&'a str),
}

type Listener = dyn Fn(Event<'_>) + Send + Sync;

pub(crate) struct Shared {
    /// Declared before the locker: a connection that comes home finds one of the two at any time.
    pub(crate) homecoming: Mutex<Homecoming>,
    pub(crate) locker: Locker,
    /// Kept open, as are the next two: closing a netfilter socket takes milliseconds.
    steerer: Mutex<Steerer>,
    silencer: Mutex<Silencer>,
    pub(crate) kit: Kit,
    diag: Mutex<Option<Diag>>,
    pub(crate) limits: Limits,
    /// Where it moves connections from and to, as far as the kernel tells.
    pub(crate) place: Option<Place>,
    listener: Option<Box<Listener>>,
    /// Connections whose caller no longer waited when they came back.
    came_back: Mutex<Vec<Rejected<std::net::TcpStream>>>,
}

impl Mover {
    /// A mover for the network namespace of the calling thread.
    ///
    /// # Errors
    /// The errors of [`Locker::new`]: it needs `CAP_NET_ADMIN` and `CAP_NET_RAW` there, and nftables.
    pub fn new() -> Result<Self> {
        Self::with(Limits::default())
    }

    /// The same with other limits.
    ///
    /// # Errors
    /// The errors of [`new`](Self::new).
    pub fn with(limits: Limits) -> Result<Self> {
        soccr::prepare();
        let locker = Locker::new(Mode::HOLD)?;
        let shared = Shared {
            homecoming: Mutex::new(Homecoming::new(&locker)?),
            locker,
            steerer: Mutex::new(Steerer::new()?),
            silencer: Mutex::new(Silencer::new()?),
            kit: Kit::default(),
            diag: Mutex::default(),
            limits,
            place: place(),
            listener: None,
            came_back: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Calls `listener` with what happens, on the thread where it happens.
    ///
    /// # Panics
    /// Where the mover has been cloned or used before.
    pub fn on_event(mut self, listener: impl Fn(Event<'_>) + Send + Sync + 'static) -> Self {
        let shared = Arc::get_mut(&mut self.shared).expect("the mover is new");
        shared.listener = Some(Box::new(listener));
        self
    }

    /// Connections that came back into their sockets after their callers had stopped waiting, as where a future was dropped. Dropping
    /// them ends them, as any stream.
    pub fn came_back(&self) -> Vec<Rejected<std::net::TcpStream>> {
        std::mem::take(&mut *self.shared.came_back.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Mover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mover").field("limits", &self.shared.limits).finish_non_exhaustive()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn tell(&self, event: Event<'_>) {
        let Some(listener) = &self.listener else { return };
        if thread::panicking() {
            // A second panic would end the program, and this one is on its way already.
            let _ = catch_unwind(AssertUnwindSafe(|| listener(event)));
        } else {
            listener(event);
        }
    }

    /// Whether there is a listener.
    pub(crate) fn is_heard(&self) -> bool {
        self.listener.is_some()
    }

    pub(crate) fn warn(&self, error: impl fmt::Display) {
        self.tell(Event::Warning(&error.to_string()));
    }

    pub(crate) fn homecoming(&self) -> MutexGuard<'_, Homecoming> {
        self.homecoming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn steerer(&self) -> MutexGuard<'_, Steerer> {
        self.steerer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn silencer(&self) -> MutexGuard<'_, Silencer> {
        self.silencer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lends the socket of `sock_diag`, if the kernel has it. It is opened when first needed.
    pub(crate) fn with_diag<T>(&self, look: impl FnOnce(&mut Option<Diag>) -> T) -> T {
        let mut kept = self.diag.lock().unwrap_or_else(PoisonError::into_inner);
        let mut diag = kept.take().or_else(|| Diag::open().ok());
        // Taken out, so that nobody waits for it meanwhile.
        drop(kept);
        let seen = look(&mut diag);
        *self.diag.lock().unwrap_or_else(PoisonError::into_inner) = diag;
        seen
    }

    /// Some of these connections have arrived; the others stay where they are, and this host is silent again about those of which it was.
    pub(crate) fn settle(&self, all: &[Flow], arrived: &[Flow], silent: &[Flow]) {
        let here: HashSet<Flow> = arrived.iter().map(Flow::on_the_wire).collect();
        let away: Vec<Flow> =
            silent.iter().filter(|flow| !here.contains(&flow.on_the_wire())).copied().collect();
        self.warn_of(self.silencer().begin(&away, SILENCE));
        let mut homecoming = self.homecoming();
        self.warn_of(homecoming.arrived(arrived));
        let arrived: HashSet<&Flow> = arrived.iter().collect();
        let others: Vec<Flow> = all.iter().filter(|flow| !arrived.contains(flow)).copied().collect();
        self.warn_of(homecoming.stay_away(&others));
    }

    pub(crate) fn leave_behind(&self, value: std::net::TcpStream, error: Error) {
        let mut came_back = self.came_back.lock().unwrap_or_else(PoisonError::into_inner);
        came_back.push(Rejected { value, error });
    }

    pub(crate) fn warn_of<E: std::fmt::Display>(&self, outcome: std::result::Result<(), E>) {
        if let Err(error) = outcome {
            self.warn(error);
        }
    }

    /// Ends the silence about connections that are here, and returns those of which this host was silent.
    pub(crate) fn end_silence(&self, flows: &[Flow]) -> soccr::Result<Vec<Flow>> {
        let Lifted { silent, locked } = self.silencer().lift(flows)?;
        for (Flow { local, remote }, name) in locked {
            self.warn(format_args!("{local} {remote}: still locked: see `soccr unlock {name}`"));
        }
        Ok(silent)
    }
}

/// For each of these connections, whether there is such a one here.
pub(crate) fn in_use(diag: &mut Option<Diag>, flows: &[Flow]) -> soccr::Result<Vec<bool>> {
    let mut in_use = vec![false; flows.len()];
    if let Some(diag) = diag {
        diag.find_each(flows, |index, socket| in_use[index] = socket.state != State::TimeWait)?;
    }
    Ok(in_use)
}

/// The host, and the network namespace of the calling thread.
pub(crate) fn place() -> Option<Place> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let boot = u128::from_str_radix(&boot.trim().replace('-', ""), 16).ok()?;
    let namespace = fs::metadata("/proc/thread-self/ns/net").ok()?;
    Some(Place { host: boot.to_be_bytes(), namespace: [namespace.dev(), namespace.ino()] })
}
