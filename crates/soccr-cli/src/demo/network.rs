//! The networks of the demonstration: two hosts that share an address, or three of which one has it.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use soccr::Flow;
use soccr::steer::{Foreign, NextHop, Numbers, redirect, stop};
use soccr_lab::{Host, Lab, Lan, Side};

/// Where the connection moves. Places are numbers: 0 is host A, which has it first.
#[derive(Debug)]
pub(crate) enum Network {
    /// The router sends packets for the shared address to the one host or to the other.
    Shared(Lab),
    /// Host A has the address, and steers packets to where the connection is.
    Steered(Lan),
}

impl Network {
    pub(crate) fn shared() -> Result<Self> {
        Ok(Self::Shared(Lab::new().context("the private network")?))
    }

    pub(crate) fn steered() -> Result<Self> {
        let lan = Lan::new().context("the private network")?;
        for host in &lan.hosts[1..] {
            host.run(|| Foreign::deliver(lan.hosts[0].v4.into(), Numbers::default()))?;
        }
        Ok(Self::Steered(lan))
    }

    pub(crate) fn peer(&self) -> &Host {
        match self {
            Self::Shared(lab) => &lab.peer,
            Self::Steered(lan) => &lan.peer,
        }
    }

    /// The hosts, by their places.
    pub(crate) fn hosts(&self) -> Vec<&Host> {
        match self {
            Self::Shared(lab) => vec![&lab.a, &lab.b],
            Self::Steered(lan) => lan.hosts.iter().collect(),
        }
    }

    /// The address that the peer speaks to.
    pub(crate) fn address(&self) -> Ipv4Addr {
        self.hosts()[0].v4
    }

    /// Has what the peer sends from now on arrive at this place.
    pub(crate) fn bring(&self, flow: Flow, to: usize) -> Result<()> {
        match self {
            Self::Shared(lab) => Ok(lab.steer(if to == 0 { Side::A } else { Side::B })?),
            Self::Steered(lan) => lan.hosts[0].run(|| {
                if to == 0 {
                    stop(&[flow])?;
                } else {
                    redirect(&[flow], &NextHop::new(lan.hosts[to].v4.into())?)?;
                }
                Ok(())
            }),
        }
    }
}

/// What people call a place.
pub(crate) fn name(place: usize) -> char {
    ['A', 'B', 'C'].get(place).copied().unwrap_or('?')
}
