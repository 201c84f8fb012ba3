//! Other processes stand still for an instant.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Stdio};

use rustix::fs::fstat;
use rustix::io::ioctl_fionbio;
use soccr_handover::foreign::{Sharing, Stopped};
use soccr_lab::{skip, wait_until};

use super::*;

/// A thread ticks; another one is in `vfork(2)` until its child can open a FIFO, and until then nothing but a kill ends that.
const PROGRAM: &str = r#"
import ctypes, os, sys, threading, time
def tick():
    while True:
        os.write(1, b".")
        time.sleep(0.01)
threading.Thread(target=tick, daemon=True).start()
c = ctypes.CDLL(None)
actions, child = ctypes.create_string_buffer(256), ctypes.c_int()
c.posix_spawn_file_actions_init(actions)
c.posix_spawn_file_actions_addopen(actions, 9, sys.argv[1].encode(), os.O_RDONLY, 0)
arguments = (ctypes.c_char_p * 2)(b"true", None)
c.posix_spawn(ctypes.byref(child), b"/bin/true", actions, None, arguments, arguments)
"#;

/// Its first argument is where the child waits.
fn in_vfork(fifo: &Path) -> Option<(Child, Sharing)> {
    assert!(Command::new("mkfifo").arg(fifo).status().unwrap().success());
    let (socket, _other_end) = UnixStream::pair().unwrap();
    let inode = fstat(&socket).unwrap().st_ino;
    let program = Command::new("python3")
        .args(["-c", PROGRAM])
        .arg(fifo)
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(socket)))
        .stdout(Stdio::piped())
        .spawn();
    let program = match program {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            skip("python3 is not in PATH");
            return None;
        }
        program => program.unwrap(),
    };
    // A thread that waits for a page of a file is in state D, too, but it has no child yet.
    wait_until("it waits for its child", || {
        let of_process =
            |file: String| std::fs::read_to_string(format!("/proc/{}/{file}", program.id())).unwrap();
        let has_child = !of_process(format!("task/{}/children", program.id())).is_empty();
        has_child && of_process("stat".into()).split_once(") ").unwrap().1.starts_with('D')
    });
    Some((program, Sharing::find(&[inode]).unwrap()))
}

pub fn a_thread_that_does_not_stop_holds_no_other_up() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    let Some((mut program, mut sharing)) = in_vfork(&fifo) else { return };
    let mut ticks = program.stdout.take().unwrap();
    ioctl_fionbio(&ticks, true).unwrap();
    let mut ticked = || {
        let mut length = 0;
        while let Ok(more @ 1..) = ticks.read(&mut [0; 4096]) {
            length += more;
        }
        length > 0
    };
    wait_until("it ticks", &mut ticked);
    let error = Stopped::stop(&mut sharing).unwrap_err();
    assert!(error.to_string().contains(&format!("thread {} does not stop", program.id())), "{error}");
    ticked();
    // This thread goes on tracing it.
    wait_until("it ticks again", &mut ticked);
    drop(File::options().write(true).open(&fifo).unwrap());
    program.kill().unwrap();
    program.wait().unwrap();
}

/// A child that has been stopped before it begins its own program would hold its parent up.
pub fn a_child_in_vfork_goes_on_until_its_parent_stops() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    let Some((mut program, mut sharing)) = in_vfork(&fifo) else { return };
    assert_eq!(sharing.processes().len(), 2);
    let status = format!("/proc/{}/status", program.id());
    thread::scope(|scope| {
        scope.spawn(|| {
            wait_until("its parent is to stop", || {
                !std::fs::read_to_string(&status).unwrap().contains("TracerPid:\t0\n")
            });
            // Fails as long as nobody reads.
            let open = || OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&fifo);
            wait_until("the child goes on", || open().is_ok());
        });
        drop(Stopped::stop(&mut sharing).unwrap());
    });
    program.kill().unwrap();
    program.wait().unwrap();
}
