//! Delivers the packets of connections that arrive with another host's address. See [`soccr::steer`].

use std::collections::HashMap;
use std::net::IpAddr;

use soccr::Flow;
use soccr::connection::State;
use soccr::diag::Diag;
use soccr::steer::{Foreign, NextHop, Numbers, Steerer, Tunnel, is_foreign};
use soccr_image::stream;

use crate::error::{Error, ErrorKind, Result};
use crate::terms::Steered;

/// Arranges delivery, once for each address.
#[derive(Debug)]
pub(crate) struct Delivery {
    when: Steered,
    numbers: Numbers,
    /// How the source steers, if it does.
    path: Option<stream::Steered>,
    /// The source, as this host reaches it: for IPv4, and for IPv6.
    hops: [Option<NextHop>; 2],
    /// `None` for an address: this host has it, or the terms ask for no delivery.
    arranged: HashMap<IpAddr, Option<Foreign>>,
    /// What this hand-over has made: it is removed if no connection arrives.
    tunnel: Option<Tunnel>,
    made: Vec<IpAddr>,
    /// What was delivered before, and answers through the source since.
    redirected: Vec<IpAddr>,
    /// A connection for which something may have been made does not come.
    is_doubtful: bool,
}

impl Delivery {
    pub(crate) fn new(when: Steered, numbers: Numbers) -> Self {
        let (arranged, made, redirected) = (HashMap::new(), Vec::new(), Vec::new());
        Self {
            when,
            numbers,
            path: None,
            hops: [None, None],
            arranged,
            tunnel: None,
            made,
            redirected,
            is_doubtful: false,
        }
    }

    /// The source steers what it sends: makes this end of the tunnel, and looks for the source. What takes time happens here, when
    /// nothing is silent yet.
    pub(crate) fn prepare(&mut self, path: stream::Steered) -> soccr::Result<()> {
        if self.when != Steered::Never {
            if let Some(tunnel) = path.tunnel.map(|tunnel| tunnel.reversed()) {
                self.tunnel = tunnel.open()?.then_some(tunnel);
                self.hops = [Some(tunnel.other_end(false)?), tunnel.other_end(true).ok()];
            }
            for address in &path.from {
                // By what no way leads to, nothing is delivered: see `arrange`.
                let hop = NextHop::new(*address);
                self.hops[usize::from(address.is_ipv6())] = if path.answers { Some(hop?) } else { hop.ok() };
            }
        }
        self.path = Some(path);
        Ok(())
    }

    /// Has packets for the local address delivered here, if it is another host's and the terms ask for it. The delivery stays.
    pub(crate) fn arrange(&mut self, steerer: &mut Steerer, flow: &Flow) -> Result<()> {
        let wanted = match self.when {
            Steered::Auto => self.path.is_some(),
            Steered::Always => true,
            Steered::Never => false,
        };
        if !wanted {
            return Ok(());
        }
        let flow = flow.on_the_wire();
        let address = flow.local.ip();
        let foreign = match self.arranged.get(&address) {
            Some(foreign) => *foreign,
            None => {
                let mut foreign = None;
                if is_foreign(address)? {
                    let there = Foreign::list()?.into_iter().find(|foreign| foreign.address() == address);
                    if there.is_none() && self.when == Steered::Auto && self.hop(address).is_none() {
                        let what = format!(
                            "packets for {address} would come from a host that is not known here: steer them by an \
                             address of the same family, or take them from anywhere (`soccr receive --steered=always`)"
                        );
                        return Err(Error::new(ErrorKind::Refused, what));
                    }
                    match &there {
                        None => self.made.push(address),
                        Some(there) => self.agree(there)?,
                    }
                    let numbers = there.map_or(self.numbers, |foreign| foreign.numbers());
                    foreign = Some(self.deliver(steerer, address, numbers)?);
                }
                *self.arranged.entry(address).or_insert(foreign)
            }
        };
        match (foreign, self.hop(address)) {
            (Some(foreign), Some(hop)) => Ok(foreign.check_arrival(flow.remote.ip(), hop.device())?),
            _ => Ok(()),
        }
    }

