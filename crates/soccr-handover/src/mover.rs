//! [`Mover`]: what a process needs once to let connections go and to take them in.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use soccr::Flow;
use soccr::bulk::Kit;
use soccr::diag::Diag;
use soccr::lock::{Locker, Mode, SILENCE};
use soccr::steer::{Homecoming, Steerer};
use soccr_image::stream::Place;

use crate::departing::{Departing, Stream};
use crate::error::{Error, Rejected, Result};
use crate::protocol::Fate;
use crate::seat::Seat;
use crate::silence::Silencer;

/// Moves connections of the network namespace in which it was made: one for the whole process.
///
/// It owns an nftables table (see [`Locker`]) and has the BPF program loaded by which congestion windows come back, so that
/// neither is waited for while a connection is silent. It is a handle: clones share everything.
#[derive(Clone)]
pub struct Mover {
    pub(crate) shared: Arc<Shared>,
}

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// For the target to be there. Nothing is locked before that.
    pub start: Duration,
    /// For each answer of the other end, and for it to read on.
    pub answer: Duration,
    /// For the source to decide about what is ready: afterwards it is refused.
    pub decision: Duration,
    /// For which this host stays silent about connections that have left it, so that late packets draw no reset.
    pub silence: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            start: Duration::from_secs(60),
            answer: Duration::from_secs(10),
            decision: Duration::from_secs(60),
            silence: SILENCE,
        }
    }
}

/// What a hand-over has to tell while it is under way.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// It is known what has become of a connection of ours.
    Settled {
        /// Its name, as the source gave it.
        name: &'a str,
        /// What has become of it.
        fate: Fate,
    },
    /// From here on connections are in the memory of this process alone, until the target has them: it must not be ended. Told once,
    /// before the first one leaves.
    Leaving,
    /// From now on this host is silent about connections that leave, for so long: see [`Limits::silence`].
    Silent(Duration),
    /// A connection has been restored here; it is not ours yet.
    Restored {
        /// Its name, as the source gave it.
        name: &'a str,
        /// What came back exactly, what approximately, what not and why.
        report: &'a soccr::Report,
    },
    /// A connection that was to arrive here does not: it stays at its source, where that listens.
    Refused {
        /// Its number in the stream of the source.
        number: u32,
        /// Why, as the source is told.
        reason: &'a str,
    },
    /// A connection that had left its source could not be brought to life: it is nowhere.
    Lost {
        /// Its number in the stream of the source.
        number: u32,
        /// Why.
        reason: &'a str,
    },
    /// The target has something to tell people. Where there is a listener, the target tells it to nobody else.
    Note {
        /// What it is.
        text: &'a str,
        /// It has not done with all connections what it was to do with them.
        failed: bool,
    },
    /// Something did not go as well as it could have; no connection is lost by it.
    Warning(&'a str),
}

type Listener = dyn Fn(Event<'_>) + Send + Sync;

pub(crate) struct Shared {
    /// Before the locker: what comes home finds one of the two at any time.
    pub(crate) homecoming: Mutex<Homecoming>,
    pub(crate) locker: Locker,
    /// Kept, as are the next two: to close a socket of Netfilter takes milliseconds.
    steerer: Mutex<Steerer>,
    silencer: Mutex<Silencer>,
    pub(crate) kit: Kit,
    diag: Mutex<Option<Diag>>,
    pub(crate) limits: Limits,
    /// Where it moves connections from and to, as far as the kernel tells.
    pub(crate) place: Option<Place>,
    listener: Option<Box<Listener>>,
    /// Results that nobody has waited for.
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
        let shared = Shared {
            homecoming: Mutex::new(Homecoming::new()?),
            locker: Locker::new(Mode::HOLD)?,
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

    /// Calls `listener` with what happens, on whichever thread it does.
    ///
    /// # Panics
    /// Where the mover has been cloned or used before.
    pub fn on_event(mut self, listener: impl Fn(Event<'_>) + Send + Sync + 'static) -> Self {
        let shared = Arc::get_mut(&mut self.shared).expect("the mover is new");
        shared.listener = Some(Box::new(listener));
        self
    }

    /// Takes a connection to send it: [`unread`](Departing::unread) what was read ahead, say what [state](Departing::with_state)
    /// goes along, then [`send`](Departing::send) it.
    ///
    /// The connection goes on until then.
    ///
    /// # Errors
    /// It is no connected TCP socket. The stream comes back.
    pub fn take<S: Stream>(&self, stream: S) -> std::result::Result<Departing<S>, Rejected<S>> {
        Departing::new(Arc::clone(&self.shared), stream)
    }

    /// The same of the socket of another process, or of one that no longer knows its peer.
    pub fn take_seat(&self, seat: Seat) -> Departing {
        Departing::of(Arc::clone(&self.shared), seat)
    }

    /// Connections that have come back into their sockets from sends that nobody waited for to the end, such as futures that were
    /// dropped. Whoever drops them ends them, as any stream.
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
        if let Some(listener) = &self.listener {
            listener(event);
        }
    }

    /// Somebody is told.
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

    /// Looks for sockets, where the kernel tells of them. It is opened when it is first needed.
    pub(crate) fn with_diag<T>(&self, look: impl FnOnce(&mut Option<Diag>) -> T) -> T {
        let mut kept = self.diag.lock().unwrap_or_else(PoisonError::into_inner);
        let mut diag = kept.take().or_else(|| Diag::open().ok());
        // Nobody waits for it meanwhile.
        drop(kept);
        let seen = look(&mut diag);
        *self.diag.lock().unwrap_or_else(PoisonError::into_inner) = diag;
        seen
    }

    /// Of these connections some have arrived; the others stay where they are.
    pub(crate) fn settle(&self, all: &[Flow], arrived: &[Flow]) {
        let mut homecoming = self.homecoming();
        if let Err(error) = homecoming.arrived(arrived).and_then(|()| homecoming.stay_away(all)) {
            self.warn(error);
        }
    }

    pub(crate) fn leave_behind(&self, value: std::net::TcpStream, error: Error) {
        let mut came_back = self.came_back.lock().unwrap_or_else(PoisonError::into_inner);
        came_back.push(Rejected { value, error });
    }

    /// Ends the silence about connections that are here.
    pub(crate) fn end_silence(&self, flows: &[Flow]) {
        match self.silencer().lift(flows) {
            Ok(locked) => {
                for (Flow { local, remote }, name) in locked {
                    self.warn(format_args!("{local} {remote}: still locked: see `soccr unlock {name}`"));
                }
            }
            Err(error) => self.warn(error),
        }
    }
}

/// The host, and the network namespace of the calling thread.
pub(crate) fn place() -> Option<Place> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let boot = u128::from_str_radix(&boot.trim().replace('-', ""), 16).ok()?;
    let namespace = fs::metadata("/proc/thread-self/ns/net").ok()?;
    Some(Place { host: boot.to_be_bytes(), namespace: [namespace.dev(), namespace.ino()] })
}
