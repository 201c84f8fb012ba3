//! What is refused, by its name, before it is touched; and what is left when something fails.

use std::io::Write;
use std::time::Duration;

use rustix::net::{SendFlags, send, sockopt};
use soccr::connection::Tls;
use soccr::tls::{Cipher, Secrets, Version};
use soccr::{Connection, Error, Flow, Lock};
use soccr_lab::{TcpInfo, set_option, wait_until};

use crate::ends::{Ends, Kind, OURS, assert_reads, keys, leave, records, set_layer, settle_and_lock};
use crate::sys::{receive_record, send_record};

const KIND: Kind = (Version::Tls12, Cipher::AesGcm128);

/// The save is refused, and the connection goes on.
fn refused(ends: &Ends) -> Error {
    let paused = soccr::pause(&ends.ours).unwrap().with_tls();
    let error = paused.save().unwrap_err();
    paused.resume().unwrap();
    error
}

#[track_caller]
fn assert_says(error: &Error, words: &str) {
    assert!(error.to_string().contains(words), "{error}");
}

pub fn a_send_queue_that_does_not_show_itself() {
    let Some(mut ends) = Ends::both(KIND) else { return };
    let lock = ends.pair.b.run(|| Lock::hold(&[Flow::of(&ends.peer).unwrap()])).unwrap();
    ends.ours.write_all(b"not acknowledged").unwrap();
    assert_says(&refused(&ends), "unacknowledged");
    let error = soccr::tls::settle(&ends.ours, Duration::from_millis(10)).unwrap_err();
    assert_says(&error, "does not acknowledge");
    lock.release().unwrap();
    assert_reads(&mut ends.peer, b"not acknowledged");
    ends.assert_alive();
}

pub fn an_open_record() {
    for connect in [Ends::both, Ends::transmitting] {
        let Some(mut ends) = connect(KIND) else { return };
        send(&ends.ours, b"open", SendFlags::MORE).unwrap();
        assert_says(&refused(&ends), "soccr::tls::settle");
        ends.ours.write_all(b" and closed").unwrap();
        assert_reads(&mut ends.peer, b"open and closed");
    }
}

/// Nobody who does not know of it reads a socket empty.
pub fn a_caller_who_does_not_carry_it() {
    for connect in [Ends::both, Ends::transmitting] {
        let Some(mut ends) = connect(KIND) else { return };
        ends.peer.write_all(b"unread").unwrap();
        wait_until("it has arrived", || TcpInfo::of(&ends.ours).unwrap().unread > 0);
        let paused = soccr::pause(&ends.ours).unwrap();
        assert_says(&paused.save().unwrap_err(), "with_tls");
        let bare = paused.save_bare(|length| Some(Box::new_uninit_slice(length))).unwrap_err();
        assert_says(&bare, "libsoccr_write");
        paused.resume().unwrap();
        ends.assert_reads(b"unread");
        ends.ours.write_all(b"alive").unwrap();
        assert_reads(&mut ends.peer, b"alive");
    }
}

pub fn keys_that_nobody_set() {
    let Some(mut ends) = Ends::plain() else { return };
    set_layer(&ends.ours).unwrap();
    assert_says(&refused(&ends), "without keys");
    ends.assert_alive();
}

pub fn ciphers_that_are_not_carried() {
    for (version, number, name) in [(Version::Tls13, 55_u16, "sm4-gcm"), (Version::Tls12, 57, "aria-gcm-128")]
    {
        let Some(mut ends) = Ends::plain() else { return };
        set_layer(&ends.ours).unwrap();
        // Its parts are as long as those of AES-GCM-128.
        let key = keys(Cipher::AesGcm128, OURS);
        let whole = [&(version as u16).to_ne_bytes()[..], &number.to_ne_bytes(), &key].concat();
        if let Err(error) = set_option(&ends.ours, 282, 1, &whole) {
            soccr_lab::skip(format_args!("the kernel has no {name}: {error}"));
            continue;
        }
        assert_says(&refused(&ends), name);
        ends.ours.write_all(b"alive").unwrap();
        assert_eq!(ends.peer.peek(&mut [0; 5]).unwrap(), 5);
    }
}

pub fn a_small_receive_buffer() {
    let Some(mut ends) = Ends::both(KIND) else { return };
    sockopt::set_socket_recv_buffer_size(&ends.ours, 8000).unwrap();
    assert_says(&refused(&ends), "SO_RCVBUF");
    ends.assert_alive();
}

/// The guard does not resume what it has read, and the value brings it all back.
pub fn what_has_been_read_is_restored_from_the_value() {
    let Some(mut ends) = Ends::both(KIND) else { return };
    ends.peer.write_all(b"unread").unwrap();
    wait_until("it has arrived", || TcpInfo::of(&ends.ours).unwrap().unread > 0);
    let lock = ends.pair.a.run(|| Lock::hold(&[Flow::of(&ends.ours).unwrap()])).unwrap();
    let paused = soccr::pause(&ends.ours).unwrap().with_tls();
    let connection = paused.save().unwrap();
    assert_eq!(paused.save().unwrap().tls, connection.tls);
    assert_says(&paused.resume().unwrap_err(), "have been read");
    drop(ends.ours);
    ends.ours = ends.pair.a.run(|| {
        // A try that fails leaves nothing behind.
        let elsewhere = Connection { local: "192.0.2.77:1".parse().unwrap(), ..connection.clone() };
        elsewhere.restore().unwrap_err();
        let restored = connection.restore().unwrap();
        lock.release().unwrap();
        restored.resume().unwrap()
    });
    ends.assert_reads(b"unread");
    ends.assert_alive();
}