    /// All connections with an address answer one way: those that are here must not lose theirs.
    fn agree(&mut self, there: &Foreign) -> Result<()> {
        let address = there.address();
        let (now, wanted) = (there.answers()?, self.answers_by(address));
        if now.as_ref() == wanted {
            return Ok(());
        }
        if has_connection(address) {
            let how = |hop: Option<&NextHop>| match hop {
                Some(hop) => format!("through {} dev {}", hop.address(), hop.device()),
                None => "directly".to_owned(),
            };
            let remedy = match (&now, wanted) {
                (None, _) => "hand it over without `--return-via-source`",
                (Some(_), None) => "hand it over with `--return-via-source`, too",
                (Some(_), Some(_)) => "hand it over from that host",
            };
            let what = format!(
                "connections that are here with the address {address} answer {}, and this one would answer {}: {remedy}, \
                 or move those first",
                how(now.as_ref()),
                how(wanted)
            );
            return Err(Error::new(ErrorKind::Refused, what));
        }
        let is_redirected = wanted.is_some();
        // No connection needs the old way.
        if now.is_some() {
            there.answer_directly()?;
        }
        if is_redirected {
            self.redirected.push(address);
        }
        Ok(())
    }

    fn deliver(&self, steerer: &mut Steerer, address: IpAddr, numbers: Numbers) -> soccr::Result<Foreign> {
        let hop = self.hop(address);
        let made = steerer.deliver(address, numbers, hop)?;
        if let Some(hop) = self.answers_by(address) {
            made.answer_through(hop)?;
        }
        Ok(made)
    }

    /// A connection does not come: what was made may have been for that alone.
    pub(crate) fn doubt(&mut self) {
        self.is_doubtful = true;
    }

    /// Removes what was made for addresses that no connection here has, if there may be such. No connection is being placed.
    pub(crate) fn review(&mut self) {
        if !std::mem::take(&mut self.is_doubtful) || (self.made.is_empty() && self.redirected.is_empty()) {
            return;
        }
        for foreign in Foreign::list().unwrap_or_default() {
            let address = foreign.address();
            let undo = match (self.made.contains(&address), self.redirected.contains(&address)) {
                (true, _) => Foreign::remove,
                (false, true) => Foreign::answer_directly,
                (false, false) => continue,
            };
            if has_socket(address) || undo(&foreign).is_err() {
                continue;
            }
            if has_socket(address) {
                // Another hand-over uses it by now.
                let _ = Steerer::new()
                    .and_then(|mut steerer| self.deliver(&mut steerer, address, foreign.numbers()));
                continue;
            }
            self.made.retain(|made| *made != address);
            self.redirected.retain(|redirected| *redirected != address);
            self.arranged.remove(&address);
        }
    }

    /// Through which host connections with this address answer.
    fn answers_by(&self, address: IpAddr) -> Option<&NextHop> {
        self.hop(address).filter(|_| self.path.as_ref().is_some_and(|path| path.answers))
    }

    fn hop(&self, address: IpAddr) -> Option<&NextHop> {
        self.hops[usize::from(address.is_ipv6())].as_ref()
    }
}

impl Drop for Delivery {
    /// Removes what was made, if nothing has arrived.
    fn drop(&mut self) {
        self.doubt();
        self.review();
        if let Some(tunnel) = self.tunnel {
            let _ = tunnel.remove_unused();
        }
    }
}

/// Whether a socket here has this address. If the kernel does not tell, one may have it.
fn has_socket(address: IpAddr) -> bool {
    has(address, |_| true)
}

/// The same, of a connection that has still something to say.
fn has_connection(address: IpAddr) -> bool {
    has(address, |state| state != State::TimeWait)
}

fn has(address: IpAddr, counts: impl Fn(State) -> bool) -> bool {
    let mut found = false;
    let visited = Diag::open().and_then(|mut diag| {
        diag.visit(|socket| {
            found |= counts(socket.state) && socket.local.ip().to_canonical() == address;
        })
    });
    found || visited.is_err()
}
