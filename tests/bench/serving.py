"""Tiles per second from slide to feature file, compared with the usual loop and an upper bound.

    make bench-serving

Prints tables. All numbers of a table come from one run: medians over rounds in which the variants
alternate. No test depends on them.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import date
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from made import bundle_of, large_pyramid
from triton_server import TritonServer

from histoseek.export.options import TritonOptions
from histoseek.export.triton import write_repository
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.meter import Meter
from histoseek.serving.embedding.pipeline import PIECE, embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.engines import cores
from histoseek.serving.encoders.onnx import OnnxEncoder
from histoseek.serving.encoders.open import open_encoder
from histoseek.serving.slides.openslide_source import OpenSlideSource
from histoseek.serving.slides.slide import open_slide

ROUNDS = 3


def rate(count, call):
    started = time.perf_counter()
    call()
    return count / (time.perf_counter() - started)


def show(title, rows):
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:58} {value}")
    sys.stdout.flush()


def pipeline(slide, encoder, folder, jobs=None):
    """Tiles per second of `histoseek embed`, from opening the slide to the published file."""
    shutil.rmtree(folder, ignore_errors=True)
    meter, options = Meter(), EmbedOptions(jobs=jobs, overlays=False)
    started = time.perf_counter()
    (result,) = embed_jobs(find_jobs([slide]), encoder, folder, options, lambda *_: None, meter)
    assert result.state == "done", result
    counted = meter.read()
    # opening and finding tissue is once a slide; the first piece begins when it is done
    steady = time.perf_counter() - started - counted["stages"]["open"]["seconds"]
    return result.tiles / steady, result.tiles / (time.perf_counter() - started), counted


def pure_encoder(encoder, tiles, seconds=4.0):
    """Tiles per second with every stream at work on ready pieces, as the pipeline calls it."""
    pieces = [tiles[n : n + PIECE] for n in range(0, len(tiles) - PIECE + 1, PIECE)]

    def work(number):
        done, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            encoder.embed(pieces[(number + done) % len(pieces)])
            done += 1
        return done * PIECE

    started = time.perf_counter()
    with ThreadPoolExecutor(encoder.parallel) as pool:
        total = sum(pool.map(work, range(encoder.parallel)))
    return total / (time.perf_counter() - started)


def pure_reading(slide, coords, side):
    """Tiles per second of reading alone, with a worker per core, in the pipeline's pieces."""
    places = [(int(x), int(y)) for x, y in coords]
    pieces = [places[n : n + PIECE] for n in range(0, len(places), PIECE)]
    with ThreadPoolExecutor(cores()) as pool:
        return rate(
            len(places),
            lambda: list(pool.map(lambda p: slide.read_tiles(p, side, room(p)), pieces)),
        )


BUFFERS = threading.local()


def room(places):
    """Return this thread's buffer, as a worker of the pipeline has one."""
    if not hasattr(BUFFERS, "tiles"):
        BUFFERS.tiles = np.empty((PIECE, 224, 224, 3), np.uint8)
    return BUFFERS.tiles[: len(places)]


