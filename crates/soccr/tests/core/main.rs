//! Connections between private networks, paused, saved, restored and resumed on the real kernel.

use std::process::ExitCode;

use soccr_lab::Test;

mod ends;
mod faults;
mod sys;

/// The named functions of a module as tests.
macro_rules! tests {
    ($($module:ident: $($name:ident)*;)*) => {
        vec![$($(Test::new(concat!(stringify!($module), "::", stringify!($name)), $module::$name),)*)*]
    };
}

fn main() -> ExitCode {
    soccr_lab::harness(tests! {
        faults: every_fault_of_a_save_is_told_and_harmless every_fault_of_a_restore_is_told_and_silent;
    })
}
