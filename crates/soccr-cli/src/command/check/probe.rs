//! What is tried, and how.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::sockopt::set_socket_linger;
use rustix::process::{Resource, getrlimit};
use soccr::adopt::Adopter;
use soccr::connection::State;
use soccr::lock::{Locker, Mode};
use soccr::tls::{Cipher, Secrets, Tls, Version};
use soccr::{Connection, Flow, Restored, pause};

use super::{Finding, surroundings};
use crate::exit;

/// How long to wait for what a loopback connection usually does at once.
const LIMIT: Duration = Duration::from_secs(2);

/// Fewer descriptors do not suffice for many connections: each takes two.
const DESCRIPTORS: u64 = 4096;

/// Everything, in the network namespace of the caller.
pub(super) fn all() -> Vec<Finding> {
    let lo = ends().map(drop).map_err(|error| exit::line(&error));
    // Without `lo` each of these would wait for the same failure.
    let over_lo = |probe: fn() -> Result<String>| match &lo {
        Ok(()) => probe(),
        Err(why) => bail!("{why}"),
    };
    vec![
        finding("connections over lo", true, over_lo(|| Ok(String::new()))),
        finding("pause and save", true, over_lo(save)),
        finding("lock (drop)", true, over_lo(|| lock(Mode::Drop))),
        finding("lock (hold)", true, over_lo(|| lock(Mode::HOLD))),
        finding("move", true, over_lo(|| moved(false))),
        finding("move half-closed ones", false, over_lo(|| moved(true))),
        finding("restore cwnd and ECN", false, over_lo(congestion)),
        finding("adopt (servers as they are)", false, adopt()),
        finding("kernel TLS", false, over_lo(tls)),
        finding("other users' processes", false, processes()),
        finding("other namespaces", false, capability(21, "CAP_SYS_ADMIN", String::new())),
        finding("large queues", false, capability(12, "CAP_NET_ADMIN", buffers())),
        finding("firewalls of others", false, surroundings::firewalls()),
        finding("strict firewalls", false, over_lo(strict)),
        finding("steered packets", false, surroundings::reverse_paths()),
        finding("missing addresses", false, over_lo(missing)),
        finding("many connections", false, descriptors()),
    ]
}

fn finding(name: &str, essential: bool, outcome: Result<String>) -> Finding {
    let (works, detail) = match outcome {
        Ok(detail) => (true, detail),
        Err(error) => (false, exit::line(&error)),
    };
    Finding { name: name.into(), essential, works, detail }
}

/// Two ends of a connection over the loopback device.
fn ends() -> Result<(TcpStream, TcpStream)> {
    let connect = || {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let peer = TcpStream::connect_timeout(&listener.local_addr()?, LIMIT)?;
        let (ours, _) = listener.accept()?;
        for stream in [&peer, &ours] {
            stream.set_read_timeout(Some(LIMIT))?;
            // They end by a reset: otherwise each would stay in TIME_WAIT for a minute.
            set_socket_linger(stream, Some(Duration::ZERO))?;
        }
        std::io::Result::Ok((ours, peer))
    };
    connect()
        .context("127.0.0.1: bring `lo` up: ip link set lo up; a firewall must let pass what comes by it")
}

fn save() -> Result<String> {
    let (ours, mut peer) = ends()?;
    peer.write_all(b"unread")?;
    wait(|| Ok(rustix::io::ioctl_fionread(&ours)? == 6))?;
    let paused = pause(&ours)?;
    let saved = paused.save()?;
    paused.resume()?;
    ensure!(saved.receive_queue == b"unread", "other bytes were saved than had arrived");
    Ok("TCP_REPAIR, with unread bytes".into())
}

fn lock(mode: Mode) -> Result<String> {
    let (ours, _peer) = ends()?;
    let lock = Locker::new(mode)?.lock(&[Flow::of(&ours)?])?;
    lock.release()?;
    Ok(if mode == Mode::Drop { "nftables" } else { "nftables and NFLOG" }.into())
}

/// A connection leaves its socket for another one while its peer goes on.
fn moved(half_closed: bool) -> Result<String> {
    let (ours, mut peer) = ends()?;
    if half_closed {
        peer.shutdown(Shutdown::Write)?;
        wait(|| Ok((&ours).read(&mut [0])? == 0))?;
    }
    let locker = Locker::new(Mode::HOLD)?;
    let lock = locker.lock(&[Flow::of(&ours)?])?;
    let (_, restored) = again(&ours)?;
    lock.release_into(&[&restored])?;
    let mut stream = restored.resume()?;
    stream.write_all(b"there")?;
    let mut heard = [0; 5];
    peer.read_exact(&mut heard).context("the peer hears nothing after the move")?;
    ensure!(&heard == b"there", "the peer hears other bytes after the move");
    Ok(if half_closed { "segments that play the peer's arrive" } else { "the peer goes on" }.into())
}

