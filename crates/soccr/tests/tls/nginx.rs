//! A download from nginx, whose TLS the kernel has, by `sendfile`: the connection goes on in this process in the middle of it.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use soccr_lab::{TcpInfo, wait_until};

use crate::ends::{LIMIT, leave, settle_and_lock};
use crate::openssl::{Program, make_certificate, openssl, socket_of, wait_for_listener};

/// More than all buffers on the way take.
const LENGTH: usize = 48 << 20;

/// What this process sends behind what nginx has sent.
const MARK: &[u8] = b"the connection is here now";

pub fn a_download_goes_on_here() {
    if Command::new("nginx").arg("-v").output().is_err() {
        soccr_lab::skip("nginx is not installed");
        return;
    }
    let Some(directory) = make_certificate() else { return };
    let file: Vec<u8> = (0..LENGTH as u32).map(|place| (place % 251) as u8 ^ (place >> 12) as u8).collect();
    fs::write(directory.path().join("file"), &file).unwrap();
    // In 1.3 this OpenSSL leaves decrypting to itself.
    for (port, version, decrypts) in [(4443, "-tls1_2", true), (4444, "-tls1_3", false)] {
        go_on(directory.path(), port, version, decrypts, &file);
    }
}

fn go_on(directory: &Path, port: u16, version: &str, decrypts: bool, file: &[u8]) {
    let path = directory.display();
    let configuration = format!(
        "user root root; daemon off; master_process off; pid {path}/pid; events {{ }}
         http {{ access_log off; sendfile on; client_body_temp_path {path}/body; proxy_temp_path {path}/proxy;
                fastcgi_temp_path {path}/fastcgi; uwsgi_temp_path {path}/uwsgi; scgi_temp_path {path}/scgi;
                server {{ listen 127.0.0.1:{port} ssl; root {path}; ssl_conf_command Options KTLS; ssl_protocols TLSv1.2 TLSv1.3;
                         ssl_certificate {path}/certificate; ssl_certificate_key {path}/key; }} }}"
    );
    fs::write(directory.join("nginx.conf"), configuration).unwrap();
    let mut server = Command::new("nginx");
    server.args(["-e", "stderr", "-c"]).arg(directory.join("nginx.conf"));
    let server = Program::start(&mut server);
    wait_for_listener(port);
    let client = format!("s_client -quiet {version} -connect 127.0.0.1:{port}");
    let mut client = Program::start(&mut openssl(directory, &client));
    client.say("GET /file HTTP/1.0\r\n\r\n");
    let mut output = client.0.stdout.take().unwrap();
    let mut received = vec![0; 100_000];
    if let Err(error) = output.read_exact(&mut received) {
        kill_process(server.pid(), Signal::TERM).unwrap();
        panic!("{error}; the client: {}; the server: {}", client.complaints(), server.complaints());
    }

    let socket = socket_of(server.pid(), port);
    // Nobody reads on: the client's window is closed, and more waits behind it.
    wait_until("all buffers are full", || {
        let info = TcpInfo::of(&socket).unwrap();
        info.unsent > 0 && info.unacknowledged == info.unsent && info.snd_wnd < info.snd_mss
    });
    kill_process(server.pid(), Signal::STOP).unwrap();
    if decrypts {
        // The send queue does not show itself, and stays.
        let error = soccr::tls::settle(&socket, Duration::from_millis(100)).unwrap_err();
        assert!(error.to_string().contains("does not acknowledge"), "{error}");
    }
    let reader = std::thread::spawn(move || {
        output.read_to_end(&mut received).unwrap();
        received
    });
    let lock = settle_and_lock(&socket);
    let connection = leave(TcpStream::from(socket));
    let tls = connection.tls.as_ref().unwrap();
    assert_eq!((tls.transmit.is_some(), tls.receive.is_some()), (true, decrypts));
    // In repair mode its end is silent.
    drop(server);
    let restored = connection.restore().unwrap();
    lock.release().unwrap();
    let mut ours = restored.resume().unwrap();
    ours.set_nonblocking(false).unwrap();
    ours.set_write_timeout(Some(LIMIT)).unwrap();
    ours.write_all(MARK).unwrap();
    drop(ours);
    let received = reader.join().unwrap();
    let complaints = client.complaints();
    assert!(!complaints.contains("alert") && !complaints.contains("bad record"), "{complaints}");
    let header = received.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
    let body = received[header..].strip_suffix(MARK).expect("what was sent here comes last");
    assert!(body.len() < file.len() && file.starts_with(body), "{} bytes, some of them others", body.len());
}
