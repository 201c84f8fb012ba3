//! Connections with TLS in the kernel, and that nothing prints their keys.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use soccr_lab::{Call, LIMIT, Lab, Side, run_and_kill, set_option, wait_until};

use crate::kill::{
    BEGIN, COMMIT, CONNECTION, END, End, PREAMBLE, READY, TAKEN, assert_nobody_has_it, hand_over, moves,
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
    a_session_of_openssl_moves_to_a_program,
    a_killed_source_leaves_one_connection_with_kernel_tls,
    a_killed_target_leaves_one_connection_with_kernel_tls,
    what_a_killed_save_leaves_is_restored_once,
    a_killed_restore_leaves_an_image,
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
            soccr_lab::skip(format_args!("the kernel has no TLS (modprobe tls): {error}"));
            return false;
        }
        for direction in [1, 2] {
            set_option(end, 282, direction, &CRYPTO).unwrap();
        }
    }
    true
}

/// Saves a connection for good, of which 6 bytes are decrypted and unread, and returns its peer; `None` where the kernel has no TLS.
pub fn saved(image: &str, look: impl FnOnce()) -> Option<TcpStream> {
    let listener = TcpListener::bind("127.0.0.1:7").unwrap();
    let mut peer = TcpStream::connect("127.0.0.1:7").unwrap();
    let ours = listener.accept().unwrap().0;
    if !encrypt([&ours, &peer]) {
        return None;
    }
    look();
    peer.set_read_timeout(Some(LIMIT)).unwrap();
    peer.write_all(b"unread").unwrap();
    soccr::tls::settle(&ours, LIMIT).unwrap();
    soccr::tls::settle(&peer, LIMIT).unwrap();
    let paused = soccr::pause(&ours).unwrap().with_tls();
    soccr_image::save_file(image, &paused.save().unwrap()).unwrap();
    paused.detach().unwrap();
    Some(peer)
}

