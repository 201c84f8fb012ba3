//! Locking and unlocking, when the table exists. No floor: each is one netlink transaction, and the kernel's own work
//! is all of it that counts.

use std::net::Ipv4Addr;

use anyhow::Result;
use soccr::Flow;
use soccr::lock::{Locker, Mode};
use soccr_lab::Namespace;

use crate::arguments::Arguments;
use crate::connections::budget;
use crate::report::{Report, Row};
use crate::statistics::{Samples, repeat};

pub(crate) fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let namespace = Namespace::new()?;
    for (mode, name) in [(Mode::Drop, "drop"), (Mode::HOLD, "hold")] {
        let locker = namespace.run(|| Locker::new(mode))?;
        for count in [1, 1_000, 10_000] {
            let flows: Vec<Flow> = (0..count).map(flow).collect();
            let (mut on, mut off) = (Samples::default(), Samples::default());
            repeat(budget(arguments.full), 10, |_| {
                let lock = on.time(|| locker.lock(&flows))?;
                off.time(|| lock.release())?;
                Ok::<_, soccr::Error>(())
            })?;
            report.add(Row::new("lock", format!("lock {count}, {name}"), &on));
            report.add(Row::new("lock", format!("unlock {count}, {name}"), &off));
        }
    }
    Ok(())
}

fn flow(number: u16) -> Flow {
    Flow {
        local: (Ipv4Addr::new(192, 0, 2, 1), 443).into(),
        remote: (Ipv4Addr::new(198, 51, 100, 1), 10_000 + number).into(),
    }
}
