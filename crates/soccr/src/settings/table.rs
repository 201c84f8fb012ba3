//! The table: one row for each socket option that travels.
//!
//! Not in it, for they are more than options: the sizes of the buffers
//! ([`Buffers`](crate::connection::Buffers)), `TCP_MAXSEG` (`Options::mss_clamp`; what an application asked for
//! cannot be read from a connected socket), and everything that `TCP_REPAIR` gives away. Not in it, for packets and
//! system calls change them and no application keeps them: `TCP_QUICKACK`, `SO_INCOMING_CPU`.

use libc::*;

/// When an option is set on a socket that becomes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It decides to which address, port and device the socket can be bound.
    BeforeBind,
    /// It decides about the route, or about the headers that the size of a segment depends on.
    BeforeConnect,
    /// Connected, in repair mode, before any data is queued.
    InRepair,
    /// Still in repair mode, behind everything that is injected: it would drop such segments.
    Injected,
    /// Everything else, behind the window and the end of the send queue.
    Last,
}

/// How a value is encoded, and the default of a new socket where all kernels agree on it: a default is not carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An `int`. `None` where a sysctl, a route or another option decides about new sockets.
    Number { fresh: Option<i32> },
    /// Up to `max` bytes; a new socket has none, or only bytes that equal `fresh`.
    Bytes { max: usize, fresh: u8 },
    /// Instructions of a classic packet filter.
    Filter,
    /// TCP MD5 keys: one `struct tcp_diag_md5sig` behind another.
    Md5Keys,
}

/// To which connections an option applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carrier {
    Any,
    /// IPv4 packets: IPv4 sockets, and IPv6 sockets with IPv4-mapped addresses.
    Ipv4,
    /// IPv6 sockets.
    Ipv6,
}

/// A socket option that travels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) level: i32,
    pub(crate) number: i32,
    pub(crate) stage: Stage,
    pub(crate) kind: Kind,
    pub(crate) carrier: Carrier,
}

/// The option that repair mode destroys: its value comes from whoever paused the socket.
pub(crate) const REUSEADDR: &str = "SO_REUSEADDR";
/// The option that holds secrets.
pub(crate) const MD5: &str = "TCP_MD5SIG";

/// Every length that [`Kind::Bytes`] asks for fits.
pub(crate) const LONGEST: usize = 2048;

// Numbers that the libc crate does not have yet: `linux/tcp.h`, `asm-generic/socket.h`, `linux/in6.h`.
const TCP_TX_DELAY: i32 = 37;
const TCP_RTO_MAX_MS: i32 = 44;
const TCP_RTO_MIN_US: i32 = 45;
const TCP_DELACK_MAX_US: i32 = 46;
const SO_TIMESTAMP_NEW: i32 = 63;
const SO_TIMESTAMPNS_NEW: i32 = 64;
const SO_TIMESTAMPING_NEW: i32 = 65;
const SO_TXREHASH: i32 = 74;
const SO_RCVMARK: i32 = 75;
const SO_RCVPRIORITY: i32 = 82;
const IP_UNICAST_IF: i32 = 50;
const IP_LOCAL_PORT_RANGE: i32 = 51;
const IPV6_UNICAST_IF: i32 = 76;

const ZERO: Kind = Kind::Number { fresh: Some(0) };
const ONE: Kind = Kind::Number { fresh: Some(1) };
const MINUS_ONE: Kind = Kind::Number { fresh: Some(-1) };
const TUNED: Kind = Kind::Number { fresh: None };
const LINGER: Kind = Kind::Bytes { max: size_of::<linger>(), fresh: 0 };
const TIMEVAL: Kind = Kind::Bytes { max: size_of::<timeval>(), fresh: 0 };
const RATE: Kind = Kind::Bytes { max: size_of::<c_ulong>(), fresh: 0xff };
const PAIR: Kind = Kind::Bytes { max: 8, fresh: 0 };
const NAME: Kind = Kind::Bytes { max: 16, fresh: 0 };
const IP_HEADER: Kind = Kind::Bytes { max: 40, fresh: 0 };
const EXTENSION_HEADER: Kind = Kind::Bytes { max: LONGEST, fresh: 0 };

