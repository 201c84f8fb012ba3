//! The Internet sockets of `files.img`.

use std::net::{IpAddr, SocketAddr};

use soccr::Connection;
use soccr::connection::{Buffers, ControlBlock, Path, State};
use soccr::settings::{Settings, Value};

use super::protobuf::{Field, fields};
use super::{Stream, container};
use crate::error::{Error, Result};

/// The open flag of a descriptor that does not wait, as fcntl(2) numbers it.
const O_NONBLOCK: u32 = 0o4000;

/// The bit of `sk_shutdown` that the application has said: it reads no more.
const SHUT_READ: u32 = 1;

/// Numbers of `file_entry`.
pub(super) const FILE_INETSK: u32 = 4;
/// Numbers of `inet_sk_entry`.
pub(super) mod number {
    pub(in super::super) const STATE: u32 = 6;
    pub(in super::super) const LOCAL_PORT: u32 = 7;
    pub(in super::super) const REMOTE_PORT: u32 = 8;
    pub(in super::super) const LOCAL: u32 = 11;
    pub(in super::super) const REMOTE: u32 = 12;
}

/// What an Internet socket speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Another one, by its number (`IPPROTO_…`).
    Other(u32),
}

/// An Internet socket, as `files.img` describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// The number by which the descriptors of the dumped processes refer to it.
    pub id: u32,
    /// The socket's inode: names its `tcp-stream` image.
    pub inode: u32,
    /// What it speaks.
    pub protocol: Protocol,
    /// Its state; [`State::Listen`] for a listener.
    pub state: State,
    /// The address of our end.
    pub local: SocketAddr,
    /// The address of the peer; unspecified for a listener.
    pub remote: SocketAddr,
    /// Open flags (`O_NONBLOCK` …), as fcntl(2) numbers them.
    pub flags: u32,
    /// Length of the accept queue of a listener.
    pub backlog: u32,
    /// The interface that a link-local IPv6 address belongs to: its index is the scope of the address.
    pub interface: Option<String>,
    /// The network namespace, as CRIU numbers them.
    pub namespace: Option<u32>,
    /// The sizes of the socket buffers.
    pub buffers: Buffers,
    /// The socket options, by their kernel names.
    pub settings: Settings,
}

/// Reads the Internet sockets of a `files.img`.
///
/// # Errors
/// [`Foreign`](crate::ErrorKind::Foreign) where it is another file; a message that is malformed, or lacks what CRIU always
/// writes.
pub fn sockets(files: &[u8]) -> Result<Vec<Socket>> {
    let mut rest = container::open(files, &[container::COMMON, container::FILES], "files.img")?;
    let mut sockets = Vec::new();
    while !rest.is_empty() {
        for field in fields(container::entry(&mut rest)?) {
            let field = field?;
            if field.number == FILE_INETSK {
                sockets.push(socket(field.bytes()?)?);
            }
        }
    }
    Ok(sockets)
}

fn socket(message: &[u8]) -> Result<Socket> {
    let mut numbers = [None; 11];
    let (mut local, mut remote) = (Vec::new(), Vec::new());
    let (mut interface, mut namespace, mut shutdown) = (None, None, 0);
    let (mut opts, mut ip_opts, mut tcp_opts, mut v6only) = (&[][..], &[][..], &[][..], None);
    for field in fields(message) {
        let field = field?;
        match field.number {
            at @ 1..=10 => numbers[at as usize] = Some(field.u32()?),
            number::LOCAL => field.u32s(&mut local)?,
            number::REMOTE => field.u32s(&mut remote)?,
            14 => opts = field.bytes()?,
            15 => v6only = Some(field.flag()?),
            16 => ip_opts = field.bytes()?,
            17 => interface = Some(text(&field)?),
            18 => namespace = Some(field.u32()?),
            19 => shutdown = field.u32()?,
            20 => tcp_opts = field.bytes()?,
            _ => {}
        }
    }
    let number =
        |at: u32| numbers[at as usize].ok_or_else(|| Error::damaged(format!("a socket without field {at}")));
    let (state, id) = (number(number::STATE)?, number(1)?);
    let unknown = || Error::damaged(format!("socket {id}: state {state}"));
    let state = u8::try_from(state).ok().and_then(State::from_kernel).ok_or_else(unknown)?;
    let local = address(&local, number(number::LOCAL_PORT)?)?;
    let (buffers, mut settings) = options(local.is_ipv4(), opts, ip_opts, tcp_opts, v6only)?;
    // Behind the peer's FIN every socket has it.
    if shutdown & SHUT_READ != 0 && !state.fin_received() && state != State::Listen {
        settings.set("SHUT_RD", Value::Number(1));
    }
    Ok(Socket {
        id,
        inode: number(2)?,
        protocol: match number(5)? {
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            other => Protocol::Other(other),
        },
        state,
        local,
        remote: address(&remote, number(number::REMOTE_PORT)?)?,
        flags: number(9)?,
        backlog: number(10)?,
        interface,
        namespace,
        buffers,
        settings,
    })
}

