//! What a rule does to a packet of which only some things are known: pure.

use std::collections::HashMap;

use soccr_netlink::attributes;

use crate::nftables::rule as nft;
use crate::nftables::set::{EXPRESSION_DATA, EXPRESSION_NAME};
use crate::nftables::{DATA_VALUE, Decision, text, value};
use crate::sys::{LOOPBACK, MARK};

/// What is known of a packet. Everything else may be anything.
#[derive(Clone, Copy, Debug)]
pub(super) enum Known {
    /// It plays the peer's: over `lo`, with our mark, of a connection that has been entered into connection tracking.
    OurSegment,
    /// The state that connection tracking gives it.
    State(u32),
}

/// linux/netfilter/nf_conntrack_common.h: `NF_CT_STATE_INVALID_BIT` and the like.
pub(super) const INVALID: u32 = 1;
const ESTABLISHED: u32 = 1 << 1;
pub(super) const UNTRACKED: u32 = 1 << 6;

/// What a rule decides about a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) decision: Decision,
    /// Every condition of the rule is met. Otherwise some may be met, and none is known not to be.
    pub(super) surely: bool,
    /// One of the conditions is about that by which the packet is known.
    pub(super) compared: bool,
}

/// An element of a set or a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Not,
    /// In a map, with what it decides.
    With(Option<Decision>),
    Unclear,
}

impl Known {
    /// The value that an expression loads.
    fn load(self, expression: &str, key: u32) -> Option<Vec<u8>> {
        let name = || [&b"lo"[..], &[0; 14]].concat();
        match (self, expression, key) {
            (Self::OurSegment, "meta", nft::META_MARK) => Some(MARK.to_ne_bytes().to_vec()),
            (Self::OurSegment, "meta", META_IIF | META_OIF) => Some(LOOPBACK.to_ne_bytes().to_vec()),
            (Self::OurSegment, "meta", META_IIFNAME | META_OIFNAME) => Some(name()),
            (Self::OurSegment, "ct", CT_STATE) => Some(ESTABLISHED.to_ne_bytes().to_vec()),
            (Self::State(state), "ct", CT_STATE) => Some(state.to_ne_bytes().to_vec()),
            (_, "meta", nft::META_L4PROTO) => Some(vec![libc::IPPROTO_TCP as u8]),
            _ => None,
        }
    }

    /// This is what a rule must look at to be about such packets.
    fn is_about(self, expression: &str, key: u32) -> bool {
        matches!(
            (self, expression, key),
            (Self::OurSegment, "meta", nft::META_MARK) | (Self::State(_), "ct", CT_STATE)
        )
    }
}

/// A value in a register.
#[derive(Clone, Debug)]
struct Loaded {
    bytes: Vec<u8>,
    /// It is what the packet is known by.
    matters: bool,
}

/// Runs the expressions of a rule. `None` where it does not apply, or decides nothing.
pub(super) fn run(
    expressions: &[u8],
    known: Known,
    find: &mut dyn FnMut(&str, &[u8]) -> Found,
) -> Option<Outcome> {
    let mut registers: HashMap<u32, Loaded> = HashMap::new();
    let (mut surely, mut compared) = (true, false);
    for (_, expression) in attributes(expressions) {
        let name = text(expression, EXPRESSION_NAME)?;
        let data = value(expression, EXPRESSION_DATA).unwrap_or_default();
        let number = |kind| Some(u32::from_be_bytes(*value(data, kind)?.first_chunk()?));
        let bytes = |kind| value(value(data, kind)?, DATA_VALUE);
        let source = |kind| number(kind).and_then(|register| registers.get(&register));
        match name.as_str() {
            "counter" | "log" | "notrack" => {}
            "meta" | "ct" => {
                if let (Some(register), Some(key)) = (number(nft::META_REGISTER), number(nft::META_KEY)) {
                    let matters = known.is_about(&name, key);
                    match known.load(&name, key) {
                        Some(bytes) => registers.insert(register, Loaded { bytes, matters }),
                        None => registers.remove(&register),
                    };
                }
            }
            "bitwise" => {
                let changed = source(nft::BITWISE_SOURCE).and_then(|loaded| {
                    let (mask, xor) = (bytes(nft::BITWISE_MASK)?, bytes(nft::BITWISE_XOR)?);
                    let pairs = loaded.bytes.iter().zip(mask).zip(xor);
                    let bytes = pairs.map(|((byte, mask), xor)| byte & mask ^ xor).collect();
                    Some(Loaded { bytes, ..*loaded })
                });
                put(&mut registers, number(nft::BITWISE_DESTINATION), changed);
            }
            "cmp" => match (source(nft::COMPARE_REGISTER), bytes(nft::COMPARE_DATA)) {
                (Some(loaded), Some(other)) => {
                    let is_equal = loaded.bytes.get(..other.len()) == Some(other);
                    match number(nft::COMPARE_OPERATION) {
                        Some(nft::COMPARE_EQUAL) if !is_equal => return None,
                        Some(nft::COMPARE_UNEQUAL) if is_equal => return None,
                        Some(nft::COMPARE_EQUAL | nft::COMPARE_UNEQUAL) => compared |= loaded.matters,
                        _ => surely = false,
                    }
                }
                _ => surely = false,
            },
            "lookup" => {
                let inverted = number(nft::LOOKUP_FLAGS).is_some_and(|flags| flags & nft::INVERTED != 0);
                let loaded = source(nft::LOOKUP_REGISTER);
                let found = match (&loaded, text(data, nft::LOOKUP_SET)) {
                    (Some(loaded), Some(set)) => find(&set, &loaded.bytes),
                    _ => Found::Unclear,
                };
                let matters = loaded.is_some_and(|loaded| loaded.matters);
                match found {
                    Found::Unclear => surely = false,
                    Found::Not if !inverted => return None,
                    Found::With(_) if inverted => return None,
                    Found::With(Some(decision)) => {
                        return Some(Outcome { decision, surely, compared: compared || matters });
                    }
                    _ => compared |= matters,
                }
            }
            "reject" => {
                let decision = Decision { code: nft::NF_DROP, chain: None };
                return Some(Outcome { decision, surely, compared });
            }
            "immediate" if number(nft::IMMEDIATE_REGISTER) == Some(nft::VERDICT_REGISTER) => {
                let decision = Decision::read(value(data, nft::IMMEDIATE_DATA)?)?;
                return Some(Outcome { decision, surely, compared });
            }
            // It may end the rule, or load anything.
            _ => {
                surely = false;
                registers.clear();
            }
        }
    }
    None
}

fn put(registers: &mut HashMap<u32, Loaded>, register: Option<u32>, loaded: Option<Loaded>) {
    if let Some(register) = register {
        match loaded {
            Some(loaded) => registers.insert(register, loaded),
            None => registers.remove(&register),
        };
    }
}

// linux/netfilter/nf_tables.h
const META_IIF: u32 = 4;
const META_OIF: u32 = 5;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const CT_STATE: u32 = 0;
