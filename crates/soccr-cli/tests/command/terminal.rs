//! Tables in the width of a terminal.

use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::Value;
use soccr_lab::Namespace;

use crate::programs::{json, soccr, succeed};

crate::tests![a_list_fits_its_terminal];

/// What the command shows on a terminal that is so wide, without colours.
fn shown(width: u16, arguments: &[&str]) -> String {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let screen = openpt(flags).unwrap();
    grantpt(&screen).unwrap();
    unlockpt(&screen).unwrap();
    let terminal = ioctl_tiocgptpeer(&screen, flags).unwrap();
    let size = Winsize { ws_row: 24, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&terminal, size).unwrap();
    let mut program = soccr(arguments).env("NO_COLOR", "1").stdout(terminal).spawn().unwrap();
    let (mut screen, mut text, mut piece) = (File::from(screen), Vec::new(), [0; 4096]);
    // The terminal fails once the program has ended and all is read.
    while let Ok(length) = screen.read(&mut piece) {
        text.extend(&piece[..length]);
    }
    assert!(program.wait().unwrap().success());
    String::from_utf8(text).unwrap().replace('\r', "")
}

/// A listener, a connection to it, and what it has accepted.
fn connection(ours: SocketAddr, theirs: SocketAddr) -> (TcpListener, TcpStream, TcpStream) {
    let listener = TcpListener::bind(theirs).unwrap();
    let family = if ours.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&socket, &ours).unwrap();
    rustix::net::connect(&socket, &theirs).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    (listener, socket.into(), accepted)
}

fn a_list_fits_its_terminal() {
    let v6 = [1, 2].map(|n| Ipv6Addr::new(0x2001, 0xdb8, 0x1111, 0x2222, 0x3333, 0x4444, 0x5555, 0x6660 + n));
    let v4 = [101, 202].map(|n| Ipv4Addr::new(127, n, n, n));
    let mut control = Namespace::current().unwrap().rtnetlink().unwrap();
    for address in v6 {
        control.add_address("lo", address.into(), 128).unwrap();
    }
    let _open = [
        connection((v6[0], 44444).into(), (v6[1], 55555).into()),
        connection((v4[0], 44444).into(), (v4[1], 55555).into()),
    ];
    let sockets = json(&["list", "--json"]);
    assert_eq!(sockets.len(), 6);
    let words = |socket: &Value| {
        ["local", "remote", "state"].map(|name| socket[name].as_str().unwrap_or("*").to_owned())
    };
    let mut expected: Vec<String> = sockets.iter().flat_map(words).collect();
    expected.sort_unstable();
    for width in [40, 53, 60, 80, 100, 120, 140, 250] {
        let screen = shown(width, &["list"]);
        for line in screen.lines() {
            // The longest address needs 53 columns: a narrower terminal breaks it itself.
            let room = usize::from(if line.contains("2001:") { width.max(53) } else { width });
            assert!(line.chars().count() <= room, "{width} columns:\n{screen}");
        }
        let mut found: Vec<&str> = screen.split_whitespace().collect();
        found.retain(|word| expected.iter().any(|expected| expected == word));
        found.sort_unstable();
        assert_eq!(found, expected, "{width} columns:\n{screen}");
    }
    // A pipe has no width: there is a line for each socket.
    let piped = String::from_utf8(succeed(&["list"])).unwrap();
    assert_eq!(piped.lines().count(), 1 + sockets.len(), "{piped}");
}
