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

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;

/// The kinds of types that are looked up by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Struct = 4,
    /// A function of the kernel: a BPF program may call some of them.
    Function = 12,
}

const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;
const HEADER: usize = 24;
const TYPE: usize = 12;
const MEMBER: usize = 12;
/// What sysfs gives per read.
const BLOCK: usize = 4096;

/// A type.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Type {
    pub(crate) number: u32,
    /// That of a structure, in bytes.
    pub(crate) size: usize,
    info: u32,
    /// Where its members begin.
    members: u64,
}

/// A member of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// Where it lies in the structure, in bytes.
    pub(crate) offset: usize,
    /// Where it stands among the members.
    pub(crate) index: u32,
}

/// Type information, read a block at a time where it lies: it is megabytes long, and little of it is of use.
pub(crate) struct Btf<S = File> {
    source: BufReader<S>,
    types: Range<u64>,
    names: Range<u64>,
}

impl Btf {
    /// That of the running kernel.
    ///
    /// # Errors
    /// `ENOENT` where the kernel was built without it (`CONFIG_DEBUG_INFO_BTF`).
    pub(crate) fn kernel() -> io::Result<Self> {
        Self::open(File::open("/sys/kernel/btf/vmlinux")?)
    }
}

impl<S: Read + Seek> Btf<S> {
    /// Checks that types and names are there as a whole; what they hold is checked when it is read.
    pub(crate) fn open(source: S) -> io::Result<Self> {
        let mut btf = Self { source: BufReader::with_capacity(BLOCK, source), types: 0..0, names: 0..0 };
        let header: [u8; HEADER] = btf.read()?;
        let [first, second] = MAGIC.to_ne_bytes();
        if !header.starts_with(&[first, second, VERSION]) {
            return Err(malformed());
        }
        let section = |at| {
            let start = u64::from(word(&header, 4)) + u64::from(word(&header, at));
            start..start + u64::from(word(&header, at + 4))
        };
        (btf.types, btf.names) = (section(8), section(16));
        for end in [btf.types.end, btf.names.end] {
            btf.seek(end.saturating_sub(1))?;
            btf.read::<1>()?;
        }
        Ok(btf)
    }

    /// Finds a type.
    ///
    /// # Errors
    /// `NotFound`, with the name; `InvalidData`.
    pub(crate) fn find(&mut self, kind: Kind, name: &str) -> io::Result<Type> {
        let name_at = self.find_name(name)?;
        self.seek(self.types.start)?;
        let (mut at, mut number) = (self.types.start, 0);
        while at < self.types.end {
            let header: [u8; TYPE] = self.read()?;
            let info = word(&header, 4);
            let tail = tail(info).ok_or_else(malformed)?;
            let members = at + TYPE as u64;
            at = members + tail as u64;
            if at > self.types.end {
                return Err(malformed());
            }
            number += 1;
            if kind_of(info) == kind as u8 && word(&header, 0) == name_at {
                return Ok(Type { number, size: word(&header, 8) as usize, info, members });
            }
            // Unlike `seek`, this keeps what has been read ahead.
            self.source.seek_relative(tail as i64)?;
        }
        Err(missing(name))
    }

    /// Finds a member of a structure; not one inside of an anonymous member.
    ///
    /// # Errors
    /// `NotFound`, with the name: also for bit fields, which have no address. `InvalidData`.
    pub(crate) fn member(&mut self, structure: &Type, name: &str) -> io::Result<Member> {
        let info = structure.info;
        let count = if kind_of(info) == Kind::Struct as u8 { info & 0xffff } else { 0 };
        for index in 0..count {
            self.seek(structure.members + u64::from(index) * MEMBER as u64)?;
            let member: [u8; MEMBER] = self.read()?;
            if self.is_name(word(&member, 0), name)? {
                let place = word(&member, 8);
                let has_bit_fields = info >> 31 != 0;
                let (bits, width) =
                    if has_bit_fields { (place & 0xff_ffff, place >> 24) } else { (place, 0) };
                if width != 0 || bits % 8 != 0 {
                    break;
                }
                return Ok(Member { offset: bits as usize / 8, index });
            }
        }
        Err(missing(name))
    }

