//! [`Departing`]: a connection on its way out of a program.

use std::marker::PhantomData;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use soccr::Flow;
use soccr::connection::QUEUE_LIMIT;

use crate::channel::Channel;
use crate::departure::{Condition, Departure, Ended, Item, Manner};
use crate::error::{Error, ErrorKind, Rejected};
use crate::guide::Path;
use crate::mover::{Mover, Shared};
use crate::protocol::Fate;
use crate::users::Users;
use crate::{drive, seat::Seat};

/// Types of sockets that connections leave and come back to: the standard library's, and tokio's with the feature `tokio`.
pub trait Stream: Sized + AsFd + sealed::Sealed {
    /// The socket behind the stream.
    ///
    /// # Errors
    /// The errors of the runtime.
    fn into_std(self) -> std::io::Result<TcpStream>;

    /// The stream of a socket; to be called where the runtime is.
    ///
    /// # Errors
    /// The errors of the runtime, and of `fcntl(2)`.
    fn from_std(stream: TcpStream) -> std::io::Result<Self>;
}

pub(crate) mod sealed {
    pub trait Sealed {}
}

impl sealed::Sealed for TcpStream {}

impl Stream for TcpStream {
    fn into_std(self) -> std::io::Result<TcpStream> {
        Ok(self)
    }

    fn from_std(stream: TcpStream) -> std::io::Result<Self> {
        Ok(stream)
    }
}

/// A connection that will be sent. Until then it goes on in its socket. Dropping this ends the connection, as dropping its stream would.
#[derive(Debug)]
#[must_use = "dropping it ends the connection"]
pub struct Departing<S = TcpStream> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) item: Box<Item>,
    stream: PhantomData<fn() -> S>,
}

/// What has become of a connection.
#[derive(Debug)]
#[must_use = "a connection that stays is in here"]
pub enum Outcome<S = TcpStream> {
    /// The other end has it.
    Moved,
    /// It is here, in its old socket, as if nothing had happened. Bytes given to [`unread`](Departing::unread) are not put back into it.
    Stays(S, Error),
    /// The other end has it, or nobody has.
    Unknown(Error),
}

impl<S: Stream> Departing<S> {
    pub(crate) fn new(shared: Arc<Shared>, stream: S) -> Result<Self, Rejected<S>> {
        let flow = match Flow::of(&stream) {
            Ok(flow) => flow,
            Err(error) => return Err(Rejected { value: stream, error: error.into() }),
        };
        // The runtime gives up the stream here: it cannot be had back from an error of its own.
        let socket = stream.into_std().expect("a stream leaves its runtime");
        Ok(Self::of(shared, Seat::own(socket.into(), flow)))
    }

    pub(crate) fn of(shared: Arc<Shared>, seat: Seat) -> Self {
        let flow = seat.flow();
        let item = Item::new(seat, format!("{} {}", flow.local, flow.remote));
        Self { shared, item: Box::new(item), stream: PhantomData }
    }

    /// The addresses of the connection.
    pub fn flow(&self) -> Flow {
        self.item.seat.flow()
    }

    /// Puts bytes that have been read in front of what has not: the target reads them first. See
    /// [`Connection::unread`](soccr::Connection::unread). Where the connection stays, they are not in it.
    ///
    /// # Errors
    /// [`TooMuch`](ErrorKind::TooMuch): over 64 MiB. The connection comes back.
    pub fn unread(mut self, bytes: &[u8]) -> Result<Self, Rejected<Self>> {
        if self.item.unread.len() + bytes.len() > QUEUE_LIMIT as usize {
            let error = Error::new(ErrorKind::TooMuch, "over 64 MiB have been read and not dealt with");
            return Err(Rejected { value: self, error });
        }
        self.item.unread.splice(..0, bytes.iter().copied());
        Ok(self)
    }

    /// Sends bytes along that only the two applications understand. A target without a use for them drops them.
    pub fn with_state(mut self, state: impl Into<Vec<u8>>) -> Self {
        (self.item.state, self.item.critical) = (Some(state.into()), false);
        self
    }

    /// The same for bytes without which the connection is useless: a target that cannot take them refuses the connection.
    pub fn with_critical_state(self, state: impl Into<Vec<u8>>) -> Self {
        let mut departing = self.with_state(state);
        departing.item.critical = true;
        departing
    }

    /// Lets the connection leave only if its socket passes this check, which is made under the lock, right before the connection is saved.
    /// Otherwise the connection stays, for the reason that the check gives.
    pub fn provided(
        mut self,
        check: impl Fn(BorrowedFd<'_>) -> std::result::Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.item.condition = Some(Condition(Box::new(check)));
        self
    }

    /// The name of the connection in messages at both ends; its addresses, unless set.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.item.name = name.into();
        self
    }

