//! [`Terms`]: what a target takes.

use std::sync::{Arc, Mutex};

use soccr::steer::Numbers;
use soccr_image::AddressMap;

use crate::notes::Notes;
use crate::recipient::{Check, Offer, Recipient};

/// What a target takes, and with which addresses.
#[derive(Clone)]
#[non_exhaustive]
pub struct Terms {
    /// An address OLD, at either end of a connection, becomes NEW.
    pub map: Vec<AddressMap>,
    /// How many connections are taken; `None` for any number.
    pub room: Option<usize>,
    /// Connections over the loopback of another network are taken, too: their peers are in this one.
    pub takes_loopback: bool,
    /// What the source sends along with a connection, for its application, is kept. Otherwise it is thrown away as it comes; an
    /// [offer](Offer::is_state_critical) tells whether the source would mind. If it does not, and hears no answers, what there is no room
    /// for is thrown away, too.
    pub takes_states: bool,
    /// When packets for addresses of other hosts are delivered here.
    pub steered: Steered,
    /// The mark, the routing table and the rules for that, if nothing delivers the address yet.
    pub numbers: Numbers,
    /// What this end has to tell people: the source passes it on, if it has said that it does.
    pub notes: Notes,
    pub(crate) recipient: Option<Arc<Mutex<dyn Recipient>>>,
    /// The caller says END.
    pub(crate) leaves_end: bool,
}

impl Default for Terms {
    /// Everything is taken, as it comes.
    fn default() -> Self {
        Self {
            map: Vec::new(),
            room: None,
            takes_loopback: false,
            takes_states: true,
            steered: Steered::default(),
            numbers: Numbers::default(),
            notes: Notes::default(),
            recipient: None,
            leaves_end: false,
        }
    }
}

/// When packets for an address that is not this host's are delivered here, to a connection that arrives with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Steered {
    /// If the source steers them, and this host reaches it: by the device that leads there.
    #[default]
    Auto,
    /// In any case.
    Always,
    /// Never: somebody else arranges it.
    Never,
}

impl Terms {
    /// Takes only what `check` accepts: any other connection stays at the source, which is told the reason. Decode the
    /// [state](Offer::state) here, to find out whether it can be understood.
    pub fn accept_if(
        self,
        check: impl FnMut(&Offer<'_>) -> std::result::Result<(), String> + Send + 'static,
    ) -> Self {
        self.for_recipient(Arc::new(Mutex::new(Check(check))))
    }

    /// Asks a recipient about each connection.
    pub fn for_recipient(mut self, recipient: Arc<Mutex<dyn Recipient>>) -> Self {
        self.recipient = Some(recipient);
        self
    }
}

impl std::fmt::Debug for Terms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Terms").field("map", &self.map).field("room", &self.room).finish_non_exhaustive()
    }
}
