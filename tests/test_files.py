"""Publishing: all or nothing."""

import os
import subprocess
import sys
import threading

import pytest

from histoseek.artifacts.files import (
    exclusive,
    publish_folder,
    read_json,
    remove_leftovers,
    write_atomic,
    write_json,
)
from histoseek.errors import BadInput, Busy, Damaged, StorageFailed


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(StorageFailed, match="no space left"):
                write_atomic(path, "new")
        assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), publish_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with publish_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert (tmp_path / "out/whole").read_text() == "x"
    with pytest.raises(BadInput, match="exists already"), publish_folder(tmp_path / "out"):
        pass


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    gone = [sys.executable, "-c", "import os; print(os.getpid())"]
    dead = int(subprocess.run(gone, capture_output=True, check=True).stdout)
    host = os.uname().nodename
    keep = {
        "x.h5", ".p.tmp", f".y.h5.{host}~{os.getpid()}~ab.histoseek-tmp",
        f".z.h5.elsewhere~{dead}~ab.histoseek-tmp",
    }  # fmt: skip
    for name in {*keep, f".x.h5.{host}~{dead}~ab.histoseek-tmp"}:
        (tmp_path / name).write_text("x")
    assert remove_leftovers([tmp_path]) == 1
    assert {p.name for p in tmp_path.iterdir()} == keep  # of the living, of others, and not ours


def test_one_holder_at_a_time(tmp_path):
    seen = []
    with exclusive(tmp_path / "lock", "atlas x"):

        def other():
            try:
                with exclusive(tmp_path / "lock", "atlas x"):
                    seen.append("in")
            except Busy as error:
                seen.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "atlas x is being written" in seen[0]
    with exclusive(tmp_path / "lock", "atlas x"):
        pass


def test_json_round_trip_and_errors(tmp_path):
    write_json(tmp_path / "a.json", {"µm": 0.5})
    assert read_json(tmp_path / "a.json") == {"µm": 0.5}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "b.json", {"x": float("nan")})
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(Damaged, match=r"c\.json"):
        read_json(tmp_path / "c.json")
    with pytest.raises(BadInput, match=r"d\.json"):
        read_json(tmp_path / "d.json")
