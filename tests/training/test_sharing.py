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
from histoseek.errors import BadInput, StorageFailed
from histoseek.training.reproduce import StudyOptions, reproduce
from histoseek.training.reproduce.sharing import locked, remove_locks

COMMAND = (sys.executable, "-m", "histoseek", "reproduce", "topology-sweep", "--quick", "--json")
CELLS = [f"{net}-{code}" for net in ("ae", "cae") for code in (128, 16, 32, 64)]


@contextmanager
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
    process = subprocess.Popen([*COMMAND, *given, *more], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def answer(process):
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    return json.loads(printed)


def said(texts, text):
    end = time.monotonic() + 120
    while text not in texts:
        assert time.monotonic() < end, texts
        time.sleep(0.05)


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
    with (
        command(tile_folder, out, "--train-only") as one,
        command(tile_folder, out, "--train-only") as two,
    ):
        trained = [answer(process)["trained"] for process in (one, two)]
    assert sorted(trained[0] + trained[1]) == CELLS
    assert not (out / "report.md").exists()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    with command(tile_folder, out) as last:
        assert "tables" in answer(last)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    assert not list(out.rglob("*.lock"))


def test_what_needs_a_training_of_another_process_waits_for_it_and_the_rest_does_not(tmp_path):
    out, tiles, told, texts = tmp_path / "r", digits(), [], []
    options = StudyOptions(out, quick=True, accelerator="cpu", train_only=True)

    def run():
        shown = reproduce("ae-dac", options, tiles, lambda done, total, text: texts.append(text))
        told.extend(shown["trained"])

    thread = threading.Thread(target=run, daemon=True)
    with training_elsewhere(out, "ae-kmeans-0"):
        thread.start()
        said(texts, "waiting, because other processes train ae-kmeans-0")
        assert [path.parent.name for path in out.rglob("run.json")] == ["dac-0"]
        assert thread.is_alive()
    thread.join(120)
    assert told == ["dac-0", "ae-kmeans-0", "dec-0", "ae-dac-0"]
    assert set(json.loads((out / "records.json").read_text())) == set(told)


def test_the_first_training_that_is_free_again_is_taken(tmp_path):
    out, told = tmp_path / "r", []
    options = StudyOptions(out, quick=True, accelerator="cpu", parts="AE", train_only=True)
    thread = threading.Thread(
        target=lambda: told.extend(reproduce("topology-sweep", options, digits(), no_progress)["trained"]),
        daemon=True,
    )  # fmt: skip
    with training_elsewhere(out, "ae-16"):
        with training_elsewhere(out, "ae-64"):
            thread.start()
            finished(out, "ae-128")
        finished(out, "ae-64")  # although ae-16 is not over
        assert not (out / "runs/ae-16/run.json").exists()
    thread.join(120)
    assert told == ["ae-32", "ae-128", "ae-64", "ae-16"]


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
        said(texts, "ae-32: waiting, because another process trains it")
        assert not (out / "runs/ae-64").exists()
    thread.join(120)
    assert (out / "report.md").is_file()


def test_a_lock_is_held_once_and_that_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "runs/a.lock"
    with locked(path) as first, locked(path) as second:
        assert first and not second
    holder = """if True:
        import sys, time
        from pathlib import Path
        from histoseek.training.reproduce.sharing import locked
        with locked(Path(sys.argv[1])) as held:
            print(held, flush=True)
            time.sleep(600)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    with locked(path) as mine:
        assert not mine
    process.kill()
    process.wait()
    process.stdout.close()
    with locked(path) as mine:
        assert mine
    path.unlink()  # with the report
    with locked(path) as mine:
        assert mine


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EWOULDBLOCK])
def test_a_file_that_another_host_removed_is_tried_again(tmp_path, monkeypatch, number):
    real, tries = fcntl.flock, []

    def stale(file, how):
        tries.append(file)
        if len(tries) < 3:
            raise OSError(number, "another host")
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", stale)
    with locked(tmp_path / "a.lock", lambda: None) as mine:
        assert mine and len(tries) == 3


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(StorageFailed, match="runs"), locked(tmp_path / "runs/a.lock"):
        pass


def test_what_does_not_fit_into_memory_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("histoseek.training.data.MAX_BYTES", 1000)
    options = StudyOptions(tmp_path / "r", quick=True, accelerator="cpu")
    for name in ("ae-dac", "arcface", "breast-ae", "p4m-deepcluster", "topology-sweep"):
        with pytest.raises(
            BadInput, match=r"200 tiles of \d+ px do not fit into memory; pass --limit"
        ):
            reproduce(name, options, digits(), no_progress)
    assert not list(tmp_path.rglob("run.json"))


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


def test_a_report_leaves_the_locks_of_processes_that_still_train(tmp_path):
    """They may train for a report with more folds; without its lock, a second one would train the same."""
    code = (
        "import sys; from pathlib import Path; from histoseek.training.reproduce.sharing import locked\n"
        "with locked(Path(sys.argv[1])) as mine: print(mine, flush=True); sys.stdin.read()"
    )
    held, free = tmp_path / "runs/held.lock", tmp_path / "runs/free.lock"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(held)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "True\n"
        free.touch()
        remove_locks(tmp_path)
        assert held.exists() and not free.exists()
        other.stdin.close()
        other.wait(60)
    remove_locks(tmp_path)
    assert not held.exists()


@pytest.mark.parametrize(("number", "stays"), [(errno.EACCES, True), (errno.ENOLCK, False)])
def test_a_lock_that_cannot_be_tried_stays(tmp_path, monkeypatch, number, stays):
    """It may be another user's; where there are no locks at all, none can be held."""
    (tmp_path / "a.lock").touch()

    def refuse(*_):
        raise OSError(number, "refused")

    monkeypatch.setattr(fcntl, "flock", refuse)
    remove_locks(tmp_path)
    assert (tmp_path / "a.lock").exists() == stays
