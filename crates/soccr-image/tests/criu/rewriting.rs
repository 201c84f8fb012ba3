//! Addresses that change in images: nothing else does.

use super::*;

#[test]
fn without_a_match_nothing_changes() {
    for rules in [&[][..], &["10.0.0.1=10.0.0.2"], &["127.0.0.1:7000=10.0.0.2", "[::1]:1=::2"][..1]] {
        let (bytes, changed) = rewrite(FILES, &maps(rules)).unwrap();
        let expected = usize::from(rules.len() == 1 && rules[0].starts_with("127"));
        assert_eq!(changed, expected, "{rules:?}");
        assert_eq!(bytes == FILES, changed == 0);
    }
}

#[test]
fn only_what_a_rule_concerns_changes() {
    let old = sockets(FILES).unwrap();
    let rules = ["127.0.0.1:7000=192.0.2.1:80", "127.0.0.1=198.51.100.255", "::1=2001:db8::ffff:1"];
    let (bytes, changed) = rewrite(FILES, &maps(&rules)).unwrap();
    assert_eq!(changed, 7);
    let new = sockets(&bytes).unwrap();
    for (old, new) in old.iter().zip(&new) {
        let (local, remote) = match (old.state, old.local) {
            (State::Listen, _) => ("192.0.2.1:80".parse().unwrap(), "0.0.0.0:0".parse().unwrap()),
            (_, SocketAddr::V4(_)) => {
                let ip: IpAddr = "198.51.100.255".parse().unwrap();
                ((ip, old.local.port()).into(), (ip, old.remote.port()).into())
            }
            _ => {
                let ip: IpAddr = "2001:db8::ffff:1".parse().unwrap();
                ((ip, old.local.port()).into(), (ip, old.remote.port()).into())
            }
        };
        assert_eq!(*new, Socket { local, remote, ..old.clone() });
    }
    // What rules have done, rules undo: then every byte is where it was.
    let rules = ["192.0.2.1:80=127.0.0.1:7000", "198.51.100.255=127.0.0.1", "2001:db8::ffff:1=::1"];
    let (back, changed) = rewrite(&bytes, &maps(&rules)).unwrap();
    assert_eq!(changed, 7);
    assert!(back == FILES);
}

#[test]
fn peers_follow_with_their_ports() {
    let old = sockets(FILES).unwrap();
    let at =
        old.iter().map(|socket| socket.remote).find(|remote| remote.is_ipv4() && remote.port() > 0).unwrap();
    let (bytes, changed) = rewrite(FILES, &maps(&[&format!("{at}=192.0.2.1:80")])).unwrap();
    assert_eq!(changed, old.iter().filter(|socket| [socket.local, socket.remote].contains(&at)).count());
    for (old, new) in old.iter().zip(sockets(&bytes).unwrap()) {
        let follow = |end| if end == at { "192.0.2.1:80".parse().unwrap() } else { end };
        assert_eq!(new, Socket { local: follow(old.local), remote: follow(old.remote), ..old.clone() });
    }
}

/// The container by hand: the entry of the socket with number 13, changed by `change`.
fn with_changed_entry(change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let (mut out, mut rest) = (FILES[..8].to_vec(), &FILES[8..]);
    while !rest.is_empty() {
        let length = u32::from_le_bytes(rest[..4].try_into().unwrap()) as usize;
        let mut entry = rest[4..4 + length].to_vec();
        if entry.starts_with(&[8, 4, 16, 13]) {
            change(&mut entry);
        }
        out.extend((entry.len() as u32).to_le_bytes());
        out.extend(entry);
        rest = &rest[4 + length..];
    }
    out
}

/// The message of the socket within its entry, replaced by what `change` makes of it.
fn with_changed_socket(change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    with_changed_entry(|entry| {
        assert_eq!((entry[4], entry[5] as usize), (0x22, entry.len() - 6));
        let mut socket = entry.split_off(6);
        change(&mut socket);
        entry.truncate(5);
        entry.extend([socket.len() as u8 | 0x80, (socket.len() >> 7) as u8]);
        entry.extend(socket);
    })
}

