//! The socket options that travel with a connection: `TCP_*`, `SO_*`, `IP_*`, `IPV6_*`, by their kernel names.
//!
//! Only what differs from a new socket is carried: an option missing here has the value every new socket has.
//!
//! ```
//! use soccr::settings::{Settings, Value};
//!
//! let mut settings = Settings::default();
//! settings.set("TCP_NODELAY", Value::Number(1));
//! settings.set("TCP_KEEPIDLE", Value::Number(600)); // seconds
//! assert_eq!(settings.get("TCP_NODELAY"), Some(&Value::Number(1)));
//! ```
//!
//! # References
//! `socket(7)`, `tcp(7)`, `ip(7)`, `ipv6(7)`.

mod keys;
mod md5;
mod process;
mod table;

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use crate::error::{Error, Result};
use crate::fidelity::Fidelity;
use crate::sys::MARK;
use crate::sys::{filter, sockopt, tcp};
use table::{Carrier, Kind, Row, TABLE};

pub(crate) use table::{MD5, REUSEADDR, Stage};

/// The value of a socket option.
#[derive(Clone, PartialEq, Eq)]
pub enum Value {
    /// An `int`.
    Number(i32),
    /// Anything else, as `getsockopt` gave it, in the byte order of the machine.
    Bytes(Vec<u8>),
    /// Bytes that are never printed.
    Secret(Vec<u8>),
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Bytes(bytes) => bytes.fmt(f),
            Self::Secret(_) => f.write_str("<secret>"),
        }
    }
}

/// The socket options of a connection, in the order in which they were read.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Settings(Vec<(Name, Value)>);

impl Settings {
    /// Keeps only the options for which `keep` returns true. A stream from elsewhere may be trusted with some of them only.
    pub fn retain(&mut self, mut keep: impl FnMut(&str, &Value) -> bool) {
        self.0.retain(|(name, value)| keep(name.as_str(), value));
    }
}

const SHUT_RD: &str = "SHUT_RD";

/// Names of the table are carried as their place in it: 10,000 connections have half a million of them.
#[derive(Clone, PartialEq, Eq)]
enum Name {
    Known(u8),
    Unknown(Box<str>),
}

impl Name {
    fn new(name: &str) -> Self {
        match table::position(name) {
            Some(place) => Self::Known(place as u8),
            None => Self::Unknown(name.into()),
        }
    }

    fn as_str(&self) -> &str {
        match self {
            Self::Known(place) => TABLE[usize::from(*place)].name,
            Self::Unknown(name) => name,
        }
    }
}

impl Settings {
    /// The options and their values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// The value of an option, by its kernel name.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    /// Sets an option by its kernel name, such as `TCP_NODELAY`.
    ///
    /// A name that this version does not know is kept, and reported when the connection is restored.
    pub fn set(&mut self, name: &str, value: Value) {
        match self.0.iter_mut().find(|(known, _)| known.as_str() == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((Name::new(name), value)),
        }
    }

    /// Leaves an option to what a new socket has.
    pub(crate) fn forget(&mut self, name: &str) {
        self.0.retain(|(known, _)| known.as_str() != name);
    }

    /// Reads everything that the table lists and the kernel has, except what only `sock_diag` tells and what
    /// repair mode has destroyed. What follows from what is known is not asked for: a filter needs some `memory` of those
    /// that the socket's options take. The memory of the values is reused.
    ///
    /// # Errors
    /// System: an option that the kernel has and does not tell, such as `SO_BINDTODEVICE` of a device that is gone.
    pub(crate) fn read_into(&mut self, fd: BorrowedFd<'_>, local: SocketAddr, memory: u32) -> Result<()> {
        let mut buffer = [0; table::LONGEST];
        let settings = &mut self.0;
        settings.clear();
        settings.reserve(24);
        for (place, row) in TABLE.iter().enumerate().filter(|(_, row)| row.applies(local)) {
            let is_set = |wanted: i32| {
                settings.iter().any(
                    |(name, _)| matches!(name, Name::Known(place) if TABLE[usize::from(*place)].is_socket_option(wanted)),
                )
            };
            let is_absent = match row.kind {
                Kind::Filter => memory == 0,
                _ => row.only_with().is_some_and(|other| !is_set(other)),
            };
            if is_absent {
                continue;
            }
            match row.read(fd, &mut buffer) {
                Ok(Some(value)) => settings.push((Name::Known(place as u8), value)),
                // An eBPF program: its own name is not in the table, so that its loss is reported.
                Err(error) if row.kind == Kind::Filter && error.raw_os_error() == Some(libc::EACCES) => {
                    settings.push((Name::Unknown("SO_ATTACH_BPF".into()), Value::Bytes(Vec::new())));
                }
                Ok(None) => {}
                Err(error) if is_unknown(&error) => {}
                Err(error) => return Err(unreadable(row, error)),
            }
        }
        Ok(())
    }

