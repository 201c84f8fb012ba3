//! BTF: the kernel's description of its own types.
//!
//! ```text
//!  header   magic u16 · version u8 · flags u8 · header length u32 · types at, length u32 · strings at, length u32
//!  type     name u32 · members u16, –, kind and flag u8 · size or type u32 · then by kind
//!  member   name u32 · type u32 · offset u32 (in bits; with the flag: bit field size << 24 | offset)
//! ```
//!
//! # References
//! `Documentation/bpf/btf.rst`; `linux/btf.h`.

use std::io;

/// The kinds of types that are looked up by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Struct = 4,
    /// A function of the kernel, such as those that programs may call.
    #[cfg_attr(not(test), expect(dead_code, reason = "for programs that call kernel functions"))]
    Function = 12,
}

const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;
const HEADER: usize = 24;
const TYPE: usize = 12;
const MEMBER: usize = 12;

/// A member of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// Where it lies in the structure, in bytes.
    pub(crate) offset: usize,
    /// Where it stands among the members.
    pub(crate) index: u32,
}

/// Type information.
pub(crate) struct Btf {
    bytes: Vec<u8>,
    /// Where the names begin and end.
    names: std::ops::Range<usize>,
    /// Where each type begins, by its number minus one.
    starts: Vec<u32>,
}

impl Btf {
    /// That of the running kernel.
    ///
    /// # Errors
    /// `ENOENT` where the kernel was built without it (`CONFIG_DEBUG_INFO_BTF`).
    pub(crate) fn kernel() -> io::Result<Self> {
        Self::parse(std::fs::read("/sys/kernel/btf/vmlinux")?)
    }

    /// Checks that every type is there as a whole.
    pub(crate) fn parse(bytes: Vec<u8>) -> io::Result<Self> {
        let Some((names, starts)) = layout(&bytes) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "malformed BTF"));
        };
        Ok(Self { bytes, names, starts })
    }

    /// The number of a type.
    ///
    /// # Errors
    /// `NotFound`, with the name.
    pub(crate) fn find(&self, kind: Kind, name: &str) -> io::Result<u32> {
        let place = self.starts.iter().position(|start| {
            let at = *start as usize;
            self.word(at + 4).is_some_and(|info| kind_of(info) == kind as u8) && self.is_named(at, name)
        });
        place.map(|place| place as u32 + 1).ok_or_else(|| missing(name))
    }

    /// A member of the structure with that number; not one inside of an anonymous member.
    ///
    /// # Errors
    /// `NotFound`, with the name: also for bit fields, which have no address.
    pub(crate) fn member(&self, structure: u32, name: &str) -> io::Result<Member> {
        self.find_member(structure, name).ok_or_else(|| missing(name))
    }

    /// The size of the structure with that number, in bytes.
    ///
    /// # Errors
    /// `NotFound` where there is no such structure.
    pub(crate) fn size(&self, structure: u32) -> io::Result<usize> {
        let size = self.structure(structure).and_then(|(at, _)| self.word(at + 8));
        size.map(|size| size as usize).ok_or_else(|| missing("such structure"))
    }

    fn find_member(&self, structure: u32, name: &str) -> Option<Member> {
        let (at, info) = self.structure(structure)?;
        for index in 0..info & 0xffff {
            let member = at + TYPE + index as usize * MEMBER;
            if self.is_named(member, name) {
                let place = self.word(member + 8)?;
                let has_bit_fields = info >> 31 != 0;
                let (bits, width) =
                    if has_bit_fields { (place & 0xff_ffff, place >> 24) } else { (place, 0) };
                return (width == 0 && bits % 8 == 0).then_some(Member { offset: bits as usize / 8, index });
            }
        }
        None
    }

    /// Where the structure with that number begins, and its info word.
    fn structure(&self, number: u32) -> Option<(usize, u32)> {
        let at = *self.starts.get((number as usize).checked_sub(1)?)? as usize;
        let info = self.word(at + 4)?;
        (kind_of(info) == Kind::Struct as u8).then_some((at, info))
    }

    /// Types and members begin with their name.
    fn is_named(&self, at: usize, name: &str) -> bool {
        let names = &self.bytes[self.names.clone()];
        let text = self.word(at).and_then(|offset| names.get(offset as usize..));
        let rest = text.and_then(|text| text.strip_prefix(name.as_bytes()));
        rest.is_some_and(|rest| rest.first() == Some(&0))
    }

    fn word(&self, at: usize) -> Option<u32> {
        word(&self.bytes, at)
    }
}

