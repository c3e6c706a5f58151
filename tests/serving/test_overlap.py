"""Stages overlap across slides; results do not depend on workers, nor memory on the size of a slide."""

import hashlib
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from triton_server import free_ports

from histoseek.artifacts.manifest import read_manifest
from histoseek.errors import BadInput, Busy
from histoseek.serving.embedding import pipeline
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.meter import Meter
from histoseek.serving.embedding.metrics_page import metrics_page
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.onnx import OnnxEncoder
from histoseek.serving.encoders.open import DEFAULT_BUNDLE

sys.path.append(str(Path(__file__).parents[1] / "bench"))


class SlowEncoder:
    """Takes a known time per call, on somebody else's machine; counts how many calls are under way."""

    offloads, parallel, batch = True, 2, 64

    def __init__(self, seconds):
        self.seconds, self.now, self.most = seconds, 0, 0
        self.manifest = read_manifest(DEFAULT_BUNDLE)
        self._lock = threading.Lock()

    def describe(self):
        return {}

    def embed(self, tiles):
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        with self._lock:
            self.now -= 1
        return np.ones((len(tiles), self.manifest.dim), np.float32)

    def close(self):
        pass


def run(slides, encoder, out, meter=None, **options):
    chosen = EmbedOptions(overlays=False, **options)
    return pipeline.embed_jobs(find_jobs(slides), encoder, out, chosen, lambda *_: None, meter)


@pytest.fixture(scope="module")
def slides(make_slide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    return [make_slide(folder / f"case-{n}.tiff", side=1400, seed=n) for n in range(6)]


def test_the_encoder_does_not_wait_for_slides_to_open(slides, tmp_path, monkeypatch):
    prepare = pipeline.prepare

    meter, encoder, meanwhile = Meter(), SlowEncoder(0.5), []

    def slow(*args):
        time.sleep(0.4)
        meanwhile.append(encoder.now > 0)
        return prepare(*args)

    monkeypatch.setattr(pipeline, "prepare", slow)
    results = run(slides, encoder, tmp_path / "out", meter, overlap_px=112)
    assert all(r.state == "done" for r in results) and encoder.most >= 2
    assert sum(meanwhile) >= 3, meanwhile  # of six slides, the first is opened before any call
    counted = meter.read()
    assert counted["stages"]["open"]["seconds"] >= 2.4 and 0.3 < counted["encoder_busy"] <= 1


def test_files_are_the_same_to_the_byte_whatever_the_number_of_workers(slides, tmp_path):
    found = []
    for jobs in (1, 2, 5):
        encoder = OnnxEncoder(DEFAULT_BUNDLE, batch=4, streams=jobs)
        out = tmp_path / "out"
        run(slides[:3], encoder, out, jobs=jobs, overlap_px=56)
        files = sorted(out.rglob("*.h5"))
        found.append([hashlib.sha256(f.read_bytes()).hexdigest() for f in files])
        for file in files:
            file.unlink()
    assert len(found[0]) == 3 and found[0] == found[1] == found[2]


def test_slow_slides_and_failing_ones_keep_their_places(slides, make_slide, tmp_path):
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"no slide")
    order = [slides[0], broken, *slides[1:3], tmp_path / "missing.svs", slides[3]]
    results = run(order, SlowEncoder(0.01), tmp_path / "out")
    assert [Path(r.source) for r in results] == order
    assert [r.state for r in results] == ["done", "failed", "done", "done", "failed", "done"]


def test_an_error_that_nobody_expects_ends_the_run_without_hanging(slides, tmp_path):
    class Bad(SlowEncoder):
        def embed(self, tiles):
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(slides, Bad(0), tmp_path / "out")
    assert time.monotonic() - started < 30
    assert not list((tmp_path / "out").rglob("*.h5")) + list(tmp_path.rglob("*.histoseek-tmp"))


def test_prometheus_sees_the_run(slides, tmp_path):
    meter, seen = Meter(), []
    (port,) = free_ports(1)

    class Watched(SlowEncoder):
        def embed(self, tiles):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
                seen.append(page.read().decode())
            return super().embed(tiles)

    with metrics_page(str(port), meter):
        run(slides[:2], Watched(0.01), tmp_path / "out", meter)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            last = page.read().decode()
        with pytest.raises(Busy, match=str(port)), metrics_page(str(port), meter):
            pass
    tiles = meter.read()["tiles_done"]
    assert f"histoseek_tiles_total {tiles}.0" in last and tiles > 10
    assert 'histoseek_slides_total{state="done"} 2.0' in last
    assert 'histoseek_stage_items_total{stage="read"}' in seen[0]
    for bad in ("x", "127.0.0.1:0", "70000"):
        with pytest.raises(BadInput, match="--metrics"), metrics_page(bad, meter):
            pass


PEAK = """
import sys
from histoseek.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
status = open("/proc/self/status").read()  # getrusage would count what the parent had, too
print(status.partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.shared
def test_memory_does_not_grow_with_the_slide(other_bundle, tmp_path):
    """Peak memory on a slide of four times the pixels of another, all of it embedded."""
    from made import large_pyramid

    peaks, tiles = [], []
    for across, down in ((5, 4), (10, 8)):
        path = large_pyramid(tmp_path / f"{across}.tiff", across, down)
        command = [
            sys.executable, "-c", PEAK, "embed", path, "--out", tmp_path / str(across), "--encoder",
            other_bundle, "--mpp", "1.165", "--min-tissue", "0", "--engine", "onnxruntime",
            "--jobs", "2",
        ]  # fmt: skip
        env = {**os.environ, "MALLOC_ARENA_MAX": "2"}  # glibc's arenas vary by chance by 60 MiB
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=550,
            check=True,
            env=env,
        )
        peaks.append(int(done.stdout.splitlines()[-1]))
        tiles.append(sum(1 for _ in (tmp_path / str(across)).rglob("*.h5")))
        path.unlink()
    print(f"peak memory {peaks[0] / 1024:.0f} and {peaks[1] / 1024:.0f} MiB")
    assert tiles == [1, 1]
    assert peaks[1] <= 1.2 * peaks[0]
