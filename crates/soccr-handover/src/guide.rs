//! What becomes of packets for connections that have left this host: they are steered to where those are, or dropped.

use std::time::Duration;

use soccr::Flow;
use soccr::steer::{self, NextHop};

use crate::error::Result;
use crate::mover::Shared;
use crate::silence;

/// What this host does about connections that leave it: it steers their packets, or else is silent about them.
#[derive(Debug)]
pub(crate) struct Guide {
    hops: Vec<NextHop>,
    silence: Duration,
}

impl Guide {
    pub(crate) fn new(hops: Vec<NextHop>, silence: Duration) -> Self {
        Self { hops, silence }
    }

    /// Takes care of connections that are about to leave.
    pub(crate) fn begin(&self, flows: &[Flow]) -> Result<()> {
        match self.hops.is_empty() {
            true => Ok(silence::begin(flows, self.silence)?),
            false => redirect(flows, &self.hops),
        }
    }

    /// These have not left after all.
    pub(crate) fn end(&self, flows: &[Flow], shared: &Shared) {
        if self.hops.is_empty() {
            shared.end_silence(flows);
        } else if let Err(error) = steer::stop(flows) {
            shared.warn(error);
        }
    }
}

/// Steers connections, each to the next hop of its address family.
///
/// # Errors
/// Those of [`steer::redirect`].
pub fn redirect(flows: &[Flow], hops: &[NextHop]) -> Result<()> {
    for hop in hops {
        let is_ipv4 = hop.address().is_ipv4();
        let flows: Vec<Flow> = flows.iter().filter(|flow| flow.is_ipv4() == is_ipv4).copied().collect();
        if !flows.is_empty() {
            steer::redirect(&flows, hop)?;
        }
    }
    Ok(())
}
