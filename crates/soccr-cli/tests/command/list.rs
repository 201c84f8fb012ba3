//! `list`: which sockets, and what it says about them.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use soccr_lab::{sysctl, wait_until};

use crate::programs::{
    Program, ask, connect, descriptors, installed, json, python, server, server_at, soccr, succeed,
};

crate::tests![
    filters_choose,
    what_is_ipv4_on_the_wire_is_shown_as_that,
    a_connection_with_tls_of_the_kernel_cannot_be_saved,
    who_may_not_pause_is_told_so,
];

fn filters_choose() {
    if !installed("python3") {
        return;
    }
    let server = server("", 1);
    let mut client = connect(([127, 0, 0, 1], 7));
    assert_eq!(ask(&mut client, "one", ""), "one");
    let count = |arguments: &[&str]| {
        let pid = server.pid();
        json(&[&["list", "--json", "--pid", &pid], arguments].concat()).len()
    };
    for (arguments, expected) in [
        (&["--state", "established"][..], 1),
        (&["--state", "LISTEN"], 1),
        (&["--state", "listen", "--state", "established"], 2),
        (&["--state", "close-wait"], 0),
        (&["--peer", "127.0.0.1"], 1),
        (&["--peer", "127.0.0.0/8", "--port", "7"], 1),
        (&["--peer", "192.0.2.0/24"], 0),
        (&["--idle", "0"], 1),
        (&["--idle", "86400"], 0),
    ] {
        assert_eq!(count(arguments), expected, "{arguments:?}");
    }
    let socket = &json(&["list", "--json", "--pid", &server.pid(), "--state", "established"])[0];
    assert!(socket["congestion_control"].is_string(), "{socket}");
    assert_eq!((&socket["bytes_received"], &socket["retransmissions"]), (&3.into(), &0.into()));
    assert!(socket["idle_ms"].is_u64(), "{socket}");
    let table = String::from_utf8(succeed(&["list", "--pid", &server.pid()])).unwrap();
    assert!(
        table.contains("IDLE") && table.contains(socket["congestion_control"].as_str().unwrap()),
        "{table}"
    );
}

fn what_is_ipv4_on_the_wire_is_shown_as_that() {
    if !installed("python3") {
        return;
    }
    let server = server_at("::", "", 1);
    let client = connect(([127, 0, 0, 1], 7));
    let mut sockets = Vec::new();
    wait_until("the connection is accepted", || {
        sockets = json(&["list", "--json", "--pid", &server.pid(), "--peer", "127.0.0.1"]);
        sockets.len() == 1
    });
    assert_eq!(sockets[0]["local"], "127.0.0.1:7");
    assert_eq!(sockets[0]["remote"], client.local_addr().unwrap().to_string());
}

/// A connection to itself, with TLS of the kernel on one end.
const TLS: &str = r#"
import signal, socket
listener = socket.create_server(("127.0.0.1", 7))
connection = socket.create_connection(("127.0.0.1", 7))
accepted = listener.accept()
try:
    connection.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
    print("tls", flush=True)
except OSError as error:
    print(error, flush=True)
signal.pause()
"#;

fn a_connection_with_tls_of_the_kernel_cannot_be_saved() {
    if !installed("python3") {
        return;
    }
    let mut program = Program::start(&mut python(TLS, &[]));
    let mut line = String::new();
    BufReader::new(program.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    if line != "tls\n" {
        eprintln!("\nSKIPPED: the kernel has no TLS: {line}");
        return;
    }
    let sockets = json(&["list", "--json", "--pid", &program.pid(), "--state", "established"]);
    let reasons = sockets.iter().filter_map(|socket| socket["why_not"].as_str());
    assert_eq!(reasons.collect::<Vec<_>>(), ["kTLS: the kernel does not give its keys away"]);
    assert_eq!(descriptors(&program.pid()).len(), 1);
}

fn who_may_not_pause_is_told_so() {
    if !installed("python3") || !installed("setpriv") {
        return;
    }
    sysctl("net/ipv4/ip_unprivileged_port_start", "0").unwrap();
    let without_rights = |program: &Command| {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", "-all", "--inh-caps", "-all", "--"]).arg(program.get_program());
        command.args(program.get_args()).stdout(Stdio::piped());
        command
    };
    let program =
        Program::start(&mut without_rights(&python(TLS.replace(r#"b"tls""#, r#"b"none""#).as_str(), &[])));
    wait_until("it listens", || json(&["list", "--json", "--port", "7"]).len() == 3);
    let list = soccr(&["list", "--json", "--pid", &program.pid(), "--state", "established"]);
    let output = without_rights(&list).output().unwrap();
    let sockets: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(sockets.len(), 2, "{output:?}");
    for socket in sockets {
        assert_eq!(socket["savable"], false);
        assert!(socket["why_not"].as_str().unwrap().contains("run as root"), "{socket}");
    }
}
