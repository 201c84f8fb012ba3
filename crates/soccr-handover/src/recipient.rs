//! [`Recipient`]: who gets the connections that arrive, and what it says to them.

use soccr::{Connection, Restored};

/// Who gets the connections that arrive. An error is a reason to refuse, which the source is told.
pub trait Recipient: Send {
    /// A source begins. No connection has come yet.
    ///
    /// # Errors
    /// Nothing of it is taken.
    fn expect(&mut self, announced: &Announced) -> Result<(), String> {
        let _ = announced;
        Ok(())
    }

    /// A connection is offered; nothing has been done about it. It is restored with the changes that are made here.
    ///
    /// # Errors
    /// The connection stays at the source.
    fn accept(&mut self, offer: &mut Offer<'_>) -> Result<(), String> {
        let _ = offer;
        Ok(())
    }

    /// A connection is restored, silent, and not ours yet.
    ///
    /// # Errors
    /// The connection stays at the source.
    fn inspect(&mut self, name: &str, restored: &Restored) -> Result<(), String> {
        let (_, _) = (name, restored);
        Ok(())
    }

    /// A connection is ours from here on. The source is told right after.
    fn take(&mut self, name: &str) {
        let _ = name;
    }
}

/// What a source says about what it is going to send.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Announced {
    /// How many connections will come.
    pub connections: usize,
    /// Whether it listens to answers; otherwise it may have let go of the connections already.
    pub answers: bool,
    /// Where the source is.
    pub origin: Origin,
    /// Whether it steers their packets here.
    pub steers: bool,
}

/// Where the connections of a source are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// In this network namespace: addresses in use here may be the source's.
    Here,
    /// In another network namespace of this host.
    SameHost,
    /// On another host.
    OtherHost,
    /// Unknown: the kernel of one of the two does not tell.
    Unknown,
}

impl Origin {
    /// It is known to be in another network namespace.
    pub(crate) fn is_apart(self) -> bool {
        matches!(self, Self::SameHost | Self::OtherHost)
    }
}

/// A connection that a source offers: nothing has been done about it.
#[non_exhaustive]
pub struct Offer<'a> {
    /// What people call it at the source.
    pub name: &'a str,
    /// What goes along with it, for the application.
    pub state: &'a [u8],
    /// The source wants the connection refused if the state cannot be passed on.
    pub is_state_critical: bool,
    /// The connection, under the addresses that it will have.
    pub connection: &'a mut Connection,
}

/// Leaves the state out: there may be keys in it.
impl std::fmt::Debug for Offer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offer")
            .field("name", &self.name)
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}

/// A recipient that only looks at offers.
pub(crate) struct Check<F>(pub(crate) F);

impl<F: FnMut(&Offer<'_>) -> Result<(), String> + Send> Recipient for Check<F> {
    fn accept(&mut self, offer: &mut Offer<'_>) -> Result<(), String> {
        self.0(offer)
    }
}
