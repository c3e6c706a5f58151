"""Schedule of the tests: which are slow, which run one after another, and how often they repeat.

Under pytest-xdist every file is a group: one worker runs it, so its module fixtures are set up once. Files
in ``SPREAD`` have no expensive fixtures; their tests are distributed one by one, at the end. Tests that use
a resource of the machine (a Ray cluster, a Triton server, a browser) form one group over all files.

The mark ``slow`` is set by fixture, by file, by what the test calls, or by hand. ``make test-quick`` leaves
slow tests out and allows every other test 30 s, so a slow test without the mark fails there.
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
    if deep or file in SLOW_FILES or fixtures & SLOW_FIXTURES or calls & slow_calls:
        item.add_marker(pytest.mark.slow)
