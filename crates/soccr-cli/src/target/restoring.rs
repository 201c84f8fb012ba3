//! What a target restores: before the COMMIT, or behind it where the old socket is in the way.

use std::time::Instant;

use anyhow::{Result, anyhow};
use soccr::bulk;
use soccr::connection::State;
use soccr::diag::Diag;
use soccr::lock::Held;
use soccr::{Connection, Flow, Lock, Restored};
use soccr_image::AddressMap;
use soccr_image::stream::Message;

use super::{Arriving, Batch, Committed, Place, Target, WAITING, WAITING_BYTES, Waiting};
use crate::{exit, silence};

impl Target<'_> {
    /// Restores what has arrived.
    pub(super) fn restore(&mut self) -> Result<()> {
        let waiting: usize = self.waiting.values().map(|waiting| waiting.bytes).sum();
        let waiting = waiting + std::mem::take(&mut self.arriving_bytes);
        let arriving = std::mem::take(&mut self.arriving);
        let crowd = self.waiting.len() + arriving.len() > WAITING || waiting > WAITING_BYTES;
        let mut batch = Vec::new();
        // Where that cannot be found out, the restore tells.
        let mut diag = Diag::open().ok();
        for mut arriving in arriving {
            AddressMap::apply_to_connection(self.terms.maps, &mut arriving.connection);
            let flow = arriving.connection.flow();
            let refused = if self.room == 0 {
                Err(anyhow!("--stdio takes one connection"))
            } else if crowd {
                Err(anyhow!("more connections wait for the source than there is room for"))
            } else if self.apart && !self.terms.is_here && is_loopback(flow) {
                Err(anyhow!(
                    "its peer is where it comes from: name that network namespace by --netns, or use --map"
                ))
            } else if let Err(error) = self.reports.distrust(&mut arriving.connection) {
                Err(error)
            } else {
                arriving.behind = diag.as_mut().is_some_and(|diag| is_in_use(diag, flow));
                match arriving.behind && !self.beside {
                    true => Err(anyhow!("this connection is in use here, and not by the source")),
                    false => self.recipient.check(&arriving.connection),
                }
            };
            let refused = refused.and_then(|()| self.delivery.arrange(flow.local.ip().to_canonical()));
            match refused {
                Err(error) => self.refuse(arriving.id, &error.context(arriving.name)),
                Ok(()) => {
                    self.room -= 1;
                    batch.push(arriving);
                }
            }
        }
        let flows: Vec<Flow> = batch.iter().map(|arriving| arriving.connection.flow()).collect();
        match self.locker.lock(&flows) {
            _ if batch.is_empty() => Ok(()),
            Ok(lock) => self.restore_locked(batch, lock),
            // One of them is in the way of all.
            Err(_) => batch.into_iter().try_for_each(|arriving| {
                match self.locker.lock(&[arriving.connection.flow()]) {
                    Ok(lock) => self.restore_locked(vec![arriving], lock)?,
                    Err(error) => self.give_up(arriving.id, &arriving.name, error.into()),
                }
                Ok(())
            }),
        }
    }

    fn restore_locked(&mut self, batch: Vec<Arriving>, lock: Lock) -> Result<()> {
        let number = self.batches.last_key_value().map_or(0, |(last, _)| last + 1);
        self.batches.insert(number, Batch { lock, undecided: batch.len(), taken: Vec::new() });
        let (behind, free): (Vec<_>, Vec<_>) = batch.into_iter().partition(|arriving| arriving.behind);
        // They have left this host, not long ago maybe. Our own lock keeps them silent from here on.
        let flows: Vec<Flow> = free.iter().map(|arriving| arriving.connection.flow()).collect();
        lift(&flows);
        self.delivery.expect(&flows)?;
        for Arriving { id, name, connection, .. } in behind {
            match connection.validate() {
                Ok(()) => {
                    let flow = connection.flow();
                    let bytes = queued(&connection);
                    self.ready(id, name, number, (flow, bytes), Place::Behind(Box::new(connection)));
                }
                Err(error) => self.give_up_of(number, id, &name, error.into()),
            }
        }
        let mut outcomes = Vec::with_capacity(free.len());
        let keyed = free.into_iter().map(|Arriving { id, name, connection, .. }| {
            let what = (connection.flow(), queued(&connection));
            ((id, name, what), connection)
        });
        bulk::restore(keyed, |key, outcome| outcomes.push((key, outcome)));
        for ((id, name, what), outcome) in outcomes {
            match self.check(&name, outcome) {
                Ok(restored) => self.ready(id, name, number, what, Place::Restored(restored)),
                Err(error) => self.give_up_of(number, id, &name, error),
            }
        }
        Ok(())
    }

    fn check(&mut self, name: &str, outcome: soccr::Result<Restored>) -> Result<Restored> {
        let restored = outcome?;
        self.reports.add(name, &restored)?;
        Ok(restored)
    }

    fn ready(&mut self, id: u32, name: String, batch: usize, (flow, bytes): (Flow, usize), place: Place) {
        let (held, since) = (Held { flow, packets: Vec::new() }, Instant::now());
        self.waiting.insert(id, Waiting { name, batch, since, bytes, place, held });
        self.answer(&Message::Ready { connection: id });
    }

    /// Restores what has been waiting for the COMMIT. A source that listens takes back what cannot be restored.
    pub(super) fn restore_committed(&mut self) {
        if self.committed.is_empty() {
            return;
        }
        let committed = std::mem::take(&mut self.committed);
        let flows: Vec<Flow> = committed.iter().map(|committed| committed.held.flow).collect();
        // The source has begun to stay silent about what leaves it.
        lift(&flows);
        let mut outcomes = Vec::with_capacity(committed.len());
        let keyed = committed
            .into_iter()
            .map(|Committed { id, name, batch, connection, held }| ((id, name, batch, held), connection));
        bulk::restore(keyed, |key, outcome| outcomes.push((key, outcome)));
        for ((id, name, batch, held), outcome) in outcomes {
            match self.check(&name, outcome) {
                Ok(restored) => self.take(id, batch, restored, held),
                Err(error) if self.answers.is_none() => {
                    self.lost += 1;
                    exit::complain(&format!("connection {id}: lost: {}", exit::line(&error)));
                    self.decided(batch);
                }
                Err(error) => self.give_up_of(batch, id, &name, error),
            }
        }
    }
}

/// Ends the silence about connections that are back.
fn lift(flows: &[Flow]) {
    if let Err(error) = silence::lift(flows) {
        exit::complain(&exit::line(&error));
    }
}

pub(super) fn queued(connection: &Connection) -> usize {
    connection.receive_queue.len() + connection.send_queue.len()
}

fn is_loopback(flow: Flow) -> bool {
    [flow.local, flow.remote].iter().any(|end| end.ip().to_canonical().is_loopback())
}

/// A socket of this network namespace has the connection.
fn is_in_use(diag: &mut Diag, flow: Flow) -> bool {
    let state = diag.find(flow.local, flow.remote, |socket| socket.state);
    state.is_ok_and(|state| state.is_some_and(|state| state != State::TimeWait))
}
