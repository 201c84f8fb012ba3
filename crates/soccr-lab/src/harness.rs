//! A test harness that enters a private network before any thread starts.

use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use libtest_mimic::{Arguments, Completion, Trial};

use crate::{LIMIT, Namespace, enter, orphans};

/// A named test for [`harness`].
pub struct Test {
    name: String,
    run: Box<dyn FnOnce() + Send>,
}

impl Test {
    /// The test `name`, which fails by panicking.
    pub fn new(name: impl Into<String>, run: impl FnOnce() + Send + 'static) -> Self {
        Self { name: name.into(), run: Box::new(run) }
    }
}

impl std::fmt::Debug for Test {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Test").field(&self.name).finish()
    }
}

/// How many tests run at once, unless `--test-threads` says otherwise.
const PARALLEL: usize = 8;

/// Runs tests in parallel, each in a fresh network namespace, so that all of them can use the same ports. To be called
/// from the `main` of a test with `harness = false`; takes the arguments that `cargo test` passes on.
///
/// Programs that the tests have started end with the last test. A test that takes long is named on standard error, each minute: what
/// it waits for may never come.
///
/// Where private networks are [unavailable](crate::Unavailable), every test is reported as ignored and the reason is
/// printed on standard error. `--include-ignored` makes that a failure.
pub fn harness(tests: impl IntoIterator<Item = Test>) -> ExitCode {
    // The main thread is still the only one here.
    let unavailable = enter().err().map(|reason| reason.to_string());
    let mut arguments = Arguments::from_args();
    // Tests of networks wait for timers of the kernel more than they compute.
    arguments.test_threads.get_or_insert(PARALLEL);
    if let Some(reason) = &unavailable {
        eprintln!("\nEVERY TEST IS SKIPPED: {reason}\n");
    }
    let trial = |test: Test| {
        let (unavailable, must_run) = (unavailable.clone(), arguments.include_ignored);
        let name = test.name.clone();
        Trial::ignorable_test(test.name, move || match unavailable {
            Some(reason) if must_run => Err(reason.into()),
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => {
                let _end = name_each_minute(name);
                Namespace::new()?.run(test.run);
                Ok(Completion::Completed)
            }
        })
    };
    let trials = tests.into_iter().map(trial).collect();
    // Where that fails, programs of failed tests live on.
    let _ = orphans::adopt();
    let conclusion = libtest_mimic::run(&arguments, trials);
    orphans::end();
    conclusion.exit_code()
}

fn name_each_minute(name: String) -> mpsc::Sender<()> {
    let (end, ended) = mpsc::channel();
    let start = Instant::now();
    thread::spawn(move || {
        while ended.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
            eprintln!("test {name} has been running for over {} seconds", start.elapsed().as_secs());
        }
    });
    end
}

/// Defines the `main` of a test with `harness = false` that runs the named functions by [`harness`].
///
/// ```
/// # // The harness would read the arguments of the documentation test.
/// fn a_port_is_free() {
///     std::net::TcpListener::bind("127.0.0.1:80").unwrap();
/// }
///
/// # mod inner { use super::a_port_is_free;
/// soccr_lab::tests![a_port_is_free];
/// # }
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        fn main() -> std::process::ExitCode {
            $crate::harness([$($crate::Test::new(stringify!($name), $name)),*])
        }
    };
}
