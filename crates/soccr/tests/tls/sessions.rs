//! Sessions of OpenSSL between two programs that write and read all the time. One of them gets its connection in another socket,
//! again and again, and goes on with its session: where the kernel only encrypts (TLS 1.3), it decrypts itself.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use soccr::tls::{Cipher, Version};
use soccr_lab::{Flags, Pair, Sniffer, Test};

use crate::ends::{LIMIT, leave, settle_and_lock};
use crate::moves::moves;
use crate::openssl::{CIPHERS, CONFIGURATION, make_certificate};

const PROGRAM: &str = include_str!("session.py");

/// In the order of those of TLS 1.2.
const SUITES: [&str; 4] = [
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_AES_128_CCM_SHA256",
    "TLS_CHACHA20_POLY1305_SHA256",
];

/// One for each cipher and version.
pub fn tests() -> impl Iterator<Item = Test> {
    CIPHERS.into_iter().zip(SUITES).flat_map(|((name, cipher), suite)| {
        [Version::Tls12, Version::Tls13].map(|version| {
            Test::new(format!("sessions::{version} {cipher}"), move || go_on(version, name, suite, cipher))
        })
    })
}

/// A program with one end of the connection.
struct End {
    program: Child,
    control: UnixStream,
}

impl End {
    fn start(role: &str, socket: impl Into<OwnedFd>, directory: &Path, kind: [&str; 2]) -> Self {
        let (control, theirs) = UnixStream::pair().unwrap();
        control.set_read_timeout(Some(3 * LIMIT)).unwrap();
        let mut command = Command::new("python3");
        command
            .args(["-c", PROGRAM, role])
            .args(kind)
            .current_dir(directory)
            .env("OPENSSL_CONF", "configuration");
        command.stdin(socket.into()).stdout(OwnedFd::from(theirs)).stderr(Stdio::piped());
        Self { program: command.spawn().unwrap(), control }
    }

    fn say(&mut self, bytes: &[u8]) {
        self.control.write_all(bytes).unwrap();
    }

    #[track_caller]
    fn hear<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        if let Err(error) = self.control.read_exact(&mut bytes) {
            let _ = self.program.kill();
            let mut complaints = String::new();
            self.program.stderr.take().unwrap().read_to_string(&mut complaints).unwrap();
            panic!("{error}; it says: {complaints}");
        }
        bytes
    }

    /// It goes on with this socket.
    fn give(&self, socket: &TcpStream) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut message = SendAncillaryBuffer::new(&mut space);
        let socket = [socket.as_fd()];
        assert!(message.push(SendAncillaryMessage::ScmRights(&socket)));
        sendmsg(&self.control, &[IoSlice::new(b"n")], &mut message, SendFlags::empty()).unwrap();
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

fn go_on(version: Version, name: &str, suite: &str, cipher: Cipher) {
    if Command::new("python3").arg("--version").output().is_err() {
        soccr_lab::skip("python3 is not installed");
        return;
    }
    let Some(directory) = make_certificate() else { return };
    let configuration = format!("{CONFIGURATION}Ciphersuites = {suite}\n");
    std::fs::write(directory.path().join("configuration"), configuration).unwrap();
    let pair = Pair::new().unwrap();
    let mut resets =
        [&pair.a, &pair.b].map(|host| Sniffer::flagged(&host.namespace, "eth0", Flags::RST).unwrap());
    let listener = pair.b.run(|| TcpListener::bind((pair.b.v4, 443))).unwrap();
    let mut ours = pair.a.run(|| TcpStream::connect((pair.b.v4, 443))).unwrap();
    let peer = listener.accept().unwrap().0;
    let decrypts = version == Version::Tls12;
    let kind = [if decrypts { "TLSv1_2" } else { "TLSv1_3" }, name];
    let mut here = End::start("server", ours.try_clone().unwrap(), directory.path(), kind);
    let mut there = End::start("client", peer, directory.path(), kind);
    assert_eq!([here.hear(), there.hear()], [*b"h"; 2]);
    if !soccr::tls::is_on(&ours).unwrap() && !decrypts && cipher == Cipher::AesCcm128 {
        soccr_lab::skip(format_args!("this OpenSSL keeps {cipher} of TLS 1.3 to itself"));
        return;
    }
    for _ in 0..moves() {
        here.say(b"m");
        assert_eq!(&here.hear(), b"r");
        ours = pair.a.run(|| {
            let lock = settle_and_lock(&ours);
            let connection = leave(ours);
            let tls = connection.tls.as_ref().unwrap();
            assert_eq!((tls.version, tls.cipher), (version, cipher));
            // OpenSSL gives the keys to decrypt TLS 1.3 to the kernel since 3.2.
            assert!(tls.transmit.is_some() && tls.receive.is_some() >= decrypts, "{}", tls.summary());
            let restored = connection.restore().unwrap();
            lock.release().unwrap();
            restored.resume().unwrap()
        });
        here.give(&ours);
    }
    let mut ends = [here, there];
    ends.iter_mut().for_each(|end| end.say(b"s"));
    let sent = ends.each_mut().map(|end| end.hear::<8>());
    for (end, expected) in ends.iter_mut().zip([sent[1], sent[0]]) {
        end.say(&[&b"e"[..], &expected].concat());
    }
    ends.iter_mut().for_each(|end| assert_eq!(&end.hear(), b"d"));
    for end in &mut ends {
        end.say(b".");
        assert!(end.program.wait().unwrap().success());
    }
    for resets in &mut resets {
        assert_eq!(resets.segments().unwrap().len(), 0);
    }
}
