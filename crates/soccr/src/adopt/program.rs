//! The two programs: one that makes a connection of a marked segment, and one that looks at what has come of it.
//!
//! ```text
//!  take      on `lo`, incoming, for packets with our mark:
//!              with a priority            → as if they came from the interface of that number, where it runs again
//!              no socket                  → dropped
//!              a connection               → on its way
//!              a listener, attributes     → bpf_sk_assign_tcp_reqsk: a connection in the listener's accept queue
//!              a listener, none or refused → dropped: the listener would answer with a reset
//!  inspect   run by hand on a frame that holds addresses of several connections: writes behind each what the socket knows
//! ```
//!
//! # References
//! `Documentation/bpf/kfuncs.rst`; kernel `net/core/filter.c`: `bpf_sk_assign_tcp_reqsk` (Linux 6.9); `bpf-helpers(7)`.

use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::{io, mem};

use crate::adopt::attributes;
use crate::bpf::{self, Assembler, Btf, Kind, ProgramSpec, Register, Size, Type};
use crate::connection::{Flow, State};
use crate::sys::{LOOPBACK, MARK};

use Register::{R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10};

const PROG_TYPE_SCHED_CLS: u32 = 3;
const ATTACH_TCX_INGRESS: u32 = 46;

const PACKET_HOST: i32 = 0;
const REDIRECT_INGRESS: i32 = 1;

const TCX_NEXT: i32 = -1;
const TCX_DROP: i32 = 2;

const HELPER_SKB_STORE_BYTES: i32 = 9;
const HELPER_REDIRECT: i32 = 23;
const HELPER_SKB_LOAD_BYTES: i32 = 26;
const HELPER_SKB_CHANGE_TYPE: i32 = 32;
const HELPER_SKB_LOAD_BYTES_RELATIVE: i32 = 68;
const HELPER_SK_LOOKUP_TCP: i32 = 84;
const HELPER_SK_RELEASE: i32 = 86;
const HELPER_TCP_SOCK: i32 = 96;

/// `bpf_skb_load_bytes_relative`: from the IP header.
const FROM_NETWORK_HEADER: i32 = 1;
/// `bpf_sk_lookup_tcp`: in the namespace of the packet.
const CURRENT_NAMESPACE: i32 = -1;

/// Places in `struct __sk_buff`.
const SKB_MARK: i16 = 8;
const SKB_PROTOCOL: i16 = 16;
const SKB_PRIORITY: i16 = 32;
const SKB_IFINDEX: usize = 40;
/// In `struct bpf_sock`.
const SOCK_BOUND_DEV_IF: i16 = 0;
const SOCK_STATE: i16 = 72;
/// In `struct bpf_tcp_sock`.
const TCP_RCV_NXT: i16 = 16;
const TCP_SND_UNA: i16 = 24;

/// Source and destination addresses and ports follow each other in a packet as in `struct bpf_sock_tuple`: where they
/// begin, how long they are, and where TCP's options begin behind an IP header without any.
struct Layout {
    tuple_at: i32,
    tuple_length: i32,
    options_at: i32,
}

const IPV4: Layout = Layout { tuple_at: 12, tuple_length: 12, options_at: 40 };
const IPV6: Layout = Layout { tuple_at: 8, tuple_length: 36, options_at: 60 };

const ETHERNET: usize = 14;
/// The frame that is inspected: Ethernet's header, and for each connection room for the longer tuple and four words of answer.
const ANSWER_AT: usize = 36;
const ANSWER: usize = 16;
const ENTRY: usize = ANSWER_AT + ANSWER;

/// How many connections are inspected at a time: a system call costs more than a look.
pub(super) const MOST: usize = 16;

/// The programs of one network namespace. Dropping them detaches what is attached.
#[derive(Debug)]
pub(super) struct Programs {
    inspect: OwnedFd,
    take: OwnedFd,
    /// Where `take` is attached, by the number of the interface.
    links: Vec<(u32, OwnedFd)>,
}

/// What a socket knows of its connection (`struct bpf_tcp_sock`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) state: State,
    pub(super) rcv_nxt: u32,
    pub(super) snd_una: u32,
    /// It is bound to this interface; 0 for none.
    pub(super) interface: u32,
}

/// A step of loading that failed.
pub(super) struct Failure {
    pub(super) step: &'static str,
    pub(super) error: io::Error,
}

impl Failure {
    fn at(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self { step, error }
    }
}

impl Programs {
    /// Loads them, and attaches the first to `lo` of the calling thread's network namespace.
    pub(super) fn load() -> Result<Self, Failure> {
        // Fails fast without CAP_BPF, before milliseconds go into parsing BTF.
        let inspect = load(&inspect()).map_err(Failure::at("BPF_PROG_LOAD"))?;
        let mut btf = Btf::kernel().map_err(Failure::at("BTF"))?;
        let function = btf
            .find(Kind::Function, "bpf_sk_assign_tcp_reqsk")
            .map_err(Failure::at("bpf_sk_assign_tcp_reqsk"))?;
        let take = load(&take(&function)).map_err(Failure::at("BPF_PROG_LOAD"))?;
        let mut programs = Self { inspect, take, links: Vec::new() };
        programs.attach(LOOPBACK).map_err(Failure::at("BPF_LINK_CREATE"))?;
        Ok(programs)
    }

