//! Places connections that arrive: restored and silent under a lock, or in memory until the old socket is out of the way.

use std::collections::HashMap;
use std::sync::Arc;

use soccr::diag::Diag;
use soccr::lock::Held;
use soccr::{Connection, Flow, Lock, Restored};

use super::{Arrival, Arriving, Batch, Place, WAITING, WAITING_BYTES, Waiting, bytes_of_packets};
use crate::mover::{Event as Told, in_use};
use crate::protocol::{Id, News};
use crate::recipient::{Offer, Origin};

impl Arrival {
    /// Locks and restores what has arrived.
    pub(super) fn place(&mut self) {
        (self.patience, self.arriving_bytes) = (None, 0);
        if !self.arriving.is_empty() {
            let shared = Arc::clone(&self.shared);
            shared.with_diag(|diag| self.place_with(diag));
        }
        self.delivery.review();
    }

    /// `None`: nobody can say what is in use here. The restore will tell.
    fn place_with(&mut self, diag: &mut Option<Diag>) {
        let mut batch = Vec::new();
        let mut crowd = (self.waiting.len(), self.waiting_bytes);
        let (is_heard, mut left_out) = (self.is_heard(), 0);
        let arriving = std::mem::take(&mut self.arriving);
        let free = self.are_free(diag, arriving.iter().map(|arriving| &arriving.connection));
        for (mut arriving, is_free) in arriving.into_iter().zip(free) {
            let mut state_bytes = self.state_bytes;
            if crowd.1 + state_bytes > WAITING_BYTES && !is_heard && !arriving.is_critical {
                // Nobody would take the connection back: better without its state than not at all.
                left_out += usize::from(!std::mem::take(&mut arriving.state).is_empty());
                state_bytes = 0;
            }
            let accepted = match crowd.0 >= WAITING || crowd.1 + state_bytes > WAITING_BYTES {
                true => Err("more has come than there is room for".into()),
                false => self.accept(&mut arriving, is_free),
            };
            match accepted {
                Ok(()) => {
                    crowd = (crowd.0 + 1, crowd.1 + arriving.connection.queued() + arriving.state.len());
                    batch.push(arriving);
                }
                Err(reason) => self.placed(arriving.id, Err(reason)),
            }
        }
        if left_out > 0 {
            self.shared.warn(format_args!(
                "there is no room for more states: {left_out} of the connections come without theirs"
            ));
        }
        if batch.is_empty() {
            return;
        }
        match self.shared.locker.lock_arriving(batch.iter().map(|arriving| &arriving.connection)) {
            Ok(lock) => self.place_locked(batch, lock),
            // One connection cannot be locked, and fails the transaction for all.
            Err(_) => {
                for arriving in batch {
                    match self.shared.locker.lock_arriving([&arriving.connection]) {
                        Ok(lock) => self.place_locked(vec![arriving], lock),
                        Err(error) => {
                            self.make_room();
                            self.placed(arriving.id, Err(error.to_string()));
                        }
                    }
                }
            }
        }
    }

