//! [`Arriving`]: connections on their way into a program.

use std::marker::PhantomData;
use std::net::TcpStream;
use std::sync::Arc;

use soccr::Flow;

use crate::arrival::{Arrival, Landed};
use crate::channel::Channel;
use crate::departing::Stream;
use crate::drive::{self, Engine, PIECE};
use crate::error::Result;
use crate::mover::Mover;
use crate::notes::LastWords;
use crate::terms::Terms;

/// What has come through [`Mover::receive_all`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Received {
    /// The connections that live here, in the order in which the source has numbered them. If the stream breaks, connections that the
    /// source had let go of by then are among them.
    pub arrived: Vec<Arrived>,
    /// How the stream has ended.
    pub outcome: Result<()>,
    /// The source has only asked: see [`try_out`](crate::try_out).
    pub was_trial: bool,
    /// To be said once the connections have been passed on: the source waits for it.
    pub end: LastWords,
}

/// A live connection that has arrived. Dropping this ends it, as dropping its stream would.
#[derive(Debug)]
#[must_use = "dropping it ends the connection"]
pub struct Arrived<S = TcpStream> {
    landed: Landed,
    stream: PhantomData<fn() -> S>,
}

impl<S: Stream> Arrived<S> {
    pub(crate) fn new(landed: Landed) -> Self {
        Self { landed, stream: PhantomData }
    }

    /// What the source has sent along; empty where it has sent nothing.
    pub fn state(&self) -> &[u8] {
        &self.landed.state
    }

    /// The name that the source gave it, for messages.
    pub fn name(&self) -> &str {
        &self.landed.name
    }

    /// The addresses of the connection, also where the peer has reset it meanwhile.
    pub fn flow(&self) -> Flow {
        self.landed.flow
    }

    /// The stream. It is blocking or not (`O_NONBLOCK`) as it was at the source; in a runtime it never blocks.
    ///
    /// # Errors
    /// The errors of the runtime.
    pub fn into_stream(self) -> std::io::Result<S> {
        S::from_std(self.landed.stream)
    }
}

/// The connections that come through a channel, stream after stream, until its other end closes it.
///
/// Nothing happens between two calls of [`next`](Self::next): call it again soon, and serve the connections elsewhere. Dropping this
/// closes silently what the source has not let go of: such a connection stays at the source.
#[must_use = "nothing arrives unless it is asked for"]
pub struct Arriving<C> {
    mover: Mover,
    terms: Terms,
    channel: C,
    engine: Arrival,
    input: Vec<u8>,
    is_open: bool,
    /// Nothing more comes.
    is_over: bool,
}

impl Mover {
    /// Takes in the connections that come through a channel.
    pub fn listen<C: Channel>(&self, channel: C) -> Arriving<C> {
        self.listen_for(channel, Terms::default())
    }

    /// The same, under conditions.
    pub fn listen_for<C: Channel>(&self, channel: C, terms: Terms) -> Arriving<C> {
        let engine = Arrival::new(Arc::clone(&self.shared), terms.clone());
        let input = vec![0; PIECE];
        Arriving { mover: self.clone(), terms, channel, engine, input, is_open: true, is_over: false }
    }

    /// Takes in all connections of one stream, and of those right behind it that hear no answers: their sources cannot be told that
    /// nobody reads on. The caller has to say its last word: a source that hears answers waits for that.
    pub fn receive_all(&self, channel: &mut impl Channel, mut terms: Terms) -> Received {
        terms.leaves_end = true;
        let mut engine = Arrival::new(Arc::clone(&self.shared), terms.clone());
        let mut landed: Vec<Landed> = Vec::new();
        let outcome = loop {
            drive::run(&mut engine, channel);
            let before = landed.len();
            landed.extend(std::iter::from_fn(|| engine.landed()));
            landed[before..].sort_by_key(|landed| landed.number);
            match engine.next_stream(engine.is_one_way()) {
                Ok(Some(rest)) => {
                    terms.room = engine.room();
                    engine = Arrival::new(Arc::clone(&self.shared), terms.clone()).behind_another();
                    engine.feed(&rest);
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        let end = engine.last_words();
        let was_trial = engine.was_trial();
        Received { was_trial, arrived: landed.into_iter().map(Arrived::new).collect(), outcome, end }
    }
}

impl<C: Channel> Arriving<C> {
    /// Waits for the next connection. `None` when the channel is closed between two streams.
    ///
    /// # Errors
    /// The channel is broken, or the source does not know its part. What it had let go of has been given before. It is told once.
    #[allow(clippy::should_implement_trait, reason = "it can fail, as a whole")]
    pub fn next(&mut self) -> Result<Option<Arrived>> {
        while !self.is_over {
            self.engine.advance();
            // The source waits until this has been written.
            let has_said_all = self.engine.output().bytes().is_empty();
            if has_said_all && let Some(landed) = self.engine.landed() {
                return Ok(Some(Arrived::new(landed)));
            }
            if self.engine.is_over() && has_said_all {
                match self.engine.next_stream(self.is_open) {
                    Ok(Some(rest)) => {
                        self.terms.room = self.engine.room();
                        self.engine = Arrival::new(Arc::clone(&self.mover.shared), self.terms.clone());
                        self.engine.feed(&rest);
                    }
                    ended => {
                        self.is_over = true;
                        return ended.map(|_| None);
                    }
                }
                continue;
            }
            drive::step(&mut self.engine, &mut self.channel, &mut self.input, &mut self.is_open);
        }
        Ok(None)
    }

    /// Gives the channel back.
    pub fn into_channel(self) -> C {
        self.channel
    }
}

impl<C> std::fmt::Debug for Arriving<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arriving").field("terms", &self.terms).finish_non_exhaustive()
    }
}
