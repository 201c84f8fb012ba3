//! Live connections enter the accept queues of servers that know nothing of it. Needs BPF: as root, on Linux 6.9.

mod ends;
mod give;
mod refused;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use ends::{Ends, On, accept, adopter, connect, pattern, read};
use soccr::connection::{ControlBlock, State};
use soccr::{Connection, Fidelity, Flow, Lock, pause};
use soccr_lab::{Family, TcpInfo, calls_of, set_option, sysctl, wait_until};

macro_rules! tests {
    ($($module:ident: $($name:ident)*;)*) => {
        [$($(soccr_lab::Test::new(concat!(stringify!($module), "::", stringify!($name)), $module::$name),)*)*]
    };
}

fn main() -> std::process::ExitCode {
    soccr_lab::harness(tests! {
        adopted: every_kind_of_listener_accepts_it
            what_was_negotiated_comes_back
            the_options_of_the_listener_count
            a_listener_that_is_bound_to_a_device_accepts_it
            a_long_queue_enters_before_the_server_reads
            many_of_every_kind_come_in_their_order
            what_arrives_meanwhile_follows
            a_listener_that_waits_for_data_gets_it_without
            a_listener_that_wants_what_no_router_has_forwarded_gets_it
            clients_that_connect_are_not_touched;
        give: a_socket_waits_until_its_peer_has_acknowledged
            a_socket_that_is_never_acknowledged_stays
            every_byte_arrives_while_the_client_talks
            a_buffer_hardly_grows_from_move_to_move
            many_sockets_enter_one_queue
            a_release_that_fails_is_told
            a_full_queue_keeps_the_rest;
        refused: what_no_server_can_have_stays
            what_does_not_enter_as_a_whole_is_taken_back
            a_kernel_without_cookies
            a_kernel_without_an_option
            a_loopback_that_is_down
            a_listener_that_speaks_mptcp
            listeners_one_of_which_speaks_mptcp
            a_listener_that_is_bound_to_another_device
            nobody_listens
            a_socket_is_in_the_way;
    })
}

mod adopted {
    use super::*;

    pub fn every_kind_of_listener_accepts_it() {
        let kinds = [
            (Family::V4, On::Address),
            (Family::LinkLocal, On::Address),
            (Family::LinkLocal, On::Wildcard),
            (Family::V4, On::Wildcard),
            (Family::V4, On::DualStack),
            (Family::V6, On::Address),
            (Family::V6, On::DualStack),
            (Family::Mapped, On::DualStack),
            (Family::Mapped, On::Wildcard),
        ];
        for (family, on) in kinds {
            for (received, fin) in [(0, false), (5000, false), (40_000, true), (0, true)] {
                one(family, on, received, fin);
            }
        }
    }

