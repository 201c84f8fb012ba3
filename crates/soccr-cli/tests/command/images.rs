//! `inspect`, `criu`, `lock`, and what is made from the definitions of the command line.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use soccr::lock::PersistentLock;
use soccr_lab::Namespace;

use crate::programs::{assert_unlocked, fail, installed, json, run, succeed};

crate::tests![
    a_dump_is_listed,
    an_extracted_connection_is_what_the_dump_says,
    rewritten_addresses_are_found_again,
    bytes_are_shown_on_demand_only,
    all_that_may_hinder_a_restore_is_shown,
    a_damaged_image_is_an_error,
    a_lock_stays_until_it_is_removed,
    every_subcommand_has_a_page,
];

const DUMP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../soccr-image/tests/criu/images");

fn a_dump_is_listed() {
    let sockets = json(&["criu", "list", "--json", DUMP]);
    assert_eq!(sockets.len(), 7);
    assert_eq!(sockets[0]["state"], "LISTEN");
    assert_eq!(sockets[0]["remote"], serde_json::Value::Null);
    assert_eq!(sockets[2]["remote"], "127.0.0.1:7101");
    let table = String::from_utf8(succeed(&["criu", "list", DUMP])).unwrap();
    assert!(table.contains("[::1]:7104"), "{table}");
    assert!(fail(1, &["criu", "list", "/"]).contains("/inventory.img"));
    assert!(fail(1, &["inspect", "/"]).contains("/, read as images of CRIU: "));
}

fn an_extracted_connection_is_what_the_dump_says() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let image = image.to_str().unwrap();
    succeed(&["criu", "extract", DUMP, "13", "-o", image]);
    let connection = &json(&["inspect", "--json", image])[0];
    assert_eq!(connection["inq_len"], 5000);
    assert_eq!(connection["remote"], "127.0.0.1:7101");
    let of_dump = json(&["inspect", "--json", DUMP]);
    let of_dump = of_dump.iter().find(|connection| connection["name"] == "socket 13").unwrap();
    assert_eq!(connection["rcv_nxt"], of_dump["rcv_nxt"]);
    // There is no other way than -o.
    let complaint = fail(1, &["criu", "extract", DUMP, "13", "-o", "/", "--force"]);
    assert!(complaint.contains("not a regular file") && !complaint.contains("leave -o out"), "{complaint}");
    // It may be all that is left of the connection.
    assert!(fail(1, &["criu", "extract", DUMP, "13", "-o", image]).contains("--force"));
    succeed(&["criu", "extract", DUMP, "13", "-o", image, "--force"]);
    let other = &format!("{image}-other");
    assert!(fail(1, &["criu", "extract", DUMP, "99", "-o", other]).contains("number 99"));
    assert!(fail(1, &["criu", "extract", DUMP, "11", "-o", other]).contains("11"), "a listener");
}

fn rewritten_addresses_are_found_again() {
    let copy = tempfile::tempdir().unwrap();
    for file in fs::read_dir(DUMP).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    let directory = copy.path().to_str().unwrap();
    let printed = succeed(&["criu", "rewrite", directory, "--map", "127.0.0.1=192.0.2.7"]);
    let expected =
        "6 sockets changed\nno image configures 192.0.2.7: give it to an interface before the restore\n";
    assert_eq!(String::from_utf8(printed).unwrap(), expected);
    for (old, new) in
        json(&["criu", "list", "--json", DUMP]).iter().zip(json(&["criu", "list", "--json", directory]))
    {
        let expected = old["local"].as_str().unwrap().replace("127.0.0.1", "192.0.2.7");
        assert_eq!(new["local"], expected);
    }
    assert!(fail(1, &["criu", "rewrite", directory, "--map", "127.0.0.1=192.0.2.7"]).contains("no socket"));
    succeed(&["criu", "rewrite", directory, "--map", "192.0.2.7=127.0.0.1"]);
    let files = |directory: &Path| fs::read(directory.join("files.img")).unwrap();
    assert_eq!(files(copy.path()), files(Path::new(DUMP)));
    assert_eq!(run(&["criu", "rewrite", directory, "--map", "127.0.0.1"]).status.code(), Some(2));
}

