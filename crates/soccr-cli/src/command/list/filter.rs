//! Which sockets `soccr list` shows.

use std::time::Duration;

use soccr::connection::State;
use soccr::diag::Socket;

use super::row::Owner;
use crate::selection::matching::Matching;
use crate::traffic::Traffic;

/// Conditions for a socket to be shown. A condition that is not given is met.
#[derive(clap::Args, Debug)]
pub(super) struct Filter {
    #[command(flatten)]
    matching: Matching,
    /// Only sockets in this state (such as ESTABLISHED or close-wait); may be repeated
    #[arg(long, value_name = "STATE", value_parser = parse_state)]
    state: Vec<State>,
    /// Only connections that have been idle for this time: nothing sent or received, and nothing in their queues
    #[arg(long, value_name = "SECONDS")]
    idle: Option<u32>,
}

impl Filter {
    pub(super) fn wants(&self, socket: &Socket<'_>, traffic: Option<&Traffic>) -> bool {
        self.matching.wants(socket.local, socket.remote)
            && (self.state.is_empty() || self.state.contains(&socket.state))
            && self.idle.is_none_or(|seconds| {
                let idle = Duration::from_secs(seconds.into());
                socket.receive_queue == 0 && traffic.is_some_and(|traffic| traffic.is_idle(idle))
            })
    }

    /// The processes that have the socket.
    pub(super) fn wants_one_of(&self, owners: &[Owner]) -> bool {
        self.matching.wants_all_names() || owners.iter().any(|owner| self.matching.wants_name(&owner.name))
    }
}

fn parse_state(text: &str) -> Result<State, String> {
    let plain = |name: &str| name.replace(['_', '-'], "").to_uppercase();
    let mut states = (1..=u8::MAX).map_while(State::from_kernel);
    states.find(|state| plain(state.name()) == plain(text)).ok_or_else(|| {
        let names: Vec<&str> = (1..=u8::MAX).map_while(State::from_kernel).map(State::name).collect();
        format!("it is one of {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_the_names_of_the_kernel_and_of_ss() {
        for (name, state) in [
            ("ESTABLISHED", State::Established),
            ("close-wait", State::CloseWait),
            ("fin_wait1", State::FinWait1),
        ] {
            assert_eq!(parse_state(name), Ok(state));
        }
        assert!(parse_state("open").is_err_and(|error| error.contains("ESTABLISHED")));
    }
}
