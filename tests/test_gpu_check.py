"""The check of a CUDA device, rehearsed on a CPU: it runs, reports what fails, and loses nothing."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "gpu"


def module(name):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(loaded)
    finally:
        sys.path[:] = path
    return loaded


@pytest.mark.slow
def test_parts_run_on_a_cpu(tmp_path):
    words = [sys.executable, FOLDER / "check.py", "--stand-in", "--out", tmp_path, "--only"]
    parts = ("environment", "default", "faiss", "pipeline", "training", "vit-g14")
    done = subprocess.run([*map(str, words), *parts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "gpu.json").read_text())
    assert list(facts["parts"]) == list(parts) and facts["stand_in"]
    rows = {name: part["lines"] for name, part in facts["parts"].items()}
    measured = [row for row in rows["default"] + rows["training"] if "skipped" not in row]
    assert len(measured) == 4 and all(row["tiles_per_s"] > 0 for row in measured)
    assert {row["encoder_on"] for row in rows["pipeline"]} == {"cpu"}
    assert rows["pipeline"][0]["tiles"] > 0
    assert rows["vit-g14"][0]["skipped"] == "the network is too large for a rehearsal"
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith("# Rehearsal") and "numbers mean nothing" in page


def test_without_a_device_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, FOLDER / "check.py", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "no CUDA device; rehearse with --stand-in" in done.stderr


def test_an_uninstalled_checkout_is_importable_here_and_in_other_processes(monkeypatch):
    check = module("check")
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    links = check.find_package()
    code = "import histoseek.errors; print(histoseek.errors.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    links.cleanup()
    assert done.stdout.strip() == f"{links.name}/histoseek/errors.py", done.stderr


def test_the_page_says_what_limits_embed():
    check = module("check")
    parts = {
        "default": {"lines": [{"what": "default, ONNX Runtime fp32, batch 64", "tiles_per_s": 4000.0}]},
        "pipeline": {"lines": [{"what": "embed with 1 cores", "tiles_per_s": 400.0},
                               {"what": "embed with 8 cores", "tiles_per_s": 2000.0}]},
    }  # fmt: skip
    said = check.feeding(parts)
    assert "reading and decoding is the limit" in said and "10.0 cores feed one device" in said
    assert check.feeding({}) == "Not known: a part above is missing."


def test_a_failed_or_late_part_keeps_its_lines(tmp_path, monkeypatch):
    check = module("check")
    script = tmp_path / "part.py"
    script.write_text(
        "import json, sys, time\nprint(json.dumps({'what': 'first', 'n': 1}), flush=True)\n"
        "if 'late' in sys.argv: time.sleep(30)\nsys.exit('it broke')\n"
    )
    monkeypatch.setattr(check, "__file__", str(script))
    broken = check.run_part("broken", True, 20)
    assert broken["failed"] == "it broke" and broken["lines"] == [{"what": "first", "n": 1}]
    late = check.run_part("late", True, 2)
    assert late["failed"] == "stopped after 2 s" and late["lines"] == [{"what": "first", "n": 1}]
    facts = {"stand_in": False, "date": "today", "parts": {"late": late}}
    assert "**failed**: stopped after 2 s" in check.page(facts)

    def wrong():
        raise ValueError("no such shape")

    def absent():
        raise check.Skipped("no library")

    rows = check.lines([("a", wrong), ("b", absent), ("c", lambda: {"x": 1})])
    assert rows == [
        {"what": "a", "failed": "ValueError: no such shape"}, {"what": "b", "skipped": "no library"},
        {"what": "c", "x": 1},
    ]  # fmt: skip


def test_wheels_come_in_pieces(tmp_path):
    wheels = module("wheels")
    blob = bytes(range(256)) * 40
    (tmp_path / "large-1.whl").write_bytes(blob)
    (tmp_path / "small-1.whl").write_bytes(b"small")
    wheels.split(tmp_path, 4096)
    assert sorted(path.name for path in tmp_path.glob("*.whl*")) == [
        "large-1.whl.00", "large-1.whl.01", "large-1.whl.02", "small-1.whl",
    ]  # fmt: skip
    wheels.join(tmp_path)
    assert (tmp_path / "large-1.whl").read_bytes() == blob
    (tmp_path / "large-1.whl.01").write_bytes(b"changed")
    with pytest.raises(SystemExit, match="large-1.whl.01 is damaged"):
        wheels.join(tmp_path)
    (tmp_path / "large-1.whl.01").unlink()
    with pytest.raises(SystemExit, match="bring all pieces of large-1.whl"):
        wheels.join(tmp_path)
