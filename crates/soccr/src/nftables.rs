//! nftables as netlink messages: tables, sets, chains and rules, made and changed in transactions.
//!
//! Locks and steering are tables of this kind. Sets, not rules: what a packet costs does not depend on how many
//! connections there are, and no rule is ever added for one.
//!
//! # References
//! `linux/netfilter/nf_tables.h`; nft(8).

mod look;
pub(crate) mod rule;
pub(crate) mod set;

use std::collections::{HashMap, HashSet};
use std::io;
use std::time::Duration;

use rustix::net::sockopt;
use soccr_netlink::{
    ACK, APPEND, Batch, CREATE, DUMP, EXCLUSIVE, Message, NOT_RECURSIVE, REQUEST, Socket, attributes,
};

use crate::connection::Flow;
use crate::error::{Error, Result};
pub(crate) use look::{Chain, Decision, Look};
use rule::Expressions;
use set::Set;

/// Opens the way for transactions about many connections: an ordinary user may get less.
pub(crate) fn set_longest(socket: &Socket) -> Result<()> {
    /// Enough for as many connections at once as a set can hold.
    const LONGEST: usize = 8 << 20;
    socket.set_send_buffer(LONGEST).map_err(|error| Error::system("SO_SNDBUF", error))
}

/// How many connections one transaction through this socket can add or delete.
pub(crate) fn most_elements(socket: &Socket) -> Result<usize> {
    sockopt::socket_send_buffer_size(socket)
        .map(elements_in)
        .map_err(|errno| Error::system("SO_SNDBUF", errno))
}

pub(crate) fn elements_in(length: usize) -> usize {
    /// What frames the elements, and the table where it is made.
    const TABLE: usize = 4096;
    /// One IPv6 element with its time limit, and its share of the headers.
    const ELEMENT: usize = 72;
    (length.saturating_sub(TABLE) / ELEMENT).max(1)
}

/// A table, whether it exists or not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table<'a> {
    pub(crate) family: Family,
    name: &'a str,
}

/// Which packets the chains of a table see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4 and IPv6.
    Inet = 1,
    Ipv4 = 2,
    /// Whatever a device receives.
    Netdev = 5,
    Ipv6 = 10,
}

impl<'a> Table<'a> {
    pub(crate) fn inet(name: &'a str) -> Self {
        Self { family: Family::Inet, name }
    }

    pub(crate) fn ip(name: &'a str, ipv6: bool) -> Self {
        Self { family: if ipv6 { Family::Ipv6 } else { Family::Ipv4 }, name }
    }

    pub(crate) fn netdev(name: &'a str) -> Self {
        Self { family: Family::Netdev, name }
    }
}

/// Where a chain gets its packets from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hook<'a> {
    pub(crate) number: u32,
    pub(crate) priority: i32,
    /// The device whose packets they are, for a table of devices.
    pub(crate) device: Option<&'a str>,
}

impl Hook<'_> {
    /// What arrives, before it is routed.
    pub(crate) const PREROUTING: u32 = 0;
    /// What is for this host.
    pub(crate) const INPUT: u32 = 1;
    /// What this host sends.
    pub(crate) const OUTPUT: u32 = 3;
    /// What leaves this host, or comes back to it over `lo`.
    pub(crate) const POSTROUTING: u32 = 4;
    /// What a device receives, before anything else looks at it.
    pub(crate) const INGRESS: u32 = 0;
    /// Before connection tracking and early demux.
    pub(crate) const RAW: i32 = -300;
    /// Behind connection tracking, before the packet is routed.
    pub(crate) const MANGLE: i32 = -150;
    /// Where firewalls are.
    pub(crate) const FILTER: i32 = 0;
}

/// A transaction in the making: all of it happens, or nothing.
pub(crate) struct Transaction<'a> {
    batch: &'a mut Batch,
    table: Table<'a>,
    /// Sets made so far: rules of the same transaction refer to them.
    sets: u32,
    is_empty: bool,
}

impl<'a> Transaction<'a> {
    /// Begins a transaction about a table. What `batch` held is forgotten.
    pub(crate) fn begin(batch: &'a mut Batch, table: Table<'a>) -> Self {
        batch.clear();
        batch.message(BATCH_BEGIN, REQUEST, |m| m.bytes(&header(0, NFTABLES)));
        Self { batch, table, sets: 0, is_empty: true }
    }

    /// Makes the table anew, whatever it was.
    pub(crate) fn replace_table(&mut self) {
        self.message(NEW_TABLE, CREATE, |_| ());
        self.remove();
        self.create_table(false);
    }

