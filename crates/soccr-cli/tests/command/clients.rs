//! Clients as they are installed stay connected while their server is exchanged by `--adopt`. As root, on Linux 6.9; skipped
//! elsewhere, and where one of the programs is not installed.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use soccr_lab::wait_until;

use crate::adopt::adoption_works;
use crate::programs::{Program, installed, python};
use crate::servers::{memcached, move_clients, nginx, redis};

crate::tests![curl_uses_its_connection_again, redis_cli_goes_on, the_memcached_client_of_python_goes_on,];

/// What a program writes next.
fn hear(program: &mut Program, length: usize) -> String {
    let mut bytes = vec![0; length];
    program.0.stdout.as_mut().unwrap().read_exact(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

/// Asks by a line for its standard input; it answers with a name in a line.
fn ask(program: &mut Program, line: &str) -> String {
    program.0.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
    hear(program, "old\n".len()).trim_end().to_owned()
}

fn curl_uses_its_connection_again() {
    if !adoption_works() || !installed("nginx") || !installed("curl") {
        return;
    }
    // It reads the cookies of each request first: a pipe keeps it waiting.
    let directory = tempfile::tempdir().unwrap();
    let cookies = directory.path().join("cookies");
    mknodat(CWD, &cookies, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let curl = |server: SocketAddr| {
        let request =
            ["--silent", "--no-buffer", "--cookie", cookies.to_str().unwrap(), &format!("http://{server}/")];
        // The third is never let through: otherwise the connection would be closed when the test looks at it.
        let requests = [request; 3].join(&"--next");
        Program::start(Command::new("curl").args(requests).stdout(Stdio::piped()))
    };
    let get = |curl: &mut Program| {
        let mut open = OpenOptions::new();
        open.write(true).custom_flags(libc::O_NONBLOCK);
        wait_until("curl reads its cookies", || open.open(&cookies).is_ok());
        hear(curl, "old".len())
    };
    move_clients(1, nginx, curl, get);
}

fn redis_cli_goes_on() {
    if !adoption_works() || !installed("redis-server") || !installed("redis-cli") {
        return;
    }
    let redis_cli = |server: SocketAddr| {
        let mut command = Command::new("redis-cli");
        command.args(["-h", &server.ip().to_string(), "-p", &server.port().to_string()]);
        Program::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()))
    };
    move_clients(10, redis, redis_cli, |client| ask(client, "GET name\n"));
}

const PYMEMCACHE: &str = r#"
import sys, pymemcache
client = pymemcache.Client((sys.argv[1], 7))
for line in sys.stdin:
    print(client.get("name").decode(), flush=True)
"#;

fn the_memcached_client_of_python_goes_on() {
    if !adoption_works() || !installed("memcached") {
        return;
    }
    if !python("import pymemcache", &[]).stderr(Stdio::null()).status().unwrap().success() {
        soccr_lab::skip("pymemcache is not installed");
        return;
    }
    let client = |server: SocketAddr| {
        Program::start(python(PYMEMCACHE, &[&server.ip().to_string()]).stdin(Stdio::piped()))
    };
    move_clients(10, memcached, client, |client| ask(client, "\n"));
}
