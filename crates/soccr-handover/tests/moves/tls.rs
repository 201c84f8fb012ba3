//! Connections whose encryption is the kernel's.

use std::io::Write;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use soccr_handover::{ErrorKind, Mover, Offer, Terms};

use crate::{assert_alive, connect, listen, read, stays};

/// Gives the kernel keys for both directions of both ends (TLS 1.2, AES-GCM-128); false where it has no TLS.
fn encrypt(ends: [&TcpStream; 2]) -> bool {
    let mut crypto = [7; 40];
    crypto[..4].copy_from_slice(&[3, 3, 51, 0]);
    crypto[32..].fill(0);
    for end in ends {
        if let Err(error) = soccr_lab::set_option(end, 6, 31, b"tls") {
            soccr_lab::skip(format_args!("the kernel has no TLS (modprobe tls): {error}"));
            return false;
        }
        [1, 2].into_iter().for_each(|direction| soccr_lab::set_option(end, 282, direction, &crypto).unwrap());
    }
    true
}

/// The state stands for what a program knows of the session, and may have keys as well.
pub fn with_kernel_tls_it_moves_with_its_session() {
    let (ours, peers) = connect(1);
    let (mut ours, mut peer) = (ours.into_iter().next().unwrap(), &peers[0]);
    if !encrypt([&ours, peer]) {
        return;
    }
    for number in 0..10 {
        peer.write_all(&[number; 20_000]).unwrap();
        assert_eq!(read(&ours, 3), [number; 3]);
        ours.write_all(b"to the peer").unwrap();
        let (mut here, there) = UnixStream::pair().unwrap();
        let look = |offer: &Offer<'_>| match format!("{offer:?}").contains("7, 7, 7") {
            true => Err("a key".into()),
            false => Ok(()),
        };
        let listening = listen(there, Terms::default().accept_if(look));
        let mover = Mover::new().unwrap();
        let departing = mover.take(ours).unwrap().unread(&[number; 3]).unwrap().with_critical_state([7; 4]);
        assert!(!format!("{departing:?}").contains("7, 7, 7"), "a key");
        let outcome = departing.send(&mut here);
        assert!(outcome.is_moved(), "{outcome:?}");
        drop(here);
        let arrived = listening.join().unwrap().pop().unwrap();
        assert_eq!(arrived.state(), [7; 4]);
        assert!(!format!("{arrived:?}").contains("7, 7, 7"), "a key");
        ours = arrived.into_stream().unwrap();
        assert_eq!(read(&ours, 20_000), [number; 20_000]);
        assert_eq!(read(peer, 11), b"to the peer");
        assert_alive(&ours, peer);
    }
}

pub fn with_kernel_tls_what_is_refused_goes_on() {
    let (ours, peers) = connect(1);
    let (ours, mut peer) = (ours.into_iter().next().unwrap(), &peers[0]);
    if !encrypt([&ours, peer]) {
        return;
    }
    peer.write_all(b"unread").unwrap();
    let (mut here, there) = UnixStream::pair().unwrap();
    let listening = listen(there, Terms::default().accept_if(|_| Err("not here".into())));
    let outcome = Mover::new().unwrap().take(ours).unwrap().send(&mut here);
    let ours = stays(outcome, ErrorKind::Refused);
    drop(here);
    assert!(listening.join().unwrap().is_empty());
    assert_eq!(read(&ours, 6), b"unread");
    assert_alive(&ours, peer);
}