    /// Attaches the first one to another interface, too: for packets that are to come from there.
    pub(super) fn attach(&mut self, interface: u32) -> io::Result<()> {
        if !self.is_attached(interface) {
            let link = bpf::link(self.take.as_fd(), interface, ATTACH_TCX_INGRESS)?;
            self.links.push((interface, link));
        }
        Ok(())
    }

    pub(super) fn is_attached(&self, interface: u32) -> bool {
        self.links.iter().any(|(attached, _)| *attached == interface)
    }

    /// Whether it is attached to `lo` alone.
    pub(super) fn is_plain(&self) -> bool {
        self.links.len() == 1
    }

    /// Looks at the sockets that get packets of flows from this interface, in the calling thread's network namespace: the
    /// connection, or else the listener. At most [`MOST`] flows, of one address family.
    pub(super) fn inspect(&self, flows: &[Flow], interface: u32) -> io::Result<Vec<Option<Position>>> {
        let mut frame = frame(flows);
        // struct __sk_buff, up to the interface that it comes from.
        let mut context = [0; SKB_IFINDEX + mem::size_of::<u32>()];
        context[SKB_IFINDEX..].copy_from_slice(&interface.to_ne_bytes());
        bpf::test_run(self.inspect.as_fd(), &mut frame, &context)?;
        let entries = frame[ETHERNET..].chunks_exact(ENTRY);
        Ok(entries.map(|entry| Position::read(&entry[ANSWER_AT..])).collect())
    }
}

impl Position {
    /// What the program has written; zeros where there is no socket.
    fn read(answer: &[u8]) -> Option<Self> {
        let word = |place: usize| {
            let at = place * mem::size_of::<u32>();
            u32::from_ne_bytes([answer[at], answer[at + 1], answer[at + 2], answer[at + 3]])
        };
        let state = u8::try_from(word(0)).ok().and_then(State::from_kernel)?;
        Some(Self { state, rcv_nxt: word(1), snd_una: word(2), interface: word(3) })
    }
}

fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    bpf::load_program(&ProgramSpec {
        prog_type: PROG_TYPE_SCHED_CLS,
        expected_attach_type: 0,
        attach_btf_id: 0,
        instructions,
    })
}

/// The frame with the addresses of packets from the peers.
fn frame(flows: &[Flow]) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET + flows.len() * ENTRY];
    for (flow, entry) in flows.iter().zip(frame[ETHERNET..].chunks_exact_mut(ENTRY)) {
        let Flow { local, remote } = flow.on_the_wire();
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            entry[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        for end in [remote, local] {
            match end.ip() {
                IpAddr::V4(address) => put(&address.octets()),
                IpAddr::V6(address) => put(&address.octets()),
            }
        }
        put(&remote.port().to_be_bytes());
        put(&local.port().to_be_bytes());
    }
    let is_ipv4 = flows.first().is_none_or(Flow::is_ipv4);
    let protocol = if is_ipv4 { libc::ETH_P_IP } else { libc::ETH_P_IPV6 };
    frame[ETHERNET - 2..ETHERNET].copy_from_slice(&(protocol as u16).to_be_bytes());
    frame
}