#[test]
fn unknown_fields_and_unusual_encodings_stay() {
    // Unknown: field 1000, a varint of needless length, and field 1001, bytes, in socket and entry.
    let unknown = [0xc0, 0x3e, 0x81, 0x80, 0x00, 0xca, 0x3e, 3, b'a', b'b', b'c'];
    let files = with_changed_socket(|socket| {
        socket.splice(0..0, unknown);
        socket.extend(unknown);
    });
    let rules = (maps(&["127.0.0.1=10.1.2.3"]), maps(&["10.1.2.3=127.0.0.1"]));
    let (bytes, _) = rewrite(&files, &rules.0).unwrap();
    assert_eq!(bytes.windows(unknown.len()).filter(|window| *window == unknown).count(), 2);
    let again = sockets(&bytes).unwrap();
    assert_eq!(again[2].local.ip(), "10.1.2.3".parse::<IpAddr>().unwrap());
    let (back, _) = rewrite(&bytes, &rules.1).unwrap();
    assert!(back == files);
}

#[test]
fn options_of_other_kinds_keep_their_layout() {
    // sk_opts: 3 s 5 µs of SO_SNDTIMEO, bound to eth0, lingering 7 s. Protocol buffers: the last of a field counts.
    let more = [&[0x18, 3, 0x20, 5, 0x7a, 4][..], b"eth0", &[0xc0, 0x01, 7]].concat();
    let with = |opts: &[u8]| {
        with_changed_socket(|socket| {
            let at = socket.windows(2).position(|bytes| bytes == [0x72, 0x2a]).unwrap();
            let length = 42 + opts.len();
            socket[at + 1] = length as u8 & 0x7f | 0x80;
            socket.splice(at + 2..at + 2, [(length >> 7) as u8]);
            socket.splice(at + 3 + 42..at + 3 + 42, opts.iter().copied());
        })
    };
    let socket = sockets(&with(&more)).unwrap().remove(2);
    let bytes = |name: &str| match socket.settings.iter().find(|setting| setting.0 == name) {
        Some((_, Value::Bytes(bytes))) => bytes.clone(),
        other => panic!("{name}: {other:?}"),
    };
    assert_eq!(bytes("SO_BINDTODEVICE"), b"eth0");
    assert_eq!(bytes("SO_LINGER"), [1i32.to_ne_bytes(), 7i32.to_ne_bytes()].concat());
    assert_eq!(bytes("SO_SNDTIMEO"), [3i64.to_ne_bytes(), 5i64.to_ne_bytes()].concat());
}

#[test]
fn packed_addresses_are_read_and_rewritten_packed() {
    let files = with_changed_socket(|socket| {
        let at = socket.windows(6).position(|bytes| bytes == [0x58, 0xff, 0x80, 0x80, 0x08, 0x60]).unwrap();
        socket.splice(at..at + 5, [0x5a, 4, 0xff, 0x80, 0x80, 0x08]);
    });
    assert_eq!(sockets(&files).unwrap(), sockets(FILES).unwrap());
    let (bytes, changed) = rewrite(&files, &maps(&["127.0.0.1=255.255.255.255"])).unwrap();
    assert_eq!(changed, 6);
    assert_eq!(
        sockets(&bytes).unwrap(),
        sockets(&rewrite(FILES, &maps(&["127.0.0.1=255.255.255.255"])).unwrap().0).unwrap()
    );
    assert!(bytes.windows(7).any(|bytes| bytes == [0x5a, 5, 0xff, 0xff, 0xff, 0xff, 0x0f]));
}

#[test]
fn mapped_addresses_of_ipv6_sockets_follow_ipv4_rules() {
    let files = {
        let old: Vec<u8> = [[0x58, 0], [0x58, 0], [0x58, 0]].concat();
        let at = FILES
            .windows(11)
            .position(|w| w[..6] == old && w[6..] == [0x58, 0x80, 0x80, 0x80, 0x08])
            .unwrap();
        let mut files = FILES.to_vec();
        // ::1 becomes ::ffff:0.0.0.1. Third word 0 → 0xffff0000 takes four bytes more: in entry and socket, whose lengths follow.
        files.splice(at + 5..at + 6, [0x80, 0x80, 0xfc, 0xff, 0x0f]);
        let entry = files.windows(8).position(|w| w[4..] == [8, 4, 16, 16]).unwrap();
        files[entry] += 4;
        files[entry + 9] += 4;
        files
    };
    assert_eq!(sockets(&files).unwrap()[5].local.ip(), "::ffff:0.0.0.1".parse::<IpAddr>().unwrap());
    let (bytes, changed) = rewrite(&files, &maps(&["0.0.0.1=10.9.8.7"])).unwrap();
    assert_eq!(changed, 1);
    assert_eq!(sockets(&bytes).unwrap()[5].local.ip(), "::ffff:10.9.8.7".parse::<IpAddr>().unwrap());
}

