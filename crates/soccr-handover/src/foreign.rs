//! Connections of other processes, which need not know about it: for commands and container runtimes.
//!
//! ```no_run
//! # use std::os::fd::AsFd;
//! # use soccr_handover::foreign::{Captive, Keeper, Process, Sharing, namespace};
//! # use soccr_handover::{Mover, Outcome, channel::Channel};
//! # fn example(pid: rustix::process::Pid, channel: &mut impl Channel) -> soccr_handover::Result<Vec<Outcome>> {
//! let process = Process::open(pid)?;
//! let captive = Captive::new(&process, 5)?; // its descriptor 5
//! // A second process stops those that use the socket, and puts all in order should this one be killed.
//! let keeper = Keeper::start(&[captive.as_fd()], Sharing::find(&[captive.inode()])?, None)?;
//! namespace::enter_of(captive.as_fd())?;
//! let mover = Mover::new()?;
//! let departing = mover.take_seat(captive.into_seat()?);
//! Ok(mover.sending([departing]).used_by(keeper).through(channel))
//! # }
//! ```
//!
//! Start the keeper and enter namespaces before this process has a second thread. Making a [`Mover`](crate::Mover) starts one.
//!
//! # Rights
//! `CAP_SYS_PTRACE` over the processes, besides those of the [crate](crate#rights).

mod captive;
mod keeper;
pub mod namespace;
pub mod process;
mod stop;
mod sys;

pub use captive::Captive;
pub use keeper::Keeper;
pub use process::{Process, Sharing};
pub use stop::Stopped;
