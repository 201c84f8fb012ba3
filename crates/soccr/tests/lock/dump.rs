//! Lists of what the kernel has, while that changes.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use soccr::Flow;
use soccr::lock::PersistentLock;
use soccr_lab::Namespace;
use soccr_netlink::{Batch, DUMP, Family, REQUEST, Socket};

/// So many that the kernel tells about them in many pieces.
const MANY: usize = 20_000;

fn flows() -> Vec<Flow> {
    let flow = |number: usize| Flow {
        local: SocketAddr::from((Ipv4Addr::LOCALHOST, 80)),
        remote: SocketAddr::from(([10, 0, 0, 1], number as u16 + 1)),
    };
    (0..MANY).map(flow).collect()
}

/// Asks for what this lock contains.
fn question(name: &str) -> Batch {
    const GET_ELEMENTS: u16 = (10 << 8) | 13;
    const INET: u8 = 1;
    let mut batch = Batch::new();
    batch.message(GET_ELEMENTS, REQUEST | DUMP, |m| {
        m.bytes(&[INET, 0, 0, 0]);
        m.string(1, &format!("soccr-persistent-{name}"));
        m.string(2, "flows4");
    });
    batch
}

fn create(name: &str, flows: &[Flow]) -> PersistentLock {
    PersistentLock::create(name, flows, None).unwrap();
    PersistentLock::list().unwrap().into_iter().find(|lock| lock.name == name).unwrap()
}

pub fn an_end_with_an_error_is_one() {
    let lock = create("short-lived", &flows());
    let mut parts = 0;
    let outcome = Socket::open(Family::Netfilter).unwrap().dump(&question("short-lived"), |_, _| {
        if parts == 0 {
            lock.remove().unwrap();
        }
        parts += 1;
    });
    let error = outcome.expect_err("it was removed after the first part");
    assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "{error} after {parts} parts");
}

pub fn what_changes_meanwhile_is_asked_for_again() {
    let lock = create("large", &flows());
    let mut socket = Socket::open(Family::Netfilter).unwrap();
    let mut change = true;
    let outcome = socket.dump(&question("large"), |_, _| {
        if std::mem::take(&mut change) {
            create("small", &flows()[..1]).remove().unwrap();
        }
    });
    assert_eq!(outcome.map_err(|error| error.kind()), Err(ErrorKind::Interrupted));

    let mut changes = 3;
    let parts = socket.dump_all(&question("large"), |parts, _| {
        if parts.is_empty() && changes > 0 {
            changes -= 1;
            create("small", &flows()[..1]).remove().unwrap();
        }
        parts.push(());
    });
    let mut again = 0;
    socket.dump(&question("large"), |_, _| again += 1).unwrap();
    assert_eq!((parts.unwrap().len(), changes), (again, 0));
    lock.remove().unwrap();
}

/// What is no set of a firewall tells it by a flag of its own (`NLM_F_DUMP_INTR`).
pub fn the_kernel_says_that_something_has_changed() {
    const GET_ADDRESSES: u16 = 22;
    let here = Namespace::current().unwrap();
    let mut control = here.rtnetlink().unwrap();
    let address = |number: u16| IpAddr::from([10, 1, (number >> 8) as u8, number as u8]);
    for number in 0..1500 {
        control.add_address("lo", address(number), 32).unwrap();
    }
    let mut question = Batch::new();
    question.message(GET_ADDRESSES, REQUEST | DUMP, |m| m.bytes(&[0; 8]));
    let mut change = true;
    let outcome = Socket::open(Family::Route).unwrap().dump(&question, |_, _| {
        if std::mem::take(&mut change) {
            control.add_address("lo", address(2000), 32).unwrap();
        }
    });
    assert_eq!(outcome.map_err(|error| error.kind()), Err(ErrorKind::Interrupted));
}
