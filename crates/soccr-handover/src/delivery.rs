//! How the packets of connections that arrive find them here, where their address is another host's. See [`soccr::steer`].

use std::collections::HashSet;
use std::net::IpAddr;

use soccr::steer::{Foreign, Numbers, is_foreign};

use crate::listen::Steered;

/// Arranges it, once for each address.
#[derive(Debug)]
pub(crate) struct Delivery {
    when: Steered,
    source_steers: bool,
    arranged: HashSet<IpAddr>,
}

impl Delivery {
    pub(crate) fn new(when: Steered) -> Self {
        Self { when, source_steers: false, arranged: HashSet::new() }
    }

    /// The source steers what it sends, or does not.
    pub(crate) fn source_steers(&mut self, steers: bool) {
        self.source_steers = steers;
    }

    /// Has packets for this address delivered here, where it is another host's and that is wanted. This stays.
    pub(crate) fn arrange(&mut self, address: IpAddr) -> soccr::Result<()> {
        let wanted = match self.when {
            Steered::Auto => self.source_steers,
            Steered::Always => true,
            Steered::Never => false,
        };
        if wanted && !self.arranged.contains(&address) {
            if is_foreign(address)? {
                Foreign::deliver(address, Numbers::default())?;
            }
            self.arranged.insert(address);
        }
        Ok(())
    }
}
