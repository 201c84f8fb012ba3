//! Connections between private networks, paused, saved, restored and resumed on the real kernel.

use std::process::ExitCode;

use soccr_lab::Test;

mod detach;
mod diag;
mod ends;
mod errors;
mod faults;
mod full;
mod lessons;
mod lock_faults;
mod matrix;
mod orphans;
mod outward;
mod owners;
mod paced;
mod partly;
mod ports;
mod property;
mod refused;
mod reset;
mod routes;
mod shut;
mod stages;
mod states;
mod sys;
mod unread;
mod urgent;
mod values;
mod windows;

/// The named functions of a module as tests.
macro_rules! tests {
    ($($module:ident: $($name:ident)*;)*) => {
        vec![$($(Test::new(concat!(stringify!($module), "::", stringify!($name)), $module::$name),)*)*]
    };
}

fn main() -> ExitCode {
    // Not in the middle of a test, whose peers would repeat segments meanwhile.
    soccr::prepare();
    let mut tests = tests! {
        detach: what_moves_between_two_guards_stops_the_detach a_connection_that_stands_still_between_two_guards_leaves
            what_is_sent_again_meanwhile_does_not_stop_the_detach;
        diag: those_that_are_not_here_are_looked_for_together those_that_are_here_are_told_by_their_places;
        errors: a_pause_without_capabilities
            a_restore_without_capabilities
            a_restore_at_a_port_of_services_without_capability
            a_restore_where_the_old_socket_lives
            a_restore_where_the_address_is_not
            a_restore_where_the_address_is_tentative_waits
            a_restore_where_the_address_stays_tentative
            a_save_where_the_device_is_gone
            what_is_no_socket;
        faults: every_fault_of_a_save_is_told_and_harmless every_fault_of_a_restore_is_told_and_silent
            every_fault_of_a_resume_is_told_and_silent a_detach_fails_only_where_the_connection_stays
            an_interrupted_call_is_made_again without_threads_it_takes_longer
            a_kernel_that_does_not_unlock_buffers_is_told_of a_save_opens_nothing_where_nothing_is_tracked
            a_resume_that_fails_once_is_made_again a_handshake_that_fails_once_is_begun_again
            a_resume_or_detach_that_fails_can_be_tried_again;
        lock_faults: a_lock_that_fails_locks_nothing a_lock_of_many_that_fails_locks_nothing a_release_that_fails_unlocks
            a_release_into_a_queue_that_fails_loses_nothing nothing_is_put_behind_what_did_not_arrive
            a_lock_that_does_not_persist_stays a_reader_that_fails_is_told_of_and_done_without;
        routes: what_a_route_asks_for_changes_no_connection;
        owners: a_group_of_listeners_of_another_user;
        lessons: a_length_that_contradicts_another_is_refused_before_the_first_system_call
            what_arrives_during_a_save_is_carried_whole_or_told
            what_a_socket_has_of_its_process_is_told
            one_connection_restores_twice
            a_listener_on_the_port_is_no_hindrance
            a_save_consumes_nothing
            a_fin_that_cannot_arrive_is_an_error
            the_first_send_after_close_wait_reaches_the_peer_at_once
            an_address_that_only_looks_mapped_is_ipv6
            a_link_local_address_without_its_link_is_refused
            a_link_local_connection_comes_back_on_the_link_of_its_name
            the_segment_size_comes_back
            reuse_address_survives
            the_offset_of_a_peek_survives
            a_descriptor_waits_as_before
            a_blocking_socket_with_tiny_buffers_does_not_hang
            tuning_of_the_buffers_goes_on
            a_blocked_connect_goes_on
            a_detached_socket_is_silent_for_ever
            a_restored_socket_that_is_dropped_is_silent
            what_has_arrived_since_the_save_stops_the_detach
            a_blocked_connect_goes_on_though_the_old_socket_holds_its_port;
        full: both_sides_full_on_ipv4_then_drained_25_times
            both_sides_full_on_ipv6_then_drained_25_times
            queues_of_64_mib;
        orphans: an_orphan_does_not_hold_its_link;
        outward: a_rule_for_its_source_counts a_rule_for_its_mark_counts;
        paced: what_only_counts_as_sent_is_saved_as_unsent what_was_sent_since_the_save_stops_the_detach a_probe_of_the_mtu_does_not_end_the_silence;
        partly: what_is_acknowledged_of_a_segment_is_not_saved;
        ports: connections_to_other_peers_can_have_the_same_port a_port_that_is_bound_is_had_again a_port_that_is_bound_is_shared_with_nobody;
        property: every_connection_comes_back;
        refused: a_handshake_that_carries_data a_socket_that_signs_its_segments
            a_socket_that_was_never_connected_is_refused
            a_listener_is_refused
            an_mptcp_socket_is_refused
            an_upper_layer_protocol_is_refused
            a_second_pause_of_one_socket_is_refused
            a_socket_with_a_connection_is_not_restored_onto;
        reset: an_unread_reset_is_carried what_an_ended_connection_has_not_read_is_carried one_of_a_socket_that_is_sent_notices_is_carried notices_that_nobody_has_read_are_refused
            notices_that_never_come_are_told;
        unread: into_a_closed_window in_front_of_the_urgent_mark up_to_64_mib
            a_connection_that_is_not_established_has_been_read_nothing_from;
        urgent: a_mark_that_has_been_read_past_is_none;
        stages: a_fin_that_the_peer_repeats_need_not_be_played
            a_socket_with_other_addresses_is_refused the_receive_window_is_not_limited_by_the_local_sysctl
            a_timer_that_runs_out_between_the_stages_does_no_harm what_the_peer_says_between_the_stages_is_told
            unsent_bytes_come_back_where_little_may_wait_unsent;
        values: the_timeout_is_saved_without_its_doublings
            the_window_is_announced_as_it_was_agreed the_clock_is_ahead_of_what_pacing_holds_back;
        shut: who_reads_no_more_does_not_afterwards;
        states: a_handshake_that_the_peer_has_answered_goes_on a_handshake_goes_on_with_its_own_peer;
    };
    tests.extend(states::tests());
    tests.extend(unread::tests());
    tests.extend(urgent::tests());
    tests.extend(matrix::tests());
    tests.extend(windows::tests());
    soccr_lab::harness(tests)
}