#[test]
fn a_listener_keeps_its_missing_peer() {
    let (bytes, changed) = rewrite(FILES, &maps(&["0.0.0.0=10.0.0.1"])).unwrap();
    assert_eq!(changed, 0);
    assert!(bytes == FILES);
}

#[test]
fn files_are_replaced_whole_and_keep_their_mode() {
    use std::os::unix::fs::PermissionsExt;
    let directory = copy();
    let path = directory.path().join("files.img");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    let mut images = Directory::open(directory.path()).unwrap();
    assert_eq!(images.rewrite(&maps(&["10.0.0.1=10.0.0.2"])).unwrap().sockets, 0);
    assert_eq!(images.rewrite(&maps(&["127.0.0.1=127.0.0.2"])).unwrap().sockets, 6);
    assert_eq!(
        images.extract(images.socket(13).unwrap()).unwrap().local.ip(),
        "127.0.0.2".parse::<IpAddr>().unwrap()
    );
    let written = sockets(&std::fs::read(&path).unwrap()).unwrap();
    assert!(written == images.sockets());
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(images.rewrite(&maps(&["127.0.0.2=127.0.0.1"])).unwrap().sockets, 6);
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let entry = entry.unwrap();
        let old = std::fs::read(golden().join(entry.file_name())).unwrap();
        assert!(std::fs::read(entry.path()).unwrap() == old, "{:?}", entry.file_name());
    }
}

/// A dump of tasks with a network namespace of their own: 192.0.2.1/24 and 2001:db8::1/64 on an interface, a gateway.
fn copy_with_network() -> tempfile::TempDir {
    let directory = copy();
    for name in ["ifaddr-9.img", "route-9.img", "route6-9.img"] {
        std::fs::copy(golden().join("../network").join(name), directory.path().join(name)).unwrap();
    }
    directory
}

#[test]
fn addresses_and_routes_of_a_namespace_follow() {
    let directory = copy_with_network();
    let read = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
    let has = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).any(|window| window == what);
    let before = ["ifaddr-9.img", "route-9.img", "route6-9.img"].map(read);
    let mut images = Directory::open(directory.path()).unwrap();

    let rules = ["192.0.2.1=198.51.100.7", "192.0.2.254=198.51.100.1", "2001:db8::1=2001:db8:7::1"];
    let rewritten = images.rewrite(&maps(&rules)).unwrap();
    // The address of each family; the default route, the IPv4 network, the route by the gateway, the IPv6 network.
    assert_eq!((rewritten.sockets, rewritten.addresses, rewritten.routes), (0, 2, 4));
    assert!(rewritten.missing.is_empty() && rewritten.unreachable.is_empty(), "{rewritten:?}");
    let [addresses, routes, routes6] = ["ifaddr-9.img", "route-9.img", "route6-9.img"].map(read);
    assert!(has(&addresses, &[198, 51, 100, 7]) && has(&addresses, &[198, 51, 100, 255]));
    assert!(
        has(&routes, &[198, 51, 100, 0])
            && has(&routes, &[198, 51, 100, 1])
            && has(&routes, &[203, 0, 113, 0])
    );
    let ipv6 = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
    assert!(has(&addresses, &ipv6("2001:db8:7::1")) && has(&routes6, &ipv6("2001:db8:7::")));
    for bytes in [&addresses, &routes] {
        assert!(!has(bytes, &[192, 0, 2]));
    }

    let back = ["198.51.100.7=192.0.2.1", "198.51.100.1=192.0.2.254", "2001:db8:7::1=2001:db8::1"];
    images.rewrite(&maps(&back)).unwrap();
    assert!(["ifaddr-9.img", "route-9.img", "route6-9.img"].map(read) == before);
}

#[test]
fn what_a_rewrite_leaves_to_be_done_is_told() {
    let directory = copy_with_network();
    let mut images = Directory::open(directory.path()).unwrap();
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    // Sockets get an address that nobody configures.
    let rewritten = images.rewrite(&maps(&["127.0.0.1=192.0.2.99"])).unwrap();
    // Nothing of the namespace has changed.
    assert_eq!((rewritten.missing, rewritten.unreachable), (vec![ip("192.0.2.99")], vec![]));
    // And here one that the namespace has, but its gateway is elsewhere.
    let rewritten = images.rewrite(&maps(&["192.0.2.99=198.51.100.7", "192.0.2.1=198.51.100.7"])).unwrap();
    assert_eq!((&rewritten.missing[..], &rewritten.unreachable[..]), (&[][..], &[ip("192.0.2.254")][..]));
}