    /// Makes the table; `EEXIST` where there is one of this name. The kernel removes an `owned` one when the socket that
    /// made it is closed.
    pub(crate) fn create_table(&mut self, owned: bool) {
        self.message(NEW_TABLE, CREATE | EXCLUSIVE, |m| m.be32(TABLE_FLAGS, u32::from(owned) * TABLE_OWNER));
    }

    pub(crate) fn create_set(&mut self, set: &Set<'_>) {
        self.sets += 1;
        let id = self.sets;
        self.message(NEW_SET, CREATE, |m| set.write(m, id));
    }

    /// Makes a chain; `EEXIST` where there is one of this name.
    pub(crate) fn create_chain(&mut self, name: &str, hook: Hook<'_>) {
        self.message(NEW_CHAIN, CREATE | EXCLUSIVE, |m| {
            m.string(CHAIN_NAME, name);
            m.nested(CHAIN_HOOK, |h| {
                h.be32(HOOK_NUMBER, hook.number);
                h.be32(HOOK_PRIORITY, hook.priority as u32);
                if let Some(device) = hook.device {
                    h.string(HOOK_DEVICE, device);
                }
            });
            m.string(CHAIN_TYPE, "filter");
        });
    }

    /// Removes a chain with its rules.
    pub(crate) fn delete_chain(&mut self, name: &str) {
        self.message(DELETE_CHAIN, 0, |m| m.string(CHAIN_NAME, name));
    }

    /// Appends a rule to a chain.
    pub(crate) fn rule(&mut self, chain: &str, write: impl FnOnce(&mut Expressions<'_, '_>)) {
        self.message(NEW_RULE, CREATE | APPEND, |m| {
            m.string(RULE_CHAIN, chain);
            m.nested(RULE_EXPRESSIONS, |list| write(&mut Expressions::new(list)));
        });
    }

    /// Adds connections of one address family to a set; `each` writes what an element holds besides its key.
    pub(crate) fn add<'f>(
        &mut self,
        set: &str,
        flows: impl Iterator<Item = &'f Flow>,
        each: impl FnMut(&mut Message<'_>, &Flow),
    ) {
        self.elements(NEW_ELEMENTS, CREATE | EXCLUSIVE, set, flows, each);
    }

    /// Takes connections of one address family out of a set.
    pub(crate) fn delete<'f>(&mut self, set: &str, flows: impl Iterator<Item = &'f Flow>) {
        self.elements(DELETE_ELEMENTS, 0, set, flows, |_, _| ());
    }

    /// The same, where it is unknown which of them are in it: Linux 6.3, `EINVAL` before.
    pub(crate) fn destroy<'f>(&mut self, set: &str, flows: impl Iterator<Item = &'f Flow>) {
        self.elements(DESTROY_ELEMENTS, 0, set, flows, |_, _| ());
    }

    /// Adds those of the connections that are not in a set yet.
    pub(crate) fn complete<'f>(&mut self, set: &str, flows: impl Iterator<Item = &'f Flow>) {
        self.elements(NEW_ELEMENTS, CREATE, set, flows, |_, _| ());
    }

    /// Removes the table.
    pub(crate) fn remove(&mut self) {
        self.message(DELETE_TABLE, 0, |_| ());
    }

    /// Removes the table with these chains and sets; `EBUSY` where a set has elements.
    pub(crate) fn remove_empty<'n>(&mut self, chains: &[&str], sets: impl IntoIterator<Item = &'n str>) {
        // A set can go when no rule refers to it.
        chains.iter().for_each(|chain| self.delete_chain(chain));
        for set in sets {
            self.message(DELETE_SET, NOT_RECURSIVE, |m| m.string(set::SET_NAME, set));
        }
        self.remove();
    }

    /// Sends the transaction, if it is about anything, and waits for the kernel's verdict.
    pub(crate) fn commit(self, socket: &mut Socket) -> io::Result<()> {
        if self.is_empty {
            return Ok(());
        }
        self.batch.acknowledge_last();
        self.batch.message(BATCH_END, REQUEST, |m| m.bytes(&header(0, NFTABLES)));
        socket.transact(self.batch)
    }

    fn elements<'f>(
        &mut self,
        kind: u16,
        flags: u16,
        set: &str,
        flows: impl Iterator<Item = &'f Flow>,
        mut each: impl FnMut(&mut Message<'_>, &Flow),
    ) {
        /// As many as fit into one attribute, whose length has 16 bits, with keys of 40 bytes and an address of 16.
        const AT_ONCE: usize = 700;
        let mut flows = flows.peekable();
        while flows.peek().is_some() {
            self.message(kind, flags, |m| {
                m.string(ELEMENTS_SET, set);
                m.nested(ELEMENTS, |list| {
                    for flow in flows.by_ref().take(AT_ONCE) {
                        list.nested(LIST_ELEMENT, |element| {
                            write_key(element, flow);
                            each(element, flow);
                        });
                    }
                });
            });
        }
    }

    fn message(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Message<'_>)) {
        self.is_empty = false;
        self.batch.message(SUBSYSTEM | kind, REQUEST | flags, |m| {
            m.bytes(&header(self.table.family as u8, 0));
            m.string(TABLE, self.table.name);
            body(m);
        });
    }
}

