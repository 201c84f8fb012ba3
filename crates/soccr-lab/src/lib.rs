//! Private networks for tests, demonstrations and benchmarks of TCP on the real kernel.
//!
//! Everything happens in network namespaces of this process, made by system calls alone: no root, no `ip`, no `nft`,
//! nothing left behind. An ordinary user gets a user namespace around them, see [`enter`].
//!
//! ```
//! use std::io::{Read, Write};
//! use std::net::{TcpListener, TcpStream};
//!
//! if let Err(unavailable) = soccr_lab::enter() {
//!     eprintln!("skipped: {unavailable}");
//!     return Ok(());
//! }
//! let pair = soccr_lab::Pair::new()?;
//! let listener = pair.b.run(|| TcpListener::bind((pair.b.v4, 80)))?;
//! let mut a = pair.a.run(|| TcpStream::connect((pair.b.v4, 80)))?;
//! let (mut b, _) = listener.accept()?;
//! a.write_all(b"hello")?;
//! let mut read = [0; 5];
//! b.read_exact(&mut read)?;
//! assert_eq!(&read, b"hello");
//! # Ok::<(), std::io::Error>(())
//! ```

mod case;
mod counters;
mod cpu;
mod enter;
#[cfg(feature = "harness")]
mod faults;
#[cfg(feature = "harness")]
mod harness;
mod host;
mod lan;
mod line;
mod machine;
mod making;
mod metrics;
mod namespace;
#[cfg(feature = "harness")]
mod orphans;
mod rtnetlink;
mod segment;
mod signals;
mod skip;
mod sniffer;
mod sys;
mod tcp;
mod topology;
mod wait;

pub use case::{Case, Made, Peer};
pub use cpu::OnCpu;
pub use enter::{Unavailable, enter};
#[cfg(feature = "harness")]
pub use faults::{Faults, calls_of, option_of, supervised};
#[cfg(feature = "harness")]
pub use harness::{Test, harness};
pub use host::{Family, Host};
pub use lan::Lan;
pub use line::{Line, Shape};
pub use machine::{has_kernel, may_repair, obstacle_to_bpf};
pub use metrics::Metric;
pub use namespace::{Namespace, sysctl};
pub use rtnetlink::{VethEnd, veth};
pub use segment::{Flags, Segment};
pub use signals::blocked_signals;
pub use skip::skip;
pub use sniffer::Sniffer;
pub use soccr_netlink::Rtnetlink;
#[cfg(feature = "harness")]
pub use sys::{Call, Supervisor, let_fail, run_and_kill, run_and_watch};
#[cfg(all(feature = "harness", target_arch = "x86_64"))]
pub use sys::{End, Entry, Verdict, run_family};
pub use sys::{as_owner, attach_filter, detach_filter, option, programs_on_lo, set_option};
pub use tcp::{State, TcpInfo};
pub use topology::{Lab, Pair, Side};
pub use wait::{LIMIT, wait_until};
