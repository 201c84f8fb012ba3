//! The scenarios, one file each.

mod adopt;
pub(crate) mod bystander;
mod handover;
mod lock;
mod memory;
mod moves;
mod offload;
mod restore;
mod save;
mod speed;
mod stall;
mod steer;
mod wander;

use anyhow::Result;

use crate::arguments::Arguments;
use crate::report::Report;

type Run = fn(&Arguments, &mut Report) -> Result<()>;

/// In the order in which they run.
pub(crate) const ALL: &[(&str, Run)] = &[
    ("save", save::run),
    ("restore", restore::run),
    ("adopt", adopt::run),
    ("lock", lock::run),
    ("moves", moves::run),
    ("handover", handover::run),
    ("bystander", bystander::run),
    ("memory", memory::run),
    ("stall", stall::run),
    ("speed", speed::run),
    ("steer", steer::run),
    ("offload", offload::run),
];