    /// What a new socket has, of what not all kernels agree on and a sysctl may change at any time.
    pub(crate) fn of_new(fd: BorrowedFd<'_>, local: SocketAddr) -> Self {
        let mut buffer = [0; table::LONGEST];
        let is_read = |row: &Row| row.applies(local) && row.is_tuned() && row.stands_alone();
        let rows = TABLE.iter().enumerate().filter(|(_, row)| is_read(row));
        let values = rows
            .filter_map(|(place, row)| Some((Name::Known(place as u8), row.read(fd, &mut buffer).ok()??)));
        Self(values.collect())
    }

    /// Forgets what a new socket has anyway, with the options `fresh`: it need not be set.
    pub(crate) fn forget_defaults(&mut self, fresh: &Self) {
        self.0.retain(|setting| {
            let Name::Known(place) = setting.0 else { return true };
            !TABLE[usize::from(place)].stands_alone() || !fresh.0.contains(setting)
        });
    }

    /// Notes that the application has said that it reads no more (`shutdown(2)`): no option tells that, but it travels and
    /// comes back as one.
    pub(crate) fn note_shutdown(&mut self) {
        self.0.push((Name::Unknown(SHUT_RD.into()), Value::Number(1)));
    }

    /// Whether the application has said that it reads no more (`SHUT_RD`).
    pub fn reads_no_more(&self) -> bool {
        self.get(SHUT_RD) == Some(&Value::Number(1))
    }

    /// Sets again what a socket loses that is disconnected, as far as that can be set.
    pub fn set_again(&self, socket: impl AsFd, local: SocketAddr) {
        for stage in [Stage::InRepair, Stage::Injected, Stage::Last] {
            self.apply(socket.as_fd(), stage, local, &mut Vec::new());
        }
    }

    /// Takes off a socket, which has these options, those that would drop segments that play the peer's. Returns what it has lost.
    pub(crate) fn unblock(&self, fd: BorrowedFd<'_>, local: SocketAddr) -> Self {
        let was_taken_off = |(name, value): &&(Name, Value)| match name {
            Name::Known(place) => {
                let row = &TABLE[usize::from(*place)];
                row.drops_segments() && row.applies(local) && row.clear(fd, value).is_ok()
            }
            Name::Unknown(_) => false,
        };
        Self(self.0.iter().filter(was_taken_off).cloned().collect())
    }

    /// Sets the options of one stage, and adds to `skipped` what could not be set.
    pub(crate) fn apply(
        &self,
        fd: BorrowedFd<'_>,
        stage: Stage,
        local: SocketAddr,
        skipped: &mut Vec<Skipped>,
    ) {
        for (name, value) in &self.0 {
            let outcome = match name {
                Name::Known(place) => {
                    let row = &TABLE[usize::from(*place)];
                    if row.stage != stage || !row.applies(local) {
                        continue;
                    }
                    if row.name == "SO_MARK" && *value == Value::Number(MARK as i32) {
                        Err(io::Error::other(
                            "0xC114 marks the packets of soccr itself, which pass every lock",
                        ))
                    } else {
                        row.write(fd, value)
                    }
                }
                Name::Unknown(_) if stage != Stage::Last => continue,
                // Behind everything that is injected: in FIN_WAIT1 and FIN_WAIT2 data would reset the connection then.
                Name::Unknown(name) if **name == *SHUT_RD && *value == Value::Number(1) => {
                    rustix::net::shutdown(fd, rustix::net::Shutdown::Read).map_err(io::Error::from)
                }
                Name::Unknown(name) => {
                    skipped.extend(process::compare(name, value));
                    continue;
                }
            };
            if let Err(error) = outcome {
                skipped.push(Skipped {
                    name: name.as_str().to_owned().into(),
                    error,
                    fidelity: Fidelity::Missing,
                });
            }
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// This kernel has no such option, or not for such a socket.
fn is_unknown(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP | libc::EINVAL))
}

fn unreadable(row: &Row, error: io::Error) -> Error {
    let is_gone = error.raw_os_error() == Some(libc::ENODEV);
    let error = Error::system(row.name, error);
    if is_gone {
        error.advise("the device that the socket is bound to is gone: bind it to another one, or to none")
    } else {
        error
    }
}

/// A socket option that could not be brought back.
#[derive(Debug)]
pub(crate) struct Skipped {
    pub(crate) name: Cow<'static, str>,
    pub(crate) error: io::Error,
    pub(crate) fidelity: Fidelity,
}

impl Skipped {
    pub(crate) fn new(name: &'static str, error: io::Error) -> Self {
        Self { name: name.into(), error, fidelity: Fidelity::Missing }
    }

