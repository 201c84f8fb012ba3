//! What would become of a connection if it came: everything is checked, and nothing is kept.

use std::net::SocketAddr;

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use soccr::connection::State;
use soccr::{Connection, Flow, Restore};
use soccr_image::AddressMap;
use soccr_image::stream::Message;

use super::{Arrival, Arriving};
use crate::recipient::Origin;

/// Some options that the two ends may have agreed upon: any will do.
const MSS: u16 = 1460;

impl Arrival {
    /// The source has only asked.
    pub(crate) fn was_trial(&self) -> bool {
        self.was_trial
    }

    pub(super) fn try_out(&mut self, id: u32, name: String, flow: Flow) {
        self.was_trial = true;
        let mut connection = Connection::empty();
        (connection.local, connection.remote) = (flow.local, flow.remote);
        connection.control.state = State::Established;
        connection.control.options.mss_clamp = MSS;
        AddressMap::apply_to_connection(&self.terms.map, &mut connection);
        let mut arriving = Arriving { id, name, state: Vec::new(), is_critical: false, connection };
        let shared = std::sync::Arc::clone(&self.shared);
        let is_free = shared.with_diag(|diag| self.are_free(diag, std::iter::once(&arriving.connection)));
        let accepted = is_free.into_iter().try_for_each(|is_free| self.accept(&mut arriving, is_free));
        let is_accepted = accepted.is_ok();
        let outcome = accepted.and_then(|()| {
            // The old socket keeps its addresses in this network.
            match self.origin {
                Origin::Here => has_address(arriving.connection.local),
                _ => has_place(&arriving.connection),
            }
        });
        match (is_accepted, &outcome) {
            (true, Ok(())) => self.tried += 1,
            (true, Err(_)) => self.make_room(),
            (false, _) => {}
        }
        self.say(&match outcome {
            Ok(()) => Message::Ready { connection: id },
            Err(reason) => Message::Refused { connection: id, reason },
        });
    }
}

fn has_address(local: SocketAddr) -> Result<(), String> {
    let failed = |errno: rustix::io::Errno| format!("bind to {}: {errno}", local.ip());
    let family = if local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(failed)?;
    let mut any_port = local;
    any_port.set_port(0);
    bind(&socket, &any_port).map_err(failed)
}

/// Makes a socket for it, in repair mode: it says nothing, connection tracking hears nothing of it, and it is closed in silence.
fn has_place(connection: &Connection) -> Result<(), String> {
    let family = if connection.local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let socket = socket.map_err(|errno| format!("socket: {errno}"))?;
    let connected = Restore::unbound(&socket, &connection.control, None)
        .and_then(|steps| steps.occupy(connection.flow()));
    connected.map_err(|error| error.to_string())
}
