"""Schedule of the tests: which are slow, which run one after another, and how often they repeat.

Under pytest-xdist every file is a group: one worker runs it, so its module fixtures are set up once. Files
in ``SPREAD`` have no expensive fixtures; their tests are distributed one by one, at the end. Tests that use
a resource of the machine (a Ray cluster, a Triton server, a browser) form one group over all files.

The mark ``slow`` is set by fixture, by file, by name, by what the test calls, or by hand. ``make
test-quick`` leaves slow tests out and allows every other test 30 s, so a slow test without the mark fails
there.
"""

import os
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

DEEP = os.environ.get("HISTOSEEK_DEEP") == "1"
TESTS = Path(__file__).parent

GROUPS_BY_FILE = {
    "export/test_triton_repository.py": "triton",
    "serving/test_cluster_run.py": "ray",
    "serving/test_stopping.py": "triton",
    "serving/test_triton.py": "triton",
    "ui/test_behind_nginx.py": "browser",
    "ui/page/test_page.py": "browser",
    "ui/page/test_several.py": "browser",
    "ui/page/test_viewer_tab.py": "browser",
}
GROUPS_BY_NAME = {
    "test_from_a_bucket_to_a_bucket_on_a_cluster": "ray",
    "test_the_real_server_embeds_as_in_process": "triton",
    "test_triton_serves_every_model": "triton",
}
SPREAD = frozenset(
    {
        "export/test_bundle.py",
        "export/test_every_model.py",
        "index/test_durability.py",
        "serving/test_pipeline.py",
        "training/test_fit_arcface.py",
        "training/test_recipes.py",
        "training/test_reproduce.py",
        "training/test_sharing.py",
    }
)
SLOW_FILES = {
    "export/test_bundle.py",
    "export/test_default_encoder.py",
    "export/test_every_model.py",
    "export/test_tissue.py",
    "index/test_milvus_server.py",
    "serving/test_cluster_run.py",
    "serving/test_stain_normalisation.py",
    "serving/test_stopping.py",
    "serving/test_tissue_network.py",
    "test_acceptance.py",
    "test_benches.py",
    "test_no_telemetry.py",
    "test_output.py",
    "test_packaging.py",
    "test_tutorial.py",
    "training/test_reproduce.py",
    "training/test_sharing.py",
    "ui/test_behind_nginx.py",
    "ui/test_normalised_queries.py",
    "ui/test_assistant.py",
    "ui/page/test_page.py",
    "ui/page/test_several.py",
    "ui/page/test_viewer_tab.py",
}
SLOW_FIXTURES = frozenset(
    {
        "behind",
        "browser",
        "cli_process",
        "histoseek_ui",
        "other_bundle",
        "pushed",
        "text_bundle",
        "triton",
    }  # fmt: skip
)

