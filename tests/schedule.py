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
    "ui/test_page.py": "browser",
}
GROUPS_BY_NAME = {"test_triton_serves_every_model": "triton"}
SPREAD = frozenset(
    {
        "export/test_bundle.py",
        "export/test_every_model.py",
        "index/test_durability.py",
        "serving/test_pipeline.py",
        "training/test_fit_arcface.py",
        "training/test_recipes.py",
        "training/test_reproduce.py",
    }
)
SLOW_FILES = {
    "export/test_bundle.py",
    "export/test_default_encoder.py",
    "export/test_every_model.py",
    "serving/test_cluster_run.py",
    "serving/test_stopping.py",
    "test_acceptance.py",
    "test_no_telemetry.py",
    "test_output.py",
    "test_packaging.py",
    "test_tutorial.py",
    "training/test_reproduce.py",
    "ui/test_behind_nginx.py",
    "ui/test_page.py",
}
SLOW_FIXTURES = frozenset(
    {"behind", "browser", "cli_process", "histoseek_ui", "other_bundle", "pushed", "triton"}
)

SLOW_TESTS = frozenset(
    {
        "test_a_gate_learns_from_tissue_alone_to_refuse_what_is_none",
        "test_a_run_on_a_papers_layout_exports_from_its_own_data",
        "test_a_teacher_sees_a_tile_however_it_lies",
        "test_alike_tiles_lie_together",
        "test_anndata_keeps_every_column",
        "test_codes_are_ranked_again_by_the_vectors",
        "test_cross_validation_trains_every_fold_and_sums_up",
        "test_curves_find_the_number_of_blobs",
        "test_demo_finds_the_place_the_crop_was_cut_from",
        "test_every_command_that_is_written_down_exists_with_its_options",
        "test_every_file_of_other_projects_is_embedded_or_refused_with_a_reason",
        "test_features_of_other_tools_are_searched_and_clustered",
        "test_files_are_the_same_to_the_byte_whatever_the_number_of_workers",
        "test_guessing_at_one_user_locks_that_user_there_only",
        "test_hdbscan_assignment_equals_approximate_predict",
        "test_index_verify_names_a_line_that_was_changed",
        "test_index_verify_names_a_line_that_was_removed",
        "test_it_stays_when_tiles_are_added_and_is_made_anew_when_they_doubled",
        "test_large_pictures_are_cut_and_the_label_counts_as_much_as_it_is_given",
        "test_many_at_once_are_no_way_around_the_limit",
        "test_one_hit_per_slide_even_when_one_slide_has_all_the_nearest_tiles",
        "test_p4m_features_do_not_change_under_all_of_d4",
        "test_p4m_is_invariant_through_onnx_runtime",
        "test_parameters_and_cost_are_the_papers",
        "test_placed_images_name_the_state_that_placed_them",
        "test_shape_gradient_and_round_trip",
        "test_symmetric_kernels_see_the_same_in_every_turn_and_mirror_image",
        "test_the_command_on_real_tiles_with_their_groups_as_patients",
        "test_the_command_prints_a_hash_of_what_it_reads",
        "test_the_configuration_is_one_for_production",
        "test_the_encoder_does_not_wait_for_slides_to_open",
        "test_the_run_exports_the_same_encoder",
        "test_the_same_seed_gives_the_same_map",
        "test_train_export_embed_search_with_an_encoder_of_ones_own",
        "test_train_list_shows_recipes_models_and_options",
        "test_two_writers_one_is_told_to_wait",
        "test_what_is_no_stained_tissue_is_said_to_be_that",
    }
)
"""Tests that take more than about two seconds without a server or a process; ``--durations`` shows them."""
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
