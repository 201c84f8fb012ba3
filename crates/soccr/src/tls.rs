//! TLS in the kernel (kTLS): the part of a connection that encrypts what is written and decrypts what arrives.
//!
//! A program that has done its handshake gives the traffic keys to its socket ([`Tls::start`]: `TCP_ULP`, `TLS_TX`, `TLS_RX`); the kernel
//! gives them back, with the number of the next record. So such a connection travels like any other, with a [`Tls`] in its
//! [`Connection`](crate::Connection). What the program itself knows of the session travels by other means: where the kernel
//! only encrypts (OpenSSL with TLS 1.3), nobody continues the connection without it.
//!
//! ```text
//!  settle ── lock ── pause ── save ── detach, close      Connection      restore ── resume ── unlock
//!  no part of a record         reads what has been
//!  waits in the TLS layer      decrypted or will be
//! ```
//!
//! - [`settle`] comes before the lock, while nobody writes. Where the kernel decrypts, it waits until the peer has acknowledged
//!   everything, since such a socket does not show its send queue, and until the kernel cannot be hiding a part of a record:
//!   bytes are in TCP's queue, or none have come for a retransmission timeout.
//! - The guard carries TLS where it is told to ([`with_tls`](crate::Paused::with_tls)). Where the kernel decrypts,
//!   [`save`](crate::Paused::save) *reads* what has arrived. From then on the value alone has
//!   it: the socket is not resumed any more, and whoever wants to go back restores the value.
//!   If another process uses the socket, it could not get back what was read before the move failed:
//!   [`with_tls_in_place`](crate::Paused::with_tls_in_place) only peeks.
//! - A socket with kernel TLS cannot be disconnected. After [`detach`](crate::Paused::detach) it is silent, and its addresses
//!   are free when its last descriptor is closed (a program that is just being forked has one, too), or by [`discard`].
//! - **Never let two sockets continue one sending state.** They would encrypt different bytes with the same nonce, which
//!   gives both away.
//!
//! # References
//! `linux/tls.h`; Documentation/networking/tls.rst; RFC 5288, RFC 6655, RFC 7905 (TLS 1.2), RFC 8446 (TLS 1.3).

mod arrived;
mod layer;
mod seal;

use std::fmt;

use zeroize::Zeroizing;

use crate::error::{Error, Result};
use crate::state::State;

pub(crate) use arrived::Arrived;
pub(crate) use layer::{check_settled, has_layer, read, refuse_hidden};
pub use layer::{discard, is_on, settle};

/// The most bytes of an application in one record (RFC 8446 §5.1).
const FRAGMENT: usize = 1 << 14;

/// The type of records with bytes of the application.
const APPLICATION_DATA: u8 = 23;

/// The TLS part of a connection. At least one of the two directions is the kernel's.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tls {
    /// The version of the protocol.
    pub version: Version,
    /// How records are encrypted, in both directions.
    pub cipher: Cipher,
    /// The kernel encrypts what is written (`TLS_TX`): the state before the next record.
    pub transmit: Option<Secrets>,
    /// The kernel decrypts what arrives (`TLS_RX`): the state behind the records in `unread`.
    pub receive: Option<Secrets>,
    /// What has been decrypted and not read by the application, in order. The receive queue of the connection has what
    /// follows: less than a record.
    pub unread: Vec<Record>,
    /// `TLS_TX_ZEROCOPY_RO`: files that are sent do not change meanwhile.
    pub zerocopy_sendfile: bool,
    /// `TLS_RX_EXPECT_NO_PAD`: the peer does not pad its records.
    pub expect_no_padding: bool,
}

/// A record that the kernel has decrypted.
#[derive(Clone, PartialEq, Eq)]
pub struct Record {
    /// Its content type: 21 an alert, 22 a handshake message, 23 bytes of the application.
    pub content_type: u8,
    /// What was encrypted. Bytes of the application may be those of several records.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Record {{ content_type: {}, {} bytes }}", self.content_type, self.bytes.len())
    }
}

