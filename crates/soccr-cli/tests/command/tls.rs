//! Connections with TLS in the kernel, and that nothing prints their keys.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::Duration;

use soccr_lab::{set_option, wait_until};

use crate::programs::{Program, fail, hear, json, run, soccr};

crate::tests![an_image_with_keys_is_restored_once_and_nothing_prints_them];

/// TLS 1.2, AES-GCM-128: IV, key, salt, number of the next record.
const KEY: [u8; 16] = *b"\xA5\x5A\xC3\x3C\x96\x69sixteen-ke";
const CRYPTO: [u8; 40] = {
    let mut info = [0; 40];
    [info[0], info[1], info[2]] = [3, 3, 51];
    let mut index = 0;
    while index < 16 {
        info[12 + index] = KEY[index];
        index += 1;
    }
    info
};

/// Gives both directions of both ends the same keys, as no handshake would; false where the kernel has no TLS.
fn encrypt(ends: [&TcpStream; 2]) -> bool {
    for end in ends {
        if let Err(error) = set_option(end, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls") {
            eprintln!("\nSKIPPED: the kernel has no TLS (modprobe tls): {error}");
            return false;
        }
        for direction in [1, 2] {
            set_option(end, 282, direction, &CRYPTO).unwrap();
        }
    }
    true
}

fn an_image_with_keys_is_restored_once_and_nothing_prints_them() {
    let listener = TcpListener::bind("127.0.0.1:7").unwrap();
    let mut peer = TcpStream::connect("127.0.0.1:7").unwrap();
    let ours = listener.accept().unwrap().0;
    if !encrypt([&ours, &peer]) {
        return;
    }
    peer.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = |name| directory.path().join(name).to_str().unwrap().to_owned();
    let (image, consumed) = (path("image"), path("image.consumed"));
    let mut printed = Vec::new();
    let mut show = |arguments: &[&str]| {
        let output = run(arguments);
        assert!(output.status.success(), "{output:?}");
        printed.extend([&output.stdout[..], &output.stderr].concat());
        String::from_utf8_lossy(&output.stdout).into_owned()
    };

    let sockets = show(&["list"]);
    assert_eq!(sockets.matches("(tls 1.2 aes-gcm-128 tx+rx)").count(), 2, "{sockets}");
    peer.write_all(b"unread").unwrap();
    soccr::tls::settle(&ours, Duration::from_secs(20)).unwrap();
    soccr::tls::settle(&peer, Duration::from_secs(20)).unwrap();
    let paused = soccr::pause(&ours).unwrap().with_tls();
    soccr_image::save_file(&image, &paused.save().unwrap()).unwrap();
    paused.detach().unwrap();
    drop(ours);
    assert_eq!(std::fs::metadata(&image).unwrap().permissions().mode() & 0o777, 0o600);
    let text = show(&["inspect", &image]);
    assert!(text.contains("tls 1.2 aes-gcm-128 tx+rx, 6 bytes decrypted and unread"), "{text}");
    show(&["inspect", "--json", "--data", &image]);

    let mut cat = soccr(&["restore", &image, "--stdio", "--", "cat"]);
    let mut cat = Program::start(cat.stdin(Stdio::null()).stderr(Stdio::piped()));
    assert_eq!(hear(&mut peer, 6), "unread");
    peer.write_all(b"echo").unwrap();
    assert_eq!(hear(&mut peer, 4), "echo");
    assert!(fail(1, &["restore", &image, "--", "cat"]).contains("image"));
    assert!(fail(1, &["restore", &consumed, "--", "cat"]).contains("it has been restored"));
    wait_until("the socket is listed", || {
        json(&["list", "--json"]).iter().any(|socket| socket["tls"] == "tls 1.2 aes-gcm-128 tx+rx")
    });
    show(&["list", "--json"]);
    drop(peer);
    cat.0.wait().unwrap();
    cat.0.stderr.take().unwrap().read_to_end(&mut printed).unwrap();
    assert!(String::from_utf8_lossy(&printed).contains("image.consumed now"));

    let hexadecimal: String = KEY[..6].iter().map(|byte| format!("{byte:02x}")).collect();
    let spaced: Vec<_> = KEY[..6].iter().map(|byte| format!("{byte:02x}")).collect();
    let decimal: Vec<_> = KEY[..6].iter().map(ToString::to_string).collect();
    let secrets =
        [&hexadecimal[..], &spaced.join(" "), &decimal.join(", "), &decimal.join(","), "sixteen-ke"];
    for secret in secrets {
        let found =
            printed.windows(secret.len()).any(|window| window.eq_ignore_ascii_case(secret.as_bytes()));
        assert!(!found, "{secret}");
    }
    assert!(!printed.windows(6).any(|window| window == &KEY[..6]));
}
