//! The walk-through of the README, as it stands.

use std::path::Path;
use std::process::Command;

use crate::programs::installed;

crate::tests![a_client_does_not_notice];

fn a_client_does_not_notice() {
    if !installed("python3") || !installed("ip") {
        return;
    }
    let command = Path::new(env!("CARGO_BIN_EXE_soccr")).parent().unwrap();
    let path = format!("{}:{}", command.display(), std::env::var("PATH").unwrap());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/walkthrough.sh");
    let output = Command::new("sh").arg(script).env("PATH", path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.ends_with("first server: hello\nsecond server: again\n"), "{text}");
}