/// The versions of TLS that the kernel speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u16)]
pub enum Version {
    /// TLS 1.2 (RFC 5246).
    Tls12 = 0x0303,
    /// TLS 1.3 (RFC 8446).
    Tls13 = 0x0304,
}

impl Version {
    /// The version with this number on the wire.
    pub fn from_wire(number: u16) -> Option<Self> {
        [Self::Tls12, Self::Tls13].into_iter().find(|version| *version as u16 == number)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tls12 => "1.2",
            Self::Tls13 => "1.3",
        })
    }
}

/// The ciphers that are carried, numbered as `linux/tls.h` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u16)]
pub enum Cipher {
    /// `TLS_CIPHER_AES_GCM_128`
    AesGcm128 = 51,
    /// `TLS_CIPHER_AES_GCM_256`
    AesGcm256 = 52,
    /// `TLS_CIPHER_AES_CCM_128`
    AesCcm128 = 53,
    /// `TLS_CIPHER_CHACHA20_POLY1305`
    ChaCha20Poly1305 = 54,
}

impl Cipher {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::AesGcm128, Self::AesGcm256, Self::AesCcm128, Self::ChaCha20Poly1305];

    /// The cipher with the number that the kernel gives it.
    pub fn from_kernel(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|cipher| *cipher as u16 == number)
    }

    /// The lengths of IV, key, salt and record number, as the structures of `linux/tls.h` have them one behind the other.
    fn lengths(self) -> [usize; 4] {
        match self {
            Self::AesGcm128 | Self::AesCcm128 => [8, 16, 4, 8],
            Self::AesGcm256 => [8, 32, 4, 8],
            Self::ChaCha20Poly1305 => [12, 32, 0, 8],
        }
    }

    /// How many bytes the [`Secrets`] of one direction are.
    pub fn secrets_len(self) -> usize {
        self.lengths().iter().sum()
    }
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AesGcm128 => "aes-gcm-128",
            Self::AesGcm256 => "aes-gcm-256",
            Self::AesCcm128 => "aes-ccm-128",
            Self::ChaCha20Poly1305 => "chacha20-poly1305",
        })
    }
}

/// The keys of one direction, and the number of its next record. Zeroed when dropped, never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secrets(Zeroizing<Vec<u8>>);

impl Secrets {
    /// Those in `bytes`: IV, key, salt and record number of `cipher`, as the structures of `linux/tls.h` have them behind
    /// version and cipher.
    ///
    /// # Errors
    /// Invalid: another length.
    pub fn new(cipher: Cipher, bytes: &[u8]) -> Result<Self> {
        if bytes.len() != cipher.secrets_len() {
            return Err(Error::invalid("the TLS keys are not as long as those of the cipher"));
        }
        Ok(Self(Zeroizing::new(bytes.to_vec())))
    }

    /// The bytes of [`new`](Self::new). They are secret.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// How many records came before the next one.
    pub fn record_number(&self) -> u64 {
        self.0.last_chunk().map_or(0, |number| u64::from_be_bytes(*number))
    }

    /// The same keys, a number of `records` earlier.
    fn before(&self, records: u64) -> Self {
        let mut earlier = self.clone();
        let number = self.record_number().wrapping_sub(records);
        if let Some(last) = earlier.0.last_chunk_mut() {
            *last = number.to_be_bytes();
        }
        earlier
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

/// What may be told of kernel TLS: `tls 1.3 aes-gcm-256 tx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// The version; `None` where it is one that is not carried, or nobody has set keys.
    pub version: Option<Version>,
    /// The cipher, likewise.
    pub cipher: Option<Cipher>,
    /// The kernel encrypts.
    pub transmit: bool,
    /// The kernel decrypts.
    pub receive: bool,
    /// The network device does that in its place, which is not carried.
    pub offloaded: bool,
}

impl Summary {
    /// Why a connection with such a layer cannot be carried; `None` where it can.
    pub fn refusal(&self) -> Option<&'static str> {
        match self {
            Self { transmit: false, receive: false, .. } => Some("kernel TLS without keys"),
            Self { offloaded: true, .. } => Some("kernel TLS on the network device"),
            Self { version: None, .. } | Self { cipher: None, .. } => {
                Some("kernel TLS with a version or cipher that is not carried")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tls")?;
        self.version.map_or(Ok(()), |version| write!(f, " {version}"))?;
        self.cipher.map_or(Ok(()), |cipher| write!(f, " {cipher}"))?;
        f.write_str(match (self.transmit, self.receive) {
            (true, true) => " tx+rx",
            (true, false) => " tx",
            (false, true) => " rx",
            (false, false) => "",
        })?;
        f.write_str(if self.offloaded { " offloaded" } else { "" })
    }
}

impl Tls {
    /// Without keys yet: those of at least one direction belong to it.
    pub fn new(version: Version, cipher: Cipher) -> Self {
        Self {
            version,
            cipher,
            transmit: None,
            receive: None,
            unread: Vec::new(),
            zerocopy_sendfile: false,
            expect_no_padding: false,
        }
    }

