//! The subcommands, one file each.

pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod criu;
pub(crate) mod inspect;
pub(crate) mod list;
pub(crate) mod lock;
pub(crate) mod man;
pub(crate) mod receive;
pub(crate) mod restore;
pub(crate) mod resume;
pub(crate) mod save;
pub(crate) mod send;
pub(crate) mod steer;