    /// Why, and what to do about it.
    pub(crate) fn reason(&self) -> Cow<'static, str> {
        match self.error.raw_os_error() {
            Some(libc::ENOPROTOOPT) => "neither this kernel nor this version of soccr can set it".into(),
            Some(libc::EPERM) if self.name == "TCP_CONGESTION" => {
                format!("{}: needs CAP_NET_ADMIN, and a route without `congctl lock`", self.error).into()
            }
            Some(libc::EPERM) => format!("{}: needs CAP_NET_ADMIN, or more", self.error).into(),
            _ => self.error.to_string().into(),
        }
    }
}

impl Row {
    fn applies(&self, local: SocketAddr) -> bool {
        match self.carrier {
            Carrier::Any => true,
            Carrier::Ipv4 => match local.ip() {
                IpAddr::V4(_) => true,
                IpAddr::V6(address) => address.to_ipv4_mapped().is_some(),
            },
            Carrier::Ipv6 => local.is_ipv6(),
        }
    }

    /// The value, where it differs from that of a new socket.
    fn read(&self, fd: BorrowedFd<'_>, buffer: &mut [u8; table::LONGEST]) -> io::Result<Option<Value>> {
        match self.kind {
            Kind::Number { .. } if self.name == REUSEADDR => Ok(None),
            Kind::Number { fresh } => {
                let number = sockopt::get(fd, self.level, self.number)?;
                Ok((Some(number) != fresh).then_some(Value::Number(number)))
            }
            Kind::Bytes { max, fresh } => {
                let length = sockopt::get_bytes(fd, self.level, self.number, &mut buffer[..max])?;
                let mut bytes = &buffer[..length];
                if (self.level, self.number) == (libc::IPPROTO_TCP, libc::TCP_CONGESTION) {
                    bytes = tcp::chosen(bytes);
                }
                Ok(bytes.iter().any(|byte| *byte != fresh).then(|| Value::Bytes(bytes.to_vec())))
            }
            Kind::Filter => {
                let filter = filter::get(fd)?;
                Ok((!filter.is_empty()).then_some(Value::Bytes(filter)))
            }
            Kind::Md5Keys => Ok(None),
        }
    }

    /// Makes the option what it is on a new socket.
    fn clear(&self, fd: BorrowedFd<'_>, value: &Value) -> io::Result<()> {
        match (self.kind, value) {
            (Kind::Number { fresh: Some(fresh) }, _) => sockopt::set(fd, self.level, self.number, &fresh),
            (Kind::Filter, _) => filter::detach(fd),
            (Kind::Md5Keys, Value::Secret(keys)) => md5::remove(fd, keys),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }

    fn write(&self, fd: BorrowedFd<'_>, value: &Value) -> io::Result<()> {
        match (self.kind, value) {
            (Kind::Number { .. }, Value::Number(number)) => {
                match sockopt::set(fd, self.level, self.number, number) {
                    Err(error)
                        if error.raw_os_error() == Some(libc::ENOPROTOOPT)
                            && self.built_in() == Some(*number) =>
                    {
                        Ok(())
                    }
                    other => other,
                }
            }
            (Kind::Bytes { .. }, Value::Bytes(bytes)) => {
                sockopt::set_bytes(fd, self.level, self.number, bytes)
            }
            (Kind::Filter, Value::Bytes(bytes)) => filter::attach(fd, bytes),
            (Kind::Md5Keys, Value::Secret(keys)) => md5::set(fd, keys),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }
}

#[cfg(test)]
mod tests;
