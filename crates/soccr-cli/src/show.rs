//! What people see: tables, values in words, progress.

pub(crate) mod describe;
pub(crate) mod progress;
pub(crate) mod table;
pub(crate) mod width;