/// Routes by 2001:db8::2, by 2001:db8::3 or 192.0.2.9, and by 192.0.2.2 or 192.0.2.3, all to IPv4 networks.
#[test]
fn every_gateway_of_a_route_follows() {
    let directory = copy_with_network();
    let path = directory.path().join("route-9.img");
    let before = std::fs::read(golden().join("../network/multipath-9.img")).unwrap();
    std::fs::write(&path, &before).unwrap();
    let mut images = Directory::open(directory.path()).unwrap();
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();

    let rules = ["192.0.2.1=198.51.100.7", "192.0.2.2=198.51.100.2", "2001:db8::3=2001:db8:7::3"];
    let rewritten = images.rewrite(&maps(&rules)).unwrap();
    let left = ["2001:db8:7::3", "192.0.2.9", "192.0.2.3"].map(ip);
    let told = left.iter().all(|gateway| rewritten.unreachable.contains(gateway));
    assert!(told && !rewritten.unreachable.contains(&ip("198.51.100.2")), "{rewritten:?}");
    let after = std::fs::read(&path).unwrap();
    let has = |bytes: &[u8], ip: IpAddr| match ip {
        IpAddr::V4(ip) => bytes.windows(4).any(|window| window == ip.octets()),
        IpAddr::V6(ip) => bytes.windows(16).any(|window| window == ip.octets()),
    };
    for (old, new) in
        [("192.0.2.2", "198.51.100.2"), ("2001:db8::3", "2001:db8:7::3")].map(|(a, b)| (ip(a), ip(b)))
    {
        assert!(has(&before, old) && !has(&after, old) && has(&after, new), "{old}");
    }

    let back = ["198.51.100.7=192.0.2.1", "198.51.100.2=192.0.2.2", "2001:db8:7::3=2001:db8::3"];
    images.rewrite(&maps(&back)).unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
    // Nothing panics, wherever the file ends.
    for length in 0..before.len() {
        std::fs::write(&path, &before[..length]).unwrap();
        let _ = Directory::open(directory.path()).unwrap().rewrite(&maps(&rules));
    }
}

/// `ip save` may write what says nothing of addresses.
#[test]
fn other_messages_of_a_network_image_stay() {
    let directory = copy_with_network();
    let path = directory.path().join("ifaddr-9.img");
    let message = |kind: u16, body: &[u8]| {
        let length = (16 + body.len()) as u32;
        let header = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10]].concat();
        [&header, body].concat()
    };
    // 192.0.2.1 where an address would have it (IFA_LOCAL), in RTM_DELADDR; and RTM_NEWADDR without anything.
    let like_an_address = [2, 24, 0, 0, 1, 0, 0, 0, 8, 0, 2, 0, 192, 0, 2, 1];
    let others = [message(21, &like_an_address), message(20, &[])].concat();
    std::fs::write(&path, [std::fs::read(&path).unwrap(), others.clone()].concat()).unwrap();
    let mut images = Directory::open(directory.path()).unwrap();
    assert_eq!(images.rewrite(&maps(&["192.0.2.1=198.51.100.7"])).unwrap().addresses, 1);
    assert!(std::fs::read(&path).unwrap().ends_with(&others));
}

#[test]
fn damaged_network_images_change_no_file() {
    let addresses = std::fs::read(golden().join("../network/ifaddr-9.img")).unwrap();
    let directory = copy_with_network();
    let path = directory.path().join("ifaddr-9.img");
    for length in 1..addresses.len() {
        std::fs::write(&path, &addresses[..length]).unwrap();
        let rules = maps(&["127.0.0.1=1.2.3.4"]);
        let outcome = Directory::open(directory.path()).unwrap().rewrite(&rules);
        if outcome.is_err() {
            assert!(std::fs::read(directory.path().join("files.img")).unwrap() == FILES, "{length}");
        } else {
            // A whole number of messages.
            std::fs::copy(golden().join("files.img"), directory.path().join("files.img")).unwrap();
        }
    }
}
