//! What the kernel counts.

use std::fs;

use crate::Namespace;

impl Namespace {
    /// A counter of TCP in this namespace, by its name in `/proc/net/snmp` or `/proc/net/netstat` (`RetransSegs`, `DelayedACKs`).
    ///
    /// # Panics
    /// Where the kernel has no such counter.
    pub fn counter(&self, name: &str) -> u32 {
        let read = |file| fs::read_to_string(format!("/proc/thread-self/net/{file}")).expect("counters");
        let table = self.run(|| read("snmp") + &read("netstat"));
        let mut lines = table.lines().filter(|line| line.starts_with("Tcp"));
        while let (Some(names), Some(values)) = (lines.next(), lines.next()) {
            let mut columns = names.split(' ').zip(values.split(' '));
            if let Some((_, value)) = columns.find(|(column, _)| *column == name) {
                return value.parse().expect("a number");
            }
        }
        panic!("the kernel does not count {name}");
    }
}
