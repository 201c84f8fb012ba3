//! The command line: what `--help`, the man pages and the completions are made from.

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};

use crate::command::{
    check, completions, criu, inspect, list, lock, man, receive, restore, resume, save, send, steer,
};
#[cfg(feature = "demo")]
use crate::demo;
use crate::exit;
use crate::exit::Exit;

/// See, save, restore and move live TCP connections of any process
#[derive(Parser, Debug)]
#[command(name = "soccr", version, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{}", exit::HELP))]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  soccr list --pid 4711                          what it has, and what can be saved
  soccr save --pid 4711 --fd 5 -o c.soccr        take a connection out of a process
  soccr restore c.soccr -- ./server              give it to another: descriptor 3
  soccr send --pid 4711 --all --via 'ssh host soccr receive -- ./server'";

#[derive(Subcommand, Debug)]
enum Command {
    List(list::List),
    Save(save::Save),
    Restore(restore::Restore),
    Resume(resume::Resume),
    Send(send::Send),
    Receive(receive::Receive),
    Check(check::Check),
    Inspect(inspect::Inspect),
    Criu(criu::Criu),
    Steer(steer::Steer),
    Lock(lock::Lock),
    Unlock(lock::Unlock),
    Completions(completions::Completions),
    Man(man::Man),
    #[cfg(feature = "demo")]
    Demo(demo::Demo),
    /// A program of the demonstration
    #[cfg(feature = "demo")]
    #[command(hide = true)]
    DemoProgram,
    /// A server of the demonstration
    #[cfg(feature = "demo")]
    #[command(hide = true)]
    DemoServer {
        name: String,
    },
}

impl Cli {
    pub(crate) fn run(self) -> Result<Exit> {
        match self.command {
            Command::List(list) => list.run(),
            Command::Save(save) => save.run(),
            Command::Restore(restore) => restore.run(),
            Command::Resume(resume) => resume.run(),
            Command::Send(send) => send.run(),
            Command::Receive(receive) => receive.run(),
            Command::Check(check) => check.run(),
            Command::Inspect(inspect) => inspect.run(),
            Command::Criu(criu) => criu.run(),
            Command::Steer(steer) => steer.run(),
            Command::Lock(lock) => lock.run(),
            Command::Unlock(unlock) => unlock.run(),
            Command::Completions(completions) => completions.run(),
            Command::Man(man) => man.run(public()),
            #[cfg(feature = "demo")]
            Command::Demo(demo) => demo.run(),
            #[cfg(feature = "demo")]
            Command::DemoProgram => demo::worker::run(),
            #[cfg(feature = "demo")]
            Command::DemoServer { name } => demo::servers::serve(name.leak()),
        }
    }
}

/// The command line without what is hidden from people.
pub(crate) fn public() -> clap::Command {
    let whole = Cli::command();
    let shown = whole.get_subcommands().filter(|command| !command.is_hide_set());
    clap::Command::new("soccr")
        .version(env!("CARGO_PKG_VERSION"))
        .about(whole.get_about().cloned().unwrap_or_default())
        .after_help(EXAMPLES)
        .after_long_help(format!("{EXAMPLES}\n\n{}", exit::HELP))
        .subcommands(shown.cloned())
}
