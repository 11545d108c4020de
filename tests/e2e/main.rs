//! The built programs on a node of the test world, spoken to as a client would. What got out is judged by
//! the capture on the node's link and by the internet's servers, why not by the audit.

use std::process::ExitCode;

use harness::{cases, suite::Suite};

mod attacks;
mod bad_input;
mod execution;
mod flow;
mod frames;
mod lifecycle;
mod machine;
mod names;
mod outages;
mod policies;
mod tour;

fn main() -> ExitCode {
    Suite::from_arguments()
        .group(
            "flow",
            cases![
                flow::register_create_write_execute_read_restrict_and_stop,
                flow::an_organisation_sees_only_its_own,
                tour::every_line_of_the_readmes_tour_works,
                flow::what_the_readme_promises_by_default,
                execution::a_stream_brings_output_as_it_comes_and_ends_with_done,
                execution::a_disconnect_cancels_the_command,
                execution::a_command_out_of_time_is_ended_with_everything_it_started,
                execution::exit_codes_are_real,
                execution::files_of_any_bytes_survive_the_way,
                execution::the_sandbox_is_locked_down,
                execution::limits_bite_inside_and_only_there,
                execution::full_disks_harm_nobody_else,
                bad_input::bodies_that_are_wrong_name_the_field,
                bad_input::policies_that_are_wrong_name_the_field_and_change_nothing,
                bad_input::callers_without_a_good_key_get_nothing,
                bad_input::what_does_not_exist_is_404_in_the_envelope,
            ],
        )
        .group(
            "wall",
            cases![
                names::allowed_names_pass,
                names::names_that_only_look_allowed_do_not_pass,
                names::a_wrong_name_towards_a_pinned_address_is_refused,
                names::an_address_nobody_resolved_is_refused_whatever_name_is_sent,
                names::a_client_hello_without_name_is_refused,
                names::junk_and_silence_on_443_are_refused,
                names::plain_http_is_judged_by_its_host,
                names::denied_names_are_never_asked_upstream,
                names::queries_to_other_resolvers_end_at_our_own,
                names::only_addresses_are_asked_for,
                names::private_answers_are_stripped,
                names::long_answers_are_cut_and_come_by_tcp,
                attacks::ports_outside_the_rule_are_refused,
                attacks::private_and_metadata_addresses_are_refused_whatever_the_policy_says,
                attacks::the_gateway_and_netds_own_ports_are_refused,
                attacks::addresses_of_the_node_are_refused_also_new_ones,
                attacks::sandboxes_cannot_reach_each_other,
                attacks::udp_is_refused_at_once,
                attacks::icmp_and_ipv6_go_nowhere,
                frames::forged_frames_go_nowhere,
                attacks::every_attempt_is_counted,
            ],
        )
        .group(
            "policy",
            cases![
                policies::a_tier_below_narrows_and_never_widens,
                policies::each_mode_does_what_it_says,
                policies::tightening_cuts_open_connections,
                policies::read_modify_write_works,
                policies::a_policy_given_at_create_holds_from_the_first_packet,
            ],
        )
        .group(
            "outage",
            cases![
                lifecycle::a_stopped_sandbox_leaves_nothing,
                lifecycle::a_sandbox_whose_first_process_dies_is_cleaned_up,
                outages::a_killed_netd_lets_nothing_out_and_recovers,
                outages::a_killed_controller_forgets_nothing,
                outages::a_create_cut_off_by_a_kill_leaves_nothing,
                outages::a_killed_supervisor_takes_nothing_with_it,
                lifecycle::a_sandbox_that_expires_is_cleaned_up,
            ],
        )
        .finish()
}
