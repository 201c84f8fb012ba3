//! Connections with TLS in the kernel, and that nothing prints their keys.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;
use soccr_lab::{Side, set_option, wait_until};

use crate::kill::{
    BEGIN, BOUNDARIES, Boundary, COMMIT, CONNECTION, End, PREAMBLE, READY, assert_nobody_has_it, hand_over,
};
use crate::programs::{
    HEIR, Program, assert_runs, assert_unlocked, fail, hear, installed, json, run, server_command, soccr,
};
use crate::transfer::Move;

crate::tests![
    an_image_with_keys_is_restored_once_and_nothing_prints_them,
    a_connection_leaves_its_process_with_its_keys,
    a_connection_moves_to_a_program_on_this_host,
    what_must_not_leave_stays,
    a_killed_source_leaves_one_connection_with_kernel_tls,
    what_the_target_cannot_have_is_saved_in_an_image,
];

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
fn encrypt<const N: usize>(ends: [&TcpStream; N]) -> bool {
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
    for how in [&["--json"][..], &["--data"], &["--json", "--data"], &["--svg"]] {
        show(&[&["inspect", &image[..]][..], how].concat());
    }

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

    assert_no_key(&printed);
}

#[track_caller]
fn assert_no_key(printed: &[u8]) {
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

/// The same keys for all, as no handshake would; `None` where the kernel has no TLS.
fn encrypted(goal: Side) -> Option<Move> {
    let probe = TcpListener::bind("127.0.0.1:0").unwrap();
    let probe = TcpStream::connect(probe.local_addr().unwrap()).unwrap();
    if !installed("python3") || !encrypt([&probe]) {
        return None;
    }
    let keys: String = CRYPTO.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut server = server_command("", "old ", 1);
    Some(Move::of(server.env("KTLS", keys), goal, 1, |client| assert!(encrypt([client]))))
}

/// It goes on where it was, and nothing is left of the try.
#[track_caller]
fn assert_stays(moving: &mut Move) {
    assert_runs(&moving.old.pid());
    moving.lab.a.run(assert_unlocked);
    moving.assert_lives_at(Side::A, "old ");
}

fn a_connection_leaves_its_process_with_its_keys() {
    let Some(mut moving) = encrypted(Side::A) else { return };
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let image = image.to_str().unwrap();
    let pid = moving.old.pid();
    let said = fail(1, &["save", "--pid", &pid, "--all", "--keep", "-o", image]);
    assert!(said.contains("--keep"), "{said}");
    assert_no_key(said.as_bytes());
    assert_stays(&mut moving);
    let stop = |signal: &str| {
        assert!(std::process::Command::new("kill").args([signal, &pid]).status().unwrap().success())
    };
    stop("-STOP");
    moving.clients[0].write_all(b"unread").unwrap();
    let saved = run(&["save", "--pid", &pid, "--all", "-o", image]);
    assert!(saved.status.success(), "{saved:?}");
    assert_no_key(&[saved.stdout, saved.stderr].concat());
    stop("-CONT");
    let restore = ["restore", image, "--netns", &moving.beside.pid(), "--", "python3", "-c", HEIR, "new "];
    let heir = Program::start(&mut soccr(&restore));
    assert_eq!(hear(&mut moving.clients[0], 10), "new unread");
    moving.assert_lives_at(Side::A, "new ");
    moving.clients.clear();
    assert_eq!(moving.old.output(), "errno 103\n");
    drop(heir);
}

fn a_connection_moves_to_a_program_on_this_host() {
    let Some(mut moving) = encrypted(Side::A) else { return };
    assert_eq!(moving.try_send(&["--all", "--via", &moving.receive()]), (0, String::new()));
    moving.assert_lives_at(Side::A, "new ");
    moving.clients.clear();
    assert_eq!(moving.old.output(), "errno 103\n");
}

/// Half a record, records of two types, a target that is not there.
fn what_must_not_leave_stays() {
    let Some(mut moving) = encrypted(Side::B) else { return };
    let (code, said) = moving.try_send(&["--all", "--via", "false"]);
    assert_eq!(code, 1, "{said}");
    assert_stays(&mut moving);
    let refusing =
        format!("{} receive --netns {} -- /no/such/program", crate::programs::SOCCR, moving.beside.pid());
    let (code, said) = moving.try_send(&["--all", "--via", &refusing]);
    assert_eq!(code, 1, "{said}");
    assert_no_key(said.as_bytes());
    assert_stays(&mut moving);
}

fn a_killed_source_leaves_one_connection_with_kernel_tls() {
    for boundary in BOUNDARIES {
        let Some(mut moving) = encrypted(Side::B) else { return };
        eprintln!("the source dies at {boundary:?}");
        let status = hand_over(&moving, End::Source, boundary, Signal::KILL);
        assert_eq!(status.code(), None, "{boundary:?}: killed");
        if [PREAMBLE, BEGIN, CONNECTION, READY].contains(&boundary.1) {
            assert_stays(&mut moving);
            assert_nobody_has_it(&moving);
        } else {
            moving.assert_lives_at(Side::B, "new ");
            moving.clients.clear();
            assert_eq!(moving.old.output(), "errno 103\n", "{boundary:?}");
        }
    }
}

/// Its process has lost it by then, and cannot have it back.
fn what_the_target_cannot_have_is_saved_in_an_image() {
    let Some(mut moving) = encrypted(Side::B) else { return };
    let directory = tempfile::tempdir().unwrap();
    moving.directory = directory.path().into();
    let status = hand_over(&moving, End::Target, Boundary(End::Source, COMMIT), Signal::KILL);
    assert_eq!(status.code(), Some(1));
    assert_nobody_has_it(&moving);
    let image = std::fs::read_dir(directory.path()).unwrap().next().expect("an image").unwrap().path();
    let here = moving.lab.a.run(|| Program::start(std::process::Command::new("sleep").arg("1000")));
    let restore =
        ["restore", image.to_str().unwrap(), "--netns", &here.pid(), "--", "python3", "-c", HEIR, "new "];
    let heir = Program::start(&mut soccr(&restore));
    let consumed = image.with_extension("soccr.consumed");
    wait_until("it is restored", || consumed.exists());
    moving.assert_lives_at(Side::A, "new ");
    moving.clients.clear();
    assert_eq!(moving.old.output(), "errno 103\n");
    drop(heir);
}
