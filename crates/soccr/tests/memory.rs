//! What a save and a restore take of memory: the bytes in the queues, once. Alone in its process, whose peak is measured.

use std::fs;

use soccr::pause;
use soccr_lab::{Case, Family, Made, Pair, State};

soccr_lab::tests![long_queues_are_kept_once];

const LENGTH: usize = 32 << 20;
/// What everything but the queues may take.
const OVERHEAD: usize = 1 << 20;
/// The kernel counts the pages of each processor in batches.
const NOISE: usize = 512 << 10;

fn long_queues_are_kept_once() {
    // Where the user may load BPF, the first restore of this process does, and looks up types of the kernel.
    for (received, sent, unsent) in [(LENGTH, 0, 0), (0, 10_000, LENGTH - 10_000)] {
        let pair = Pair::new().unwrap();
        let case = Case { family: Family::V4, state: State::Established, received, sent, unsent };
        let Made { socket, peer: _peer, incoming, outgoing, .. } = case.make(&pair.a, &pair.b);
        drop((incoming, outgoing));
        // Sets the peak back to what is in use now (proc(5)).
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = status("VmRSS");

        let paused = pause(&socket).unwrap();
        let connection = paused.save().unwrap();
        paused.detach().unwrap();
        let restored = pair.a.run(|| connection.restore()).unwrap();

        let peak = status("VmHWM") - before;
        drop(restored);
        assert_eq!(connection.receive_queue.len() + connection.send_queue.len(), LENGTH);
        assert!(peak >= LENGTH, "{peak} bytes are less than the queue: not measured");
        assert!(peak <= LENGTH + OVERHEAD + NOISE, "{peak} bytes for a queue of {LENGTH}");
    }
}

/// A line of `/proc/self/status`, in bytes.
fn status(name: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    let kilobytes: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kilobytes << 10
}
