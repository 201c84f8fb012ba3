//! Hosts that retransmit only after a minute, so that a busy machine causes no retransmission.

use std::io;

use soccr_netlink::{ACK, Batch, CREATE, DUMP, Family, REQUEST, Socket, attributes};

use crate::{Namespace, sysctl};

const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const REPLACE: u16 = 0x100;
const ROUTE_HEADER: usize = 12;
const RT_TABLE_MAIN: u8 = 254;
const RTN_UNICAST: u8 = 1;
/// Destination, link, gateway, priority and source: what makes the route.
const RTA_KEPT: [u16; 5] = [1, 4, 5, 6, 7];
const RTA_METRICS: u16 = 8;
const RTAX_LOCK: u16 = 1;
const RTAX_RTO_MIN: u16 = 13;

impl Namespace {
    /// From now on TCP waits for a minute at least before it repeats a segment, on the routes that there are: `rto_min` of
    /// `ip-route(8)`.
    ///
    /// # Errors
    /// The errors of `rtnetlink(7)` and of writing to `/proc/sys`.
    pub fn be_patient(&self) -> io::Result<()> {
        self.run(|| {
            let mut socket = Socket::open(Family::Route)?;
            let mut list = Batch::new();
            list.message(RTM_GETROUTE, REQUEST | DUMP, |message| message.bytes(&[0; ROUTE_HEADER]));
            let mut batch = Batch::new();
            socket.dump(&list, |_, route| be_patient_on(&mut batch, route))?;
            if !batch.as_bytes().is_empty() {
                socket.transact(&batch)?;
            }
            // For connections of the host with itself, where the kernel can (Linux 6.11).
            let _ = sysctl("net/ipv4/tcp_rto_min_us", "60000000");
            sysctl("net/ipv4/tcp_early_retrans", "0")
        })
    }
}

fn be_patient_on(batch: &mut Batch, route: &[u8]) {
    let Some((header, rest)) = route.split_at_checked(ROUTE_HEADER) else { return };
    if header[4] != RT_TABLE_MAIN || header[7] != RTN_UNICAST {
        return;
    }
    batch.message(RTM_NEWROUTE, REQUEST | ACK | CREATE | REPLACE, |message| {
        message.bytes(header);
        attributes(rest)
            .filter(|(kind, _)| RTA_KEPT.contains(kind))
            .for_each(|(kind, value)| message.attribute(kind, value));
        message.nested(RTA_METRICS, |metrics| {
            metrics.u32(RTAX_LOCK, 1 << RTAX_RTO_MIN);
            metrics.u32(RTAX_RTO_MIN, 60_000); // milliseconds
        });
    });
}
