//! How the packets of connections that have arrived find them here, where their address is another host's, or where they come
//! home. See [`soccr::steer`].

use std::collections::HashSet;
use std::net::IpAddr;

use anyhow::{Context, Result};
use soccr::Flow;
use soccr::steer::{Foreign, Homecoming, Numbers, is_foreign};

use crate::exit;

/// When packets for an address that is not this host's are delivered.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Steered {
    /// Where the source steers them (`soccr send --steer`)
    Auto,
    /// Wherever they come from
    Always,
    /// Not by this command
    Never,
}

/// Arranges it, once for each address.
#[derive(Debug)]
pub(crate) struct Delivery {
    when: Steered,
    /// The source has said so.
    source_steers: bool,
    arranged: HashSet<IpAddr>,
    homecoming: Homecoming,
}

impl Delivery {
    /// To be made before the locks: see [`Homecoming`].
    pub(crate) fn new(when: Steered) -> Result<Self> {
        Ok(Self { when, source_steers: false, arranged: HashSet::new(), homecoming: Homecoming::new()? })
    }

    /// The source steers what it sends, or does not.
    pub(crate) fn source_steers(&mut self, steers: bool) {
        self.source_steers = steers;
    }

    /// Has packets for this address delivered here, where it is another host's and that is wanted. This stays.
    pub(crate) fn arrange(&mut self, address: IpAddr) -> Result<()> {
        let wanted = match self.when {
            Steered::Auto => self.source_steers,
            Steered::Always => true,
            Steered::Never => false,
        };
        if wanted && !self.arranged.contains(&address) {
            if is_foreign(address)? {
                Foreign::deliver(address, Numbers::default()).context("--steered")?;
            }
            self.arranged.insert(address);
        }
        Ok(())
    }

    /// These connections are restored here. If this host steers them, their packets stay here for the time being.
    pub(crate) fn expect(&mut self, flows: &[Flow]) -> Result<()> {
        Ok(self.homecoming.expect(flows)?)
    }

    /// Of these connections some have arrived; the others stay where they are.
    pub(crate) fn settle(&mut self, all: &[Flow], arrived: &[Flow]) {
        let settled = self.homecoming.arrived(arrived).and_then(|()| self.homecoming.stay_away(all));
        if let Err(error) = settled {
            exit::complain(&error.to_string());
        }
    }
}
