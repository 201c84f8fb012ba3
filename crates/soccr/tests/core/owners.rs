//! Sockets that share a port and belong to several users.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};

use rustix::fs::fstat;
use soccr_lab::{Family, Pair, as_owner, skip, wait_until};
use socket2::{Domain, Socket, Type};

use crate::ends::{Ends, PORT};

const OWNER: u32 = 1000;

/// A listener that shares its port with others of the same user alone.
fn join(address: SocketAddr, reuse: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(reuse)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    socket.listen(16)?;
    Ok(socket.into())
}

/// No user can listen beside a restored connection who could not before.
pub fn a_group_of_listeners_of_another_user() {
    for (family, accepted_by, reuse) in [
        (Family::V4, OWNER, false),
        (Family::V4, 0, false),
        (Family::V4, 0, true),
        (Family::V6, OWNER, false),
        (Family::V6, 0, true),
    ] {
        let pair = Pair::new().unwrap();
        let address = pair.a.address(family, PORT);
        let group = [(); 2].map(|()| pair.a.run(|| as_owner(OWNER, || join(address, reuse))).unwrap());
        if fstat(&group[0]).unwrap().st_uid != OWNER {
            return skip("this user may open no files for another one");
        }
        let remote = pair.b.run(|| TcpStream::connect(address)).unwrap();
        let accept = || {
            let mut accepted = None;
            wait_until("one of the group has it", || {
                accepted = group.iter().find_map(|listener| listener.accept().ok());
                accepted.is_some()
            });
            let (stream, from) = accepted.unwrap();
            stream.set_nonblocking(false).unwrap();
            (stream, from)
        };
        for listener in &group {
            listener.set_nonblocking(true).unwrap();
        }
        let (ours, from) = as_owner(accepted_by, accept);
        let mut ends = Ends::between(pair, ours, remote, from);
        let may_join = |ends: &Ends| {
            [OWNER, 0]
                .map(|user| ends.pair.a.run(|| as_owner(user, || join(address, reuse))).map(drop).is_ok())
        };
        assert_eq!(may_join(&ends), [true, false], "{family:?}");
        for _ in 0..3 {
            ends.receive(1000);
            ends.move_once();
            assert_eq!(fstat(&ends.ours).unwrap().st_uid, accepted_by);
            // Beside a bound connection of another user the kernel lets only those listen that have SO_REUSEADDR.
            let owner_may = accepted_by == OWNER || reuse;
            assert_eq!(may_join(&ends), [owner_may, false], "{family:?}, of user {accepted_by}");
        }
        // New connections still find the group.
        let _another = ends.pair.b.run(|| TcpStream::connect(address)).unwrap();
        accept();
        ends.finish();
    }
}