fn bytes_are_shown_on_demand_only() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let image = image.to_str().unwrap();
    succeed(&["criu", "extract", DUMP, "13", "-o", image]);
    let svg = String::from_utf8(succeed(&["inspect", "--svg", image])).unwrap();
    assert!(svg.starts_with("<svg ") && svg.contains("write_seq") && svg.ends_with("</svg>\n"), "{svg}");
    let without = String::from_utf8(succeed(&["inspect", image])).unwrap();
    let with = String::from_utf8(succeed(&["inspect", "--data", image])).unwrap();
    assert!(without.contains("5000 unread") && without.contains("rcv_nxt"), "{without}");
    assert!(with.starts_with(&without));
    assert_eq!(with[without.len()..].matches("\n  0000").count(), 313, "16 bytes a line");
    assert!(json(&["inspect", "--json", image])[0].get("receive_queue_hex").is_none());
    let shown = json(&["inspect", "--json", "--data", image]);
    assert_eq!(shown[0]["receive_queue_hex"].as_str().unwrap().len(), 10_000);
}

fn all_that_may_hinder_a_restore_is_shown() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let name = image.to_str().unwrap();
    succeed(&["criu", "extract", DUMP, "13", "-o", name]);
    let plain = &json(&["inspect", "--json", name])[0];
    assert!(plain["reset"] == false && plain["tracked"].is_null() && plain["owner"].is_null(), "{plain}");
    let mut connection = soccr_image::load_file(&image).unwrap();
    // A reset leaves nothing in the send queue.
    connection.send_queue.clear();
    (connection.control.outq_len, connection.control.unsq_len, connection.control.reset) = (0, 0, true);
    let wire = soccr::Flow { local: "203.0.113.7:80".parse().unwrap(), ..connection.flow() };
    connection.tracked = Some(soccr::connection::Tracked { wire, initiator: false, mark: 0x2a });
    connection.owner = Some(soccr::connection::Owner { user: 1000, group: 100 });
    fs::remove_file(&image).unwrap();
    soccr_image::save_file(&image, &connection).unwrap();
    let shown = &json(&["inspect", "--json", name])[0];
    assert_eq!(shown["reset"], true);
    let tracked = &shown["tracked"];
    assert_eq!((&tracked["local"], &tracked["mark"]), (&"203.0.113.7:80".into(), &42.into()));
    assert_eq!((&tracked["translated"], &tracked["initiator"]), (&true.into(), &false.into()));
    assert_eq!(shown["owner"], serde_json::json!({ "user": 1000, "group": 100 }));
    let text = String::from_utf8(succeed(&["inspect", name])).unwrap();
    let nat = format!("on the wire {} → {} (NAT), begun by the peer, mark 0x2a", wire.local, wire.remote);
    for part in ["ESTABLISHED, reset by the peer\n", &nat, "owner       user 1000, group 100\n"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

fn a_damaged_image_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let name = image.to_str().unwrap();
    succeed(&["criu", "extract", DUMP, "13", "-o", name]);
    let bytes = fs::read(&image).unwrap();
    for length in [0, 1, 15, 16, 40, bytes.len() - 1] {
        fs::write(&image, &bytes[..length]).unwrap();
        let output = run(&["inspect", name]);
        assert!([1, 3].contains(&output.status.code().unwrap()), "{length}: {output:?}");
        fail(1, &["restore", name, "--", "true"]);
    }
    let mut changed = bytes.clone();
    changed[100] ^= 1;
    fs::write(&image, &changed).unwrap();
    assert!(fail(1, &["restore", name, "--", "true"]).contains("checksum"));
    fs::write(&image, b"something else altogether").unwrap();
    assert!(fail(1, &["inspect", name]).contains(name));
}