macro_rules! rows {
    ($($level:ident $carrier:ident { $($name:ident $stage:ident $kind:expr;)* })*) => {
        &[$($(Row {
            name: stringify!($name),
            level: $level,
            number: $name,
            stage: Stage::$stage,
            kind: $kind,
            carrier: Carrier::$carrier,
        },)*)*]
    };
}

/// In the order in which they are read and, within a stage, set.
pub(crate) const TABLE: &[Row] = rows! {
    SOL_SOCKET Any {
        SO_BINDTODEVICE BeforeBind NAME;
        SO_MARK BeforeBind ZERO;
        // A bind with it would let the user of this socket listen beside others.
        SO_REUSEPORT BeforeConnect ZERO;
        SO_DONTROUTE BeforeConnect ZERO;
    }
    IPPROTO_IP Any {
        IP_BIND_ADDRESS_NO_PORT BeforeBind ZERO;
        IP_LOCAL_PORT_RANGE BeforeBind ZERO;
    }
    IPPROTO_IP Ipv4 {
        IP_FREEBIND BeforeBind ZERO;
        IP_TRANSPARENT BeforeBind ZERO;
        IP_TOS BeforeConnect ZERO;
        IP_TTL BeforeConnect TUNED;
        IP_MTU_DISCOVER BeforeConnect TUNED;
        // Behind the connect, which an MSS of loopback's size has to compute anew without any.
        IP_OPTIONS InRepair IP_HEADER;
        IP_UNICAST_IF BeforeConnect ZERO;
        IP_MINTTL Last ZERO;
        IP_RECVERR Last ZERO;
        IP_RECVTOS Last ZERO;
        IP_RECVTTL Last ZERO;
        IP_PKTINFO Last ZERO;
    }
    IPPROTO_IPV6 Ipv6 {
        IPV6_V6ONLY BeforeBind TUNED;
        IPV6_FREEBIND BeforeBind ZERO;
        IPV6_TRANSPARENT BeforeBind ZERO;
        IPV6_TCLASS BeforeConnect ZERO;
        IPV6_UNICAST_HOPS BeforeConnect TUNED;
        IPV6_MTU_DISCOVER BeforeConnect ONE;
        IPV6_DONTFRAG BeforeConnect ZERO;
        IPV6_UNICAST_IF BeforeConnect ZERO;
        IPV6_FLOWINFO_SEND BeforeConnect ZERO;
        IPV6_AUTOFLOWLABEL BeforeConnect TUNED;
        IPV6_HOPOPTS BeforeConnect EXTENSION_HEADER;
        IPV6_RTHDRDSTOPTS BeforeConnect EXTENSION_HEADER;
        IPV6_RTHDR BeforeConnect EXTENSION_HEADER;
        IPV6_DSTOPTS BeforeConnect EXTENSION_HEADER;
        IPV6_MINHOPCOUNT Last ZERO;
        IPV6_RECVERR Last ZERO;
        IPV6_RECVPKTINFO Last ZERO;
        IPV6_RECVHOPLIMIT Last ZERO;
        IPV6_RECVTCLASS Last ZERO;
        IPV6_RECVHOPOPTS Last ZERO;
        IPV6_RECVRTHDR Last ZERO;
        IPV6_RECVDSTOPTS Last ZERO;
        IPV6_RECVPATHMTU Last ZERO;
    }
    IPPROTO_TCP Any {
        TCP_CONGESTION InRepair NAME;
        TCP_NODELAY InRepair ZERO;
        TCP_CORK InRepair ZERO;
        TCP_RTO_MAX_MS InRepair TUNED;
        TCP_RTO_MIN_US InRepair TUNED;
        TCP_DELACK_MAX_US InRepair TUNED;
        TCP_MD5SIG Injected Kind::Md5Keys;
        TCP_KEEPIDLE Last TUNED;
        TCP_KEEPINTVL Last TUNED;
        TCP_KEEPCNT Last TUNED;
        TCP_SYNCNT Last TUNED;
        TCP_LINGER2 Last TUNED;
        TCP_WINDOW_CLAMP Last TUNED;
        TCP_USER_TIMEOUT Last ZERO;
        TCP_NOTSENT_LOWAT Last ZERO;
        TCP_INQ Last ZERO;
        TCP_TX_DELAY Last ZERO;
        TCP_THIN_LINEAR_TIMEOUTS Last ZERO;
    }
    SOL_SOCKET Any {
        SO_ATTACH_FILTER Injected Kind::Filter;
        SO_LOCK_FILTER Injected ZERO;
        SO_REUSEADDR Last ZERO;
        SO_KEEPALIVE Last ZERO;
        SO_LINGER Last LINGER;
        SO_OOBINLINE Last ZERO;
        // Behind IP_TOS, which sets it too.
        SO_PRIORITY Last TUNED;
        SO_RCVLOWAT Last ONE;
        SO_RCVTIMEO Last TIMEVAL;
        SO_SNDTIMEO Last TIMEVAL;
        SO_MAX_PACING_RATE Last RATE;
        SO_TXREHASH Last TUNED;
        SO_ZEROCOPY Last ZERO;
        // The `_NEW` ones behind the old ones, for the last one set decides about the format.
        SO_TIMESTAMP Last ZERO;
        SO_TIMESTAMPNS Last ZERO;
        SO_TIMESTAMPING Last PAIR;
        SO_TIMESTAMP_NEW Last ZERO;
        SO_TIMESTAMPNS_NEW Last ZERO;
        SO_TIMESTAMPING_NEW Last PAIR;
        SO_TXTIME Last PAIR;
        SO_BUSY_POLL Last TUNED;
        SO_PREFER_BUSY_POLL Last ZERO;
        SO_PEEK_OFF Last MINUS_ONE;
        SO_SELECT_ERR_QUEUE Last ZERO;
        SO_RCVMARK Last ZERO;
        SO_RCVPRIORITY Last ZERO;
    }
};

