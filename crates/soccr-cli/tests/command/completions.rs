//! `completions`: what a shell offers next.

use std::process::{Command, Stdio};

use crate::programs::{SOCCR, connect, installed, server, succeed};

crate::tests![every_shell_gets_a_script, bash_offers_commands_processes_descriptors_and_locks];

fn every_shell_gets_a_script() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = String::from_utf8(succeed(&["completions", shell])).unwrap();
        assert!(script.contains("SOCCR_COMPLETE"), "{shell}: {script}");
    }
}

/// What bash offers for the last of `words`, one in a line.
fn offered(words: &[&str]) -> Vec<String> {
    let script = format!(
        "PATH={}:$PATH; eval \"$(soccr completions bash)\"; COMP_WORDS=(soccr \"$@\"); COMP_CWORD=$#; \
         _clap_complete_soccr soccr \"${{@: -1}}\" 2>&1; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        std::path::Path::new(SOCCR).parent().unwrap().display()
    );
    let output =
        Command::new("bash").args(["-c", &script, "bash"]).args(words).stderr(Stdio::inherit()).output();
    String::from_utf8(output.unwrap().stdout).unwrap().lines().map(|line| line.trim().to_owned()).collect()
}

fn bash_offers_commands_processes_descriptors_and_locks() {
    if !installed("bash") || !installed("python3") {
        return;
    }
    let server = server("", 1);
    let _client = connect(([127, 0, 0, 1], 7));
    let commands = offered(&["de"]);
    assert_eq!(commands, ["demo"], "and nothing that is hidden");
    assert!(offered(&["save", "--pid", ""]).contains(&server.pid()));
    let listener = offered(&["save", "--pid", &server.pid(), "--fd", ""]);
    assert!(listener.contains(&"3".to_owned()), "{listener:?}");
    succeed(&["lock", "--name", "quiet", "192.0.2.1:443-198.51.100.7:41234"]);
    assert!(offered(&["unlock", "q"]).contains(&"quiet".to_owned()));
    succeed(&["unlock", "quiet"]);
}
