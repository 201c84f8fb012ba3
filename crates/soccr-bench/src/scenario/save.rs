//! `pause` and `save`: from a live socket to its value, into memory that is reused.

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::Result;
use soccr::{Connection, Lock};
use soccr_lab::{Case, Family, Pair, State};

use crate::arguments::Arguments;
use crate::connections::{budget, cases, make};
use crate::report::{Report, Row};
use crate::statistics::{Samples, repeat};
use crate::{floor, sys};

pub(crate) fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let pair = Pair::new()?;
    for (name, case) in cases() {
        one(&pair, &name, &case, budget(arguments.full), report)?;
    }
    fresh_memory(&pair, budget(arguments.full), report)
}

fn one(pair: &Pair, name: &str, case: &Case, budget: Duration, report: &mut Report) -> Result<()> {
    let (made, flow) = make(pair, case);
    let _lock = pair.a.run(|| Lock::drop_traffic(&[flow]))?;
    let socket = made.socket.as_fd();
    let mut connection = Connection::empty();
    let mut scratch = vec![0; case.received.max(case.unsent)];
    let (mut ours, mut bare) = (Samples::default(), Samples::default());
    repeat(budget, 20, |_| {
        let paused = ours.time(|| {
            let paused = soccr::pause(&socket)?.with_peer(flow.remote);
            paused.save_into(&mut connection)?;
            Ok::<_, soccr::Error>(paused)
        })?;
        paused.leave_paused();
        floor::unpause(socket);
        bare.time(|| floor::save(socket, &mut scratch));
        floor::unpause(socket);
        Ok::<_, soccr::Error>(())
    })?;
    report.add(Row::new("save", name, &ours).against(&bare));
    Ok(())
}

/// What reusing memory is good for: against `mmap`, `recv`, `munmap`.
fn fresh_memory(pair: &Pair, budget: Duration, report: &mut Report) -> Result<()> {
    let length = 1 << 20;
    let case = Case { family: Family::V4, state: State::Established, received: length, sent: 0, unsent: 0 };
    let (made, _) = make(pair, &case);
    let paused = soccr::pause(&made.socket)?;
    let mut connection = paused.save()?;
    let (mut ours, mut fresh) = (Samples::default(), Samples::default());
    repeat(budget, 20, |_| {
        ours.time(|| paused.save_into(&mut connection))?;
        // A save leaves no queue selected.
        floor::select_receive(made.socket.as_fd());
        fresh.time(|| sys::peek_fresh(made.socket.as_fd(), length));
        Ok::<_, soccr::Error>(())
    })?;
    report.add(Row::new("save", "1 MiB to read, against fresh memory", &ours).against(&fresh));
    Ok(())
}
