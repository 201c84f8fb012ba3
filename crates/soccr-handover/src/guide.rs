//! What happens to packets for connections that have left this host: they are steered to the new host, or dropped.

use soccr::Flow;
use soccr::diag::Diag;
use soccr::steer::{NextHop, Tunnel, narrow};
use soccr_image::stream::{Place, Steered};

use crate::error::{Error, ErrorKind, Result};
use crate::mover::{Event, Shared, in_use};

/// How packets follow connections to another host, see [`soccr::steer`].
#[derive(Clone, Debug, Default)]
pub struct Path {
    hops: Vec<NextHop>,
    tunnel: Option<Tunnel>,
    answers: bool,
}

impl Path {
    /// Has the other host answer through this one, in case the network between that host and the peers drops foreign source
    /// addresses.
    pub fn with_answers(self) -> Self {
        Self { answers: true, ..self }
    }

    /// What the target has to know; nothing if packets are not steered.
    pub(crate) fn told(&self) -> Option<Steered> {
        let Self { hops, tunnel, answers } = self;
        let from = hops.iter().filter_map(|hop| hop.sees().ok().flatten()).collect();
        (!hops.is_empty() || tunnel.is_some()).then_some(Steered { from, tunnel: *tunnel, answers: *answers })
    }

    /// Where connections of an address family go.
    fn hop(&self, ipv6: bool) -> soccr::Result<Option<NextHop>> {
        match &self.tunnel {
            Some(tunnel) => tunnel.other_end(ipv6).map(Some),
            None => Ok(self.hops.iter().find(|hop| hop.address().is_ipv6() == ipv6).cloned()),
        }
    }
}

impl From<Vec<NextHop>> for Path {
    /// To these next hops on networks that both hosts share, one for each address family. A connection of a
    /// family without one stays, and so do those that would leave together with it.
    fn from(hops: Vec<NextHop>) -> Self {
        Self { hops, ..Self::default() }
    }
}

impl From<Tunnel> for Path {
    /// Through a tunnel, of which this end is [open](Tunnel::open). The target makes the other one.
    fn from(tunnel: Tunnel) -> Self {
        Self { tunnel: Some(tunnel), ..Self::default() }
    }
}

/// What this host does with packets of connections that leave it: steers them, or drops them.
#[derive(Debug)]
pub(crate) struct Guide {
    path: Path,
    is_steering: bool,
    /// The target is in this network: it has the connection before our lock ends, and no packet is misled.
    is_beside: bool,
    /// Packets of some connections have been dropped.
    is_silent: bool,
}

impl Guide {
    pub(crate) fn new(path: Path) -> Self {
        let is_steering = path.tunnel.is_some() || !path.hops.is_empty();
        Self { path, is_steering, is_beside: false, is_silent: false }
    }

    /// Where the target is: known before anything leaves, if at all.
    pub(crate) fn target_is_at(&mut self, place: Place, shared: &Shared) {
        self.is_beside = shared.place == Some(place);
    }

    /// Prepares for connections that are about to leave. With each comes the next sequence number that is expected from its peer.
    pub(crate) fn begin(&mut self, leaving: &[(Flow, u32)], shared: &Shared) -> Result<()> {
        let of = |ipv6: bool| leaving.iter().filter(move |(flow, _)| flow.is_ipv4() != ipv6);
        if !self.is_steering {
            if self.is_beside {
                return Ok(());
            }
            let flows: Vec<Flow> = leaving.iter().map(|(flow, _)| *flow).collect();
            self.is_silent = true;
            shared.silencer().begin(&flows, shared.limits.silence)?;
            if !shared.limits.silence.is_zero() {
                shared.tell(Event::Silent(shared.limits.silence));
            }
            return Ok(());
        }
        for ipv6 in [false, true] {
            let flows: Vec<Flow> = of(ipv6).map(|(flow, _)| *flow).collect();
            if flows.is_empty() {
                continue;
            }
            let Some(hop) = self.path.hop(ipv6)? else {
                // Its packets would neither follow it nor be dropped here: this host would reset it.
                let family = if ipv6 { "IPv6" } else { "IPv4" };
                let what = format!("no next hop for {family}: name one more");
                return Err(Error::new(ErrorKind::System, what));
            };
            let answers = self.path.answers;
            let mut steerer = shared.steerer();
            steerer.redirect(&flows, &hop)?;
            if answers {
                steerer.redirect_answers(&flows, &hop)?;
            }
            drop(steerer);
            if let Some(tunnel) = &self.path.tunnel {
                let mtu = tunnel.mtu()?;
                let told = of(ipv6).map(|(flow, rcv_nxt)| narrow(flow, *rcv_nxt, mtu));
                // A peer that cannot be told to send less has its packets fragmented.
                if let Some(error) = told.filter_map(|told| told.err()).next() {
                    shared.warn(error);
                }
            }
        }
        Ok(())
    }

    /// Nobody can say whether these connections have arrived. This host stays silent about them in any case.
    pub(crate) fn forget(&mut self, flows: &[Flow], shared: &Shared) {
        if self.is_steering || !self.is_beside || flows.is_empty() {
            return;
        }
        self.is_silent = true;
        if let Err(error) = shared.silencer().begin(flows, shared.limits.silence) {
            return shared.warn(error);
        }
        // A connection that arrives here from now on ends the silence itself.
        let mut diag = Diag::open().ok();
        let here = in_use(&mut diag, flows).map(|in_use| {
            flows.iter().zip(in_use).filter_map(|(flow, here)| here.then_some(*flow)).collect::<Vec<_>>()
        });
        shared.warn_of(here.and_then(|here| shared.end_silence(&here)).map(drop));
    }

    /// Undoes it for connections that have not left after all.
    pub(crate) fn end(&self, flows: &[Flow], shared: &Shared) {
        if !self.is_steering {
            if self.is_silent {
                shared.warn_of(shared.end_silence(flows).map(drop));
            }
        } else {
            shared.warn_of(shared.steerer().stop(flows).map(drop));
        }
    }
}