fn again(ours: &TcpStream) -> Result<(Connection, Restored)> {
    let paused = pause(ours)?;
    let mut saved = paused.save()?;
    if let Some(path) = &mut saved.path {
        path.snd_cwnd = CWND;
    }
    paused.detach()?;
    let restored = saved.restore()?;
    Ok((saved, restored))
}

/// A congestion window that no connection over `lo` begins with.
const CWND: u32 = 77;

fn congestion() -> Result<String> {
    let (ours, _peer) = ends()?;
    let locker = Locker::new(Mode::Drop)?;
    let _lock = locker.lock(&[Flow::of(&ours)?])?;
    let (saved, restored) = again(&ours)?;
    ensure!(saved.control.state == State::Established, "the connection has ended");
    let entry = restored.report().get("snd_cwnd").context("nothing is known of it")?;
    match entry.values() {
        Some([_, after]) if after == u64::from(CWND) => Ok("by a BPF congestion control".into()),
        _ => bail!("{}", entry.reason()),
    }
}

fn adopt() -> Result<String> {
    Adopter::new()?;
    Ok("bpf_sk_assign_tcp_reqsk".into())
}

fn tls() -> Result<String> {
    let (ours, _peer) = ends()?;
    let mut tls = Tls::new(Version::Tls13, Cipher::AesGcm128);
    tls.transmit = Some(Secrets::new(tls.cipher, &vec![0; tls.cipher.secrets_len()])?);
    tls.start(&ours)?;
    Ok("the kernel encrypts".into())
}

/// A capability of this process (`capabilities(7)`), and what matters beside it.
fn capability(number: u32, name: &str, beside: String) -> Result<String> {
    let status = fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let bits = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).context("CapEff")?;
    let in_initial = fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| map.contains("4294967295"));
    let what = if beside.is_empty() { name.to_owned() } else { format!("{name}; {beside}") };
    match bits >> number & 1 {
        1 if in_initial => Ok(what),
        1 => bail!("{what}: only in a user namespace; run as root outside of it"),
        _ => bail!("needs {what}: run as root"),
    }
}

fn processes() -> Result<String> {
    let yama = match fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope") {
        Ok(scope) if scope.trim() == "3" => {
            bail!("kernel.yama.ptrace_scope is 3: nobody may, not even root (set it to 2 and reboot)")
        }
        Ok(scope) => format!("kernel.yama.ptrace_scope is {}", scope.trim()),
        Err(_) => String::new(),
    };
    capability(19, "CAP_SYS_PTRACE", yama)
}

fn buffers() -> String {
    let limit = |name: &str| fs::read_to_string(format!("/proc/sys/net/core/{name}")).unwrap_or_default();
    format!("without it {} bytes to send, {} to read", double(&limit("wmem_max")), double(&limit("rmem_max")))
}

fn double(limit: &str) -> u64 {
    limit.trim().parse::<u64>().map_or(0, |bytes| 2 * bytes)
}

fn strict() -> Result<String> {
    let (ours, _peer) = ends()?;
    surroundings::strict_firewalls(Flow::of(&ours)?)
}

/// A connection whose address is not here is refused, also where `ip_nonlocal_bind` lets `bind` take it.
fn missing() -> Result<String> {
    let (ours, _peer) = ends()?;
    let paused = pause(&ours)?;
    let mut saved = paused.save()?;
    paused.resume()?;
    // Reserved, and a discard address (RFC 6666): nobody has them.
    let all: [(IpAddr, IpAddr); 2] = [
        ([240, 0, 0, 1].into(), Ipv4Addr::LOCALHOST.into()),
        ("100::1".parse()?, Ipv6Addr::LOCALHOST.into()),
    ];
    for (local, remote) in all {
        (saved.local, saved.remote) = ((local, 1).into(), (remote, 1).into());
        match saved.restore() {
            Err(error) if matches!(error.errno(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT)) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => bail!("{local} counts as an address of this host: see `ip route show table local`"),
        }
    }
    Ok("a connection is refused where its address is missing".into())
}

fn descriptors() -> Result<String> {
    let limit = getrlimit(Resource::Nofile).maximum;
    match limit {
        Some(limit) if limit < DESCRIPTORS => bail!("{limit} descriptors: raise RLIMIT_NOFILE (ulimit -Hn)"),
        Some(limit) => Ok(format!("{limit} descriptors, two for each connection")),
        None => Ok("any number of descriptors".into()),
    }
}

fn wait(condition: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !condition()? {
        ensure!(Instant::now() < deadline, "what was sent over `lo` did not arrive: a firewall drops it");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
