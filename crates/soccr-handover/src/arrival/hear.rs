//! What the source says.

use soccr::bulk::Needs;
use soccr_image::AddressMap;
use soccr_image::stream::{Message, Steered, Writer};

use super::{Arrival, Arriving, HELD_BYTES, PACKET, violation};
use crate::drive::Outbox;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::Event;
use crate::protocol::News;
use crate::recipient::{Announced, Origin};

impl Arrival {
    pub(super) fn hear(&mut self, message: Message) {
        if let (Some((id, ..)), false) = (&self.state, matches!(message, Message::Connection { .. })) {
            return self.give_up(violation(format!("the state of connection {id} is not before it")));
        }
        match message {
            Message::Begin { connections, answers, notes, place, steered } => {
                // A second one makes nothing.
                self.handle(News::Begin(connections));
                if self.error.is_some() {
                    return;
                }
                self.origin = match (place, self.shared.place) {
                    (Some(there), Some(here)) if there == here => Origin::Here,
                    (Some(there), Some(here)) if there.host == here.host => Origin::SameHost,
                    (Some(_), Some(_)) => Origin::OtherHost,
                    _ => Origin::Unknown,
                };
                let steers = steered.is_some();
                let prepared = self.prepare_delivery(steered);
                if let Err(error) =
                    prepared.and_then(|()| self.prepare(connections as usize, answers, steers))
                {
                    return self.give_up(error);
                }
                if answers {
                    // The first word says that everything is prepared.
                    self.writer = Some(Writer::new(Outbox::default()).expect("memory takes every byte"));
                    // Nobody learns it here: whoever knows it can have connections locked that are in use.
                    if let (Origin::Here, Some(place)) = (self.origin, self.shared.place) {
                        self.say(&Message::Here { place });
                    }
                    if notes {
                        self.terms.notes.open();
                    }
                }
            }
            Message::State { connection, bytes, critical } => {
                let bytes = if self.terms.takes_states { bytes } else { Vec::new() };
                self.state = Some((connection, bytes, critical));
            }
            Message::Connection { id, name, mut connection } => {
                let (state, is_critical) = match self.state.take() {
                    Some((of, ..)) if of != id => {
                        return self.give_up(violation("a state is not before its connection"));
                    }
                    state => state.map(|(_, state, critical)| (state, critical)).unwrap_or_default(),
                };
                AddressMap::apply_to_connection(&self.terms.map, &mut connection);
                self.handle(News::Offer(id));
                // Not if its state was damaged. A number that was used before refers to the earlier connection.
                if self.machine.places(id) {
                    self.arriving_bytes += connection.queued() + state.len();
                    self.arriving.push(Arriving { id, name, state, is_critical, connection });
                }
            }
            Message::Held { connection, mut packets } => {
                let Some(waiting) = self.waiting.get_mut(&connection) else { return };
                packets.retain(|packet| {
                    let bytes = packet.len() + PACKET;
                    let keeps = self.held_bytes + bytes <= HELD_BYTES;
                    self.held_bytes += if keeps { bytes } else { 0 };
                    keeps
                });
                waiting.held.packets.extend(packets);
            }
            Message::Commit { connection } => {
                if let Some(reason) = self.unheard_refusals.remove(&connection) {
                    self.shared.tell(Event::Lost { number: connection, reason: &reason });
                }
                self.handle(News::Commit(connection));
            }
            Message::Trial { connection, name, flow } => self.try_out(connection, name, flow),
            Message::Abort { connection, .. } => self.handle(News::Abort(connection)),
            _ => self.give_up(violation("the source does not know its part")),
        }
    }

    /// How packets come here, where the source steers them.
    fn prepare_delivery(&mut self, steered: Option<Steered>) -> Result<()> {
        match steered {
            Some(_) if self.origin == Origin::Here => {
                let why = "packets are to follow the connections to another host, and this is the same one";
                Err(Error::new(ErrorKind::Refused, why))
            }
            Some(path) => Ok(self.delivery.prepare(path)?),
            None => Ok(()),
        }
    }

    /// Does what takes time, and refuses what can already be refused.
    fn prepare(&mut self, connections: usize, answers: bool, steers: bool) -> Result<()> {
        Needs { connections, ..Needs::default() }.check()?;
        let announced = Announced { connections, answers, origin: self.origin, steers };
        let expected = self.ask(|recipient| recipient.expect(&announced));
        expected.unwrap_or(Ok(())).map_err(|reason| Error::new(ErrorKind::Refused, reason))
    }
}