fn an_image_with_keys_is_restored_once_and_nothing_prints_them() {
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

    let saved = saved(&image, || {
        let sockets = show(&["list"]);
        assert_eq!(sockets.matches("(tls 1.2 aes-gcm-128 tx+rx)").count(), 2, "{sockets}");
    });
    let Some(mut peer) = saved else { return };
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

fn has_tls() -> bool {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    encrypt([&TcpStream::connect(listener.local_addr().unwrap()).unwrap()])
}

/// The same keys for all, as no handshake would; `None` where the kernel has no TLS.
fn encrypted(goal: Side) -> Option<Move> {
    if !installed("python3") || !has_tls() {
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

/// The old program is OpenSSL with its session, and so is the peer; the new one knows of no TLS.
fn a_session_of_openssl_moves_to_a_program() {
    if !installed("python3") || !installed("openssl") || !has_tls() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let openssl = |arguments: &str| {
        let mut command = Command::new("openssl");
        command.args(arguments.split(' ')).current_dir(&directory).env("OPENSSL_CONF", "configuration");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    std::fs::write(directory.path().join("configuration"), CONFIGURATION).unwrap();
    let certificate = "req -x509 -config configuration -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
                       -keyout key -out certificate -days 1 -subj /CN=localhost";
    let made = openssl(certificate).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    for (cipher, goal) in CIPHERS.into_iter().zip([Side::A, Side::B, Side::A, Side::B]) {
        eprintln!("{cipher}, to {goal:?}");
        let lab = Lab::new().unwrap();
        let server = format!("s_server -quiet -tls1_2 -cipher {cipher} -cert certificate -key key -accept 7");
        let mut old = lab.a.run(|| Program::start(&mut openssl(&server)));
        // Whether it listens, without a connection that it would take for a client.
        let listens =
            || json(&["list", "--json", "--pid", &old.pid()]).iter().any(|s| s["state"] == "LISTEN");
        wait_until("the server listens", || lab.a.run(listens));
        let client = format!("s_client -quiet -tls1_2 -cipher {cipher} -connect {}:7", lab.a.v4);
        let mut client = lab.peer.run(|| Program::start(&mut openssl(&client)));
        say(&mut client, "hello\n");
        assert_says(&mut old, "hello\n");
        let beside = lab.host(goal).run(|| Program::start(Command::new("sleep").arg("1000")));
        let moving = Move { lab, old, clients: Vec::new(), beside, goal, directory: ".".into() };
        assert_eq!(moving.try_send(&["--all", "--via", &moving.receive()]), (0, String::new()));
        moving.lab.steer(goal).unwrap();
        for _ in 0..3 {
            say(&mut client, "more\n");
            assert_says(&mut client, "new more\n");
        }
        client.0.kill().unwrap();
        let mut complaints = String::new();
        client.0.stderr.take().unwrap().read_to_string(&mut complaints).unwrap();
        assert!(!complaints.contains("alert") && !complaints.contains("bad record"), "{complaints}");
    }
}

const CIPHERS: [&str; 4] = [
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-CCM",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
];

const CONFIGURATION: &str = "openssl_conf = init
[init]
ssl_conf = ssl
[ssl]
system_default = defaults
[defaults]
Options = KTLS
";

fn say(program: &mut Program, text: &str) {
    program.0.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
}

#[track_caller]
fn assert_says(program: &mut Program, text: &str) {
    let mut bytes = vec![0; text.len()];
    program.0.stdout.as_mut().unwrap().read_exact(&mut bytes).unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), text);
}

fn a_killed_source_leaves_one_connection_with_kernel_tls() {
    for (goal, boundary) in moves() {
        let Some(mut moving) = encrypted(goal) else { return };
        eprintln!("the source dies at {boundary:?}, to {goal:?}");
        let status = hand_over(&moving, End::Source, boundary, Signal::KILL);
        assert_eq!(status.code(), None, "{boundary:?}: killed");
        if [PREAMBLE, BEGIN, CONNECTION, READY].contains(&boundary.1) {
            assert_stays(&mut moving);
            assert_nobody_has_it(&moving);
        } else {
            moving.assert_lives_at(goal, "new ");
            moving.clients.clear();
            assert_eq!(moving.old.output(), "errno 103\n", "{boundary:?}");
        }
    }
}

/// When the connection has left its process and the target does not have it, it cannot go back: an image has it.
fn a_killed_target_leaves_one_connection_with_kernel_tls() {
    for (goal, boundary) in moves() {
        let Some(mut moving) = encrypted(goal) else { return };
        eprintln!("the target dies at {boundary:?}, to {goal:?}");
        let directory = tempfile::tempdir().unwrap();
        moving.directory = directory.path().into();
        let status = hand_over(&moving, End::Target, boundary, Signal::KILL);
        let was_taken = [TAKEN, END].contains(&boundary.1);
        assert_eq!(status.code(), Some(i32::from(!was_taken)), "{boundary:?}");
        assert_nobody_has_it(&moving);
        let image = std::fs::read_dir(directory.path()).unwrap().next().map(|entry| entry.unwrap().path());
        if was_taken {
            assert_eq!(image, None, "{boundary:?}");
            // It ends with the target, like any connection of a process that is killed.
            moving.lab.steer(goal).unwrap();
            let mut client = moving.clients.remove(0);
            let _ = client.write_all(b"more");
            assert!(!matches!(client.read(&mut [0]), Ok(1..)), "{boundary:?}");
            assert_eq!(moving.old.output(), "errno 103\n", "{boundary:?}");
            continue;
        }
        // The READY of a target that is dead is as good as any.
        assert!(boundary.1 == READY || image.is_some() == (boundary.1 == COMMIT), "{boundary:?}: {image:?}");
        match image {
            Some(image) => assert_image_lives(&mut moving, &image),
            None => assert_stays(&mut moving),
        }
    }
}

#[track_caller]
fn assert_image_lives(moving: &mut Move, image: &Path) {
    let here = moving.lab.a.run(|| Program::start(Command::new("sleep").arg("1000")));
    let restore =
        ["restore", image.to_str().unwrap(), "--netns", &here.pid(), "--", "python3", "-c", HEIR, "new "];
    let _heir = Program::start(&mut soccr(&restore));
    let consumed = image.with_extension("soccr.consumed");
    wait_until("it is restored", || consumed.exists());
    moving.assert_lives_at(Side::A, "new ");
    moving.clients.clear();
    wait_until("its process has noticed", || matches!(moving.old.0.try_wait(), Ok(Some(_))));
    let mut said = String::new();
    moving.old.0.stdout.as_mut().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "errno 103\n");
}

fn what_a_killed_save_leaves_is_restored_once() {
    let Some(mut moving) = encrypted(Side::A) else { return };
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let image = image.to_str().unwrap();
    let mut save = soccr(&["save", "--pid", &moving.old.pid(), "--all", "-o", image]);
    assert!(run_and_kill(&mut save, renames), "it was killed");
    let pid = moving.beside.pid();
    let arguments = ["restore", image, "--netns", &pid, "--", "python3", "-c", HEIR, "new "];
    let heir = Program::start(soccr(&arguments).stderr(Stdio::null()));
    moving.assert_lives_at(Side::A, "new ");
    fail(1, &arguments);
    drop(heir);
}

/// Before the image is marked the connection is silent, and can be restored again; after that it can not, unless somebody takes the
/// mark away.
fn a_killed_restore_leaves_an_image() {
    let Some(mut moving) = encrypted(Side::A) else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = |name| directory.path().join(name).to_str().unwrap().to_owned();
    let (image, consumed) = (path("image"), path("image.consumed"));
    let saved = run(&["save", "--pid", &moving.old.pid(), "--all", "-o", &image]);
    assert!(saved.status.success(), "{saved:?}");
    let pid = moving.beside.pid();
    let restore = |image: &str| {
        let mut command = soccr(&["restore", image, "--netns", &pid, "--", "python3", "-c", HEIR, "new "]);
        command.stderr(Stdio::null());
        command
    };
    assert!(run_and_kill(&mut restore(&image), renames), "it was killed");
    let mut is_marked = false;
    let killed = run_and_kill(&mut restore(&image), |call| {
        let before = is_marked;
        is_marked |= renames(call);
        before
    });
    assert!(killed, "it was killed");
    assert_nobody_has_it(&moving);
    assert!(fail(1, &["restore", &consumed, "--", "cat"]).contains("it has been restored"));
    std::fs::rename(&consumed, &image).unwrap();
    let _heir = Program::start(&mut restore(&image));
    moving.assert_lives_at(Side::A, "new ");
}

fn renames(call: &Call) -> bool {
    #[cfg(not(target_arch = "aarch64"))]
    use libc::SYS_rename as SYS_RENAME;
    #[cfg(target_arch = "aarch64")]
    use libc::SYS_renameat as SYS_RENAME;
    [SYS_RENAME, libc::SYS_renameat2].contains(&call.number)
}