    /// What may be told of it.
    pub fn summary(&self) -> Summary {
        Summary {
            version: Some(self.version),
            cipher: Some(self.cipher),
            transmit: self.transmit.is_some(),
            receive: self.receive.is_some(),
            offloaded: false,
        }
    }

    /// Checks its parts against each other.
    pub(crate) fn validate(&self) -> Result<()> {
        let check = |holds: bool, what: &str| if holds { Ok(()) } else { Err(Error::invalid(what)) };
        let both = [&self.transmit, &self.receive];
        check(both.iter().any(|secrets| secrets.is_some()), "TLS without keys")?;
        let fit = |secrets: &Secrets| secrets.0.len() == self.cipher.secrets_len();
        check(both.into_iter().flatten().all(fit), "the TLS keys are not as long as those of the cipher")?;
        let Some(receive) = &self.receive else {
            return check(self.unread.is_empty(), "decrypted records where the kernel does not decrypt");
        };
        // A record cannot have been read before the first one.
        check(self.fragments().count() as u64 <= receive.record_number(), "more TLS records than there were")
    }

    /// How many decrypted bytes wait for the application.
    pub(crate) fn unread_len(&self) -> usize {
        self.unread.iter().map(|record| record.bytes.len()).sum()
    }

    /// Puts bytes of the application back in front.
    pub(crate) fn unread(&mut self, bytes: &[u8]) {
        match self.unread.first_mut().filter(|record| record.content_type == APPLICATION_DATA) {
            Some(first) => drop(first.bytes.splice(..0, bytes.iter().copied())),
            None => self.unread.insert(0, Record { content_type: APPLICATION_DATA, bytes: bytes.to_vec() }),
        }
    }

    /// How many bytes longer a record is than those of the application in it: header, nonce, type and tag (RFC 5288 §3, RFC 6655 §3,
    /// RFC 7905 §2, RFC 8446 §5.2).
    pub(crate) fn expansion(&self) -> u64 {
        match (self.version, self.cipher) {
            (Version::Tls13, _) => 5 + 1 + 16,
            (Version::Tls12, Cipher::ChaCha20Poly1305) => 5 + 16,
            (Version::Tls12, _) => 5 + 8 + 16,
        }
    }

    /// The unread records in pieces that fit into one.
    fn fragments(&self) -> impl Iterator<Item = (u8, &[u8])> {
        self.unread
            .iter()
            .flat_map(|record| record.bytes.chunks(FRAGMENT).map(|fragment| (record.content_type, fragment)))
    }
}

/// Header, fragment, and what encryption and padding add (RFC 5246 §6.2.3, RFC 8446 §5.2).
pub(crate) const LONGEST_RECORD: usize = 5 + FRAGMENT + 2048;

/// In other states there is nothing left to continue.
pub(crate) fn check_state(state: State, reset: bool) -> Result<()> {
    if state == State::Close || state == State::SynSent || reset {
        let remedy = "its records have no reader any more: let the application close it";
        return Err(Error::refused("a connection with kernel TLS that has ended", remedy));
    }
    Ok(())
}
