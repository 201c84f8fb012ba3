//! Connections with TLS in the kernel, moved on the real kernel: every byte is compared by the kernel that decrypts it, and
//! by us. Kernels without TLS (`modprobe tls`) skip them.

use std::process::ExitCode;

use soccr_lab::Test;

mod ends;
mod moves;
mod nginx;
mod openssl;
mod queues;
mod refused;
mod sessions;
mod sys;

/// The named functions of a module as tests.
macro_rules! tests {
    ($($module:ident: $($name:ident)*;)*) => {
        vec![$($(Test::new(concat!(stringify!($module), "::", stringify!($name)), $module::$name),)*)*]
    };
}

fn main() -> ExitCode {
    soccr::prepare();
    let named = tests! {
        nginx: a_download_goes_on_here;
        openssl: a_session_of_openssl_goes_on_here;
        queues: half_a_record_in_the_receive_queue a_record_that_is_read_in_part control_records_keep_their_place
            a_fin_behind_records records_behind_our_fin the_send_queue_where_only_the_kernel_encrypts an_open_record_is_pushed
            bytes_of_the_application_are_put_back_in_front what_was_held_is_not_encrypted;
        refused: a_send_queue_that_does_not_show_itself an_open_record a_caller_who_does_not_carry_it keys_that_nobody_set ciphers_that_are_not_carried a_small_receive_buffer
            what_has_been_read_is_restored_from_the_value what_fails_before_anything_is_read_leaves_it what_is_only_looked_at_stays what_nobody_can_look_at_is_refused_and_stays keys_are_not_printed a_restore_without_the_module;
    };
    soccr_lab::harness(named.into_iter().chain(moves::tests()).chain(sessions::tests()))
}
