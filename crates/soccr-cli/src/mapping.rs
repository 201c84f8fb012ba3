//! `--map OLD=NEW`: rules that would say nothing.

use std::collections::HashSet;

use anyhow::{Result, bail};
use soccr::Connection;
use soccr_image::AddressMap;

use crate::exit::{self, Coded, Exit};

/// Refuses two rules for one address, of which only the first would count.
pub(crate) fn refuse_twice(maps: &[AddressMap]) -> Result<()> {
    let mut all = HashSet::new();
    for map in maps {
        let rule = map.to_string();
        let old = rule.split('=').next().unwrap_or_default();
        if !all.insert(old.to_owned()) {
            bail!(Coded(Exit::Usage, format!("--map: {old} is named twice")));
        }
    }
    Ok(())
}

/// Tells of each rule that concerns none of these connections.
pub(crate) fn tell_idle<'a>(maps: &[AddressMap], connections: impl Iterator<Item = &'a Connection> + Clone) {
    for map in maps {
        let is_used = |Connection { local, remote, tracked, .. }: &Connection| {
            let wire = tracked.iter().flat_map(|tracked| [tracked.wire.local, tracked.wire.remote]);
            [*local, *remote].into_iter().chain(wire).any(|address| map.apply(address).is_some())
        };
        if !connections.clone().any(is_used) {
            exit::complain(&format!("--map {map}: no connection has that address"));
        }
    }
}