    /// For each of these connections, whether it is free to come: one of somebody else is neither locked nor replaced. Its addresses
    /// on the wire are locked as well, and only the source says which they are.
    pub(super) fn are_free<'a>(
        &self,
        diag: &mut Option<Diag>,
        connections: impl Iterator<Item = &'a Connection>,
    ) -> Vec<std::result::Result<(), String>> {
        let flows: Vec<Vec<Flow>> = connections.map(|connection| connection.flows().collect()).collect();
        if self.origin == Origin::Here {
            return vec![Ok(()); flows.len()];
        }
        let mut in_use = in_use(diag, &flows.concat()).map(Vec::into_iter).map_err(|error| error.to_string());
        let is_free = |flows: Vec<Flow>| match &mut in_use {
            // Takes out all that are its own.
            Ok(in_use) => match in_use.by_ref().take(flows.len()).fold(false, |any, in_use| any | in_use) {
                true => Err("this connection is in use here, and not by the source".into()),
                false => Ok(()),
            },
            Err(error) => Err(format!("nobody can say whether this connection is in use here: {error}")),
        };
        flows.into_iter().map(is_free).collect()
    }

    /// Whether the application wants the connection, and this host has room for it.
    pub(super) fn accept(
        &mut self,
        arriving: &mut Arriving,
        is_free: std::result::Result<(), String>,
    ) -> std::result::Result<(), String> {
        let Arriving { name, state, is_critical, connection, .. } = arriving;
        connection.validate().map_err(|error| error.to_string())?;
        if self.terms.room == Some(0) {
            return Err("there is no room for more connections".into());
        }
        let flow = connection.flow();
        let is_loopback = [flow.local, flow.remote].iter().any(|end| end.ip().to_canonical().is_loopback());
        if self.origin.is_apart() && is_loopback && !self.terms.takes_loopback {
            return Err("its peer is where it comes from: take it over there, or map its addresses".into());
        }
        is_free?;
        let mut offer = Offer { name, state, is_state_critical: *is_critical, connection };
        self.ask(|recipient| recipient.accept(&mut offer)).unwrap_or(Ok(()))?;
        self.delivery.arrange(&mut self.shared.steerer(), &flow).map_err(|error| error.to_string())?;
        self.terms.room = self.terms.room.map(|room| room - 1);
        Ok(())
    }

    /// Notes that an announced connection does not come.
    pub(super) fn make_room(&mut self) {
        self.terms.room = self.terms.room.map(|room| room + 1);
    }

    fn place_locked(&mut self, batch: Vec<Arriving>, lock: Lock) {
        let number = self.next_batch;
        self.next_batch += 1;
        let (size, taken) = (batch.len(), Vec::new());
        // In the network of the source the old sockets are in the way.
        let (behind, free) =
            if self.origin == Origin::Here { (batch, Vec::new()) } else { (Vec::new(), batch) };
        // They may have left this host not long ago, and be silent or steered still. From here on our own lock keeps them silent.
        let flows: Vec<Flow> = free.iter().flat_map(|arriving| arriving.connection.flows()).collect();
        let ended = self.shared.end_silence(&flows);
        // Where it fails, it may have ended for some.
        let silent = ended.as_ref().map_or_else(|_| flows.clone(), Vec::clone);
        let ready = ended.and_then(|_| self.shared.homecoming().expect(&flows));
        self.batches.insert(number, Batch { lock, expected: flows, silent, size, undecided: size, taken });
        if let Err(error) = ready {
            // These would stay silent here, or steered away.
            for Arriving { id, .. } in free {
                self.make_room();
                self.placed(id, Err(error.to_string()));
                self.decided(number);
            }
            return;
        }
        for Arriving { id, name, state, connection, .. } in behind {
            let flows: Vec<Flow> = connection.flows().collect();
            let bytes = connection.queued() + state.len();
            let place = Place::Behind(Box::new(connection));
            self.wait(id, Waiting { name, state, batch: number, place, held: held(flows[0]), flows, bytes });
        }
        let mut outcomes = Vec::with_capacity(free.len());
        let keyed = free.into_iter().map(|Arriving { id, name, state, connection, .. }| {
            let flows: Vec<Flow> = connection.flows().collect();
            let bytes = connection.queued() + state.len();
            ((id, name, state, flows, bytes), connection)
        });
        self.shared.kit.restore(keyed, |key, outcome| outcomes.push((key, outcome)));
        for ((id, name, state, flows, bytes), outcome) in outcomes {
            match self.inspect(&name, outcome) {
                Ok(restored) => {
                    let place = Place::Restored(restored);
                    self.wait(
                        id,
                        Waiting { name, state, batch: number, place, held: held(flows[0]), flows, bytes },
                    );
                }
                Err(reason) => {
                    self.make_room();
                    self.placed(id, Err(reason));
                    self.decided(number);
                }
            }
        }
    }

    fn inspect(&self, name: &str, outcome: soccr::Result<Restored>) -> std::result::Result<Restored, String> {
        let restored = outcome.map_err(|error| error.to_string())?;
        self.shared.tell(Told::Restored { name, report: restored.report() });
        self.ask(|recipient| recipient.inspect(name, &restored)).unwrap_or(Ok(()))?;
        Ok(restored)
    }

    /// Notes that the connection is in place, and waits for the source to decide.
    fn wait(&mut self, id: Id, waiting: Waiting) {
        self.waiting_bytes += waiting.bytes;
        self.waiting.insert(id, waiting);
        self.placed(id, Ok(()));
    }

    pub(super) fn placed(&mut self, id: Id, outcome: std::result::Result<(), String>) {
        if let Err(reason) = &outcome {
            self.refusals.insert(id, reason.clone());
            self.delivery.doubt();
        }
        self.handle(News::Placed(id, outcome.is_ok()));
    }

    /// Restores what has been waiting for the COMMIT. A source that listens takes back what cannot be restored.
    pub(super) fn raise(&mut self) {
        self.patience = None;
        let committed = std::mem::take(&mut self.committed);
        let mut keyed = Vec::with_capacity(committed.len());
        let mut others = HashMap::new();
        for id in committed {
            let Some(mut waiting) = self.remove(id) else { continue };
            let Place::Behind(connection) = waiting.place else { continue };
            waiting.place = Place::Behind(Box::new(Connection::empty()));
            waiting.bytes = 0;
            keyed.push((id, *connection));
            others.insert(id, waiting);
        }
        let flows: Vec<Flow> = keyed.iter().flat_map(|(_, connection)| connection.flows()).collect();
        let mut outcomes = Vec::with_capacity(keyed.len());
        self.shared.kit.restore(keyed, |id, outcome| outcomes.push((id, outcome)));
        // A source on this host is silent about what has left it, since a moment ago if it does not hear us. That lock does not stop the
        // segments that a restore plays to its socket.
        let silent = self.shared.end_silence(&flows).map_err(|error| error.to_string());
        let is_heard = self.is_heard();
        if let (Err(error), false) = (&silent, is_heard) {
            // Nobody would take them back.
            self.shared.warn(error);
        }
        for (id, outcome) in outcomes {
            let mut waiting = others.remove(&id).expect("each comes back once");
            let inspected = self.inspect(&waiting.name, outcome);
            match inspected.and_then(|restored| match &silent {
                Err(error) if is_heard => Err(error.clone()),
                _ => Ok(restored),
            }) {
                Ok(restored) => {
                    waiting.place = Place::Restored(restored);
                    self.waiting.insert(id, waiting);
                    self.take(id);
                }
                Err(reason) => {
                    if !is_heard {
                        self.lost.insert(id);
                    }
                    self.held_bytes -= bytes_of_packets(&waiting.held);
                    self.make_room();
                    self.refusals.insert(id, reason);
                    self.handle(News::Taken(id, false));
                    self.decided(waiting.batch);
                }
            }
        }
    }
}

fn held(flow: Flow) -> Held {
    Held { flow, packets: Vec::new() }
}
