"""Freed memory stays in a training process on a CPU."""

import subprocess
import sys

from histoseek.artifacts.tileset_files import open_tiles
from histoseek.console import no_progress
from histoseek.training.arcface_options import ArcFaceOptions
from histoseek.training.job import Job

CODE = """
import sys
from pathlib import Path
import numpy as np
from histoseek.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
large = np.ones(2**24)
del large
print(resident() - before)
"""


def kept(how):
    done = subprocess.run(
        [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_large_arrays_are_kept_when_they_are_freed():
    assert kept("keep") > 100e6 > 20e6 > kept("give back")


def test_a_training_keeps_freed_memory(tile_folder, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("histoseek.training.job.keep_freed_memory", lambda: told.append(True))
    tiles = open_tiles(tile_folder)
    Job("arcface", "", ArcFaceOptions(), tiles, tmp_path / "run", no_progress).prepare()
    assert told == [True]