/// `int take(struct __sk_buff *)`. R6 holds the packet, R7 where the tuple lies and then the socket, R8 the tuple's length
/// and then what stands against the packet, R9 where TCP's options begin.
fn take(assign: &Type) -> Vec<u64> {
    const TUPLE: i32 = -40;
    const OPTION: i32 = -64;
    let mut program = Assembler::default();
    program.copy(R6, R1);
    program.load(Size::Word, R2, R6, SKB_MARK);
    let not_ours = program.jump_unless(R2, MARK);
    program.load(Size::Word, R1, R6, SKB_PRIORITY);
    let is_here = program.jump_if_zero(R1);
    program.set(R2, REDIRECT_INGRESS);
    program.call(HELPER_REDIRECT);
    program.exit();
    program.land(is_here);
    // What came this way has no address of the link, and would be for another host.
    program.copy(R1, R6);
    program.set(R2, PACKET_HOST);
    program.call(HELPER_SKB_CHANGE_TYPE);
    set_layout(&mut program, &IPV4);
    let is_ipv4 = jump_unless_ipv6(&mut program);
    set_layout(&mut program, &IPV6);
    program.land(is_ipv4);

    program.copy(R1, R6);
    program.copy(R2, R7);
    program.copy(R3, R10);
    program.add(R3, TUPLE);
    program.copy(R4, R8);
    program.set(R5, FROM_NETWORK_HEADER);
    program.call(HELPER_SKB_LOAD_BYTES_RELATIVE);
    let no_tuple = program.jump_unless_zero(R0);
    look_up(&mut program, TUPLE);
    let no_socket = program.jump_if_zero(R0);
    program.copy(R7, R0);

    program.set(R8, 0);
    program.load(Size::Word, R1, R7, SOCK_STATE);
    let is_connection = program.jump_unless(R1, State::Listen as u32);
    program.set(R8, 1);
    program.copy(R1, R6);
    program.copy(R2, R9);
    program.copy(R3, R10);
    program.add(R3, OPTION);
    program.set(R4, attributes::OPTION as i32);
    program.set(R5, FROM_NETWORK_HEADER);
    program.call(HELPER_SKB_LOAD_BYTES_RELATIVE);
    let no_option = program.jump_unless_zero(R0);
    program.load(Size::Word, R1, R10, OPTION as i16);
    let other_option = program.jump_unless(R1, u32::from_ne_bytes(attributes::HEADER));
    program.copy(R1, R6);
    program.copy(R2, R7);
    program.copy(R3, R10);
    program.add(R3, OPTION + attributes::HEADER.len() as i32);
    program.set(R4, attributes::LENGTH as i32);
    program.call_kernel(assign);
    program.copy(R8, R0);
    for jump in [is_connection, no_option, other_option] {
        program.land(jump);
    }
    program.copy(R1, R7);
    program.call(HELPER_SK_RELEASE);
    let refused = program.jump_unless_zero(R8);

    program.land(not_ours);
    program.set(R0, TCX_NEXT);
    program.exit();
    for jump in [no_tuple, no_socket, refused] {
        program.land(jump);
    }
    program.set(R0, TCX_DROP);
    program.exit();
    program.finish()
}

/// `int inspect(struct __sk_buff *)`. R6 holds the frame, R7 the socket, R8 the tuple's length.
fn inspect() -> Vec<u64> {
    const TUPLE: i32 = -40;
    const WORDS: i16 = TUPLE as i16 - ANSWER as i16;
    let mut program = Assembler::default();
    program.copy(R6, R1);
    program.set(R8, IPV4.tuple_length);
    let is_ipv4 = jump_unless_ipv6(&mut program);
    program.set(R8, IPV6.tuple_length);
    program.land(is_ipv4);

    let mut ends = Vec::new();
    for place in 0..MOST {
        let entry = ETHERNET + place * ENTRY;
        program.copy(R1, R6);
        program.set(R2, entry as i32);
        program.copy(R3, R10);
        program.add(R3, TUPLE);
        program.copy(R4, R8);
        program.call(HELPER_SKB_LOAD_BYTES);
        // The frame ends here.
        ends.push(program.jump_unless_zero(R0));
        look_up(&mut program, TUPLE);
        let no_socket = program.jump_if_zero(R0);
        program.copy(R7, R0);

        program.load(Size::Word, R1, R7, SOCK_STATE);
        program.store(Size::Word, R10, WORDS, R1);
        program.load(Size::Word, R1, R7, SOCK_BOUND_DEV_IF);
        program.store(Size::Word, R10, WORDS + 12, R1);
        program.copy(R1, R7);
        program.call(HELPER_TCP_SOCK);
        let not_tcp = program.jump_if_zero(R0);
        for (word, member) in [(1, TCP_RCV_NXT), (2, TCP_SND_UNA)] {
            program.load(Size::Word, R1, R0, member);
            program.store(Size::Word, R10, WORDS + word * 4, R1);
        }
        program.copy(R1, R6);
        program.set(R2, (entry + ANSWER_AT) as i32);
        program.copy(R3, R10);
        program.add(R3, WORDS.into());
        program.set(R4, ANSWER as i32);
        program.set(R5, 0);
        program.call(HELPER_SKB_STORE_BYTES);
        program.land(not_tcp);
        program.copy(R1, R7);
        program.call(HELPER_SK_RELEASE);
        program.land(no_socket);
    }
    ends.into_iter().for_each(|end| program.land(end));
    program.set(R0, 0);
    program.exit();
    program.finish()
}

fn set_layout(program: &mut Assembler, layout: &Layout) {
    program.set(R7, layout.tuple_at);
    program.set(R8, layout.tuple_length);
    program.set(R9, layout.options_at);
}

fn jump_unless_ipv6(program: &mut Assembler) -> bpf::Jump {
    program.load(Size::Word, R2, R6, SKB_PROTOCOL);
    program.jump_unless(R2, u32::from((libc::ETH_P_IPV6 as u16).to_be()))
}

/// `R0 = bpf_sk_lookup_tcp(R6, stack + tuple, R8)`.
fn look_up(program: &mut Assembler, tuple: i32) {
    program.copy(R1, R6);
    program.copy(R2, R10);
    program.add(R2, tuple);
    program.copy(R3, R8);
    program.set(R4, CURRENT_NAMESPACE);
    program.set(R5, 0);
    program.call(HELPER_SK_LOOKUP_TCP);
}
