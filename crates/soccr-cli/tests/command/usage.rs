//! Options that say nothing beside others, or the contrary: the command line is refused before anything is done.

use crate::programs::soccr;

crate::tests![options_that_mean_nothing_together_are_refused];

const FLOW: &str = "192.0.2.1:443-198.51.100.7:41234";

/// Command lines, and words of the answer.
const REFUSED: &[(&str, &str)] = &[
    ("list --watch --json", "--json"),
    ("save --pid 1 --fd 3 --all", "--all"),
    ("save --pid 1 --fd 3 --port 7", "--port"),
    ("save --pid 1 --fd 3 --peer 192.0.2.1", "--peer"),
    ("save --pid 1 --fd 3 --name init", "--name"),
    ("save --pid 1 --fd 3 --children", "--children"),
    ("save --pid 1 --fd 3 --with-local", "--with-local"),
    ("save --pid 1 --pid 1 --fd 3", "--fd is of one process"),
    ("save --pid 1", "--all"),
    ("save --pid 99999999999 --all", "1 to 2147483647"),
    ("save --all", "--pid"),
    ("save --port 7 --children", "--pid"),
    ("save --pid 1 --all --force", "--output"),
    ("save --pid 1 --all --output x --timeout 5", "--timeout"),
    ("save --pid 1 --all --force --timeout 5", "--force"),
    ("save --pid 1 --all --keep --silence 5", "--silence"),
    ("send --pid 1 --listener", "--via"),
    ("send --port 7 --listener --via x", "--pid"),
    ("send --pid 1 --listener --via x --children", "--fd"),
    ("send --pid 1 --listener --via x --with-local", "--fd"),
    ("send --pid 1 --listener --via x --idle 5", "--fd"),
    ("send --pid 1 --listener --via x --name init", "--listener alone takes no --name"),
    ("send --pid 1 --pid 1 --listener --via x", "--listener is of one process"),
    ("send --pid 1 --all --steer 192.0.2.2", "--via"),
    ("send --pid 1 --all --via x --steer 192.0.2.2 --silence 5", "--silence"),
    (
        "send --pid 1 --all --via x --steer 192.0.2.2 --steer 192.0.2.3",
        "one next hop for each address family",
    ),
    (
        "send --pid 1 --all --via x --steer fe80::2 --steer vxlan:192.0.2.3",
        "one next hop for each address family",
    ),
    ("send --pid 1 --all --via x --return-via-source", "--steer"),
    ("send --pid 1 --all --via x --silence 5 --return-via-source", "--return-via-source"),
    ("send --pid 1 --all --via x --dry-run --return-via-source", "--return-via-source"),
    ("send --pid 1 --all --dry-run", "--via"),
    ("send --pid 1 --all --via x --dry-run --listener", "--listener"),
    ("send --pid 1 --all --via x --dry-run --steer 192.0.2.2", "--steer"),
    ("send --pid 1 --all --via x --dry-run --silence 5", "--silence"),
    ("send --pid 1 --all --via x --json", "--dry-run"),
    ("send --pid 1 --all --via x --json --silence 5", "--json"),
    ("send --pid 1 --all --via x --json --steer 192.0.2.2", "--json"),
    ("send --pid 1 --all --via x --json --listener", "--json"),
    ("receive --adopt -- true", "--adopt"),
    ("receive --adopt --stdio", "--adopt"),
    ("receive --adopt --send-fd x", "--send-fd"),
    ("receive --adopt --connect 192.0.2.1:7", "--connect"),
    ("receive --adopt --detach", "--detach"),
    ("receive --adopt --log x", "--log"),
    ("receive --send-fd x --detach", "--detach"),
    ("receive --send-fd x --log x", "--log"),
    ("receive --send-fd x --connect 192.0.2.1:7", "--connect"),
    ("receive --send-fd x -- true", "--send-fd"),
    ("receive --connect 192.0.2.1:7 -- true", "--connect"),
    ("receive --drain 5 -- true", "--drain"),
    ("receive --drain 5 --send-fd x", "--drain"),
    ("receive --drain 5 --connect 192.0.2.1:7", "--drain"),
    ("receive --proxy-protocol 1 -- true", "--proxy-protocol"),
    ("receive --proxy-protocol 1 --send-fd x", "--proxy-protocol"),
    ("receive --proxy-protocol 1 --adopt", "--proxy-protocol"),
    ("receive --stdio", "PROGRAM"),
    ("receive --steered never --steered-numbers 1,2,3 -- true", "--steered-numbers"),
    ("restore x --drain 5 -- true", "--drain"),
    ("restore x --adopt -- true", "--adopt"),
    ("restore x", "PROGRAM"),
    ("check --via x --json", "--json"),
    ("inspect --svg --json x", "--svg"),
    ("inspect --svg --data x", "--svg"),
    ("steer --list FLOW", "--list"),
    ("steer --list --remove FLOW", "--list"),
    ("steer --list --all", "--list"),
    ("steer --list --device lo", "--list"),
    ("steer --remove --all --device lo", "--device"),
    ("steer --remove --all --json", "--json"),
    ("steer --to 192.0.2.2 --device lo FLOW", "--device"),
    ("steer --adopt-address 192.0.2.1/24 --device lo --all", "--all"),
    ("steer --adopt-address 192.0.2.1/24 --device lo --json", "--json"),
    ("steer --to 192.0.2.2", "LOCAL-REMOTE"),
    ("steer --to 192.0.2.2 --json FLOW", "--json"),
    ("steer --to 192.0.2.2 --all", "--all"),
    ("steer --remove", "LOCAL-REMOTE"),
    ("steer --remove --all FLOW", "--all"),
    ("steer --adopt-address 192.0.2.1/24", "--device"),
    ("steer --adopt-address 192.0.2.1/24 --device lo FLOW", "--adopt-address"),
    ("lock --list --name x", "--name"),
    ("lock --list --image x", "--image"),
    ("lock --list --seconds 5", "--seconds"),
    ("lock --list FLOW", "--list"),
    ("lock --name x --json FLOW", "--json"),
    ("lock --image x --json", "--json"),
    ("lock --name x --seconds 5 --json FLOW", "--json"),
    ("lock FLOW", "--name"),
    ("unlock --all x", "--all"),
    ("unlock", "NAME"),
];

fn options_that_mean_nothing_together_are_refused() {
    let is_wrong = |(line, words): &&(&str, &str)| {
        let output = soccr(&line.replace("FLOW", FLOW).split(' ').collect::<Vec<_>>()).output().unwrap();
        let complaint = String::from_utf8(output.stderr).unwrap();
        let is_refused = output.status.code() == Some(2) && complaint.contains(words);
        if !is_refused {
            eprintln!("{line}: {}: {complaint}", output.status);
        }
        !is_refused
    };
    assert_eq!(REFUSED.iter().filter(is_wrong).collect::<Vec<_>>(), <[&(&str, &str); 0]>::default());
}