fn a_lock_stays_until_it_is_removed() {
    let connections = ["192.0.2.1:443-198.51.100.7:41234", "[2001:db8::1]:443-[2001:db8::2]:41234"];
    succeed(&["lock", "--name", "move", "--seconds", "100", connections[0], connections[1]]);
    let locks = json(&["lock", "--list", "--json"]);
    assert_eq!(locks.len(), 1);
    assert_eq!(locks[0]["name"], "move");
    assert_eq!(locks[0]["connections"].as_array().unwrap().len(), 2);
    let left = locks[0]["remaining_ms"].as_u64().unwrap();
    assert!((1..=100_000).contains(&left));
    assert!(fail(1, &["lock", "--name", "move", connections[0]]).contains("EEXIST"));
    assert!(String::from_utf8(succeed(&["lock", "--list"])).unwrap().contains("[2001:db8::2]:41234"));
    // A lock that has grown has a time for each connection.
    let flow =
        |remote: &str| soccr::Flow { local: "192.0.2.1:1".parse().unwrap(), remote: remote.parse().unwrap() };
    let [short, long, forever] = ["192.0.2.2:100", "192.0.2.2:1000", "192.0.2.2:9"].map(flow);
    PersistentLock::create("grown", &[short], Some(Duration::from_secs(100))).unwrap();
    let extend = |flow, limit| {
        let locks = PersistentLock::list().unwrap();
        locks.into_iter().find(|lock| lock.name == "grown").unwrap().extend(&[flow], limit).unwrap();
    };
    extend(long, Some(Duration::from_secs(1000)));
    let grown =
        || json(&["lock", "--list", "--json"]).into_iter().find(|lock| lock["name"] == "grown").unwrap();
    let shown = grown();
    let listed = shown["connections"].as_array().unwrap();
    let left = |flow: soccr::Flow| {
        let is_it = |shown: &&serde_json::Value| shown["remote"] == flow.remote.to_string();
        listed.iter().find(is_it).unwrap()["remaining_ms"].as_u64().unwrap()
    };
    assert!(left(short) <= 100_000 && (100_001..=1_000_000).contains(&left(long)), "{shown}");
    assert_eq!(shown["remaining_ms"].as_u64(), Some(left(long)));
    extend(forever, None);
    assert_eq!(grown()["remaining_ms"], serde_json::Value::Null);
    assert!(String::from_utf8(succeed(&["lock", "--list"])).unwrap().contains(" never "));
    succeed(&["unlock", "grown"]);
    // Another network has its own.
    assert_eq!(Namespace::new().unwrap().run(|| json(&["lock", "--list", "--json"])).len(), 0);
    assert!(fail(1, &["unlock", "other"]).contains("no lock other"));
    succeed(&["unlock", "move"]);
    assert_unlocked();
    succeed(&["lock", "--name", "a", connections[0]]);
    succeed(&["lock", "--name", "b", connections[1]]);
    succeed(&["unlock", "--all"]);
    assert_unlocked();
    for wrong in ["192.0.2.1:443", "192.0.2.1:443-[::1]:5", "192.0.2.1-192.0.2.2:1"] {
        assert_eq!(run(&["lock", "--name", "c", wrong]).status.code(), Some(2));
    }
}

fn every_subcommand_has_a_page() {
    let directory = tempfile::tempdir().unwrap();
    succeed(&["man", directory.path().to_str().unwrap()]);
    let pages = ["list", "save", "restore", "resume", "send", "receive", "inspect", "criu", "lock", "unlock"];
    for page in pages {
        let text = fs::read_to_string(directory.path().join(format!("soccr-{page}.1"))).unwrap();
        assert!(text.contains(".SH EXAMPLES"), "{page}");
    }
    let send = fs::read_to_string(directory.path().join("soccr-send.1")).unwrap();
    assert!(send.contains("<\\-\\-fd <FD>|"), "a synopsis with values: {send}");
    for page in fs::read_dir(directory.path()).unwrap() {
        let page = page.unwrap().path();
        let text = fs::read_to_string(&page).unwrap();
        assert!(text.contains(".SH SEE ALSO") && !text.contains(".SH EXTRA"), "{}: {text}", page.display());
        if installed("groff") {
            let output =
                Command::new("groff").args(["-man", "-Tutf8", "-ww", "-z"]).arg(&page).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{}", page.display());
        }
    }
    let main = fs::read_to_string(directory.path().join("soccr.1")).unwrap();
    assert!(main.contains("126") && main.contains("unknown"), "exit codes: {main}");
}
