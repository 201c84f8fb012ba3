//! `restore`: from the value to a socket in repair mode.
//!
//! Plain, that is without the options that an application has set and without the speed that the connection had; and
//! with them.

use std::time::Duration;

use anyhow::Result;
use soccr::{Connection, Lock};
use soccr_lab::{Case, Pair, State};

use crate::arguments::Arguments;
use crate::connections::{budget, cases, make, value};
use crate::effort::Effort;
use crate::floor;
use crate::report::{Report, Row};
use crate::statistics::{Samples, repeat};

pub(crate) fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let pair = Pair::new()?;
    for (name, case) in cases() {
        let connection = take(&pair, &case)?;
        let most_common = (case.state, case.received, case.unsent) == (State::Established, 0, 0);
        for (effort, effort_name) in Effort::ALL {
            if effort == Effort::Plain || most_common {
                let mut connection = connection.clone();
                effort.reduce(&mut connection);
                let name = format!("{name}, {effort_name}");
                pair.a.run(|| one(&name, &connection, budget(arguments.full), report))?;
            }
        }
    }
    Ok(())
}

/// Makes a connection and takes it out of its socket. What is to be sent counts as sent: it needs no tricks then,
/// in the floor neither.
fn take(pair: &Pair, case: &Case) -> Result<Connection> {
    let (made, flow) = make(pair, case);
    let mut connection = value(&made, flow)?;
    connection.control.unsq_len = 0;
    connection.control.fin_unsent = false;
    if let Some(path) = &mut connection.path {
        // A window that no new connection has, and a round-trip time whatever the traffic was.
        path.snd_cwnd = 77;
        path.rtt = path.rtt.max(Duration::from_micros(50));
    }
    soccr::pause(&made.socket)?.detach()?;
    // The peer must not answer to what it gets by mistake.
    std::mem::forget(made.peer);
    Ok(connection)
}

fn one(name: &str, connection: &Connection, budget: Duration, report: &mut Report) -> Result<()> {
    let restorer = floor::Restorer::new(connection);
    // The peer is still there, and its timers run.
    let _lock = Lock::drop_traffic(&[connection.flow()])?;
    let (mut ours, mut bare) = (Samples::default(), Samples::default());
    repeat(budget, 20, |_| {
        drop(ours.time(|| connection.restore())?);
        drop(bare.time(|| restorer.restore()));
        Ok::<_, soccr::Error>(())
    })?;
    report.add(Row::new("restore", name, &ours).against(&bare));
    Ok(())
}
