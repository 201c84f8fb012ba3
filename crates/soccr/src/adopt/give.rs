//! Sockets of ours go to a server: drained, locked, saved, adopted. Whatever fails comes back as a socket.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::adopt::wide::Listeners;
use crate::adopt::{Adopted, Adopter, again};
use crate::connection::{Connection, Flow};
use crate::error::{Error, Result};
use crate::lock::Locker;
use crate::pause::pause;
use crate::resume::Restored;
use crate::sys::tcp;

/// How long a peer may take to acknowledge what was sent, where the caller has no better limit.
pub const DRAIN: Duration = Duration::from_secs(5);

/// How many connections are locked at a time.
const WINDOW: usize = 256;

/// How often a send queue is looked at.
const POLL: Duration = Duration::from_millis(1);

/// A connection that was not adopted: it is here still.
#[derive(Debug)]
#[must_use = "it holds the connection"]
pub struct Kept {
    socket: std::result::Result<OwnedFd, Box<Connection>>,
    error: Error,
    /// It may be tried again: the peer had not acknowledged everything.
    undrained: bool,
}

/// What became of a socket.
type Outcome = std::result::Result<Adopted, Kept>;

impl Kept {
    fn here(socket: OwnedFd, error: Error) -> Self {
        Self { socket: Ok(socket), error: error.at("adopt"), undrained: false }
    }

    /// Says, too, what has become of the lock.
    fn after(self, unlocked: &Result<()>) -> Self {
        let Err(unlock) = unlocked else { return self };
        let remedy = format!("{}; besides, {unlock}", self.error.remedy());
        Self { error: self.error.advise(remedy), ..self }
    }

