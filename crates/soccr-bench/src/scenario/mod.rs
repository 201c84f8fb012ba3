//! The scenarios, one file each.

mod lock;
mod moves;
mod restore;
mod save;

use anyhow::Result;

use crate::arguments::Arguments;
use crate::report::Report;

type Run = fn(&Arguments, &mut Report) -> Result<()>;

/// In the order in which they run.
pub(crate) const ALL: &[(&str, Run)] =
    &[("save", save::run), ("restore", restore::run), ("lock", lock::run), ("moves", moves::run)];
