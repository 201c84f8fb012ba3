//! What others have: their chains, and the rules in them.

use std::fmt;
use std::io;

use soccr_netlink::{ACK, Batch, DUMP, REQUEST, Socket, attributes};

use super::rule::{DATA_VERDICT, NF_DROP, VERDICT_CHAIN, VERDICT_CODE};
use super::set::{ELEMENT_DATA, ELEMENT_KEY};
use super::{
    CHAIN_HOOK, CHAIN_NAME, CHAIN_POLICY, DATA_VALUE, ELEMENTS, ELEMENTS_SET, Family, GET_CHAIN,
    GET_ELEMENTS, GET_RULE, HEADER, HOOK_NUMBER, LIST_ELEMENT, PREFIX, RULE_CHAIN, RULE_EXPRESSIONS,
    SUBSYSTEM, TABLE, header, text, value,
};

/// The chains of others in a network namespace.
pub(crate) struct Look {
    pub(crate) chains: Vec<Chain>,
}

/// A chain of somebody else.
pub(crate) struct Chain {
    place: Place,
    /// Where its packets come from; `None` where rules jump to it.
    pub(crate) hook: Option<u32>,
    pub(crate) policy_is_drop: bool,
    /// The expressions of each rule, in their order.
    pub(crate) rules: Vec<Vec<u8>>,
}

/// What a rule, or the element of a map, decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    /// `NF_DROP` and the like.
    pub(crate) code: u32,
    /// Where the packet jumps to.
    pub(crate) chain: Option<String>,
}

#[derive(PartialEq, Eq)]
struct Place {
    family: u8,
    table: String,
    chain: String,
}

impl Look {
    /// Every chain that sees IP packets, but those of this project.
    pub(crate) fn at_others(socket: &mut Socket) -> io::Result<Self> {
        let mut batch = Batch::new();
        batch.message(SUBSYSTEM | GET_CHAIN, REQUEST | DUMP, |m| m.bytes(&header(0, 0)));
        let mut chains = socket.dump_all(&batch, |chains, payload| chains.extend(Chain::read(payload)))?;
        batch.clear();
        batch.message(SUBSYSTEM | GET_RULE, REQUEST | DUMP, |m| m.bytes(&header(0, 0)));
        let rules = socket.dump_all(&batch, |rules, payload| {
            let expressions = value(payload.get(HEADER..).unwrap_or_default(), RULE_EXPRESSIONS);
            rules.extend(Place::read(payload, RULE_CHAIN).zip(expressions.map(<[u8]>::to_vec)));
        })?;
        for (place, expressions) in rules {
            if let Some(chain) = chains.iter_mut().find(|chain: &&mut Chain| chain.place == place) {
                chain.rules.push(expressions);
            }
        }
        Ok(Self { chains })
    }
}

impl Look {
    /// The chain that a rule of another one jumps to.
    pub(crate) fn target(&self, from: &Chain, name: &str) -> Option<&Chain> {
        let is_it = |place: &Place| {
            place.family == from.place.family && place.table == from.place.table && place.chain == name
        };
        self.chains.iter().find(|chain| is_it(&chain.place))
    }
}

impl Decision {
    /// Reads the value of a register or of an element, if it is a verdict.
    pub(crate) fn read(data: &[u8]) -> Option<Self> {
        let verdict = value(data, DATA_VERDICT)?;
        let code = u32::from_be_bytes(*value(verdict, VERDICT_CODE)?.first_chunk()?);
        Some(Self { code, chain: text(verdict, VERDICT_CHAIN) })
    }
}

impl Chain {
    fn read(payload: &[u8]) -> Option<Self> {
        let place = Place::read(payload, CHAIN_NAME)?;
        let body = payload.get(HEADER..)?;
        let number = |bytes, kind| Some(u32::from_be_bytes(*value(bytes, kind)?.first_chunk()?));
        let hook = value(body, CHAIN_HOOK).and_then(|hook| number(hook, HOOK_NUMBER));
        let policy_is_drop = number(body, CHAIN_POLICY) == Some(NF_DROP);
        Some(Self { place, hook, policy_is_drop, rules: Vec::new() })
    }

    /// Whether a set in the table of this chain has an element with this key, and what a map decides for it.
    pub(crate) fn element(
        &self,
        socket: &mut Socket,
        set: &str,
        key: &[u8],
    ) -> io::Result<Option<Option<Decision>>> {
        let mut batch = Batch::new();
        batch.message(SUBSYSTEM | GET_ELEMENTS, REQUEST | ACK, |m| {
            m.bytes(&header(self.place.family, 0));
            m.string(TABLE, &self.place.table);
            m.string(ELEMENTS_SET, set);
            m.nested(ELEMENTS, |list| {
                list.nested(LIST_ELEMENT, |element| {
                    element.nested(ELEMENT_KEY, |k| k.attribute(DATA_VALUE, key));
                });
            });
        });
        let mut decision = None;
        let answer = socket.dump(&batch, |_, payload| {
            let list = value(payload.get(HEADER..).unwrap_or_default(), ELEMENTS).unwrap_or_default();
            decision =
                attributes(list).find_map(|(_, element)| Decision::read(value(element, ELEMENT_DATA)?));
        });
        match answer {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            answer => answer.map(|()| Some(decision)),
        }
    }
}

impl Place {
    /// Reads a message about a chain or a rule; `None` where its packets are not IP, or it is one of ours.
    fn read(payload: &[u8], name: u16) -> Option<Self> {
        let family = *payload.first()?;
        let is_ip = [Family::Inet, Family::Ipv4, Family::Ipv6].iter().any(|ip| *ip as u8 == family);
        let body = payload.get(HEADER..)?;
        let place = Self { family, table: text(body, TABLE)?, chain: text(body, name)? };
        (is_ip && !place.table.starts_with(PREFIX)).then_some(place)
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { family, table, chain } = &self.place;
        let family = match family {
            1 => "inet",
            10 => "ip6",
            _ => "ip",
        };
        write!(f, "{family} {table} {chain}")
    }
}
