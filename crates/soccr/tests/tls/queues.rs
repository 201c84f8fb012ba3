//! What lies in the queues when a connection with kernel TLS moves.

use std::io::{Read, Write};
use std::net::Shutdown;

use rustix::net::{SendFlags, send};
use soccr::Flow;
use soccr::tls::{Cipher, Version};
use soccr_lab::{TcpInfo, wait_until};

use crate::ends::{Ends, Kind, assert_reads, leave, records, settle_and_lock};
use crate::sys::{receive_record, send_record};

const DATA: u8 = 23;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;

const KINDS: [Kind; 4] = [
    (Version::Tls12, Cipher::AesGcm128),
    (Version::Tls13, Cipher::AesGcm256),
    (Version::Tls12, Cipher::AesCcm128),
    (Version::Tls13, Cipher::ChaCha20Poly1305),
];

fn wait_for_unread(ends: &Ends, bytes: usize) {
    wait_until("it has arrived", || TcpInfo::of(&ends.ours).unwrap().unread == bytes);
}

pub fn half_a_record_in_the_receive_queue() {
    for (kind, cut) in KINDS.into_iter().zip([1, 5, 700, 12_000]) {
        let Some(mut ends) = Ends::receiving(kind) else { return };
        let first = vec![7; 16_000];
        let whole = records(kind, &[(DATA, &first), (DATA, &first), (DATA, b"end")]);
        let length = whole.len() / 3;
        let (head, tail) = whole.split_at(length + cut);
        ends.peer.write_all(head).unwrap();
        wait_for_unread(&ends, head.len());
        ends = ends.move_ours();
        ends.peer.write_all(tail).unwrap();
        ends.assert_reads(&[&first[..], &first, b"end"].concat());
    }
}

pub fn a_record_that_is_read_in_part() {
    for kind in KINDS {
        let Some(mut ends) = Ends::both(kind) else { return };
        ends.peer.write_all(&[1; 50]).unwrap();
        ends.peer.write_all(&[2; 20_000]).unwrap();
        ends.assert_reads(&[1; 10]);
        ends = ends.move_ours();
        ends.assert_reads(&[[1; 40].to_vec(), vec![2; 5]].concat());
        ends = ends.move_ours();
        ends.assert_reads(&[2; 19_995]);
        ends.assert_alive();
    }
}

pub fn control_records_keep_their_place() {
    for kind in KINDS {
        let Some(mut ends) = Ends::both(kind) else { return };
        ends.peer.write_all(b"one").unwrap();
        send_record(&ends.peer, HANDSHAKE, b"\x04\x00\x00\x01x").unwrap();
        ends.peer.write_all(b"two").unwrap();
        send_record(&ends.peer, ALERT, b"\x01\x00").unwrap();
        send_record(&ends.peer, ALERT, b"\x01\x00").unwrap();
        ends = ends.move_ours();
        let expected: [(u8, &[u8]); 5] = [
            (DATA, b"one"),
            (HANDSHAKE, b"\x04\x00\x00\x01x"),
            (DATA, b"two"),
            (ALERT, b"\x01\x00"),
            (ALERT, b"\x01\x00"),
        ];
        for (content_type, bytes) in expected {
            assert_eq!(receive_record(&ends.ours).unwrap(), (content_type, bytes.to_vec()));
        }
        ends.assert_alive();
    }
}

pub fn a_fin_behind_records() {
    for kind in KINDS {
        let Some(mut ends) = Ends::both(kind) else { return };
        ends.peer.write_all(b"the last words").unwrap();
        ends.peer.shutdown(Shutdown::Write).unwrap();
        wait_until("the FIN has arrived", || {
            TcpInfo::of(&ends.ours).unwrap().state == soccr_lab::State::CloseWait
        });
        ends = ends.move_ours();
        let mut read = Vec::new();
        ends.ours.read_to_end(&mut read).unwrap();
        assert_eq!(read, b"the last words");
        ends.ours.write_all(b"and ours").unwrap();
        ends.ours.shutdown(Shutdown::Write).unwrap();
        let mut read = Vec::new();
        ends.peer.read_to_end(&mut read).unwrap();
        assert_eq!(read, b"and ours");
    }
}