    /// Where a name stands among the names. The kernel's build leaves each once, and none as the end of another
    /// (libbpf's `btf__dedup`).
    fn find_name(&mut self, name: &str) -> io::Result<u32> {
        let mut names = self.names_from(0)?;
        let (mut at, mut text) = (0, Vec::new());
        loop {
            text.clear();
            read_name(&mut names, name.len(), &mut text)?;
            match text.strip_suffix(&[0]) {
                Some(found) if found == name.as_bytes() => return Ok(at),
                None if text.is_empty() => return Err(missing(name)),
                Some(_) => at += text.len() as u32,
                None => at += (text.len() + names.skip_until(0)?) as u32,
            }
        }
    }

    /// Whether that name stands there among the names.
    fn is_name(&mut self, at: u32, name: &str) -> io::Result<bool> {
        let mut text = Vec::new();
        read_name(&mut self.names_from(at)?, name.len(), &mut text)?;
        Ok(text.strip_suffix(&[0]) == Some(name.as_bytes()))
    }

    fn names_from(&mut self, at: u32) -> io::Result<impl BufRead> {
        let start = self.names.start + u64::from(at);
        self.seek(start)?;
        Ok((&mut self.source).take(self.names.end.saturating_sub(start)))
    }

    fn seek(&mut self, at: u64) -> io::Result<()> {
        self.source.seek(SeekFrom::Start(at)).map(drop)
    }

    fn read<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.source.read_exact(&mut bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => malformed(),
            _ => error,
        })?;
        Ok(bytes)
    }
}

/// Reads a name with its zero, but no more than tells whether it is one of that length.
fn read_name(names: &mut impl BufRead, length: usize, text: &mut Vec<u8>) -> io::Result<()> {
    names.take(length as u64 + 1).read_until(0, text).map(drop)
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

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(*bytes[at..].first_chunk().expect("a whole word"))
}

fn kind_of(info: u32) -> u8 {
    (info >> 24 & 0x1f) as u8
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed BTF")
}

fn missing(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("the kernel has no {name}"))
}

