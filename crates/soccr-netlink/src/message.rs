//! Messages and attributes as bytes: pure.

const HEADER: usize = 16;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// Messages that travel to the kernel in one system call.
///
/// ```
/// use soccr_netlink::{ACK, Batch, REQUEST, attributes};
///
/// let mut batch = Batch::new();
/// batch.message(16, REQUEST | ACK, |message| {
///     message.bytes(&[0; 16]); // the fixed header of this message type
///     message.string(3, "veth0");
///     message.nested(18, |link| link.u32(1, 7));
/// });
/// assert_eq!(batch.as_bytes().len() % 4, 0);
/// let (kind, name) = attributes(&batch.as_bytes()[32..]).next().unwrap();
/// assert_eq!((kind, name), (3, &b"veth0\0"[..]));
/// ```
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    last: usize,
    messages: u32,
    acknowledged: u32,
    dumps: bool,
    too_long: bool,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a message of type `kind` whose payload `body` writes.
    pub fn message(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Message<'_>)) {
        let start = self.bytes.len();
        self.last = start;
        self.messages += 1;
        self.acknowledged += u32::from(flags & crate::ACK != 0);
        self.dumps |= flags & crate::DUMP == crate::DUMP;
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&self.messages.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        body(&mut Message { bytes: &mut self.bytes, too_long: &mut self.too_long });
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Asks the kernel to acknowledge the message appended last.
    pub fn acknowledge_last(&mut self) {
        if let Some(flags) = self.bytes.get_mut(self.last + 6..self.last + 8) {
            let value = u16::from_ne_bytes([flags[0], flags[1]]);
            self.acknowledged += u32::from(value & crate::ACK == 0);
            flags.copy_from_slice(&(value | crate::ACK).to_ne_bytes());
        }
    }

    /// Everything appended so far.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether an attribute exceeds its 16-bit length: the kernel would read its tail as further attributes.
    pub(crate) fn is_too_long(&self) -> bool {
        self.too_long
    }

    /// Whether the batch holds a dump request.
    pub(crate) fn dumps(&self) -> bool {
        self.dumps
    }

    /// How many messages there are.
    pub(crate) fn messages(&self) -> u32 {
        self.messages
    }

    /// Writes everything appended so far to `bytes`, with the sequence numbers raised by `base`.
    pub(crate) fn number(&self, base: u32, bytes: &mut Vec<u8>) {
        bytes.clear();
        bytes.extend_from_slice(&self.bytes);
        let (mut start, mut sequence) = (0, base);
        while start < bytes.len() {
            sequence = sequence.wrapping_add(1);
            bytes[start + 8..start + 12].copy_from_slice(&sequence.to_ne_bytes());
            let length = [0, 1, 2, 3].map(|index| bytes[start + index]);
            start += u32::from_ne_bytes(length) as usize;
        }
    }

    /// How many messages asked for an acknowledgement.
    pub(crate) fn acknowledged(&self) -> u32 {
        self.acknowledged
    }

    /// Forgets the messages and keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.last = 0;
        self.messages = 0;
        self.acknowledged = 0;
        self.dumps = false;
        self.too_long = false;
    }
}

/// The payload of a message, or of a nested attribute, while it is written.
#[derive(Debug)]
pub struct Message<'a> {
    bytes: &'a mut Vec<u8>,
    too_long: &'a mut bool,
}

impl Message<'_> {
    /// Appends bytes as they are, padded to four: the fixed header that a message type begins with.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.pad();
    }

    /// Appends an attribute.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.enclose(kind, |message| message.bytes.extend_from_slice(value));
        self.pad();
    }

    /// Appends a number in the byte order of this machine (routing, `sock_diag`).
    pub fn u32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_ne_bytes());
    }

    /// Appends a number in network byte order (netfilter).
    pub fn be32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// Appends a string and its terminating zero.
    pub fn string(&mut self, kind: u16, value: &str) {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.attribute(kind, &bytes);
    }

    /// Appends an attribute that holds further ones.
    pub fn nested(&mut self, kind: u16, body: impl FnOnce(&mut Message<'_>)) {
        self.enclose(kind | NESTED, body);
    }

    fn enclose(&mut self, kind: u16, body: impl FnOnce(&mut Message<'_>)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        body(&mut Message { bytes: self.bytes, too_long: self.too_long });
        let length = u16::try_from(self.bytes.len() - start).unwrap_or_else(|_| {
            *self.too_long = true;
            u16::MAX
        });
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The attributes in `bytes`: (type, value) in their order. Stops at the first malformed one.
pub fn attributes(bytes: &[u8]) -> Attributes<'_> {
    Attributes { rest: bytes }
}

/// Iterator of [`attributes`].
#[derive(Clone, Debug)]
pub struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = u16::from_ne_bytes(self.rest.get(..2)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(self.rest.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let value = self.rest.get(4..length)?;
        self.rest = self.rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

/// A message that the kernel sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) payload: &'a [u8],
}

/// Splits what the kernel sent.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let flags = u16::from_ne_bytes(bytes.get(6..8)?.try_into().ok()?);
        let sequence = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
        let payload = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Received { kind, flags, sequence, payload })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_reads_back() {
        let mut batch = Batch::new();
        batch.message(1, crate::REQUEST | crate::ACK, |m| m.u32(5, 77));
        batch.message(2, crate::REQUEST, |m| m.nested(3, |n| n.attribute(9, b"abc")));
        let all: Vec<_> = messages(batch.as_bytes()).collect();
        assert_eq!(all.iter().map(|m| (m.kind, m.sequence)).collect::<Vec<_>>(), [(1, 1), (2, 2)]);
        assert_eq!(attributes(all[0].payload).next(), Some((5, &77u32.to_ne_bytes()[..])));
        let (kind, inner) = attributes(all[1].payload).next().unwrap();
        assert_eq!((kind, attributes(inner).next()), (3, Some((9, &b"abc"[..]))));
        let mut numbered = Vec::new();
        batch.number(u32::MAX, &mut numbered);
        assert_eq!(messages(&numbered).map(|m| (m.kind, m.sequence)).collect::<Vec<_>>(), [(1, 0), (2, 1)]);
        assert_eq!(batch.acknowledged(), 1);
        batch.acknowledge_last();
        batch.acknowledge_last();
        assert_eq!(batch.acknowledged(), 2);
    }

    #[test]
    fn no_length_is_cut_to_16_bits() {
        let whole = |value: &[u8]| {
            let mut batch = Batch::new();
            batch.message(1, crate::REQUEST, |m| m.nested(1, |n| n.attribute(2, value)));
            !batch.is_too_long()
        };
        let longest = 65_524;
        assert!(whole(&vec![0; longest]));
        for length in [longest + 1, longest + 8, 65_536, 1 << 20] {
            assert!(!whole(&vec![0; length]), "{length}");
        }
    }

    #[test]
    fn malformed_attributes_end_the_walk() {
        for bytes in [&[][..], &[1], &[3, 0, 1, 0], &[0, 0, 0, 0], &[200, 0, 1, 0, 9]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
    }
}
