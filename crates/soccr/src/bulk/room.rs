//! Whether a host has room for connections, before the first of them is taken from where it is.
//!
//! # References
//! `getrlimit(2)`; `ip_local_port_range`, `tcp_mem` and `nf_conntrack_max` in the kernel's
//! `Documentation/networking/ip-sysctl.rst` and `nf_conntrack-sysctl.rst`.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::net::SocketAddr;

use rustix::process::{Resource, getrlimit};

use crate::connection::Flow;
use crate::error::{Error, Result};

/// Where the kernel tells and is told.
const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const TCP_MEMORY: &str = "/proc/sys/net/ipv4/tcp_mem";
const TRACKED: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
const MOST_TRACKED: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
/// Not `/proc/net`, which is that of the first thread.
const SOCKETS: &str = "/proc/thread-self/net/sockstat";
const DESCRIPTORS: &str = "/proc/self/fd";

/// What the target host must have for the connections: descriptors, memory, conntrack entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// How many connections there are, which is how many descriptors and conntrack entries they take.
    pub connections: usize,
    /// Bytes in their queues altogether, for which the kernel needs memory.
    pub queue_bytes: u64,
    /// The ports of their own that they use towards one peer's address and port: the largest number of any. The host's
    /// own new connections to that peer need others of the ephemeral ports; before Linux 6.3, those to all peers.
    pub ports: usize,
}

impl Needs {
    /// The needs of these connections, without their queues.
    pub fn of(flows: &[Flow]) -> Self {
        let range = numbers(PORT_RANGE);
        let ephemeral = |port: u16| match range[..] {
            [first, last, ..] => (first..=last).contains(&port.into()),
            _ => false,
        };
        let mut ports: HashMap<SocketAddr, usize> = HashMap::new();
        for flow in flows.iter().filter(|flow| ephemeral(flow.local.port())) {
            *ports.entry(flow.remote).or_default() += 1;
        }
        let ports = ports.into_values().max().unwrap_or_default();
        Self { connections: flows.len(), queue_bytes: 0, ports }
    }

    /// Checks that this process and the network namespace of the calling thread have room. Where the kernel does not
    /// say how much there is, there is enough.
    ///
    /// # Errors
    /// Refused: the first thing that is short, how much of it is left, and how to get more.
    pub fn check(&self) -> Result<()> {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let wanted = self.connections as u64;
        enough("descriptors", wanted, open_descriptors(), limit, "raise RLIMIT_NOFILE (`ulimit -n`)")?;
        if let [most, ..] = numbers(MOST_TRACKED)[..] {
            let tracked = numbers(TRACKED).first().copied().unwrap_or_default();
            let remedy = "raise net.netfilter.nf_conntrack_max";
            enough("entries of the connection tracking", wanted, tracked, most, remedy)?;
        }
        if self.queue_bytes > 0
            && let [.., most] = numbers(TCP_MEMORY)[..]
        {
            let pages = self.queue_bytes.div_ceil(rustix::param::page_size() as u64);
            enough("pages of TCP memory", pages, pages_in_use(), most, "raise net.ipv4.tcp_mem")?;
        }
        if self.ports > 0
            && let [first, last, ..] = numbers(PORT_RANGE)[..]
        {
            // One must be left for the host itself.
            let (wanted, remedy) = (self.ports as u64 + 1, "widen net.ipv4.ip_local_port_range");
            enough("ephemeral ports towards one peer", wanted, 0, (last + 1).saturating_sub(first), remedy)?;
        }
        Ok(())
    }
}

fn enough(what: &str, wanted: u64, used: u64, limit: u64, remedy: &'static str) -> Result<()> {
    if wanted == 0 || used.saturating_add(wanted) <= limit {
        return Ok(());
    }
    let left = limit.saturating_sub(used);
    Err(Error::refused(format!("{wanted} {what}: {left} of {limit} are left"), remedy).at("check"))
}

/// How many descriptors this process has: the size of their directory (Linux 6.2), or what is in it.
fn open_descriptors() -> u64 {
    match fs::metadata(DESCRIPTORS) {
        Ok(directory) if directory.len() > 0 => directory.len(),
        _ => listed(fs::read_dir(DESCRIPTORS)),
    }
}

/// How many entries a directory has. One that no descriptor is left to open has as many as can be.
fn listed(directory: io::Result<fs::ReadDir>) -> u64 {
    match directory {
        Ok(entries) => entries.count() as u64,
        Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => u64::MAX,
        Err(_) => 0,
    }
}

/// The numbers in a file of `/proc/sys`; none where it is not there.
fn numbers(path: &str) -> Vec<u64> {
    let mut text = [0; 128];
    // Such a file is read at once.
    let length = fs::File::open(path).and_then(|mut file| file.read(&mut text)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[..length]);
    text.split_whitespace().map_while(|word| word.parse().ok()).collect()
}

/// What all TCP sockets use now: `TCP: inuse 5 orphan 0 tw 0 alloc 6 mem 3`.
fn pages_in_use() -> u64 {
    let text = fs::read_to_string(SOCKETS).unwrap_or_default();
    let tcp = text.lines().find_map(|line| line.strip_prefix("TCP:"));
    let mut words = tcp.unwrap_or_default().split_whitespace();
    words.find(|word| *word == "mem").and_then(|_| words.next()?.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_short_is_named_with_its_remedy() {
        let none = Needs::default();
        none.check().unwrap();
        let descriptors = Needs { connections: usize::MAX / 2, ..none }.check().unwrap_err();
        assert!(descriptors.to_string().contains("RLIMIT_NOFILE"), "{descriptors}");
        let memory = Needs { queue_bytes: u64::MAX, ..none }.check().unwrap_err();
        assert!(memory.to_string().contains("tcp_mem"), "{memory}");
        let ports = Needs { ports: 1 << 16, ..none }.check().unwrap_err();
        assert!(ports.to_string().contains("ip_local_port_range"), "{ports}");
    }

    #[test]
    fn descriptors_are_counted() {
        // Other tests open and close some meanwhile.
        let open: Vec<_> = (0..1000).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let (counted, listed) = (open_descriptors(), fs::read_dir(DESCRIPTORS).unwrap().count() as u64);
        assert!(counted.abs_diff(listed) < 500 && counted >= open.len() as u64, "{counted}, {listed}");
    }

    #[test]
    fn where_no_descriptor_is_left_to_count_them_none_is_free() {
        assert_eq!(listed(Err(io::Error::from_raw_os_error(libc::EMFILE))), u64::MAX);
        // Without /proc nobody says how many there are.
        assert_eq!(listed(Err(io::ErrorKind::NotFound.into())), 0);
    }

    #[test]
    fn ports_are_counted_by_peer() {
        let range = numbers(PORT_RANGE);
        let flow = |port: u64, peer: &str| Flow {
            local: ([192, 0, 2, 1], port as u16).into(),
            remote: peer.parse().unwrap(),
        };
        let flows = [
            flow(range[0], "192.0.2.9:1"),
            flow(range[0] + 1, "192.0.2.9:1"),
            flow(range[0], "192.0.2.9:2"),
            // A server's port is not ephemeral.
            flow(80, "192.0.2.9:1"),
        ];
        assert_eq!(Needs::of(&flows), Needs { connections: 4, queue_bytes: 0, ports: 2 });
    }

    #[test]
    fn the_kernel_tells_what_is_used() {
        assert!(numbers(TCP_MEMORY).len() == 3);
        assert!(fs::read_to_string(SOCKETS).unwrap().contains("TCP:"));
    }
}
