//! The connections that are silent together: locked, led away, unlocked.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use soccr::Flow;

use super::{Departure, Item};
use crate::error::Result;
use crate::mover::Event as Told;
use crate::protocol::{Fate, Id};

/// How long the peers of a window may take to acknowledge what the kernel has encrypted (kTLS).
const SETTLING: Duration = Duration::from_millis(500);

impl Departure {
    /// Stops the users of the sockets, and silences the connections of a window: all in one transaction or, if one of them makes that
    /// fail, each by itself.
    pub(super) fn lock(&mut self, first: Id, last: Id) -> Result<()> {
        (self.is_diverted, self.window) = (false, first as usize - 1..last as usize);
        let items = &mut self.items[self.window.clone()];
        if let Some(users) = &mut self.users
            && items.iter().any(|item| item.seat.has_kernel_tls().unwrap_or(true))
        {
            users.stop()?;
        }
        let settled = Instant::now() + SETTLING;
        for item in &mut *items {
            item.error = item.seat.settle(settled.saturating_duration_since(Instant::now())).err();
        }
        let flows: Vec<Flow> = items.iter().map(|item| item.seat.flow()).collect();
        match self.shared.locker.lock(&flows) {
            Ok(lock) => self.locks.push(lock),
            Err(_) => {
                for item in items {
                    match self.shared.locker.lock(&[item.seat.flow()]) {
                        Ok(lock) => self.locks.push(lock),
                        Err(error) => item.error = Some(error.into()),
                    }
                }
            }
        }
        self.users.as_mut().map_or(Ok(()), |users| users.stop())
    }

    /// Before the first connection of a window leaves: steers or drops the packets of all that leave, and takes over what the lock held.
    pub(super) fn divert(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.has_begun, true) {
            self.shared.tell(Told::Leaving);
        }
        let leaving = self.machine.leaving().map(|id| {
            let item = &self.items[id as usize - 1];
            (item.seat.flow(), item.seat.connection().map_or(0, |saved| saved.control.rcv_nxt))
        });
        let leaving: Vec<(Flow, u32)> = leaving.collect();
        self.is_diverted = true;
        self.guide.begin(&leaving, &self.shared)?;
        // From here on no steered packet arrives here.
        let mut taken = HashMap::new();
        for lock in &self.locks {
            match lock.take() {
                Ok(held) => taken.extend(held.into_iter().map(|held| (held.flow, held.packets))),
                // The peers send the held packets again.
                Err(error) => self.shared.warn(error),
            }
        }
        for item in &mut self.items[self.window.clone()] {
            item.held.packets.extend(taken.remove(&item.seat.flow()).unwrap_or_default());
        }
        Ok(())
    }

    /// Ends the silence of a window: each of its connections has arrived, or stays.
    pub(super) fn unlock(&mut self, first: Id, last: Id) {
        let window = first as usize - 1..last as usize;
        for id in first..=last {
            if self.machine.fate(id) == Some(Fate::Stays)
                && let Err(error) = self.item(id).seat.come_back()
            {
                self.lose(id as usize - 1, error);
            }
        }
        let staying: Vec<&Item> = (first..=last)
            .zip(&self.items[window])
            .filter(|(id, item)| self.machine.fate(*id) == Some(Fate::Stays) && !item.is_lost)
            .map(|(_, item)| item)
            .collect();
        let flows: Vec<Flow> = staying.iter().map(|item| item.seat.flow()).collect();
        if self.is_diverted {
            self.guide.end(&flows, &self.shared);
        }
        if self.is_diverted {
            let is_settled = |id: Id, item: &Item| match self.machine.fate(id) {
                Some(Fate::Moved) => true,
                fate => fate == Some(Fate::Stays) && !item.is_lost,
            };
            let all = (first..=last).zip(&self.items[first as usize - 1..]);
            let open = all.filter(|(id, item)| !is_settled(*id, item));
            let open: Vec<Flow> = open.map(|(_, item)| item.seat.flow()).collect();
            self.guide.forget(&open, &self.shared);
        }
        let replay = || staying.iter().for_each(|item| drop(item.held.replay(&item.seat)));
        replay();
        match self.is_one_way {
            true => self.kept.append(&mut self.locks),
            // Packets held since then are delivered to connections that have a socket here, or at the target in this network. The rest are
            // thrown away: they would draw resets.
            false => self.locks.clear(),
        }
        // The lock has dropped the answers until now. Sending them twice does no harm.
        replay();
        if let Some(Err(error)) = self.users.as_mut().map(|users| users.go_on()) {
            self.shared.warn(error);
        }
        for id in first..=last {
            if self.machine.fate(id).is_some() {
                let item = self.item(id);
                item.seat.give_up();
                item.held.packets = Vec::new();
                if !self.is_one_way {
                    self.tell(id);
                }
            }
        }
    }
}