/// What has arrived is read last, when nothing else is left to be found out, such as the address of the peer.
pub fn what_fails_before_anything_is_read_leaves_it() {
    let Some(mut ends) = Ends::both(KIND) else { return };
    ends.peer.write_all(b"unread").unwrap();
    wait_until("it has arrived", || TcpInfo::of(&ends.ours).unwrap().unread > 0);
    soccr_lab::supervised(|faults| {
        for left in 0.. {
            let paused = soccr::pause(&ends.ours).unwrap().with_tls();
            faults.arm_among(&[libc::SYS_getpeername], left, libc::ENOMEM);
            let saved = paused.save();
            if faults.disarm().is_none() {
                assert!(left > 1);
                return assert_eq!(saved.unwrap().tls.unwrap().unread[0].bytes, b"unread");
            }
            assert_eq!(saved.unwrap_err().errno(), Some(libc::ENOMEM));
            paused.resume().unwrap();
        }
    });
}

/// Who only looks leaves everything where it is.
pub fn what_is_only_looked_at_stays() {
    let Some(mut ends) = Ends::both(KIND) else { return };
    ends.peer.write_all(b"un").unwrap();
    ends.peer.write_all(b"read").unwrap();
    wait_until("it has arrived", || TcpInfo::of(&ends.ours).unwrap().unread == 6 + 2 * 29);
    let paused = soccr::pause(&ends.ours).unwrap().with_tls_in_place();
    let tls = paused.save().unwrap().tls.unwrap();
    paused.resume().unwrap();
    assert_eq!(tls.unread.iter().map(|record| &record.bytes[..]).collect::<Vec<_>>(), [b"unread"]);
    assert_eq!(tls.receive.unwrap().record_number(), 2);
    ends.assert_reads(b"unread");
    ends.assert_alive();
}

pub fn what_nobody_can_look_at_is_refused_and_stays() {
    let look = |ends: &Ends, words: &str| {
        soccr::tls::settle(&ends.ours, crate::ends::LIMIT).unwrap();
        let paused = soccr::pause(&ends.ours).unwrap().with_tls_in_place();
        assert_says(&paused.save().unwrap_err(), words);
        paused.resume().unwrap();
    };
    let arrived = |ends: &Ends, bytes| {
        wait_until("it has arrived", || TcpInfo::of(&ends.ours).unwrap().unread == bytes);
    };
    let Some(mut ends) = Ends::receiving(KIND) else { return };
    let sealed = records(KIND, &[(23, b"whole"), (23, b"half")]);
    let (head, tail) = sealed.split_at(sealed.len() - 7);
    ends.peer.write_all(head).unwrap();
    arrived(&ends, head.len());
    look(&ends, "half a TLS record");
    ends.peer.write_all(tail).unwrap();
    ends.assert_reads(b"wholehalf");

    let Some(mut ends) = Ends::both(KIND) else { return };
    ends.peer.write_all(b"data").unwrap();
    send_record(&ends.peer, 22, b"control").unwrap();
    arrived(&ends, 4 + 7 + 2 * 29);
    look(&ends, "records of another type");
    // The kernel has decrypted both, and shows the first only.
    look(&ends, "records of another type");
    ends.assert_reads(b"data");
    assert_eq!(receive_record(&ends.ours).unwrap(), (22, b"control".to_vec()));
    ends.peer.write_all(b"more").unwrap();
    ends.assert_reads(b"mo");
    look(&ends, "read in part");
    ends.assert_reads(b"re");
    ends.assert_alive();
}

pub fn keys_are_not_printed() {
    let Some(ends) = Ends::both(KIND) else { return };
    let lock = ends.pair.a.run(|| settle_and_lock(&ends.ours));
    let connection = ends.pair.a.run(|| leave(ends.ours));
    let (key, printed) = (keys(KIND.1, OURS), format!("{connection:?} {connection:#?}"));
    assert_eq!(connection.tls.as_ref().unwrap().summary().to_string(), "tls 1.2 aes-gcm-128 tx+rx");
    for window in key[8..24].windows(4) {
        let decimal = format!("{window:?}");
        let spaced: Vec<_> = window.iter().map(ToString::to_string).collect();
        let hexadecimal: String = window.iter().map(|byte| format!("{byte:02x}")).collect();
        for secret in [&decimal[1..decimal.len() - 1], &spaced.join(",\n"), &hexadecimal] {
            assert!(!printed.contains(secret), "{secret} in {printed}");
        }
    }
    lock.release().unwrap();
}

/// Says what to do, and leaves nothing behind.
pub fn a_restore_without_the_module() {
    if Ends::plain().is_some() {
        soccr_lab::skip("the kernel has TLS");
        return;
    }
    let pair = soccr_lab::Pair::new().unwrap();
    let listener = pair.b.run(|| std::net::TcpListener::bind((pair.b.v4, 443))).unwrap();
    let ours = pair.a.run(|| std::net::TcpStream::connect((pair.b.v4, 443))).unwrap();
    let mut peer = listener.accept().unwrap().0;
    let lock = pair.a.run(|| Lock::hold(&[Flow::of(&ours).unwrap()])).unwrap();
    let mut connection = pair.a.run(|| leave(ours));
    let mut tls = Tls::new(Version::Tls13, Cipher::AesGcm256);
    tls.transmit = Some(Secrets::new(Cipher::AesGcm256, &keys(Cipher::AesGcm256, OURS)).unwrap());
    connection.tls = Some(tls);
    let error = pair.a.run(|| connection.restore()).unwrap_err();
    assert_says(&error, "modprobe tls");
    connection.tls = None;
    let restored = pair.a.run(|| connection.restore()).unwrap();
    lock.release().unwrap();
    let mut ours = restored.resume().unwrap();
    ours.write_all(b"alive").unwrap();
    assert_reads(&mut peer, b"alive");
}