pub fn records_behind_our_fin() {
    for kind in KINDS {
        let Some(mut ends) = Ends::both(kind) else { return };
        ends.ours.write_all(b"the last words").unwrap();
        ends.ours.shutdown(Shutdown::Write).unwrap();
        ends.peer.write_all(b"one").unwrap();
        ends = ends.move_ours();
        assert_eq!(TcpInfo::of(&ends.ours).unwrap().state, soccr_lab::State::FinWait2);
        ends.peer.write_all(b"two").unwrap();
        ends.peer.shutdown(Shutdown::Write).unwrap();
        let (mut read, mut read_there) = (Vec::new(), Vec::new());
        ends.ours.read_to_end(&mut read).unwrap();
        ends.peer.read_to_end(&mut read_there).unwrap();
        assert_eq!((&read[..], &read_there[..]), (&b"onetwo"[..], &b"the last words"[..]));
    }
}

/// Sent or not, acknowledged or not.
pub fn the_send_queue_where_only_the_kernel_encrypts() {
    for kind in KINDS {
        let Some(mut ends) = Ends::transmitting(kind) else { return };
        let bytes: Vec<u8> = (0..3_000_000u32).map(|place| (place % 251) as u8).collect();
        ends.ours.set_nonblocking(true).unwrap();
        let mut written = 0;
        while let Ok(length) = ends.ours.write(&bytes[written..]) {
            written += length;
        }
        ends.ours.set_nonblocking(false).unwrap();
        assert!(TcpInfo::of(&ends.ours).unwrap().unacknowledged > 0);
        ends.peer.write_all(b"plain").unwrap();
        for _ in 0..3 {
            ends = ends.move_ours();
        }
        assert!(TcpInfo::of(&ends.ours).unwrap().unacknowledged > 0);
        ends.assert_reads(b"plain");
        let mut ours = ends.ours.try_clone().unwrap();
        let rest = bytes[written..].to_vec();
        let writer = std::thread::spawn(move || ours.write_all(&rest).unwrap());
        assert_reads(&mut ends.peer, &bytes);
        writer.join().unwrap();
    }
}

pub fn an_open_record_is_pushed() {
    for connect in [Ends::both, Ends::transmitting] {
        let Some(mut ends) = connect(KINDS[0]) else { return };
        send(&ends.ours, b"more to come", SendFlags::MORE).unwrap();
        assert_eq!(TcpInfo::of(&ends.ours).unwrap().unacknowledged, 0);
        ends = ends.move_ours();
        assert_reads(&mut ends.peer, b"more to come");
        ends.ours.write_all(b"this").unwrap();
        assert_reads(&mut ends.peer, b"this");
    }
}

pub fn bytes_of_the_application_are_put_back_in_front() {
    let Some(mut ends) = Ends::both(KINDS[1]) else { return };
    ends.peer.write_all(&[9; 20_000]).unwrap();
    ends.assert_reads(&[9; 17_000]);
    let lock = ends.pair.a.run(|| settle_and_lock(&ends.ours));
    let mut connection = ends.pair.a.run(|| leave(ends.ours));
    connection.unread(&[9; 17_000]).unwrap();
    ends.ours = ends.pair.a.run(|| {
        let restored = connection.restore().unwrap();
        lock.release().unwrap();
        restored.resume().unwrap()
    });
    ends.assert_reads(&[9; 20_000]);
    ends.assert_alive();
}

/// Held packets that go into the socket itself would pass through the layer, as if the application had written them.
pub fn what_was_held_is_not_encrypted() {
    let Some(mut ends) = Ends::both(KINDS[0]) else { return };
    let flow = Flow::of(&ends.ours).unwrap();
    let lock = ends.pair.a.run(|| settle_and_lock(&ends.ours));
    let connection = ends.pair.a.run(|| leave(ends.ours));
    let bytes = vec![5; 50_000];
    ends.peer.write_all(&bytes).unwrap();
    let mut held = Vec::new();
    wait_until("something is held", || {
        held.extend(lock.take().unwrap().remove(0).packets);
        held.len() > 3
    });
    let held = soccr::lock::Held { flow, packets: held };
    ends.ours = ends.pair.a.run(|| {
        let restored = connection.restore().unwrap();
        held.replay(&restored).unwrap();
        lock.release().unwrap();
        restored.resume().unwrap()
    });
    ends.assert_reads(&bytes);
    ends.assert_alive();
}