    /// Several are looked at by one system call: as many as are alike.
    pub fn many_of_every_kind_come_in_their_order() {
        let mut ends = Ends::new(Family::V4);
        let Some(mut adopter) = adopter(&ends.pair) else { return };
        let old = ends.listen(Family::V6, On::DualStack);
        let families = (0..70).map(|number| [Family::V4, Family::V6][usize::from(number / 20 % 2 == 1)]);
        let clients: Vec<TcpStream> = families.map(|family| connect(&ends.pair, family)).collect();
        let sockets: Vec<TcpStream> = clients.iter().map(|_| accept(&old)).collect();
        drop(old);
        let length = |number| if (37..43).contains(&number) { 40_000 } else { [0, 3, 5000][number % 3] };
        for (number, mut client) in clients.iter().enumerate() {
            let length = length(number);
            client.write_all(&pattern(length)).unwrap();
            let server = server_of(client, &sockets);
            wait_until("it is there", || TcpInfo::of(server).unwrap().unread == length);
        }
        let listener = ends.listen(Family::V6, On::DualStack);
        let flows: Vec<Flow> = sockets.iter().map(|socket| Flow::of(socket).unwrap()).collect();
        let lock = ends.pair.a.run(|| Lock::hold(&flows)).unwrap();
        let leave = |socket: TcpStream| {
            let paused = pause(&socket).unwrap();
            let connection = paused.save().unwrap();
            paused.detach().unwrap();
            connection
        };
        let mut connections: Vec<Connection> = sockets.into_iter().map(leave).collect();
        connections[23].control.reset = true;
        let mut outcomes = Vec::new();
        let duplicated = ends
            .pair
            .a
            .run(|| calls_of(&[libc::SYS_pidfd_getfd], || outcomes = adopter.adopt(&lock, &connections)));
        // Among all descriptors of the host the listener is looked for once, not for each long queue.
        assert_eq!(duplicated.len(), 1);
        for (number, (outcome, flow)) in outcomes.iter().zip(&flows).enumerate() {
            match outcome {
                Ok(adopted) => assert_eq!(adopted.flow(), *flow),
                Err(error) => assert!(number == 23 && error.to_string().contains("has reset"), "{error}"),
            }
        }
        connections[23].control.reset = false;
        let restored = ends.pair.a.run(|| connections[23].restore()).unwrap();
        lock.release().unwrap();
        let mut servers: Vec<TcpStream> = vec![restored.resume().unwrap()];
        servers.extend((1..70).map(|_| accept(&listener)));
        for (number, mut client) in clients.iter().enumerate() {
            let server = server_of(client, &servers);
            client.write_all(b"and on").unwrap();
            let bytes = [&pattern(length(number))[..], b"and on"].concat();
            assert!(read(server, bytes.len()) == bytes, "other bytes than were sent");
        }
        ends.no_reset();
    }