/// Where the names lie, and where each type begins.
fn layout(bytes: &[u8]) -> Option<(std::ops::Range<usize>, Vec<u32>)> {
    if bytes.get(..3)? != [MAGIC.to_ne_bytes()[0], MAGIC.to_ne_bytes()[1], VERSION] {
        return None;
    }
    let body = word(bytes, 4)? as usize;
    let section = |header| {
        let start = body.checked_add(word(bytes, header)? as usize)?;
        let end = start.checked_add(word(bytes, header + 4)? as usize)?;
        (end <= bytes.len()).then_some(start..end)
    };
    let (types, names) = (section(8)?, section(16)?);
    let mut starts = Vec::with_capacity(types.len() / (TYPE + MEMBER));
    let mut at = types.start;
    while at < types.end {
        starts.push(u32::try_from(at).ok()?);
        at += TYPE + tail(word(bytes, at + 4)?)?;
    }
    (at == types.end).then_some((names, starts))
}

/// How many bytes follow the three words of a type.
fn tail(info: u32) -> Option<usize> {
    let members = (info & 0xffff) as usize;
    match kind_of(info) {
        // INT, VAR, DECL_TAG
        1 | 14 | 17 => Some(4),
        // ARRAY
        3 => Some(12),
        // STRUCT, UNION, DATASEC, ENUM64
        4 | 5 | 15 | 19 => Some(members * MEMBER),
        // ENUM, FUNC_PROTO
        6 | 13 => Some(members * 8),
        // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG
        2 | 7..=12 | 16 | 18 => Some(0),
        _ => None,
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn kind_of(info: u32) -> u8 {
    (info >> 24 & 0x1f) as u8
}

fn missing(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("the kernel has no {name}"))
}

/// Describes a map from `int` to an array of so many `u32`, for the kinds of maps whose types the kernel wants to
/// know: the key's type is 1, the value's 2.
pub(crate) fn describe_map(values: u32) -> Vec<u8> {
    let int = [1, 1 << 24, 4, 1 << 24 | 32];
    let array = [0, 3 << 24, 0, 1, 1, values];
    encode(&[int.as_slice(), &array].concat(), b"\0int\0")
}

fn encode(types: &[u32], names: &[u8]) -> Vec<u8> {
    let length = size_of_val(types) as u32;
    let header = [HEADER as u32, 0, length, length, names.len() as u32];
    let words = header.iter().chain(types).flat_map(|word| word.to_ne_bytes());
    let [first, second] = MAGIC.to_ne_bytes();
    [first, second, VERSION, 0].into_iter().chain(words).chain(names.iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct s { int a; int b : 3; int c; }`
    fn sample() -> Vec<u8> {
        let int = [1, 1 << 24, 4, 1 << 24 | 32];
        let structure = [5, 1 << 31 | 4 << 24 | 3, 12, 7, 1, 0, 9, 1, 3 << 24 | 32, 11, 1, 64];
        encode(&[int.as_slice(), &structure].concat(), b"\0int\0s\0a\0b\0c\0")
    }

    #[test]
    fn finds_structures_and_members() {
        let btf = Btf::parse(sample()).unwrap();
        let id = btf.find(Kind::Struct, "s").unwrap();
        assert_eq!((id, btf.size(id).unwrap()), (2, 12));
        assert_eq!(btf.member(id, "a").unwrap(), Member { offset: 0, index: 0 });
        assert_eq!(btf.member(id, "c").unwrap(), Member { offset: 8, index: 2 });
        assert!(btf.member(id, "b").is_err(), "a bit field has no address");
        assert!(btf.find(Kind::Struct, "in").is_err() && btf.find(Kind::Function, "s").is_err());
        assert!(btf.member(1, "a").is_err() && btf.member(0, "a").is_err() && btf.size(9).is_err());
    }

    #[test]
    fn malformed_input_is_an_error_or_finds_nothing() {
        let good = sample();
        for length in 0..good.len() {
            assert!(Btf::parse(good[..length].to_vec()).is_err(), "cut at {length}");
        }
        for at in 0..good.len() {
            for byte in [0, 1, 0x7f, 0x84, 0xff] {
                let mut bad = good.clone();
                bad[at] = byte;
                if let Ok(btf) = Btf::parse(bad) {
                    for id in 0..4 {
                        let _ = (btf.find(Kind::Struct, "s"), btf.member(id, "c"), btf.size(id));
                    }
                }
            }
        }
    }

    #[test]
    fn the_description_of_a_map_is_well_formed() {
        assert_eq!(Btf::parse(describe_map(3)).unwrap().starts.len(), 2);
    }

    #[test]
    fn the_running_kernel_is_understood() {
        let Ok(btf) = Btf::kernel() else {
            eprintln!("SKIPPED: this kernel has no /sys/kernel/btf/vmlinux");
            return;
        };
        let tcp_sock = btf.find(Kind::Struct, "tcp_sock").unwrap();
        assert_eq!(btf.member(tcp_sock, "inet_conn").unwrap().offset, 0);
        assert!(btf.member(tcp_sock, "snd_cwnd").unwrap().offset < btf.size(tcp_sock).unwrap());
        assert!(btf.find(Kind::Function, "tcp_sendmsg").is_ok());
    }
}
