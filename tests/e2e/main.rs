//! The built programs on a node of the test world, spoken to as a client would. What got out is judged by
//! the capture on the node's link and by the internet's servers, why not by the audit.

use std::process::ExitCode;

use harness::{cases, suite::Suite};

mod attacks;
mod audit;
mod bad_input;
mod clsact;
mod dns;
mod execution;
mod files;
mod flow;
mod frames;
mod instances;
mod ipv6;
mod leak;
mod lifecycle;
mod lifetimes;
mod machine;
mod names;
mod observe;
mod outages;
mod passes;
mod policies;
mod pool;
mod promise;
mod quotas;
mod restart;
mod review;
mod siege;
mod sockets;
mod templates;
mod tour;
mod tunnels;

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
                sockets::commands_run_one_after_the_other_on_a_socket_and_end_with_it,
                sockets::a_process_outlives_its_client_and_is_found_again,
                sockets::a_terminal_is_typed_on_resized_and_come_back_to,
                sockets::a_session_keeps_its_state_and_is_interrupted,
                execution::exit_codes_are_real,
                execution::files_of_any_bytes_survive_the_way,
                files::files_are_moved_copied_found_and_removed,
                files::no_path_shows_what_is_the_agents,
                files::a_long_file_goes_in_and_out_at_constant_memory,
                files::a_form_is_stored_and_a_directory_followed,
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
            "dns",
            cases![
                dns::asking::real_clients_resolve_what_is_allowed_and_nothing_else,
                dns::asking::types_that_no_policy_lists_are_refused_and_service_bindings_are_empty,
                dns::asking::types_that_the_policy_lists_are_answered_from_parsed_records,
                dns::asking::nothing_but_a_name_and_a_type_goes_upstream,
                dns::asking::improper_questions_get_no_further,
                dns::asking::answers_are_cut_to_what_a_client_takes_and_whole_by_tcp,
                dns::asking::a_connection_carries_many_questions_at_once,
                dns::asking::aliases_are_judged_by_the_name_that_was_asked,
                dns::asking::addresses_that_nobody_may_reach_are_stripped_in_every_form,
                dns::asking::names_of_a_cluster_and_of_search_domains_go_nowhere_unless_listed,
                dns::upstreams::forged_answers_are_not_heard,
                dns::upstreams::a_sandbox_cannot_answer_netds_questions,
                dns::upstreams::an_upstream_that_fails_is_passed_over_and_remembered,
                dns::upstreams::what_one_organisation_asked_another_cannot_tell,
                dns::budgets::names_under_a_wildcard_carry_little_out,
                dns::budgets::long_labels_and_names_are_refused,
                dns::budgets::bytes_that_go_upstream_are_counted_and_the_caches_are_not,
                dns::budgets::the_strictest_tier_sets_the_budget,
                dns::budgets::limits_of_a_tier_in_audit_mode_are_recorded_and_refuse_nothing,
                dns::budgets::large_answers_asked_in_turn_are_refused_to_who_asks_alone,
                dns::pinned::an_address_that_turns_all_the_time_drops_no_flow,
                dns::pinned::every_one_of_three_hundred_addresses_is_pinned,
                dns::pinned::what_a_flow_uses_is_not_forgotten_however_much_is_asked,
                dns::pinned::pins_outlive_netd_and_not_the_policy,
                dns::pinned::whoever_gets_an_address_next_inherits_no_pin,
                dns::pinned::names_resolve_while_policies_change,
            ],
        )
        .group(
            "policy",
            cases![
                policies::a_tier_below_narrows_and_never_widens,
                policies::each_mode_does_what_it_says,
                policies::tightening_cuts_open_connections,
                policies::what_began_in_audit_mode_is_held_to_what_is_enforced_since,
                policies::read_modify_write_works,
                policies::edits::whoever_read_an_old_policy_is_told_so,
                policies::edits::of_changes_at_once_none_is_lost,
                policies::large::ten_thousand_rules_are_enforced_and_one_more_changes_nothing,
                policies::a_policy_given_at_create_holds_from_the_first_packet,
                quotas::what_goes_to_a_host_is_counted_over_all_connections,
                quotas::hosts_beyond_the_quota_are_not_met,
                quotas::a_quota_in_audit_mode_is_told_and_stops_nothing,
                review::a_record_is_explained_and_allowed_by_one_call,
                review::a_candidate_is_tried_on_what_happened,
                review::what_was_done_in_audit_mode_becomes_a_policy,
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
        .group(
            "life",
            cases![
                lifetimes::of_many_creations_of_a_session_one_makes_the_sandbox,
                lifetimes::a_paused_sandbox_stands_still_also_over_a_restart_of_the_controller,
                lifetimes::what_happens_is_told_as_it_happens,
                templates::what_a_template_says_is_done_before_anybody_gets_the_sandbox,
                templates::a_template_whose_command_fails_gives_no_sandbox_and_says_why,
                lifetimes::a_sandbox_that_nobody_uses_ends_and_says_why,
            ],
        )
        .group(
            "tunnel",
            cases![
                tunnels::tunnels_are_opened_listed_and_closed,
                tunnels::a_private_tunnel_opens_to_its_token_which_the_program_never_sees,
                tunnels::every_protocol_passes,
                tunnels::grpc_passes_with_its_trailers,
                tunnels::closing_cuts_what_is_open,
                tunnels::an_expired_tunnel_is_cut_and_says_so,
                tunnels::a_tunnel_leads_to_its_port_and_nowhere_else,
                tunnels::tunnel_proxy_may_nothing,
                tunnels::a_killed_tunnel_proxy_loses_no_waiting_connection,
                tunnels::tunnels_survive_netd_and_the_controller,
                tunnels::tunnel_proxy_shows_numbers,
            ],
        )
        .group(
            "pool",
            cases![
                pool::before_it_is_somebodys_nothing_gets_out,
                pool::nobody_has_any_part_of_a_member,
                pool::a_claim_is_counted_and_replaced,
                pool::many_at_once_never_get_the_same,
                pool::from_inside_a_claimed_one_is_like_any_other,
                pool::its_owners_rules_hold_from_the_first_packet,
                pool::a_member_that_dies_is_replaced,
                pool::a_member_that_does_not_answer_is_no_reason_to_fail,
                pool::a_killed_controller_goes_on_with_its_pool,
                pool::the_pool_makes_room_for_whoever_asks,
            ],
        )
        .group(
            "promise",
            cases![
                promise::calls::every_client_uses_a_key_that_it_never_has,
                promise::calls::a_client_needs_no_credential_of_its_own,
                promise::calls::every_kind_puts_the_key_in_its_place,
                promise::calls::git_clones_and_pushes_with_a_password_that_it_never_has,
                promise::calls::other_credentials_do_not_travel_with_the_key,
                promise::calls::however_often_a_client_sends_it_one_header_arrives,
                promise::calls::redirects_are_not_followed_and_carry_only_the_placeholder,
                promise::calls::other_hosts_stay_spliced,
                promise::calls::large_bodies_stream_both_ways,
                promise::calls::websockets_pass_and_are_masked,
                promise::calls::a_plain_variable_is_what_it_says,
                promise::trust::every_sandbox_has_an_authority_of_its_own,
                promise::trust::clients_trust_it_without_a_flag_and_go_on_trusting_the_rest,
                promise::doctor::every_client_is_well_whatever_the_policy_says,
                promise::doctor::a_client_that_does_not_trust_is_told_apart,
                promise::doctor::what_is_not_installed_or_hostile_is_told_apart,
                promise::doctor::the_gateway_has_that_one_host_only,
                promise::doctor::only_its_owner_may_ask_and_only_while_it_runs,
                promise::store::a_sandbox_gets_the_keys_that_it_was_promised,
                promise::store::well_known_names_need_no_binding,
                promise::store::a_key_that_a_rule_demands_must_be_bound,
                promise::refusals::in_clear_or_on_another_port_there_is_no_key,
                promise::refusals::other_methods_and_paths_of_a_bound_host_get_no_key,
                promise::refusals::the_name_inside_must_be_the_name_outside,
                promise::refusals::http_rules_hold_for_every_request,
                promise::refusals::questions_to_name_servers_go_nowhere,
                promise::refusals::servers_that_are_not_who_they_say_get_nothing,
                promise::refusals::a_placeholder_is_of_one_sandbox,
                promise::leaks::bodies_headers_and_trailers_are_masked,
                promise::leaks::what_would_hide_the_key_is_not_asked_for,
                promise::leaks::however_it_is_written_and_cut_the_key_does_not_come_back,
                promise::rotation::a_new_value_is_used_on_the_next_request,
                promise::rotation::a_key_that_is_taken_back_stops_at_once,
                promise::rotation::without_the_controller_a_key_lives_no_longer_than_its_lease,
                promise::canary::no_key_is_anywhere,
            ],
        )
        .group(
            "observe",
            cases![
                observe::every_program_shows_its_metrics_on_a_listener_of_its_own,
                observe::one_command_one_flow_and_one_question_count_one,
                observe::logs_name_the_request_and_the_sandbox,
                observe::the_api_describes_itself,
                observe::a_place_for_metrics_that_cannot_be_had_names_its_variable,
            ],
        )
        .group(
            "audit",
            cases![
                audit::a_killed_netd_loses_no_record,
                audit::what_finds_no_room_is_refused_or_told_by_a_gap,
                audit::a_full_disk_loses_no_record,
                audit::whoever_edits_the_database_is_found_out,
                audit::a_stream_goes_on_where_it_was_left,
            ],
        )
        .group(
            "restart",
            cases![
                restart::netd_keeps_only_the_rights_it_needs,
                restart::netd_is_replaced_under_load_without_a_gap,
                restart::connections_that_a_killed_netd_opened_go_on_and_are_forgotten_when_they_end,
                restart::tunnel_proxy_is_replaced_under_load_and_loses_no_queued_connection,
                restart::the_controller_is_replaced_under_load_and_loses_nothing,
            ],
        )
        .group(
            "instances",
            cases![
                instances::one_in_a_network_namespace_of_its_own_has_the_same_addresses,
                instances::one_beside_it_has_addresses_of_its_own,
                instances::what_is_in_use_is_refused_by_name,
                instances::the_last_one_takes_the_shared_control_group_away,
            ],
        )
        .group(
            "siege",
            cases![
                siege::frozen::a_frozen_netd_lets_nothing_out_and_goes_on_where_it_was,
                siege::frozen::denials_that_find_the_ring_full_are_counted,
                siege::starved::a_netd_without_memory_is_killed_and_replaced,
                siege::starved::without_the_controller_what_was_wanted_is_enforced_and_nothing_is_lost,
                siege::starved::a_node_without_room_forgets_rather_than_allows,
                siege::starved::a_controller_without_room_loses_nothing,
                siege::fresh::what_sends_with_its_first_instruction_gets_nothing_out,
                siege::fresh::an_address_that_is_given_again_inherits_nothing,
            ],
        )
        .group(
            "passes",
            cases![
                passes::what_address_and_port_allow_leaves_by_the_kernel_and_is_recorded,
                passes::tightening_ends_an_open_connection,
                passes::nothing_else_gets_out_that_way,
                passes::what_the_nodes_firewall_redirects_is_not_for_sandboxes,
                passes::datagrams_pass_by_a_rule_and_only_by_one,
                passes::a_killed_netd_does_not_touch_what_passes,
                passes::a_firewall_that_drops_is_named_and_left_alone,
                passes::a_firewall_that_is_flushed_gets_its_table_back,
                passes::doubt::an_uplink_that_others_took_over_is_used_no_more_and_made_anew,
                passes::one_that_goes_leaves_its_guard_to_one_that_stays,
                passes::switched_off_it_leaves_the_node_alone,
                passes::the_node_is_as_it_was_when_all_is_taken_down,
            ],
        )
        .group(
            "clsact",
            cases![
                clsact::nothing_but_what_is_allowed_gets_out,
                clsact::a_killed_netd_lets_nothing_out_and_recovers,
                clsact::what_the_kernel_forwards_outlives_netd_and_is_adopted,
                clsact::filters_that_are_taken_away_let_nothing_out_and_come_back,
                clsact::a_means_that_is_none_is_refused_by_name,
                clsact::taken_down_it_leaves_nothing,
            ],
        )
        .group(
            "ipv6",
            cases![
                ipv6::allowed_names_pass_by_ipv6,
                ipv6::a_client_goes_on_with_the_family_that_works,
                ipv6::every_resolver_is_our_own_by_ipv6_too,
                ipv6::requests_are_read_and_keys_injected_by_ipv6,
                ipv6::tightening_cuts_flows_of_ipv6,
                ipv6::refusals::what_is_not_allowed_is_refused_at_once,
                ipv6::refusals::private_and_wrapped_addresses_are_refused_whatever_the_policy_says,
                ipv6::refusals::addresses_of_the_node_are_refused_also_new_ones,
                ipv6::refusals::sandboxes_cannot_reach_each_other,
                ipv6::refusals::udp_and_echoes_go_nowhere,
                ipv6::refusals::private_answers_are_stripped,
                ipv6::frames::forged_frames_go_nowhere,
                ipv6::state::a_killed_netd_lets_nothing_out_and_recovers,
                ipv6::state::without_a_way_out_there_is_no_ipv6,
                ipv6::state::the_range_is_the_operators,
                ipv6::passes::what_address_and_port_allow_leaves_by_the_kernel_and_is_recorded,
                ipv6::passes::datagrams_pass_by_a_rule_and_only_by_one,
                ipv6::passes::open_connections_outlive_netd_and_not_their_rules,
                ipv6::passes::a_firewall_that_drops_ipv6_is_named_and_ipv4_goes_on,
                ipv6::passes::without_a_way_out_it_is_refused_by_the_range,
                ipv6::passes::the_node_is_as_it_was_when_all_is_taken_down,
            ],
        )
        .group("leak", cases![leak::two_hundred_sandboxes_leave_nothing])
        .finish()
}
