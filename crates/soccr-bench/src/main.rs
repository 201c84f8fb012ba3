//! What it costs to save, restore, lock and move connections, next to the bare system calls.
//!
//! ```sh
//! cargo bench                         # everything, one table, a few minutes
//! cargo bench -- save restore         # scenarios whose name contains one of the words
//! cargo bench -- --json               # one JSON object
//! cargo bench -- --plots docs/        # the plots as well
//! cargo bench -- --full stall         # as many runs as the numbers deserve
//! ```
//!
//! Everything happens in network namespaces of its own. Root has larger buffers and may load BPF; the table says who
//! ran it.

mod arguments;
mod connections;
mod effort;
mod floor;
mod idle;
mod machine;
mod plot;
mod report;
mod scenario;
mod statistics;
mod sys;
mod traffic;

use anyhow::Result;

use arguments::Arguments;
use machine::Machine;
use report::Report;

fn main() -> Result<()> {
    if let [_, option, address] = &std::env::args().collect::<Vec<_>>()[..]
        && option == "--serve"
    {
        return scenario::bystander::serve(address);
    }
    let arguments = Arguments::parse()?;
    let machine = Machine::here();
    soccr_lab::enter()?;
    machine::raise_descriptor_limit();
    // What the library prepares once for a process is no part of anything that is measured.
    soccr::prepare();
    let mut report = Report::new(machine, arguments.json);
    for (name, run) in scenario::ALL {
        if arguments.selects(name) {
            run(&arguments, &mut report)?;
        }
    }
    report.finish();
    Ok(())
}
