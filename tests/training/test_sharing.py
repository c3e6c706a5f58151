"""Several processes train one protocol: each training runs once, and a killed process delays no other."""

import errno
import fcntl
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
from digit_tiles import digits

from histoseek.console import no_progress
from histoseek.errors import StorageFailed
from histoseek.training.reproduce import StudyOptions, reproduce
from histoseek.training.reproduce.sharing import locked

COMMAND = (sys.executable, "-m", "histoseek", "reproduce", "topology-sweep", "--quick", "--json")
CELLS = [f"{net}-{code}" for net in ("ae", "cae") for code in (128, 16, 32, 64)]


def command(tile_folder, out, *more):
    given = (
        "--data",
        str(tile_folder),
        "--out",
        str(out),
        "--size-px",
        "28",
        "--accelerator",
        "cpu",
    )
    return subprocess.Popen([*COMMAND, *given, *more], stdout=subprocess.PIPE, text=True)


def finished(out, cell):
    end = time.monotonic() + 120
    while not (out / f"runs/{cell}/run.json").is_file():
        assert time.monotonic() < end, cell
        time.sleep(0.05)


@contextmanager
def training_elsewhere(out, cell):
    """As if another process trained this cell."""
    with locked(out / f"runs/{cell}.lock") as mine:
        assert mine
        yield


def test_processes_share_the_trainings_and_one_writes_the_report(tile_folder, tmp_path):
    out = tmp_path / "r"
    pair = [command(tile_folder, out, "--train-only") for _ in range(2)]
    trained = [json.loads(process.communicate(timeout=300)[0])["trained"] for process in pair]
    assert sorted(trained[0] + trained[1]) == CELLS
    assert not (out / "report.md").exists() and not list(out.rglob("*.lock"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    report = command(tile_folder, out)
    assert "tables" in json.loads(report.communicate(timeout=300)[0])
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}


def test_what_needs_a_training_of_another_process_waits_for_it_and_the_rest_does_not(tmp_path):
    out, tiles, told = tmp_path / "r", digits(), []
    options = StudyOptions(out, quick=True, accelerator="cpu", train_only=True)

    def run():
        told.append(reproduce("ae-dac", options, tiles, no_progress)["trained"])

    thread = threading.Thread(target=run, daemon=True)
    with training_elsewhere(out, "ae-kmeans-0"):
        thread.start()
        finished(out, "dac-0")  # it starts from random weights
        time.sleep(0.3)
        assert not (out / "runs/dec-0/run.json").exists() and thread.is_alive()
    thread.join(120)
    assert told == [["dac-0", "ae-kmeans-0", "dec-0", "ae-dac-0"]]
    assert set(json.loads((out / "records.json").read_text())) == set(told[0])


def test_without_the_option_the_command_waits_and_says_so(tmp_path):
    out, texts = tmp_path / "r", []
    options = StudyOptions(out, quick=True, accelerator="cpu", parts="AE")
    thread = threading.Thread(
        target=reproduce, daemon=True,
        args=("topology-sweep", options, digits(), lambda done, total, text: texts.append(text)),
    )  # fmt: skip
    with training_elsewhere(out, "ae-32"):
        thread.start()
        finished(out, "ae-16")
        end = time.monotonic() + 60
        while "ae-32: waiting, because another process trains it" not in texts:
            assert time.monotonic() < end, texts
            time.sleep(0.05)
        assert not (out / "runs/ae-64").exists()
    thread.join(120)
    assert (out / "report.md").is_file()


def test_a_lock_is_held_once_and_that_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "runs/a.lock"
    with locked(path) as first, locked(path) as second:
        assert first and not second
    assert not path.exists()
    path.touch()  # a killed process leaves its file
    with locked(path) as mine:
        assert mine
    assert not path.exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    options = StudyOptions(tmp_path / "r", quick=True, accelerator="cpu", parts="AE")
    shared = replace(options, train_only=True)
    with pytest.raises(StorageFailed, match=r"No locks available.*without --train-only"):
        reproduce("topology-sweep", shared, digits(), no_progress)
    assert not list(tmp_path.rglob("run.json"))
    reproduce("topology-sweep", options, digits(), no_progress)
    assert (tmp_path / "r/report.md").is_file()