/// An address from the words that it lies in memory as.
pub(super) fn address(words: &[u32], port: u32) -> Result<SocketAddr> {
    let port = u16::try_from(port).map_err(|_| Error::damaged(format!("port {port}")))?;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let ip = match (<[u8; 4]>::try_from(&bytes[..]), <[u8; 16]>::try_from(&bytes[..])) {
        (Ok(v4), _) => IpAddr::from(v4),
        (_, Ok(v6)) => IpAddr::from(v6),
        _ => return Err(Error::damaged(format!("an address of {} bytes", bytes.len()))),
    };
    Ok((ip, port).into())
}

fn text(field: &Field<'_>) -> Result<String> {
    let text = std::str::from_utf8(field.bytes()?).ok();
    // The name of an interface, IFNAMSIZ: shown on terminals.
    let text = text.filter(|text| text.len() < 16 && !text.chars().any(char::is_control));
    text.map(str::to_owned).ok_or_else(|| Error::damaged(format!("field {} is no name", field.number)))
}

/// Socket options under their kernel names.
///
/// CRIU writes what it has read, defaults included; so does this.
fn options(
    v4: bool,
    opts: &[u8],
    ip_opts: &[u8],
    tcp_opts: &[u8],
    v6only: Option<bool>,
) -> Result<(Buffers, Settings)> {
    let mut buffers = Buffers { send: 0, receive: 0, lock: 0 };
    let mut settings = Settings::default();
    let mut timeouts = [0u64; 4];
    for field in fields(opts) {
        let field = field?;
        let name = match field.number {
            1 => {
                buffers.send = field.u32()?;
                continue;
            }
            2 => {
                buffers.receive = field.u32()?;
                continue;
            }
            25 => {
                buffers.lock = field.u32()?;
                continue;
            }
            at @ 3..=6 => {
                timeouts[at as usize - 3] = field.u64()?;
                continue;
            }
            15 => {
                settings.set("SO_BINDTODEVICE", Value::Bytes(text(&field)?.into_bytes()));
                continue;
            }
            16 => {
                // A packet filter. The option has no such name, so that its loss is reported: how CRIU makes numbers of the
                // instructions is not documented.
                settings.set("SO_GET_FILTER", Value::Bytes(Vec::new()));
                continue;
            }
            24 => {
                // struct linger: CRIU writes the seconds, and only where it is on.
                let bytes = [1u32.to_ne_bytes(), field.u32()?.to_ne_bytes()].concat();
                settings.set("SO_LINGER", Value::Bytes(bytes));
                continue;
            }
            7 => "SO_REUSEADDR",
            8 => "SO_PRIORITY",
            9 => "SO_RCVLOWAT",
            10 => "SO_MARK",
            13 => "SO_DONTROUTE",
            17 => "SO_REUSEPORT",
            19 => "SO_KEEPALIVE",
            20 => "TCP_KEEPCNT",
            21 => "TCP_KEEPIDLE",
            22 => "TCP_KEEPINTVL",
            23 => "SO_OOBINLINE",
            _ => continue,
        };
        settings.set(name, Value::Number(field.u32()? as i32));
    }
    for (name, time) in [("SO_SNDTIMEO", &timeouts[..2]), ("SO_RCVTIMEO", &timeouts[2..])] {
        if time != [0, 0] {
            // struct timeval.
            settings.set(name, Value::Bytes([time[0].to_ne_bytes(), time[1].to_ne_bytes()].concat()));
        }
    }
    if let Some(v6only) = v6only {
        settings.set("IPV6_V6ONLY", Value::Number(v6only.into()));
    }
    for field in fields(ip_opts) {
        let field = field?;
        let name = match field.number {
            1 => "IP_FREEBIND",
            6 if v4 => "IP_TOS",
            7 if v4 => "IP_TTL",
            6 => "IPV6_TCLASS",
            7 => "IPV6_UNICAST_HOPS",
            _ => continue,
        };
        settings.set(name, Value::Number(field.u32()? as i32));
    }
    for field in fields(tcp_opts) {
        let field = field?;
        let name = match field.number {
            1 => "TCP_CORK",
            2 => "TCP_NODELAY",
            3 => "TCP_KEEPCNT",
            4 => "TCP_KEEPIDLE",
            5 => "TCP_KEEPINTVL",
            _ => continue,
        };
        settings.set(name, Value::Number(field.u32()? as i32));
    }
    Ok((buffers, settings))
}