    /// Gives the stream back.
    ///
    /// # Errors
    /// The errors of the runtime.
    pub fn into_stream(self) -> std::io::Result<S> {
        S::from_std(self.item.seat.into_socket().into())
    }
}

impl Departing {
    /// Moves the connection to the [`listen`](Mover::listen)er at the other end of the channel, and waits for what becomes of it.
    ///
    /// Once the target is there, the peer hears nothing until the target has the connection, or until it is known to stay. What the
    /// peer sends meanwhile goes along.
    pub fn send(self, channel: &mut impl Channel) -> Outcome {
        let mover = Mover { shared: Arc::clone(&self.shared) };
        mover.send_all([self], channel).pop().expect("one connection has one outcome")
    }
}

impl Mover {
    /// Takes a connection to send it: [`unread`](Departing::unread) what was read ahead, say what [state](Departing::with_state)
    /// goes along, then [`send`](Departing::send) it.
    ///
    /// The connection goes on until then.
    ///
    /// # Errors
    /// It is not a connected TCP socket. The stream comes back.
    pub fn take<S: Stream>(&self, stream: S) -> std::result::Result<Departing<S>, Rejected<S>> {
        Departing::new(Arc::clone(&self.shared), stream)
    }

    /// The same for the socket of another process, or one that no longer knows its peer.
    pub fn take_seat(&self, seat: Seat) -> Departing {
        Departing::of(Arc::clone(&self.shared), seat)
    }

    /// Moves many connections at once: many times faster than one by one. Their outcomes are in their order.
    pub fn send_all(
        &self,
        departing: impl IntoIterator<Item = Departing>,
        channel: &mut impl Channel,
    ) -> Vec<Outcome> {
        self.sending(departing).through(channel)
    }

    /// The same, with further options.
    pub fn sending(&self, departing: impl IntoIterator<Item = Departing>) -> Sending {
        Sending { mover: self.clone(), departing: departing.into_iter().collect(), manner: Manner::default() }
    }
}

/// Connections to be sent together, and how.
#[must_use = "nothing is sent before `through` is called"]
pub struct Sending {
    mover: Mover,
    departing: Vec<Departing>,
    manner: Manner,
}

impl Sending {
    /// Names others who use the sockets: they are stopped while connections are on their way.
    pub fn used_by(mut self, users: impl Users + 'static) -> Self {
        self.manner.users = Some(Box::new(users));
        self
    }

    /// Steers the packets of connections that have left to their new host, instead of dropping them: to next hops, one for each address
    /// family, or through a tunnel. See [`soccr::steer`].
    pub fn steered_to(mut self, path: impl Into<Path>) -> Self {
        self.manner.path = path.into();
        self
    }

    /// The channel carries no answers: a connection leaves as soon as it has been written, and [`Moved`](Outcome::Moved) says no
    /// more than that.
    pub fn one_way(mut self) -> Self {
        self.manner.is_one_way = true;
        self
    }

    /// Sends them, and waits for what becomes of each, in their order.
    pub fn through(self, channel: &mut impl Channel) -> Vec<Outcome> {
        let Self { mover, departing, manner } = self;
        let mut departure = Departure::new(Arc::clone(&mover.shared), manner, items_of(departing));
        drive::run(&mut departure, channel);
        departure.outcomes().into_iter().map(|ended| Outcome::of(&mover.shared, ended)).collect()
    }
}

/// The connections behind the guards, which end here.
pub(crate) fn items_of<S>(departing: impl IntoIterator<Item = Departing<S>>) -> Vec<Item> {
    departing.into_iter().map(|departing| *departing.item).collect()
}

impl std::fmt::Debug for Sending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sending").field("departing", &self.departing).finish_non_exhaustive()
    }
}

impl<S: Stream> Outcome<S> {
    pub(crate) fn of(shared: &Shared, ended: Ended) -> Self {
        let Ended { socket, fate, error } = ended;
        match fate {
            Fate::Moved => Self::Moved,
            Fate::Unknown => Self::Unknown(error),
            Fate::Stays => {
                let spare = socket.try_clone();
                match (S::from_std(socket), spare) {
                    (Ok(stream), _) => Self::Stays(stream, error),
                    (Err(reason), Ok(spare)) => {
                        shared.leave_behind(spare, error);
                        let what = "it is here (see Mover::came_back), and the runtime does not take it";
                        Self::Unknown(Error::of(ErrorKind::System, what, reason))
                    }
                    (Err(reason), Err(_)) => Self::Unknown(reason.into()),
                }
            }
        }
    }

    /// The other end has it.
    pub fn is_moved(&self) -> bool {
        matches!(self, Self::Moved)
    }
}
