//! The port of a client: `connect(2)` shares it with connections to other peers, `bind(2)` does not. A host with thousands of
//! restored clients would have no ports left for new ones. So `connect` chooses it here too, from a range of one (Linux 6.3).

use std::fs;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::bind::{bind_alone, bind_freely, connect};
use crate::connection::Flow;
use crate::error::{Error, Result};
use crate::sys::namespace::{self, Recently};
use crate::sys::sockopt;

/// Binds and connects; `between` the two, options can be set. See [`bind_freely`].
pub(super) fn bind_and_connect(
    fd: BorrowedFd<'_>,
    flow: Flow,
    free: bool,
    between: impl FnOnce(),
) -> Result<()> {
    let Some(range) = RangeOfOne::begin(fd, flow.local.port()) else {
        bind_freely(fd, flow.local, free)?;
        between();
        return connect(fd, flow);
    };
    let outcome = range.connect(flow, free, between);
    outcome.and(range.end())
}

/// The only port that `connect` may choose for a socket, until the [end](Self::end).
struct RangeOfOne<'fd> {
    fd: BorrowedFd<'fd>,
    before: [i32; 2],
}

// linux/in.h
const IP_LOCAL_PORT_RANGE: i32 = 51;
const OPTIONS: [(i32, &str); 2] = [
    (libc::IP_BIND_ADDRESS_NO_PORT, "IP_BIND_ADDRESS_NO_PORT"),
    (IP_LOCAL_PORT_RANGE, "IP_LOCAL_PORT_RANGE"),
];

impl<'fd> RangeOfOne<'fd> {
    /// `None` where the port is not one that `connect` chooses, or this kernel cannot.
    fn begin(fd: BorrowedFd<'fd>, port: u16) -> Option<Self> {
        if !is_ephemeral(fd, port) {
            return None;
        }
        let get = |(option, _)| sockopt::get(fd, libc::IPPROTO_IP, option).ok();
        let range = Self { fd, before: [get(OPTIONS[0])?, get(OPTIONS[1])?] };
        match range.set([1, (u32::from(port) << 16 | u32::from(port)) as i32]) {
            Ok(()) => Some(range),
            // What has been set is overwritten by what was there.
            Err(_) => range.end().ok().and(None),
        }
    }

    fn connect(&self, flow: Flow, free: bool, between: impl FnOnce()) -> Result<()> {
        let mut address = flow.local;
        address.set_port(0);
        bind_freely(self.fd, address, free)?;
        between();
        match connect(self.fd, flow) {
            // Somebody has bound the port, a listener perhaps: then it is shared by nobody.
            Err(error) if error.errno() == Some(libc::EADDRNOTAVAIL) => {
                bind_alone(self.fd, flow.local, free)?;
                connect(self.fd, flow)
            }
            outcome => outcome,
        }
    }

    /// Gives the socket its own options back.
    fn end(&self) -> Result<()> {
        self.set(self.before)
    }

    /// Sets both, also where the first cannot be set.
    fn set(&self, [no_port, range]: [i32; 2]) -> Result<()> {
        let set = |(option, name): (i32, &'static str), value: i32| {
            let set = sockopt::set(self.fd, libc::IPPROTO_IP, option, &value);
            set.map_err(|error| Error::system(name, error))
        };
        let outcome = set(OPTIONS[0], no_port);
        outcome.and(set(OPTIONS[1], range))
    }
}

/// Whether `connect` may choose this port in the network namespace of a socket.
fn is_ephemeral(fd: BorrowedFd<'_>, port: u16) -> bool {
    static RANGE: Recently<[u16; 2]> = Recently::within(Duration::from_secs(1));
    /// The kernel takes nothing lower for the range by default, and servers have most of what is below.
    const FIRST: u16 = 1024;
    if port < FIRST {
        return false;
    }
    let read = || {
        let text = namespace::run_beside(fd, || fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range"));
        let text = text.ok()?;
        let mut numbers = text.split_whitespace().map_while(|number| number.parse().ok());
        let range = [numbers.next()?, numbers.next()?];
        RANGE.note_at(fd, range);
        Some(range)
    };
    RANGE.at(fd).or_else(read).is_some_and(|[first, last]| (first..=last).contains(&port))
}