    fn server_of<'a>(client: &TcpStream, servers: &'a [TcpStream]) -> &'a TcpStream {
        // A port serves both families.
        let plain = |end: SocketAddr| (end.ip().to_canonical(), end.port());
        let client = plain(client.local_addr().unwrap());
        servers.iter().find(|server| plain(server.peer_addr().unwrap()) == client).unwrap()
    }

    fn one(family: Family, on: On, received: usize, fin: bool) {
        let seen = if family == Family::Mapped { Family::V4 } else { family };
        let mut ends = Ends::new(seen);
        let Some(mut adopter) = adopter(&ends.pair) else { return };
        ends.client.write_all(&pattern(received)).unwrap();
        if fin {
            ends.client.shutdown(Shutdown::Write).unwrap();
            wait_until("CLOSE_WAIT", || {
                TcpInfo::of(&ends.ours).unwrap().state == soccr_lab::State::CloseWait
            });
        }
        ends.received(received);
        let listener = ends.listen(family, on);
        let (lock, connection) = ends.leave();
        let connections = [connection];
        let outcome = ends.pair.a.run(|| adopter.adopt(&lock, &connections)).remove(0);
        let adopted = outcome.unwrap_or_else(|error| panic!("{family:?} {on:?} {received} {fin}: {error}"));
        assert!(!adopted.accepted());
        lock.release().unwrap();
        adopter.announce(&connections[0]).unwrap();

        let mut server = accept(&listener);
        assert_eq!(server.peer_addr().unwrap().ip().to_canonical(), connections[0].remote.ip());
        assert_eq!(adopter.is_accepted(adopted.flow()).unwrap(), Some(true));
        assert!(read(&server, received) == pattern(received), "other bytes than were unread");
        if fin {
            assert_eq!(server.read(&mut [0]).unwrap(), 0, "the end is missing");
            server.write_all(b"farewell").unwrap();
            drop(server);
            assert_eq!(read(&ends.client, 8), b"farewell");
            assert_eq!(ends.client.read(&mut [0]).unwrap(), 0);
            ends.no_reset();
        } else {
            ends.talk(&server);
        }
    }

    pub fn what_was_negotiated_comes_back() {
        for (name, value) in [
            ("tcp_ecn", "1"),
            ("tcp_window_scaling", "0"),
            ("tcp_sack", "0"),
            ("tcp_timestamps", "0"),
            ("tcp_rmem", "4096 16384 16384"),
        ] {
            for family in [Family::V4, Family::V6] {
                let mut ends = Ends::prepared(family, |host| {
                    host.run(|| sysctl(&format!("net/ipv4/{name}"), value)).unwrap();
                });
                let Some(mut adopter) = adopter(&ends.pair) else { return };
                let listener = ends.listen(family, On::Address);
                let (lock, connection) = ends.leave();
                let connections = [connection];
                let adopted = ends.pair.a.run(|| adopter.adopt(&lock, &connections)).remove(0).unwrap();
                let server = accept(&listener);
                // Before a byte has passed, it is the same connection to the last number.
                let paused = pause(&server).unwrap();
                let now = paused.save().unwrap();
                paused.resume().unwrap();
                let saved = &connections[0].control;
                assert_eq!(fixed(&now.control), fixed(saved), "{name} = {value}");
                let (before, after) = (saved.options.timestamps, now.control.options.timestamps);
                let ahead = after.unwrap_or(0).wrapping_sub(before.unwrap_or(0)) as i32;
                assert!(before.is_some() == after.is_some() && ahead >= 0, "{before:?} became {after:?}");
                assert_eq!(adopted.report().get("snd_mss").unwrap().reason(), "");
                lock.release().unwrap();
                adopter.announce(&connections[0]).unwrap();
                ends.talk(&server);
            }
        }
    }

    pub fn the_options_of_the_listener_count() {
        let mut ends = Ends::new(Family::V4);
        let Some(mut adopter) = adopter(&ends.pair) else { return };
        ends.ours.set_nodelay(true).unwrap();
        let listener = ends.listen(Family::V4, On::Address);
        let (lock, connection) = ends.leave();
        let connections = [connection];
        let adopted = ends.pair.a.run(|| adopter.adopt(&lock, &connections)).remove(0).unwrap();
        let nodelay = adopted.report().get("TCP_NODELAY").expect("it is listed");
        assert_eq!(nodelay.fidelity(), Fidelity::Missing);
        assert!(nodelay.reason().contains("options of its listener"), "{nodelay}");
        lock.release().unwrap();
        adopter.announce(&connections[0]).unwrap();
        let server = accept(&listener);
        assert!(!server.nodelay().unwrap());
        ends.talk(&server);
    }

    /// What must not differ.
    fn fixed(control: &ControlBlock) -> (State, [u32; 4], u16, [Option<u8>; 2], [bool; 3]) {
        let ControlBlock { state, rcv_nxt, inq_len, write_seq, outq_len, options, .. } = control;
        let scale = options.window_scale;
        (
            *state,
            [*rcv_nxt, *inq_len, *write_seq, *outq_len],
            options.mss_clamp,
            [scale.map(|scale| scale.snd), scale.map(|scale| scale.rcv)],
            [options.sack, options.ecn, options.microseconds],
        )
    }

    pub fn a_listener_that_is_bound_to_a_device_accepts_it() {
        for family in [Family::V4, Family::V6, Family::LinkLocal] {
            let received = 30_000;
            let mut ends = Ends::new(family);
            let Some(mut adopter) = adopter(&ends.pair) else { return };
            ends.client.write_all(&pattern(received)).unwrap();
            ends.received(received);
            let listener = ends.listen(family, On::Wildcard);
            set_option(&listener, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"eth0\0").unwrap();
            let (lock, connection) = ends.leave();
            let connections = [connection];
            ends.pair.a.run(|| adopter.adopt(&lock, &connections)).remove(0).unwrap();
            lock.release().unwrap();
            adopter.announce(&connections[0]).unwrap();
            let server = accept(&listener);
            assert!(read(&server, received) == pattern(received), "other bytes than were unread");
            ends.talk(&server);
        }
    }

    pub fn a_long_queue_enters_before_the_server_reads() {
        for (family, length) in [(Family::V4, 64 << 20), (Family::V6, 8 << 20)] {
            let mut ends = Ends::prepared(family, |host| {
                let sizes = format!("4096 {0} {0}", length * 4);
                host.run(|| sysctl("net/ipv4/tcp_rmem", &sizes).and(sysctl("net/ipv4/tcp_wmem", &sizes)))
                    .unwrap();
            });
            let Some(mut adopter) = adopter(&ends.pair) else { return };
            ends.client.write_all(&pattern(length)).unwrap();
            ends.received(length);
            // The new server has small buffers, as usual.
            ends.pair.a.run(|| sysctl("net/ipv4/tcp_rmem", "4096 131072 6291456")).unwrap();
            let listener = ends.listen(family, On::Address);
            let (lock, connection) = ends.leave();
            let connections = [connection];
            let outcome = ends.pair.a.run(|| adopter.adopt(&lock, &connections)).remove(0);
            assert!(!outcome.unwrap().accepted());
            lock.release().unwrap();
            adopter.announce(&connections[0]).unwrap();
            let server = accept(&listener);
            assert!(read(&server, length) == pattern(length), "other bytes than were unread");
            ends.talk(&server);
        }
    }

    pub fn what_arrives_meanwhile_follows() {
        let mut ends = Ends::new(Family::V4);
        let Some(mut adopter) = adopter(&ends.pair) else { return };
        let listener = ends.listen(Family::V4, On::Wildcard);
        ends.client.write_all(b"before, ").unwrap();
        ends.received(8);
        let (lock, connection) = ends.leave();
        ends.client.write_all(b"meanwhile, ").unwrap();
        wait_until("a packet is held", || lock.held() > 0);
        let connections = [connection];
        ends.pair.a.run(|| adopter.adopt(&lock, &connections)).remove(0).unwrap();
        ends.client.write_all(b"and after").unwrap();
        lock.release().unwrap();
        adopter.announce(&connections[0]).unwrap();
        let server = accept(&listener);
        assert_eq!(read(&server, 28), b"before, meanwhile, and after");
        ends.talk(&server);
    }

    pub fn a_listener_that_waits_for_data_gets_it_without() {
        let mut ends = Ends::new(Family::V4);
        let Some(mut adopter) = adopter(&ends.pair) else { return };
        let listener = ends.listen(Family::V4, On::Wildcard);
        let seconds = 5_i32.to_ne_bytes();
        set_option(&listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, &seconds).unwrap();
        let (lock, connection) = ends.leave();
        let connections = [connection];
        ends.pair.a.run(|| adopter.adopt(&lock, &connections)).remove(0).unwrap();
        lock.release().unwrap();
        adopter.announce(&connections[0]).unwrap();
        ends.talk(&accept(&listener));
    }

    /// RFC 5082.
    pub fn a_listener_that_wants_what_no_router_has_forwarded_gets_it() {
        for (family, level, least, hops) in [
            (Family::V4, libc::IPPROTO_IP, libc::IP_MINTTL, libc::IP_TTL),
            (Family::V6, libc::IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT, libc::IPV6_UNICAST_HOPS),
        ] {
            let most = 255_i32.to_ne_bytes();
            let mut ends = Ends::new(family);
            let Some(mut adopter) = adopter(&ends.pair) else { return };
            set_option(&ends.client, level, hops, &most).unwrap();
            ends.client.write_all(&pattern(5000)).unwrap();
            ends.received(5000);
            let listener = ends.listen(family, On::Address);
            set_option(&listener, level, least, &most).unwrap();
            let (lock, connection) = ends.leave();
            let connections = [connection];
            ends.pair.a.run(|| adopter.adopt(&lock, &connections)).remove(0).unwrap();
            lock.release().unwrap();
            adopter.announce(&connections[0]).unwrap();
            let server = accept(&listener);
            assert!(read(&server, 5000) == pattern(5000), "other bytes than were unread");
            ends.talk(&server);
        }
    }

    pub fn clients_that_connect_are_not_touched() {
        let ends = Ends::new(Family::V4);
        let Some(adopter) = adopter(&ends.pair) else { return };
        let listener = ends.listen(Family::V4, On::Wildcard);
        let mut client = connect(&ends.pair, Family::V4);
        client.write_all(b"new").unwrap();
        assert_eq!(read(&accept(&listener), 3), b"new");
        // A connection over `lo`, where the program is.
        let mut local = ends.pair.a.run(|| std::net::TcpStream::connect(("127.0.0.1", ends::PORT))).unwrap();
        local.write_all(b"near").unwrap();
        assert_eq!(read(&accept(&listener), 4), b"near");
        drop(adopter);
    }
}