def usual_loop(path, views, coords, side, lean=False, batch=32):
    asked = json.dumps([str(path), views, batch, cores(), side, coords.tolist(), lean])
    script = Path(__file__).parent / "usual_loop.py"
    done = subprocess.run(
        [sys.executable, script], input=asked, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def readers(path, coords, side):
    """Ways to read the same tiles, one thread each."""
    import fastslide

    places = [(int(x), int(y)) for x, y in coords[:1500]]
    found = {"OpenSlide": [], "fastslide": [], "direct (this project)": []}
    with (
        closing(OpenSlideSource(path, direct=False)) as plain,
        closing(OpenSlideSource(path)) as direct,
        fastslide.FastSlide.from_file_path(str(path)) as fast,
    ):
        assert direct.reads_directly
        one, two = (np.empty((64, side, side, 3), np.uint8) for _ in "12")
        assert not plain.regions(places[:64], 0, one) and not direct.regions(places[:64], 0, two)
        assert np.array_equal(one, two)
        ways = {
            "OpenSlide": lambda: [plain.regions([p], 0, one[:1]) for p in places],
            "fastslide": lambda: [
                np.asarray(fast.read_region(location=p, level=0, size=(side, side))) for p in places
            ],
            "direct (this project)": lambda: [
                direct.regions(places[n : n + PIECE], 0, room(places[n : n + PIECE]))
                for n in range(0, len(places), PIECE)
            ],
        }
        for _ in range(ROUNDS):
            for name, way in ways.items():
                found[name].append(rate(len(places), way))
    base = statistics.median(found["OpenSlide"])
    show(
        "reading, one thread, tiles/s (pixels of OpenSlide and direct are equal)",
        [
            (name, f"{statistics.median(v):7.0f}   x{statistics.median(v) / base:.2f}")
            for name, v in found.items()
        ],
    )


def main_table(path, slide, grid, views, work, precisions):
    tiles = np.empty((512, 224, 224, 3), np.uint8)
    slide.read_tiles([(int(x), int(y)) for x, y in grid.coords[:512]], grid.size_px_level0, tiles)
    bundle = bundle_of(work / f"bundle-{views}", views)
    few = grid.coords[: (1600 if views == 1 else 320)]
    for precision in precisions:
        encoder = OnnxEncoder(bundle, engine="auto", precision=precision)
        plan = encoder.describe()
        found = {key: [] for key in "abBcd"}
        whole = []
        pure_encoder(encoder, tiles, 0.5)
        for _ in range(ROUNDS):
            found["b"].append(usual_loop(path, views, few, grid.size_px_level0))
            found["B"].append(usual_loop(path, views, few, grid.size_px_level0, lean=True))
            found["c"].append(pure_encoder(encoder, tiles))
            found["d"].append(pure_reading(slide, grid.coords, grid.size_px_level0))
            steady, all_of_it, counted = pipeline(path, encoder, work / "features")
            found["a"].append(steady)
            whole.append(all_of_it)
        a, b, lean, c, d = (statistics.median(found[key]) for key in "abBcd")
        bound = 1 / (1 / c + 1 / d)
        show(
            f"{views} view(s), {plan['engine']} {precision}, batch {plan['batch']}, "
            f"{plan['streams']} streams, {cores()} cores, {len(grid.coords)} tiles; tiles/s",
            [
                ("(a) this pipeline, slide to file", f"{a:7.0f}"),
                (
                    "    with opening the slide and finding tissue",
                    f"{statistics.median(whole):7.0f}",
                ),
                ("(b) OpenSlide + DataLoader + torch eager", f"{b:7.0f}"),
                ("(b') the same, sending bytes and scaling in the network", f"{lean:7.0f}"),
                ("(c) encoder alone, ready batches", f"{c:7.0f}"),
                ("(d) reading alone", f"{d:7.0f}"),
                ("bound 1 / (1/c + 1/d)", f"{bound:7.0f}"),
                ("(a) / (b)", f"{a / b:7.2f}"),
                ("(a) / (b')", f"{a / lean:7.2f}"),
                ("(a) / bound", f"{a / bound:7.2f}"),
                ("encoder busy", f"{counted['encoder_busy']:7.0%}"),
            ],
        )


def triton_table(path, work, views=1, limit=2000):
    bundle = bundle_of(work / f"triton-bundle-{views}", views)
    options = TritonOptions(max_batch=8, instances=cores(), delay_us=0)
    write_repository([bundle], work / "models", options)
    name = f"bench-{views}-view"
    local = OnnxEncoder(bundle, engine="onnxruntime", batch=8)
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (256, 224, 224, 3), dtype=np.uint8)
    (work / "server").mkdir()
    with TritonServer(work / "models", work / "server") as server:
        rows = {"in process": local}
        rows["Triton, shared memory"] = open_encoder(server.url(name, "?shm=1"))
        rows["Triton, gRPC"] = open_encoder(server.url(name))
        found = {key: [] for key in rows}
        used = {key: [] for key in rows}
        for encoder in rows.values():
            pure_encoder(encoder, tiles, 0.5)
        for _ in range(ROUNDS):
            for key, encoder in rows.items():
                before = time.process_time()
                speed = pure_encoder(encoder, tiles)
                used[key].append((time.process_time() - before) / (speed * 4.0))
                found[key].append(speed)
        base = statistics.median(found["in process"])
        show(
            "Triton on the client's own cores (stand-in backend), ready tiles; tiles/s, share of in "
            "process, tiles per second of the client's CPU time",
            [
                (key, f"{statistics.median(v):7.0f}   x{statistics.median(v) / base:.2f}"
                 f"   {1 / statistics.median(used[key]):7.0f}")
                for key, v in found.items()
            ],
        )  # fmt: skip
        spent = server_times(rows["Triton, gRPC"], tiles)
        show("where a request by gRPC spends its time, µs per tile, two requests at a time", spent)
        for encoder in rows.values():
            encoder.close()


def server_times(encoder, tiles, seconds=4.0):
    """What Triton's own statistics say of the time between asking and being answered."""

    def ask():
        answer = encoder._client.get_inference_statistics(encoder.address.model)
        found = answer.model_stats[0].inference_stats
        return {
            name: getattr(found, name).ns
            for name in ("queue", "compute_input", "compute_infer", "compute_output", "success")
        }, answer.model_stats[0].inference_count

    before, first = ask()
    waited = []

    def work(number):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            started = time.perf_counter()
            encoder.embed(tiles[:8])
            waited.append(time.perf_counter() - started)

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(work, range(cores())))
    after, last = ask()
    spent = {name: (after[name] - before[name]) / 1e3 / (last - first) for name in before}
    whole = sum(waited) * 1e6 / (last - first)
    rows = [
        ("at the client, from call to answer", whole),
        ("  in the server", spent["success"]),
        ("    waiting in the queue", spent["queue"]),
        ("    taking tiles in", spent["compute_input"]),
        ("    the backend: its process, copies, and the network itself", spent["compute_infer"]),
        ("    giving embeddings out", spent["compute_output"]),
        ("  packing, gRPC and the kernel, both ways", whole - spent["success"]),
    ]
    return [(name, f"{value:7.0f}") for name, value in rows]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=["readers", "main", "triton"])
    parser.add_argument("--views", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--precision", nargs="*", default=["f32", "bf16"])
    parser.add_argument("--repeat", type=int, nargs=2, default=[12, 9])
    chosen = parser.parse_args()
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {cores()} cores")
    with tempfile.TemporaryDirectory() as temp:
        work = Path(temp)
        os.environ["HISTOSEEK_CACHE"] = str(work / "cache")
        path = large_pyramid(work / "large.tiff", *chosen.repeat)
        with open_slide(path) as slide:
            grid = slide.grid(224, 0.5)
            size = f"{slide.width} x {slide.height}, {path.stat().st_size / 1e6:.0f} MB"
            print(f"pyramid {size}, {len(grid.coords)} tiles of tissue")
            if chosen.only in (None, "readers"):
                readers(path, grid.coords, grid.size_px_level0)
            if chosen.only in (None, "main"):
                for views in chosen.views:
                    main_table(path, slide, grid, views, work, chosen.precision)
        if chosen.only in (None, "triton"):
            triton_table(path, work)


if __name__ == "__main__":
    main()
