//! What others have set up in this network: firewall rules and sysctls that would be in the way of a move. They are read, because
//! trying over `lo` does not meet them.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, bail};
use soccr::Flow;
use soccr::conntrack::Tracking;
use soccr::firewall::{self, Drops, Obstacle};

/// Rules of others that would drop segments with our mark.
pub(super) fn firewalls() -> Result<String> {
    let found = firewall::obstacles()?;
    let in_the_way = |obstacle: &&Obstacle| matches!(obstacle.drops, Drops::OurMark | Drops::TheRest);
    let all: Vec<_> = found.iter().filter(in_the_way).map(remedy).collect();
    if !all.is_empty() {
        bail!("{}", all.join("; "));
    }
    let passes = "none drops segments that play the peer's";
    Ok(match firewall::legacy_tables() {
        Ok(tables) if tables.is_empty() => passes.into(),
        Ok(tables) => format!("{passes}; not read: legacy iptables ({})", tables.join(", ")),
        Err(error) => format!("{passes}; not read: whether there are legacy iptables ({error})"),
    })
}

fn remedy(Obstacle { chain, drops, .. }: &Obstacle) -> String {
    let mark = if *drops == Drops::OurMark { "" } else { ", also packets with the mark 0xC114" };
    format!("{chain} drops {drops}{mark}: nft insert rule {chain} meta mark 0xc114 accept")
}

/// Firewalls that let only established connections pass: one that has moved here is new to connection tracking until it is entered.
pub(super) fn strict_firewalls(flow: Flow) -> Result<String> {
    let mut all: Vec<_> = firewall::obstacles()?
        .iter()
        .filter(|obstacle| obstacle.drops == Drops::Unknown)
        .map(|obstacle| format!("{} drops {}", obstacle.chain, obstacle.drops))
        .collect();
    if sysctl("netfilter/nf_conntrack_tcp_loose").as_deref() == Some("0") {
        all.push("nf_conntrack_tcp_loose is 0".into());
    }
    let Some(mut tracking) = Tracking::open()? else { return Ok("no connection tracking here".into()) };
    match tracking.find(flow) {
        Ok(_) if all.is_empty() => Ok("connection tracking takes established connections".into()),
        Ok(_) => Ok(format!("{}: connections are entered when they are restored", all.join("; "))),
        Err(error) => {
            Err(error).context("connection tracking takes no entries: modprobe nf_conntrack_netlink")
        }
    }
}

/// Strict `rp_filter`s: a steered packet arrives by the device that leads to the old host, and the answer may leave by another.
pub(super) fn reverse_paths() -> Result<String> {
    let devices = routed_devices();
    let filter = |name: &str| {
        sysctl(&format!("ipv4/conf/{name}/rp_filter")).and_then(|value| value.parse::<u8>().ok())
    };
    // The kernel goes by the larger of the two.
    let is_strict = |device: &&String| filter("all").max(filter(device)) == Some(1);
    let strict: Vec<_> = devices.iter().filter(is_strict).cloned().collect();
    if strict.is_empty() {
        return Ok("no device has a strict rp_filter".into());
    }
    if devices.len() == 1 {
        return Ok(format!("rp_filter is strict, and {} the only device with routes", strict[0]));
    }
    let remedy: Vec<_> = strict.iter().map(|device| format!("net.ipv4.conf.{device}.rp_filter=2")).collect();
    bail!(
        "rp_filter drops packets of connections that are steered here, if answers leave by another device: sysctl -w {}",
        remedy.join(" ")
    )
}

/// The devices that IPv4 routes lead by, in this network namespace.
fn routed_devices() -> BTreeSet<String> {
    let routes = fs::read_to_string("/proc/thread-self/net/route").unwrap_or_default();
    let device = |line: &str| line.split_whitespace().next().map(str::to_owned);
    routes.lines().skip(1).filter_map(device).filter(|device| device != "lo").collect()
}

/// A sysctl of this network namespace.
fn sysctl(name: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/sys/net/{name}")).ok().map(|value| value.trim().to_owned())
}