impl Row {
    /// How kernels behave that have no such option: there this value has nothing to set.
    pub(crate) fn built_in(&self) -> Option<i32> {
        match (self.level, self.number) {
            (IPPROTO_TCP, TCP_RTO_MAX_MS) => Some(120_000),
            (IPPROTO_TCP, TCP_RTO_MIN_US | TCP_DELACK_MAX_US) => Some(200_000),
            _ => None,
        }
    }

    /// Segments that play the peer's may not pass it.
    pub(crate) fn drops_segments(&self) -> bool {
        matches!(self.kind, Kind::Filter | Kind::Md5Keys)
            || ["IP_MINTTL", "IPV6_MINHOPCOUNT"].contains(&self.name)
    }

    /// Neither another option nor the route changes it: `IP_TOS` sets the priority, and a route may have a hop limit.
    pub(crate) fn stands_alone(&self) -> bool {
        let depends = ["SO_PRIORITY", "IP_TTL", "IPV6_UNICAST_HOPS"].contains(&self.name);
        matches!(self.kind, Kind::Number { .. }) && !depends
    }

    /// A sysctl, a route or another option decides about new sockets.
    pub(crate) fn is_tuned(&self) -> bool {
        self.kind == TUNED
    }

    /// It is this option of sockets.
    pub(crate) fn is_socket_option(&self, number: i32) -> bool {
        (self.level, self.number) == (SOL_SOCKET, number)
    }

    /// The option of sockets without which the kernel does not report this one: the new format of timestamps is shared.
    pub(crate) fn only_with(&self) -> Option<i32> {
        match (self.level, self.number) {
            (SOL_SOCKET, SO_TIMESTAMPNS_NEW) => Some(SO_TIMESTAMP_NEW),
            (SOL_SOCKET, SO_TIMESTAMPING_NEW) => Some(SO_TIMESTAMPING),
            _ => None,
        }
    }
}

/// Where `name` stands in the [`TABLE`].
pub(crate) fn position(name: &str) -> Option<usize> {
    TABLE.iter().position(|row| row.name == name)
}
