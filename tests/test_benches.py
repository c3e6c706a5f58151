"""The benchmarks are not run by the tests; here at least their calls are checked against the package."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHES = sorted([*(ROOT / "tests/bench").glob("*.py"), *(ROOT / "tests/gpu").glob("*.py")])
ROT = ("[call-arg]", "[attr-defined]", "[name-defined]", "[import-not-found]")
"""What a change of the package causes in a benchmark; other errors of untyped code say little."""


def errors(files, folders, tmp_path):
    command = [
        sys.executable, "-m", "mypy", "--config-file", os.devnull, "--cache-dir", tmp_path / "cache",
        "--check-untyped-defs", "--ignore-missing-imports", "--follow-imports", "silent",
        "--explicit-package-bases", *files,
    ]  # fmt: skip
    path = os.pathsep.join(str(ROOT / folder) for folder in (".typing", *folders))
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env={**os.environ, "MYPYPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "source file" in done.stdout, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if line.endswith(ROT)]


def test_benchmarks_call_what_exists(tmp_path):
    # ui.py uses tests/atlases.py, the others tests/bench/atlases.py.
    others = [path for path in BENCHES if path.name != "ui.py"]
    assert len(others) > 10
    assert errors(others, ("tests/bench", "tests", "tests/gpu"), tmp_path) == []
    assert errors([ROOT / "tests/bench/ui.py"], ("tests", "tests/bench"), tmp_path) == []
    broken = tmp_path / "broken.py"
    broken.write_text(
        "from histoseek.index.atlas import Atlas\n\n\ndef run(path):\n    Atlas(path).fitt()\n"
        "    Atlas(path).fit('kmeans', clusters=3, nothing=1)\n    Atlas.create(path, path, mistake=1)\n"
    )
    assert len(errors([broken], ("tests",), tmp_path)) >= 2


def test_the_table_of_papers_is_that_of_the_reports():
    path = ROOT / "tests/bench/papers.py"
    spec = importlib.util.spec_from_file_location("papers", path)
    papers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(papers)
    found = papers.reports()
    assert set(found) == set(papers.REASONS) >= papers.OTHER_DATA
    for name, report in found.items():
        text = (ROOT / "docs/results" / name / "report.md").read_text()
        assert all(says and says in text for says in report["says"]), name
        assert text.split("\n")[2].startswith("**Fewer epochs.**") == bool(report["fewer"]), name
    hint = "run python tests/bench/papers.py"
    assert papers.page(found) == (ROOT / "docs/results/papers.md").read_text(), hint
    assert (
        papers.BEGIN + papers.summary(found) + papers.END in (ROOT / "docs/results.md").read_text()
    ), hint
    cell = {"published": 50.0, "published_sd": 1.0, "mean": 52.5, "sd": 9.0, "ours": [0] * 5}
    assert papers.verdict(cell) == "higher"
    ours = {**cell, "published_sd": None}
    assert papers.verdict(ours) == "within" and papers.verdict({**ours, "ours": [0] * 4}) is None
    repeated = {"compares_settings": True, "title": "", "rows": {"a": {"b": cell}}}
    assert list(papers.cells({"tables": [repeated]})) == []
