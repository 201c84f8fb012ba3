//! The firewall rules of others, as far as they may be in the way of a move: read, never changed.
//!
//! Segments that play the peer's come over `lo` with the mark 0xC114. A restored connection is new to connection tracking
//! until it has been entered there. So three kinds of chains matter: those that drop the mark, those that drop what connection
//! tracking does not know, and those that drop whatever no rule accepts.
//!
//! Not read are the tables of legacy iptables, and the matches of xtables inside of nftables rules: a rule with such a match may
//! apply or not.
//!
//! # References
//! `linux/netfilter/nf_tables.h`: `NFT_MSG_GETCHAIN`, `NFT_MSG_GETRULE`, `NFT_MSG_GETSETELEM`.

mod rule;

use std::fmt;

use rule::{Found, Known, Outcome};
use soccr_netlink::{Family, Socket};

use crate::conntrack;
use crate::error::{Error, Result};
use crate::nftables::{Chain, Hook, Look, rule as nft};

/// A chain of others that may drop what a move depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Obstacle {
    /// The chain, as nft(8) takes it: family, table and chain.
    pub chain: String,
    /// What it drops.
    pub drops: Drops,
}

/// What is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Drops {
    /// Packets with the mark 0xC114, by a rule that looks at the mark.
    OurMark,
    /// Whatever no rule accepts, and none is sure to accept packets over `lo` with the mark 0xC114.
    TheRest,
    /// Packets of connections that connection tracking does not know (`ct state invalid` or `untracked`).
    Unknown,
}

impl fmt::Display for Drops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OurMark => "packets with the mark 0xC114",
            Self::TheRest => "what no rule accepts",
            Self::Unknown => "what connection tracking does not know",
        })
    }
}

/// The obstacles in the network namespace of the calling thread. Empty where others have no rules, or rules that let everything
/// pass on which a move depends.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` there.
pub fn obstacles() -> Result<Vec<Obstacle>> {
    let failed = |error| Error::system("nft list ruleset", error);
    let mut socket = Socket::open(Family::Netfilter).map_err(failed)?;
    let look = Look::at_others(&mut socket).map_err(failed)?;
    let mut obstacles = Vec::new();
    // What rules jump to is walked through by itself, too: they may jump under conditions that nobody knows.
    for chain in look.chains.iter().filter(|chain| chain.hook.is_none_or(is_passed)) {
        let mut end = |known| Walk { socket: &mut socket, look: &look, known }.base(chain);
        let ours = match end(Known::OurSegment) {
            End::DroppedByRule => Some(Drops::OurMark),
            End::DroppedAnyhow if chain.hook.is_some() => Some(Drops::TheRest),
            _ => None,
        };
        let states = [rule::INVALID, rule::UNTRACKED];
        let unknown = states.into_iter().any(|state| end(Known::State(state)) == End::DroppedByRule);
        let all = ours.into_iter().chain(unknown.then_some(Drops::Unknown));
        obstacles.extend(all.map(|drops| Obstacle { chain: chain.to_string(), drops }));
    }
    Ok(obstacles)
}

/// The tables that legacy iptables and ip6tables have in the network namespace of the calling thread. Their rules cannot be read here.
///
/// # Errors
/// `EACCES`: the kernel names them to root alone.
pub fn legacy_tables() -> Result<Vec<String>> {
    conntrack::legacy_tables().map_err(|error| Error::system("ip_tables_names", error))
}

/// Packets of this host's own connections come by this hook: nothing of theirs is forwarded.
fn is_passed(hook: u32) -> bool {
    [Hook::PREROUTING, Hook::INPUT, Hook::OUTPUT, Hook::POSTROUTING].contains(&hook)
}

/// How a packet leaves a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Surely accepted.
    Accepted,
    /// Dropped by a rule, maybe, that compares what is known of the packet.
    DroppedByRule,
    /// Surely dropped, whatever it is.
    DroppedAnyhow,
    /// No rule has decided.
    Through,
}

/// A packet on its way through the chains.
struct Walk<'a> {
    socket: &'a mut Socket,
    look: &'a Look,
    known: Known,
}

impl Walk<'_> {
    fn base(&mut self, chain: &Chain) -> End {
        match self.through(chain, 0) {
            End::Through if chain.policy_is_drop => End::DroppedAnyhow,
            end => end,
        }
    }

    fn through(&mut self, chain: &Chain, depth: usize) -> End {
        /// The kernel allows no more.
        const DEEPEST: usize = 16;
        for rule in &chain.rules {
            let mut find = |set: &str, key: &[u8]| match chain.element(self.socket, set, key) {
                Ok(Some(decision)) => Found::With(decision),
                Ok(None) => Found::Not,
                Err(_) => Found::Unclear,
            };
            let Some(Outcome { decision, surely, compared }) = rule::run(rule, self.known, &mut find) else {
                continue;
            };
            match (decision.code, surely) {
                (nft::NF_DROP, _) if compared => return End::DroppedByRule,
                (nft::NF_DROP, true) => return End::DroppedAnyhow,
                (nft::NF_ACCEPT, true) => return End::Accepted,
                (nft::NFT_RETURN, true) => return End::Through,
                (nft::NFT_JUMP | nft::NFT_GOTO, true) if depth < DEEPEST => {
                    let target = decision.chain.and_then(|name| self.look.target(chain, &name));
                    let end = target.map_or(End::Through, |target| self.through(target, depth + 1));
                    if end == End::DroppedByRule {
                        // Told of that chain.
                        return End::Accepted;
                    }
                    if end != End::Through || decision.code == nft::NFT_GOTO {
                        return end;
                    }
                }
                _ => {}
            }
        }
        End::Through
    }
}