/// All tables of this project have names that begin so.
pub(crate) const PREFIX: &str = "soccr-";

/// The names of all tables of a family, or of every family, in the namespace of `socket`.
pub(crate) fn names(socket: &mut Socket, family: impl Into<Option<Family>>) -> io::Result<Vec<String>> {
    let family = family.into().map_or(0, |family| family as u8);
    let mut batch = Batch::new();
    batch.message(SUBSYSTEM | GET_TABLE, REQUEST | DUMP, |m| m.bytes(&header(family, 0)));
    socket.dump_all(&batch, |names, payload| {
        names.extend(text(payload.get(HEADER..).unwrap_or_default(), TABLE));
    })
}

/// Whether a table has a chain of this name.
pub(crate) fn has_chain(socket: &mut Socket, table: Table<'_>, name: &str) -> io::Result<bool> {
    let mut batch = Batch::new();
    batch.message(SUBSYSTEM | GET_CHAIN, REQUEST | ACK, |m| {
        m.bytes(&header(table.family as u8, 0));
        m.string(TABLE, table.name);
        m.string(CHAIN_NAME, name);
    });
    match socket.dump(&batch, |_, _| ()) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        answer => answer.map(|()| true),
    }
}

/// The names of the chains of a table.
pub(crate) fn chains(socket: &mut Socket, table: Table<'_>) -> io::Result<Vec<String>> {
    let mut batch = Batch::new();
    batch.message(SUBSYSTEM | GET_CHAIN, REQUEST | DUMP, |m| m.bytes(&header(table.family as u8, 0)));
    socket.dump_all(&batch, |names, payload| {
        let chain = payload.get(HEADER..).unwrap_or_default();
        if text(chain, TABLE).is_some_and(|name| name == table.name) {
            names.extend(text(chain, CHAIN_NAME));
        }
    })
}

/// Whether any table in the namespace of `socket` has a base chain of this type.
pub(crate) fn has_chain_of_type(socket: &mut Socket, wanted: &str) -> io::Result<bool> {
    let mut batch = Batch::new();
    batch.message(SUBSYSTEM | GET_CHAIN, REQUEST | DUMP, |m| m.bytes(&header(0, 0)));
    let found = socket.dump_all(&batch, |found, payload| {
        let kind = value(payload.get(HEADER..).unwrap_or_default(), CHAIN_TYPE);
        found.push(kind.and_then(|kind| kind.strip_suffix(&[0])) == Some(wanted.as_bytes()));
    })?;
    Ok(found.contains(&true))
}

/// As many elements as always come in one part of a dump.
const ONE_PART: usize = 64;
/// How often a set is read at most until it is the same twice in a row.
const READINGS: usize = 4;

/// What `read` makes of every element of a set: of its connection, and its attributes.
///
/// Each part of a dump counts from the beginning how many elements to skip, and the kernel rearranges a hash table that has
/// grown or shrunk meanwhile: elements can be missing, and nothing says so. So a long set is read until it stays the same. One that packets
/// change all the time never does: then it is what any of the readings has found.
pub(crate) fn contents<T>(
    socket: &mut Socket,
    table: Table<'_>,
    set: &str,
    mut read: impl FnMut(Flow, &[u8]) -> T,
) -> io::Result<Vec<T>> {
    let mut batch = Batch::new();
    batch.message(SUBSYSTEM | GET_ELEMENTS, REQUEST | DUMP, |m| {
        m.bytes(&header(table.family as u8, 0));
        m.string(TABLE, table.name);
        m.string(ELEMENTS_SET, set);
    });
    let mut before = None;
    let mut found = HashMap::new();
    for _ in 0..READINGS {
        let contents = socket.dump_all(&batch, |contents, payload| {
            let list = value(payload.get(HEADER..).unwrap_or_default(), ELEMENTS).unwrap_or_default();
            for (_, element) in attributes(list) {
                let key =
                    value(element, set::ELEMENT_KEY).and_then(|key| set::flow_of(value(key, DATA_VALUE)?));
                contents.extend(key.map(|flow| (flow, read(flow, element))));
            }
        })?;
        let flows: HashSet<Flow> = contents.iter().map(|(flow, _)| *flow).collect();
        let is_whole = flows.len() == contents.len();
        if contents.len() <= ONE_PART || (is_whole && before.as_ref() == Some(&flows)) {
            return Ok(contents.into_iter().map(|(_, what)| what).collect());
        }
        before = Some(flows);
        found.extend(contents);
    }
    Ok(found.into_values().collect())
}