/// Describes a map from `int` to an array of `values` `u32`, for the kinds of maps whose types the kernel wants to
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
    use std::io::Cursor;

    use super::*;

    /// `struct s { int a; int b : 3; int c; }` and `f()`.
    fn sample() -> Vec<u8> {
        let int = [1, 1 << 24, 4, 1 << 24 | 32];
        let structure = [5, 1 << 31 | 4 << 24 | 3, 12, 7, 1, 0, 9, 1, 3 << 24 | 32, 11, 1, 64];
        let function = [13, 12 << 24 | 1, 0];
        encode(&[int.as_slice(), &structure, &function].concat(), b"\0int\0s\0a\0b\0c\0f\0")
    }

    fn open(bytes: Vec<u8>) -> io::Result<Btf<Cursor<Vec<u8>>>> {
        Btf::open(Cursor::new(bytes))
    }

    #[test]
    fn finds_structures_and_members() {
        let mut btf = open(sample()).unwrap();
        let structure = btf.find(Kind::Struct, "s").unwrap();
        assert_eq!((structure.number, structure.size), (2, 12));
        assert_eq!(btf.member(&structure, "a").unwrap(), Member { offset: 0, index: 0 });
        assert_eq!(btf.member(&structure, "c").unwrap(), Member { offset: 8, index: 2 });
        let function = btf.find(Kind::Function, "f").unwrap();
        assert_eq!(function.number, 3);
        let missing = [
            btf.member(&structure, "b").expect_err("a bit field has no address"),
            btf.member(&structure, "f").unwrap_err(),
            btf.member(&function, "a").expect_err("a function has no members"),
            btf.find(Kind::Struct, "in").expect_err("the beginning of a name"),
            btf.find(Kind::Struct, "nt").expect_err("the end of a name"),
            btf.find(Kind::Struct, "a").expect_err("the name of a member"),
            btf.find(Kind::Function, "s").expect_err("a structure"),
        ];
        assert!(missing.iter().all(|error| error.kind() == io::ErrorKind::NotFound));
        assert_eq!(missing[0].to_string(), "the kernel has no b");
    }

    #[test]
    fn what_is_longer_than_a_block_is_found() {
        let long = "x".repeat(2 * BLOCK);
        let names = format!("\0{long}\0{long}y\0s\0m\0");
        let at = |name: &str| names.find(&format!("\0{name}\0")).unwrap() as u32 + 1;
        let pointer = [0, 2 << 24, 0].repeat(BLOCK);
        let member = |name, place| [name, 1, place];
        let members = [member(at(&long), 0).repeat(BLOCK), member(at("m"), 64).to_vec()].concat();
        let count = BLOCK as u32 + 1;
        let structure = [&[at("s"), 4 << 24 | count, 16], members.as_slice()].concat();
        let after = [at(&format!("{long}y")), 4 << 24, 7];
        let types = [pointer, structure, after.to_vec()].concat();
        let mut btf = open(encode(&types, names.as_bytes())).unwrap();
        let s = btf.find(Kind::Struct, "s").unwrap();
        assert_eq!((s.number as usize, s.size), (BLOCK + 1, 16));
        assert_eq!(btf.member(&s, "m").unwrap(), Member { offset: 8, index: BLOCK as u32 });
        assert_eq!(btf.member(&s, &long).unwrap(), Member { offset: 0, index: 0 });
        let after = btf.find(Kind::Struct, &format!("{long}y")).unwrap();
        assert_eq!((after.number, after.size), (s.number + 1, 7));
    }

    #[test]
    fn malformed_input_is_an_error_or_finds_nothing() {
        let good = sample();
        for length in 0..good.len() {
            let error = open(good[..length].to_vec()).err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "cut at {length}");
        }
        for at in 0..good.len() {
            for byte in [0, 1, 0x7f, 0x84, 0xff] {
                let mut bad = good.clone();
                bad[at] = byte;
                if let Err(error) = look_up(bad) {
                    let kind = error.kind();
                    let expected = [io::ErrorKind::InvalidData, io::ErrorKind::NotFound].contains(&kind);
                    assert!(expected, "{byte} at {at}: {error}");
                }
            }
        }
    }

    #[test]
    fn types_that_are_malformed_are_an_error() {
        let names = b"\0s\0";
        for types in [
            vec![0, 31 << 24, 0],
            vec![0, 2 << 24],
            vec![0, 4 << 24 | 2, 0, 0, 0, 0],
            vec![1, 4 << 24 | 0xffff, 0, 0, 0, 0],
        ] {
            let mut btf = open(encode(&types, names)).unwrap();
            let error = btf.find(Kind::Struct, "s").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{types:?}");
        }
    }

    fn look_up(bytes: Vec<u8>) -> io::Result<()> {
        let mut btf = open(bytes)?;
        let (structure, function) = (btf.find(Kind::Struct, "s"), btf.find(Kind::Function, "f"));
        btf.member(&structure?, "c")?;
        function.map(drop)
    }

    #[test]
    fn the_description_of_a_map_is_well_formed() {
        let mut btf = open(describe_map(3)).unwrap();
        assert_eq!(btf.find_name("int").unwrap(), 1);
        assert_eq!(btf.find(Kind::Struct, "int").unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_running_kernel_is_understood() {
        let Ok(mut btf) = Btf::kernel() else {
            soccr_lab::skip("this kernel has no /sys/kernel/btf/vmlinux");
            return;
        };
        let tcp_sock = btf.find(Kind::Struct, "tcp_sock").unwrap();
        assert_eq!(btf.member(&tcp_sock, "inet_conn").unwrap().offset, 0);
        assert!(btf.member(&tcp_sock, "snd_cwnd").unwrap().offset < tcp_sock.size);
        assert!(btf.find(Kind::Function, "tcp_sendmsg").is_ok());
    }
}