    /// Why.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The connection, which goes on: in the socket that was given, or in a new one.
    ///
    /// # Errors
    /// The value, where it could not be restored here either. Its peer gets a reset when it next sends, unless it is locked.
    pub fn into_socket(self) -> std::result::Result<OwnedFd, Box<Connection>> {
        self.socket
    }
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Kept {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl Adopter {
    /// Gives live sockets away: waits until their peers have acknowledged everything, for `limit` at most, and puts them into the accept
    /// queues of their listeners, up to 256 under one lock of `locker`. The outcomes are in the order of the sockets.
    ///
    /// # Errors
    /// For each socket that was not adopted, [`Kept`] with the reason and the connection, which goes on in it.
    pub fn give(
        &mut self,
        locker: &Locker,
        sockets: Vec<OwnedFd>,
        limit: Duration,
    ) -> Vec<std::result::Result<Adopted, Kept>> {
        let begin = Instant::now();
        let is_late = || begin.elapsed() >= limit;
        let mut outcomes = Vec::with_capacity(sockets.len());
        let mut sockets = sockets.into_iter();
        loop {
            let window: Vec<OwnedFd> = sockets.by_ref().take(WINDOW).collect();
            if window.is_empty() {
                return outcomes;
            }
            outcomes.extend(self.give_window(locker, window, is_late));
        }
    }

    fn give_window(
        &mut self,
        locker: &Locker,
        sockets: Vec<OwnedFd>,
        is_late: impl Fn() -> bool,
    ) -> Vec<Outcome> {
        let mut outcomes: Vec<Option<Outcome>> = sockets.iter().map(|_| None).collect();
        let mut waiting: Vec<(usize, OwnedFd)> = sockets.into_iter().enumerate().collect();
        while !waiting.is_empty() {
            let late = is_late();
            // Only what is drained is locked: the acknowledgements for the others must come through.
            let (ready, rest): (Vec<_>, Vec<_>) =
                waiting.into_iter().partition(|(_, socket)| late || is_drained(socket));
            waiting = rest;
            let (places, ready): (Vec<_>, Vec<_>) = ready.into_iter().unzip();
            for (place, outcome) in places.into_iter().zip(self.give_drained(locker, ready)) {
                match outcome {
                    // The application's last words, or the peer's question, came in between.
                    Err(Kept { socket: Ok(socket), undrained: true, .. }) if !late => {
                        waiting.push((place, socket))
                    }
                    outcome => outcomes[place] = Some(outcome),
                }
            }
            if !waiting.is_empty() {
                std::thread::sleep(POLL);
            }
        }
        outcomes.into_iter().flatten().collect()
    }

    /// Gives sockets away under one lock, in their order.
    fn give_drained(&mut self, locker: &Locker, sockets: Vec<OwnedFd>) -> Vec<Outcome> {
        // What has no peer any more is kept as it is.
        let flows: Vec<Result<Flow>> = sockets.iter().map(Flow::of).collect();
        let locked: Vec<Flow> = flows.iter().flatten().copied().collect();
        let lock = match locker.lock(&locked) {
            Ok(lock) => lock,
            Err(error) => {
                return sockets.into_iter().map(|socket| Err(Kept::here(socket, again(&error)))).collect();
            }
        };
        let mut listeners = Listeners::default();
        let moved = sockets.into_iter().zip(flows).map(|(socket, flow)| match flow {
            Ok(_) => self.move_out(&mut listeners, socket),
            Err(error) => Moved::Kept(Kept::here(socket, error)),
        });
        let moved: Vec<Moved> = moved.collect();
        let unlocked = lock.release().map(drop);
        moved.into_iter().map(|moved| self.settle(moved, &unlocked)).collect()
    }

    /// Takes the connection out of its socket and puts it into the queue of the listener, under a lock.
    fn move_out(&mut self, listeners: &mut Listeners, socket: OwnedFd) -> Moved {
        let connection = match self.leave(&socket) {
            Ok(connection) => connection,
            Err((undrained, error)) => return Moved::Kept(Kept { undrained, ..Kept::here(socket, error) }),
        };
        drop(socket);
        match self.adopt_batch(listeners, &[&connection]).pop().expect("there is one for each") {
            Ok(adopted) => Moved::Adopted(adopted, connection),
            Err(error) => match connection.restore() {
                Ok(restored) => Moved::Restored(restored, connection, error),
                Err(_) => Moved::Kept(Kept { socket: Err(Box::new(connection)), error, undrained: false }),
            },
        }
    }

    /// The connection, which the socket has forgotten; or the socket goes on with it.
    fn leave(&mut self, socket: &OwnedFd) -> std::result::Result<Connection, (bool, Error)> {
        let stays = |error| (false, error);
        let paused = pause(socket).map_err(stays)?;
        let connection = paused.save().map_err(stays)?;
        if connection.control.outq_len > 0 {
            let error = Error::refused(
                format!("{} bytes that the peer has not acknowledged in time", connection.control.outq_len),
                "give it more time, or try again when the connection is idle",
            );
            return Err((true, error));
        }
        self.check(&connection).map_err(stays)?;
        paused.detach().map_err(stays)?;
        Ok(connection)
    }

    /// After the unlock, which may have left the connection locked, or without what was held for it.
    fn settle(&mut self, moved: Moved, unlocked: &Result<()>) -> Outcome {
        match moved {
            Moved::Adopted(mut adopted, connection) => {
                if let Err(error) = unlocked {
                    adopted.report.unlock(error);
                }
                // Without it the peer hears of the new window by the next segment.
                let _ = self.announce(&connection);
                Ok(adopted)
            }
            Moved::Restored(restored, connection, error) => {
                let socket = restored.resume().map(OwnedFd::from).map_err(|_| Box::new(connection));
                Err(Kept { socket, error, undrained: false }.after(unlocked))
            }
            Moved::Kept(kept) => Err(kept.after(unlocked)),
        }
    }
}

/// What has become of a socket under the lock.
enum Moved {
    Adopted(Adopted, Connection),
    /// Not adopted, and back in a socket that is silent still.
    Restored(Restored, Connection, Error),
    Kept(Kept),
}

fn is_drained(socket: &OwnedFd) -> bool {
    // What cannot be read is not waited for.
    tcp::unacknowledged(socket.as_fd()).unwrap_or(0) == 0
}
