//! Connections between private networks, paused, saved, restored and resumed on the real kernel.

use std::process::ExitCode;

use soccr_lab::Test;

mod ends;
mod faults;
mod states;
mod sys;

/// The named functions of a module as tests.
macro_rules! tests {
    ($($module:ident: $($name:ident)*;)*) => {
        vec![$($(Test::new(concat!(stringify!($module), "::", stringify!($name)), $module::$name),)*)*]
    };
}

fn main() -> ExitCode {
    let mut tests = tests! {
        faults: every_fault_of_a_save_is_told_and_harmless every_fault_of_a_restore_is_told_and_silent;
        states: a_handshake_that_the_peer_has_answered_goes_on;
    };
    tests.extend(states::tests());
    soccr_lab::harness(tests)
}
