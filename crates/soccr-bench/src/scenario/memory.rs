//! The peak of memory while 1,000 connections with 64 KiB each are saved into a pipe, against the bytes in their queues.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use anyhow::{Context, Result};
use soccr::bulk::{self, Saved};
use soccr_image::stream::Writer;
use soccr_lab::{Namespace, TcpInfo, wait_until};

use crate::arguments::Arguments;
use crate::report::{Report, Row};

const COUNT: usize = 1_000;
const QUEUE: usize = 64 << 10;

pub(crate) fn run(_: &Arguments, report: &mut Report) -> Result<()> {
    let peak = Namespace::new()?.run(measure)?;
    report.add(Row::bytes("memory", "1000 x 64 KiB into a pipe", peak, COUNT * QUEUE));
    Ok(())
}

fn measure() -> Result<usize> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let bytes = vec![7; QUEUE];
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..COUNT {
        let mut peer = TcpStream::connect(address)?;
        ours.push(listener.accept()?.0);
        peer.write_all(&bytes)?;
        peers.push(peer);
    }
    for stream in &ours {
        wait_until("the queue is full", || TcpInfo::of(stream).is_ok_and(|info| info.unread == QUEUE));
    }
    let (mut reader, writer) = std::io::pipe()?;
    let drain = std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while reader.read(&mut buffer).is_ok_and(|length| length > 0) {}
    });
    // Sets the peak back to what is in use now (proc(5)).
    fs::write("/proc/self/clear_refs", "5")?;
    let before = status("VmRSS")?;
    let mut stream = Writer::new(writer)?;
    bulk::save(&ours, |index, saved| {
        let Saved { connection, paused } = saved?;
        stream.connection(index as u32 + 1, "", connection)?;
        paused.detach()?;
        Ok::<_, anyhow::Error>(())
    })?;
    drop(stream.finish()?);
    let peak = status("VmHWM")?;
    drain.join().expect("it does not panic");
    Ok(peak.saturating_sub(before))
}

/// A line of `/proc/self/status`, in bytes.
fn status(name: &str) -> Result<usize> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(name)).context("a line of /proc/self/status")?;
    let kilobytes: usize = line.split_whitespace().nth(1).context("a number")?.parse()?;
    Ok(kilobytes << 10)
}