impl Socket {
    /// Sets the scope of link-local addresses: the index that [`interface`](Self::interface) has where the connection comes
    /// back (`if_nametoindex(3)`). CRIU keeps the name only.
    pub fn set_scope(&mut self, index: u32) {
        for end in [&mut self.local, &mut self.remote] {
            if let SocketAddr::V6(end) = end
                && end.ip().is_unicast_link_local()
            {
                end.set_scope_id(index);
            }
        }
    }

    /// Joins the socket and its stream to a connection.
    ///
    /// A link-local address needs its [scope](Self::set_scope) first.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) where that is none, or contradicts itself.
    pub fn connection(&self, stream: Stream) -> Result<Connection> {
        let place = format_args!("socket {}", self.id).to_string();
        if self.protocol != Protocol::Tcp {
            return Err(Error::invalid("is no TCP socket").at(place));
        }
        let mut settings = self.settings.clone();
        for (name, value) in [("TCP_CORK", stream.cork), ("TCP_NODELAY", stream.nodelay)] {
            if let Some(value) = value {
                settings.set(name, Value::Number(value.into()));
            }
        }
        let state = match (stream.reset, stream.reset_behind_fin) {
            (false, _) => self.state,
            (true, false) => State::Established,
            (true, true) => State::CloseWait,
        };
        let connection = Connection {
            local: self.local,
            remote: self.remote,
            control: ControlBlock {
                state,
                rcv_nxt: stream.inq_seq,
                inq_len: stream.receive_queue.len() as u32,
                write_seq: stream.outq_seq,
                outq_len: stream.send_queue.len() as u32,
                unsq_len: stream.unsq_len,
                // CRIU doesn't say; but behind unsent bytes it can't have been sent.
                fin_unsent: self.state.fin_queued() && stream.unsq_len > 0,
                reset: stream.reset,
                options: stream.options,
                window: stream.window,
            },
            receive_queue: stream.receive_queue,
            send_queue: stream.send_queue,
            urgent: None,
            buffers: Some(self.buffers),
            path: (!stream.rtt.is_zero()).then(|| Path { rtt: stream.rtt, ..Path::default() }),
            settings,
            nonblocking: self.flags & O_NONBLOCK != 0,
            tracked: None,
            owner: None,
            tls: None,
        };
        connection.validate().map_err(|error| Error::invalid(error.to_string()).at(place))?;
        Ok(connection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A TCP socket without options but what is given: field 14, and field 19.
    fn message(state: State, opts: &[u8], shutdown: u8) -> Vec<u8> {
        let numbers =
            [(1, 7), (2, 9), (3, 2), (4, 1), (5, 6), (6, state as u8), (7, 80), (8, 81), (9, 2), (10, 0)];
        let mut message: Vec<u8> = numbers.iter().flat_map(|(number, value)| [number << 3, *value]).collect();
        message.extend([11 << 3, 1, 12 << 3, 2, 14 << 3 | 2, opts.len() as u8]);
        message.extend(opts);
        message.extend([0x98, 0x01, shutdown]);
        message
    }

    #[test]
    fn who_reads_no_more_is_known() {
        let noted = |state, shutdown| {
            let socket = socket(&message(state, &[], shutdown)).unwrap();
            socket.settings.get("SHUT_RD") == Some(&Value::Number(1))
        };
        for (shutdown, reads_no_more) in [(0, false), (1, true), (2, false), (3, true)] {
            assert_eq!(noted(State::Established, shutdown), reads_no_more);
            assert_eq!(noted(State::FinWait2, shutdown), reads_no_more);
            assert!(!noted(State::CloseWait, shutdown) && !noted(State::Close, shutdown));
        }
    }

    #[test]
    fn options_of_ipv6_are_known() {
        let opts = [1 << 3, 1, 6 << 3, 0x10, 7 << 3, 33];
        for (v4, names) in [
            (true, ["IP_FREEBIND", "IP_TOS", "IP_TTL"]),
            (false, ["IP_FREEBIND", "IPV6_TCLASS", "IPV6_UNICAST_HOPS"]),
        ] {
            let (_, settings) = options(v4, &[], &opts, &[], None).unwrap();
            let found = names.map(|name| settings.get(name).cloned());
            assert_eq!(found, [1, 0x10, 33].map(|value| Some(Value::Number(value))));
        }
    }

    /// As CRIU's own sources number them.
    #[test]
    fn options_of_every_socket_are_known() {
        for (number, name) in [
            (7, "SO_REUSEADDR"),
            (8, "SO_PRIORITY"),
            (9, "SO_RCVLOWAT"),
            (10, "SO_MARK"),
            (13, "SO_DONTROUTE"),
            (17, "SO_REUSEPORT"),
            (19, "SO_KEEPALIVE"),
            (20, "TCP_KEEPCNT"),
            (21, "TCP_KEEPIDLE"),
            (22, "TCP_KEEPINTVL"),
            (23, "SO_OOBINLINE"),
        ] {
            // A number of more than 15 makes a key of two bytes.
            let key =
                if number < 16 { vec![number << 3] } else { vec![number << 3 & 0x7f | 0x80, number >> 4] };
            let (_, settings) = options(true, &[key, vec![5]].concat(), &[], &[], None).unwrap();
            assert_eq!(settings.get(name), Some(&Value::Number(5)), "{name}");
        }
    }

    #[test]
    fn sockets_for_ipv6_alone_are_known() {
        for only in [0, 1] {
            let mut bytes = message(State::Established, &[], 0);
            bytes.extend([15 << 3, only]);
            let settings = socket(&bytes).unwrap().settings;
            assert_eq!(settings.get("IPV6_V6ONLY"), Some(&Value::Number(only.into())));
        }
    }

    #[test]
    fn an_interface_has_a_name_that_fits() {
        for (length, fits) in [(15, true), (16, false)] {
            let mut bytes = message(State::Established, &[], 0);
            bytes.extend([0x8a, 0x01, length]); // field 17
            bytes.extend(vec![b'a'; length.into()]);
            let interface = socket(&bytes).ok().and_then(|socket| socket.interface);
            assert_eq!(interface, fits.then(|| "a".repeat(15)));
        }
    }

    #[test]
    fn a_packet_filter_is_no_option_that_can_be_set() {
        let filter = [0x81, 0x01, 6, 0, 0, 0, 0xff, 0xff, 0, 0];
        let socket = socket(&message(State::Established, &filter, 0)).unwrap();
        let names: Vec<_> = socket.settings.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["SO_GET_FILTER"]);
    }
}
