//! The command as its users run it: the real binary, in private networks, against programs that know nothing of it.

mod adopt;
mod adopt_kill;
mod backlog;
mod check;
mod chosen;
mod clients;
mod completions;
mod demo;
mod documents;
mod dry_run;
mod ended;
#[cfg(target_arch = "x86_64")]
mod faults;
mod idle;
mod images;
mod keeper;
mod kill;
mod kill_any;
mod list;
mod nat;
mod only;
mod programs;
mod real;
mod reboot;
mod relay;
mod rescue;
mod save;
mod servers;
mod states;
mod steered;
mod steered_ways;
mod targets;
mod terminal;
mod tls;
mod transfer;
mod trust;
mod usage;

fn main() -> std::process::ExitCode {
    let tests = [
        adopt::tests(),
        adopt_kill::tests(),
        backlog::tests(),
        check::tests(),
        chosen::tests(),
        clients::tests(),
        completions::tests(),
        demo::tests(),
        documents::tests(),
        dry_run::tests(),
        ended::tests(),
        #[cfg(target_arch = "x86_64")]
        faults::tests(),
        images::tests(),
        save::tests(),
        servers::tests(),
        states::tests(),
        transfer::tests(),
        targets::tests(),
        terminal::tests(),
        idle::tests(),
        kill::tests(),
        keeper::tests(),
        kill_any::tests(),
        list::tests(),
        nat::tests(),
        real::tests(),
        relay::tests(),
        reboot::tests(),
        rescue::tests(),
        trust::tests(),
        usage::tests(),
        only::tests(),
        steered::tests(),
        steered_ways::tests(),
        tls::tests(),
    ];
    soccr_lab::harness(tests.into_iter().flatten())
}

/// The named functions of a module as tests.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub fn tests() -> Vec<soccr_lab::Test> {
            let module = module_path!().rsplit("::").next().unwrap();
            vec![$(soccr_lab::Test::new(format!("{module}::{}", stringify!($name)), $name)),*]
        }
    };
}
use tests;
