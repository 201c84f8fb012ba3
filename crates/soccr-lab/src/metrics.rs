//! TCP metrics of routes, also such that a busy machine causes no retransmission.

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

/// A metric of a route by its number (`RTAX_…`, linux/rtnetlink.h), and its value.
pub type Metric<'a> = (u16, &'a [u8]);

impl Namespace {
    /// From now on TCP waits for a minute at least before it repeats a segment, on the routes that there are: `rto_min` of
    /// `ip-route(8)`.
    ///
    /// # Errors
    /// The errors of `rtnetlink(7)` and of writing to `/proc/sys`.
    pub fn be_patient(&self) -> io::Result<()> {
        let minute = 60_000u32.to_ne_bytes(); // milliseconds
        self.set_metrics(&[(RTAX_LOCK, &(1u32 << RTAX_RTO_MIN).to_ne_bytes()), (RTAX_RTO_MIN, &minute)])?;
        self.run(|| {
            // For connections of the host with itself, where the kernel can (Linux 6.11).
            let _ = sysctl("net/ipv4/tcp_rto_min_us", "60000000");
            sysctl("net/ipv4/tcp_early_retrans", "0")
        })
    }

    /// Gives all routes of the main table these metrics, and no others.
    ///
    /// # Errors
    /// The errors of `rtnetlink(7)`.
    pub fn set_metrics(&self, metrics: &[Metric<'_>]) -> io::Result<()> {
        self.run(|| {
            let mut socket = Socket::open(Family::Route)?;
            let mut list = Batch::new();
            list.message(RTM_GETROUTE, REQUEST | DUMP, |message| message.bytes(&[0; ROUTE_HEADER]));
            let mut batch = Batch::new();
            socket.dump(&list, |_, route| set_metrics_of(&mut batch, route, metrics))?;
            if batch.as_bytes().is_empty() { Ok(()) } else { socket.transact(&batch) }
        })
    }
}

fn set_metrics_of(batch: &mut Batch, route: &[u8], metrics: &[Metric<'_>]) {
    let Some((header, rest)) = route.split_at_checked(ROUTE_HEADER) else { return };
    if header[4] != RT_TABLE_MAIN || header[7] != RTN_UNICAST {
        return;
    }
    batch.message(RTM_NEWROUTE, REQUEST | ACK | CREATE | REPLACE, |message| {
        message.bytes(header);
        attributes(rest)
            .filter(|(kind, _)| RTA_KEPT.contains(kind))
            .for_each(|(kind, value)| message.attribute(kind, value));
        message.nested(RTA_METRICS, |nested| {
            metrics.iter().for_each(|(number, value)| nested.attribute(*number, value));
        });
    });
}
