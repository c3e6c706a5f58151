"""Stages overlap across slides; results do not depend on workers, nor memory on the size of a slide."""

import hashlib
import os
import subprocess
import sys
import threading
import time
import types
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
    chosen = EmbedOptions(overlays=False, min_sharpness=0, **options)  # the slides are enlarged
    return pipeline.embed_jobs(find_jobs(slides), encoder, out, chosen, lambda *_: None, meter)


@pytest.fixture(scope="module")
def slides(make_slide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    return [make_slide(folder / f"case-{n}.tiff", side=1400, seed=n) for n in range(6)]


WAIT_S = 60
"""Seconds until a wait counts as endless: stages that do not overlap would wait for each other."""


class HeldEncoder(SlowEncoder):
    """Ends a call only when the slide after next has opened; the first call also when a second one runs."""

    def __init__(self, slides):
        super().__init__(0)
        self.last = slides - 1
        self.change = threading.Condition()
        self.here = threading.local()  # number of the slide whose tiles this thread has read
        self.opened, self.endless = set(), []

    def wait(self, reason, condition):
        with self.change:
            if not self.change.wait_for(condition, timeout=WAIT_S):
                self.endless.append(reason)

    def embed(self, tiles):
        number = self.here.number
        with self.change:
            self.now += 1
            self.most = max(self.most, self.now)
            self.change.notify_all()
        ahead = min(number + 2, self.last)
        self.wait(f"a call for slide {number}: slide {ahead} opens", lambda: ahead in self.opened)
        self.wait("the first call: another call", lambda: self.most >= 2)
        with self.change:
            self.now -= 1
        return np.ones((len(tiles), self.manifest.dim), np.float32)


def test_the_encoder_does_not_wait_for_slides_to_open(slides, tmp_path, monkeypatch):
    """Calls wait for slides that open later, and all slides but the first open during a call."""
    prepare, encoder, meter = pipeline.prepare, HeldEncoder(len(slides)), Meter()

    def prepare_during_a_call(job, *args, **named):
        number = slides.index(job.source)
        if number:
            encoder.wait(f"slide {number}: a call", lambda: encoder.now > 0)
        time.sleep(0.05)
        work = prepare(job, *args, **named)
        read = work.read

        def read_and_note(*args):
            encoder.here.number = number
            return read(*args)

        work.read = read_and_note
        with encoder.change:
            encoder.opened.add(number)
            encoder.change.notify_all()
        return work

    monkeypatch.setattr(pipeline, "prepare", prepare_during_a_call)
    results = run(slides, encoder, tmp_path / "out", meter, overlap_px=112)
    assert encoder.endless == []
    assert all(r.state == "done" for r in results) and encoder.most >= 2
    assert results[0].tiles > encoder.batch, "the first slide needs two calls"
    counted = meter.read()
    assert counted["stages"]["open"]["items"] == 6 and counted["stages"]["open"]["seconds"] >= 0.3
    assert 0 < counted["encoder_busy"] <= 1


def test_the_encoder_is_busy_while_at_least_one_call_runs(monkeypatch):
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("histoseek.serving.embedding.meter.time", clock)
    meter = Meter()
    calls = [meter.stage("encode", 10) for _ in range(3)]
    for seconds, call, step in (
        (5, 0, "begins"), (10, 1, "begins"), (15, 0, "ends"), (25, 1, "ends"), (35, 2, "begins"),
    ):  # fmt: skip
        now[0] = seconds
        calls[call].__enter__() if step == "begins" else calls[call].__exit__(None, None, None)
    now[0] = 45.0
    assert meter.read()["encoder_busy"] == 0.75  # 5 to 25 and 35 to 45, of 5 to 45
    calls[2].__exit__(None, None, None)
    now[0] = 100.0
    counted = meter.read()
    assert counted["encoder_busy"] == 0.75 and counted["seconds"] == 100
    assert counted["stages"]["encode"] == {"items": 30, "seconds": 35, "tiles_per_s": 0.9}


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