/// The connections of `flows` that are in a set, and maybe others.
pub(crate) fn present(
    socket: &mut Socket,
    table: Table<'_>,
    set: &str,
    flows: &[Flow],
) -> io::Result<Vec<Flow>> {
    if flows.len() > ONE_PART {
        return contents(socket, table, set, |flow, _| flow);
    }
    let mut present = Vec::new();
    let mut batch = Batch::new();
    for flow in flows {
        batch.clear();
        batch.message(SUBSYSTEM | GET_ELEMENTS, REQUEST | ACK, |m| {
            m.bytes(&header(table.family as u8, 0));
            m.string(TABLE, table.name);
            m.string(ELEMENTS_SET, set);
            m.nested(ELEMENTS, |list| list.nested(LIST_ELEMENT, |element| write_key(element, flow)));
        });
        match socket.dump(&batch, |_, _| ()) {
            Ok(()) => present.push(*flow),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(present)
}

fn write_key(element: &mut Message<'_>, flow: &Flow) {
    element.nested(set::ELEMENT_KEY, |key| key.attribute(DATA_VALUE, &set::key_of(flow)));
}

/// For how long elements of a set stay, where nothing else is said.
pub(crate) fn set_timeout(socket: &mut Socket, table: Table<'_>, set: &str) -> io::Result<Option<Duration>> {
    let mut batch = Batch::new();
    batch.message(SUBSYSTEM | GET_SET, REQUEST | ACK, |m| {
        m.bytes(&header(table.family as u8, 0));
        m.string(TABLE, table.name);
        m.string(set::SET_NAME, set);
    });
    let mut timeout = None;
    socket.dump(&batch, |_, payload| {
        timeout =
            value(payload.get(HEADER..).unwrap_or_default(), set::SET_DEFAULT_TIMEOUT).and_then(milliseconds);
    })?;
    Ok(timeout)
}

/// A time as the kernel tells it.
pub(crate) fn milliseconds(value: &[u8]) -> Option<Duration> {
    value.first_chunk().map(|bytes| Duration::from_millis(u64::from_be_bytes(*bytes)))
}

/// A time as the kernel wants it; zero would be none.
pub(crate) fn to_milliseconds(time: Duration) -> [u8; 8] {
    (time.as_millis().clamp(1, u64::MAX.into()) as u64).to_be_bytes()
}

/// The value of an attribute.
pub(crate) fn value(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|attribute| attribute.0 == kind).map(|attribute| attribute.1)
}

/// The text of an attribute.
pub(crate) fn text(bytes: &[u8], kind: u16) -> Option<String> {
    let text = value(bytes, kind)?;
    Some(std::str::from_utf8(text.strip_suffix(&[0])?).ok()?.to_owned())
}

/// `struct nfgenmsg`: the address family and a resource.
fn header(family: u8, resource: u16) -> [u8; HEADER] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

// linux/netfilter/nfnetlink.h
const HEADER: usize = 4;
const NFTABLES: u16 = 10;
const SUBSYSTEM: u16 = NFTABLES << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

// linux/netfilter/nf_tables.h: message types
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const NEW_SET: u16 = 9;
const GET_SET: u16 = 10;
const DELETE_SET: u16 = 11;
const NEW_ELEMENTS: u16 = 12;
const GET_ELEMENTS: u16 = 13;
const DELETE_ELEMENTS: u16 = 14;
const DESTROY_ELEMENTS: u16 = 30;

// Attributes of every message
const TABLE: u16 = 1;
const LIST_ELEMENT: u16 = 1;
pub(crate) const DATA_VALUE: u16 = 1;

// Attributes of one kind of message each
const TABLE_FLAGS: u16 = 2;
const TABLE_OWNER: u32 = 0x2;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const HOOK_DEVICE: u16 = 3;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