SLOW_TESTS = frozenset(
    {
        "test_a_batch_of_64_agrees_with_batches_of_one",
        "test_a_budget_of_another_day_stops_no_addition",
        "test_a_damaged_map_is_named_and_deleted_by_repair",
        "test_a_damaged_placement_is_made_again",
        "test_a_damaged_row_of_a_generation_is_made_again",
        "test_a_fault_while_adding_stops_no_other",
        "test_a_fit_that_would_differ_is_not_put_in_the_place_of_the_lost_one",
        "test_a_gate_learns_from_tissue_alone_to_refuse_what_is_none",
        "test_a_label_that_goes_with_the_patient_alone_is_at_chance",
        "test_a_person_wins_over_the_file_and_it_is_said",
        "test_a_replaced_tile_is_noticed",
        "test_a_replacement_that_fails_leaves_the_slide_as_it_was",
        "test_a_run_on_a_papers_layout_exports_from_its_own_data",
        "test_a_second_run_skips_and_another_folder_gets_the_same_features",
        "test_a_slide_cut_short_is_named_and_one_bad_tile_costs_only_itself",
        "test_a_slide_from_an_allowed_folder_is_searchable_soon",
        "test_a_slides_profile_is_recorded_and_its_pixels_are_as_stored",
        "test_a_tar_and_a_manifest_are_tile_sets_too",
        "test_a_teacher_sees_a_tile_however_it_lies",
        "test_a_wrong_verb_or_option_would_be_found",
        "test_alexnet_loads_all_but_its_last_layer",
        "test_alike_tiles_lie_together",
        "test_an_atlas_of_what_is_no_tissue_ignores_the_gate",
        "test_an_error_that_nobody_expects_ends_the_run_without_hanging",
        "test_an_upload_is_kept_with_the_atlas_and_goes_with_its_slide",
        "test_anndata_keeps_every_column",
        "test_clusters_are_fitted_shown_named_and_watched",
        "test_codes_are_ranked_again_by_the_vectors",
        "test_cross_validation_trains_every_fold_and_sums_up",
        "test_curves_find_the_number_of_blobs",
        "test_demo_finds_the_place_the_crop_was_cut_from",
        "test_densenet121_is_torchvisions_with_new_and_old_keys",
        "test_doctor_says_what_is_there",
        "test_errors_are_one_json_document_and_exit_1",
        "test_every_command_that_is_written_down_exists_with_its_options",
        "test_every_file_of_other_projects_is_embedded_or_refused_with_a_reason",
        "test_every_route_that_may_change_something_refuses_a_reader",
        "test_features_of_before_bounds_were_heeded_are_made_anew",
        "test_features_of_other_tools_are_searched_and_clustered",
        "test_few_tiles_have_a_map_too",
        "test_files_are_the_same_to_the_byte_whatever_the_number_of_workers",
        "test_guessing_at_one_user_locks_that_user_there_only",
        "test_hashes_match_their_password_only",
        "test_hdbscan_assignment_equals_approximate_predict",
        "test_index_verify_names_a_line_that_was_changed",
        "test_index_verify_names_a_line_that_was_removed",
        "test_it_stays_when_tiles_are_added_and_is_made_anew_when_they_doubled",
        "test_labels_snapshot_tune_audit_and_repair",
        "test_large_and_strange_pictures_have_their_own_answers",
        "test_large_pictures_are_cut_and_the_label_counts_as_much_as_it_is_given",
        "test_manifests_keep_the_schemas_of_kubernetes",
        "test_many_ask_at_once_and_everyone_gets_their_own",
        "test_many_at_once_are_no_way_around_the_limit",
        "test_many_threads_read_many_sources",
        "test_more_hits_than_the_usual_lists_hold",
        "test_no_modules_import_each_other_in_a_circle",
        "test_no_prefix_can_be_a_path_of_the_server",
        "test_nothing_warns_in_a_clean_run",
        "test_numbers_equal_brute_force_with_whole_patients_left_out",
        "test_numpy_and_parquet_and_anndata_hold_the_same",
        "test_one_hit_per_slide_even_when_one_slide_has_all_the_nearest_tiles",
        "test_only_what_changed_is_pushed_again",
        "test_options_change_the_net_as_specified",
        "test_other_options_or_a_changed_slide_are_embedded_again",
        "test_p4m_features_do_not_change_under_all_of_d4",
        "test_p4m_is_invariant_through_onnx_runtime",
        "test_parameters_and_cost_are_the_papers",
        "test_placed_images_name_the_state_that_placed_them",
        "test_search_gives_a_list_of_hits_per_picture",
        "test_shape_gradient_and_round_trip",
        "test_slides_of_one_name_do_not_overwrite_each_other",
        "test_slow_slides_and_failing_ones_keep_their_places",
        "test_symmetric_kernels_see_the_same_in_every_turn_and_mirror_image",
        "test_the_chain_goes_on_over_restarts",
        "test_the_command_on_real_tiles_with_their_groups_as_patients",
        "test_the_command_prints_a_hash_of_what_it_reads",
        "test_the_command_writes_and_tells",
        "test_the_configuration_is_one_for_production",
        "test_the_encoder_does_not_wait_for_slides_to_open",
        "test_the_real_packs_open_and_read",
        "test_the_run_exports_the_same_encoder",
        "test_the_same_seed_gives_the_same_map",
        "test_tiles_and_pictures",
        "test_tiles_go_back_to_qupath_in_its_frame",
        "test_tiles_of_another_scale_are_refused_unless_said",
        "test_tissue_tiles_and_a_picture_are_written_for_qupath",
        "test_train_export_embed_search_with_an_encoder_of_ones_own",
        "test_train_list_shows_recipes_models_and_options",
        "test_two_writers_one_is_told_to_wait",
        "test_what_is_derived_is_named_and_made_again",
        "test_what_is_no_stained_tissue_is_said_to_be_that",
        "test_what_is_refused_is_refused_in_words",
        "test_what_people_said_stays_when_a_slide_is_added_again_or_replaced",
    }
)
"""Tests that take more than about a second without a server or a process; ``--durations`` shows them."""
SLOW_CALLS = frozenset({"subprocess", "Popen", "killing"})
"""What a test calls that starts a process or kills one."""
SLOW_CALLS_IN_TRAINING = frozenset({"fit", "quick", "RECIPES"})
"""What a test of ``training/`` calls that trains."""


def group(nodeid: str) -> str:
    """Return what runs in one worker together with a test; a test of a file in SPREAD is alone."""
    file, _, name = nodeid.removeprefix("tests/").partition("::")
    found = GROUPS_BY_NAME.get(name) or GROUPS_BY_FILE.get(file)
    return found or (nodeid if file in SPREAD else file)


def order(item: pytest.Item) -> int:
    """Long groups first and single tests last, so that both workers end together."""
    found = group(item.nodeid)
    return 2 if found == item.nodeid else int(found.endswith(".py"))


class Schedule(LoadScopeScheduling):
    """Deals out groups of tests in the order of :func:`order`."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


def rounds(usual: int, deep: int) -> int:
    """How often a test repeats: ``deep`` times under HISTOSEEK_DEEP=1, else ``usual``."""
    return deep if DEEP else usual


def mark(item: pytest.Item) -> None:
    """Mark a test ``slow`` where its file, a fixture, its depth or what it calls says so."""
    file = item.path.relative_to(TESTS).as_posix()
    fixtures = set(getattr(item, "fixturenames", ()))
    calls = set(getattr(getattr(item, "function", None), "__code__", mark.__code__).co_names)
    slow_calls = SLOW_CALLS | (SLOW_CALLS_IN_TRAINING if file.startswith("training/") else set())
    deep = item.get_closest_marker("deep") is not None
    if GROUPS_BY_FILE.get(file) == "ray":  # a cluster on this machine needs all of its cores
        item.add_marker(pytest.mark.alone)
    name = getattr(item, "originalname", item.name)
    slow_name = file in SLOW_FILES or name in SLOW_TESTS
    if deep or slow_name or fixtures & SLOW_FIXTURES or calls & slow_calls:
        item.add_marker(pytest.mark.slow)
