"""What histoseek does on a CUDA device: parity, speed, GPU search and training; one JSON and one table.

Every part runs in a process of its own with a time limit. Results are written after each part, so a run
that is cut off still counts. A part that cannot run here says why. ``--stand-in`` rehearses all parts on a
CPU with small sizes: it shows that they run, and measures nothing.

    python tests/gpu/check.py --out docs/results/gpu          # on a machine with a CUDA device
    python tests/gpu/check.py --out build/gpu --stand-in      # anywhere
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "bench")]

NETS = {"vit-s16": "lunit-s16", "vit-b16": "kaiko-b16", "vit-l16": "uni", "vit-g14": "uni2-h"}
"""Published encoders of these shapes; their weights are random here, which does not change the speed."""
LIMITS_S = {
    "environment": 20, "parity": 45, "default": 30, "vit-s16": 45, "vit-b16": 45, "vit-l16": 55,
    "vit-g14": 50, "pipeline": 55, "triton": 45, "faiss": 55, "training": 35,
}  # fmt: skip
"""Parts, in the order in which they run, and the time that each may take: 8 minutes in all."""
PACKAGES = (
    "torch", "onnxruntime", "onnxruntime-gpu", "faiss-cpu", "faiss-gpu-cu12", "tritonclient",
    "nvidia-pytriton", "openslide-python", "simplejpeg", "tifffile", "numpy",
)  # fmt: skip


class Skipped(Exception):
    """A part, or a line of it, cannot run here; the text says why."""


class Machine:
    """The device under test: CUDA, or its stand-in on a CPU."""

    def __init__(self, stand_in):
        import torch

        self.stand_in = stand_in
        if not stand_in and not torch.cuda.is_available():
            raise SystemExit("there is no CUDA device; rehearse with --stand-in")
        self.name = "cpu" if stand_in else "cuda"
        self.half = torch.bfloat16
        self.seconds = 0.2 if stand_in else 2.0

    def batches(self, *full):
        return (1, 2) if self.stand_in else full

    def wait(self):
        import torch

        if not self.stand_in:
            torch.cuda.synchronize()

    def provider(self):
        """Return the execution provider to compare with the CPU's."""
        runtime = onnxruntime()
        wanted = "CPUExecutionProvider" if self.stand_in else "CUDAExecutionProvider"
        if wanted not in runtime.get_available_providers():
            raise Skipped(f"ONNX Runtime {runtime.__version__} has no {wanted}")
        return wanted


def onnxruntime():
    """Import ONNX Runtime with the CUDA libraries that torch brings."""
    from histoseek.serving.encoders.engines import load_onnxruntime

    runtime = load_onnxruntime()
    if hasattr(runtime, "preload_dlls"):
        import torch  # noqa: F401

        runtime.preload_dlls()
    return runtime


def installed(module, package=None):
    """Raise Skipped unless a module is installed."""
    if importlib.util.find_spec(module) is None:
        raise Skipped(f"{package or module} is not installed")


def rate(machine, run, count, seconds=None):
    """Return calls of ``run`` per second times ``count``; the first calls are not counted."""
    for _ in range(3):
        run()
    machine.wait()
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < (seconds or machine.seconds):
        run()
        machine.wait()
        done += count
    return done / (time.perf_counter() - started)


def lines(told):
    """Run each line of a part; one that fails is told and does not end the others."""
    rows = []
    for name, make in told:
        try:
            rows.append({"what": name, **make()})
        except Skipped as reason:
            rows.append({"what": name, "skipped": str(reason)})
        except Exception as error:
            rows.append({"what": name, "failed": f"{type(error).__name__}: {error}"[:500]})
        print(json.dumps(rows[-1]), flush=True)
    return rows


# -- parts ------------------------------------------------------------------------------------------


def environment(machine):
    import torch

    facts = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "device": "stand-in: cpu" if machine.stand_in else torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "providers": onnxruntime().get_available_providers(),
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return [{"what": key, "value": value} for key, value in facts.items()]


def graph_of(folder, name, precision="fp32"):
    """Export a published encoder with random weights; return its bundle and torch module."""
    import torch
    from checkpoints import WRITERS, seeded, timm

    from histoseek.export.from_checkpoint import build_published, export_checkpoint
    from histoseek.export.onnx_graph import Graph
    from histoseek.export.options import ExportOptions
    from histoseek.export.published import PUBLISHED

    net = seeded(build_published(PUBLISHED[name]))
    torch.save(WRITERS.get(name, timm)(net), folder / "net.bin")
    size = PUBLISHED[name].shape.size_px
    options = ExportOptions(published=name, tile_px=size, precision=precision)
    export_checkpoint(folder / "net.bin", folder / precision, options)
    return folder / precision, Graph(net, *PUBLISHED[name].colours).eval(), size


def session(bundle, provider):
    from histoseek.artifacts.manifest import GRAPH

    runtime = onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    opened = runtime.InferenceSession(str(bundle / GRAPH), options, providers=[provider])
    if opened.get_providers()[0] != provider:
        raise Skipped(f"ONNX Runtime used {opened.get_providers()[0]} instead of {provider}")
    return opened


def embed(opened, tiles):
    from histoseek.artifacts.manifest import INPUT, OUTPUT

    return opened.run([OUTPUT], {INPUT: tiles})[0]


def parity(machine):
    """Compare the device with the CPU, in single and half precision."""
    from histoseek.export.from_checkpoint import made_tiles
    from histoseek.metrics import cosine_error
    from histoseek.serving.encoders.open import DEFAULT_BUNDLE

    def compared(bundle, wanted, tiles):
        found = embed(session(bundle, machine.provider()), tiles)
        return {
            "largest_difference": float(np.abs(found - wanted).max()),
            "1_minus_cosine": float(cosine_error(wanted, found)),
        }

    def default():
        tiles = made_tiles(224, 4 if machine.stand_in else 64)
        wanted = embed(session(DEFAULT_BUNDLE, "CPUExecutionProvider"), tiles)
        return compared(DEFAULT_BUNDLE, wanted, tiles)

    def published(precision):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            bundle, graph, size = graph_of(folder, NETS["vit-s16"], precision)
            import torch

            tiles = made_tiles(size, 2 if machine.stand_in else 16)
            with torch.inference_mode():
                wanted = graph(torch.from_numpy(tiles)).numpy()
            return compared(bundle, wanted, tiles)

    return lines(
        [
            ("default encoder, fp32", default),
            ("vit-s16, fp32", lambda: published("fp32")),
            ("vit-s16, fp16", lambda: published("fp16")),
        ]
    )


def network(machine, shape):
    """Measure tiles/s by batch: ONNX Runtime, torch and a compiled torch module."""
    import torch

    from histoseek.export.from_checkpoint import build_published, made_tiles
    from histoseek.export.onnx_graph import Graph
    from histoseek.export.published import PUBLISHED

    batches = machine.batches(1, 16, 64, 256)
    told = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if shape == "default":
            from histoseek.serving.encoders.open import DEFAULT_BUNDLE

            bundles, graph, size = {"fp32": DEFAULT_BUNDLE}, None, 224
        elif shape == "vit-g14" or machine.stand_in and shape != "vit-s16":
            if machine.stand_in:
                raise Skipped("the network is too large for a rehearsal")
            from checkpoints import seeded

            name = NETS[shape]
            net = seeded(build_published(PUBLISHED[name]))
            bundles, size = {}, PUBLISHED[name].shape.size_px
            graph = Graph(net, *PUBLISHED[name].colours).eval()
        else:
            first, graph, size = graph_of(folder, NETS[shape])
            bundles = {"fp32": first, "fp16": graph_of(folder, NETS[shape], "fp16")[0]}
        tiles = {batch: made_tiles(size, batch) for batch in batches}

        def by_onnx(bundle, batch):
            opened = session(bundle, machine.provider())
            return {"tiles_per_s": rate(machine, lambda: embed(opened, tiles[batch]), batch)}

        def by_torch(batch, compiled):
            made = graph.to(machine.name)
            made.encoder.to(machine.half)  # the graph scales pixels in float32
            made.encoder.register_forward_pre_hook(lambda net, given: (given[0].to(machine.half),))
            if compiled:
                if machine.stand_in:
                    raise Skipped("torch.compile is not rehearsed")
                made = torch.compile(made)
            host = torch.from_numpy(tiles[batch])
            host = host if machine.stand_in else host.pin_memory()

            def run():
                with torch.inference_mode():
                    made(host.to(machine.name, non_blocking=True)).float().cpu()

            return {"tiles_per_s": rate(machine, run, batch)}

        for batch in batches:
            for precision, bundle in bundles.items():
                told.append(
                    (f"{shape}, ONNX Runtime {precision}, batch {batch}",
                     lambda b=bundle, n=batch: by_onnx(b, n))
                )  # fmt: skip
        if graph is not None:
            for compiled, title in ((False, "torch bf16"), (True, "torch bf16, compiled")):
                for batch in batches[-2:]:
                    told.append(
                        (f"{shape}, {title}, batch {batch}",
                         lambda n=batch, c=compiled: by_torch(n, c))
                    )  # fmt: skip
        return lines(told)


def made_slide(path, side):
    """Write a TIFF slide of made tissue with a small level, in JPEG tiles of 256 px."""
    import simplejpeg
    import tifffile

    rng = np.random.default_rng(0)
    coarse = rng.normal(0, 22, (32, 32, 3)).repeat(8, 0).repeat(8, 1)
    tile = np.clip(np.array([196, 128, 178]) + coarse + rng.normal(0, 9, coarse.shape), 0, 255)
    blob = simplejpeg.encode_jpeg(
        np.ascontiguousarray(tile.astype(np.uint8)), 90, colorsubsampling="444"
    )
    small = np.tile(tile[::16, ::16].astype(np.uint8), (side // 256, side // 256, 1))
    where = {"resolution": (1e4 / 0.5, 1e4 / 0.5), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path, bigtiff=True) as out:
        out.write(
            (blob for _ in range((side // 256) ** 2)), shape=(side, side, 3), dtype=np.uint8,
            tile=(256, 256), compression="jpeg", photometric="ycbcr", subsampling=(1, 1),
            metadata=None, **where,
        )  # fmt: skip
        out.write(small, photometric="rgb", tile=(256, 256), subfiletype=1, metadata=None)
    return path


class Busy:
    """Samples how busy the device is, with nvidia-smi."""

    def __enter__(self):
        self.samples, self._over = [], threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self):
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not self._over.wait(0.2):
            try:
                said = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
                self.samples.append(float(said.stdout.split()[0]))
            except (OSError, subprocess.SubprocessError, ValueError, IndexError):
                return

    def __exit__(self, *error):
        self._over.set()
        self._thread.join(6)

    @property
    def share(self):
        return float(np.mean(self.samples)) / 100 if self.samples else "nvidia-smi gave no answer"


def pipeline(machine):
    """Embed a slide from disk with few and with all cores: is the device or the decoding the limit?"""
    installed("openslide", "openslide-python")
    installed("simplejpeg")
    all_cores = sorted(os.sched_getaffinity(0))
    counts = [n for n in (1, 2, 4, 8, 16) if n < len(all_cores)] + [len(all_cores)]

    def embedded(count, slide, folder):
        words = [
            sys.executable, "-m", "histoseek", "embed", str(slide), "--out", str(folder / f"{count}"),
            "--json",
        ]  # fmt: skip
        os.sched_setaffinity(0, all_cores[:count])
        try:
            with Busy() as busy:
                done = subprocess.run(
                    words, capture_output=True, text=True, timeout=60, check=False
                )
        finally:
            os.sched_setaffinity(0, all_cores)
        if done.returncode:
            raise RuntimeError(done.stderr[-400:] + done.stdout[-400:])
        report = json.loads(done.stdout)
        speed = report["speed"]
        return {
            "tiles": speed["tiles_done"], "tiles_per_s": speed["tiles_per_s"], "device_busy": busy.share,
            "engine": report["encoder"]["engine"], "encoder_on": report["encoder"]["device"],
        }  # fmt: skip

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        slide = made_slide(folder / "made.tiff", 1024 if machine.stand_in else 24_576)
        return lines(
            [
                (f"embed with {count} cores", lambda n=count: embedded(n, slide, folder))
                for count in counts
            ]
        )


def triton(machine):
    """Embed through a Triton server with the python backend that stands in for its ONNX Runtime."""
    installed("pytriton", "nvidia-pytriton")
    installed("tritonclient")
    from triton_server import TritonServer

    from histoseek.export.from_checkpoint import made_tiles
    from histoseek.export.options import TritonOptions
    from histoseek.export.triton import write_repository
    from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder

    tiles = made_tiles(224, 8 if machine.stand_in else 64)
    with closing(open_encoder("default")) as known:
        wanted, name = known.embed(tiles), known.manifest.name

    def through(server, options):
        if machine.stand_in and "cuda" in options:
            raise Skipped("there is no CUDA device")
        with closing(open_encoder(server.url(name, options))) as encoder:
            found = encoder.embed(tiles)
            speed = rate(machine, lambda: encoder.embed(tiles), len(tiles))
        return {
            "tiles_per_s": speed,
            "largest_difference": float(np.abs(found - wanted).max()),
        }

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_repository([DEFAULT_BUNDLE], folder / "models", TritonOptions())
        with TritonServer(folder / "models", folder) as server:
            return lines(
                [
                    (title, lambda o=options: through(server, o))
                    for title, options in (
                        ("gRPC", ""), ("shared memory", "?shm=1"), ("CUDA shared memory", "?shm=cuda"),
                    )
                ]
            )  # fmt: skip


def faiss(machine):
    """Build and search an index of inverted lists on the device and on the CPU."""
    import faiss as library

    gpus = getattr(library, "get_num_gpus", lambda: 0)()
    if not gpus and not machine.stand_in:
        raise Skipped("this FAISS has no GPU support, or sees no device")
    dim, queries, k = 64, 1_000, 10
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2_000, dim)).astype(np.float32)

    def clustered(count):
        found = centres[rng.integers(0, len(centres), count)]
        found += 0.6 * rng.normal(size=found.shape).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def measured(count):
        vectors, asked = clustered(count), clustered(queries)
        cells = int(4 * count**0.5)
        plain = library.index_factory(dim, f"IVF{cells},SQ8", library.METRIC_INNER_PRODUCT)
        facts = {}
        for place in ("cpu", "gpu") if gpus else ("cpu",):
            if place == "gpu":
                made = library.index_cpu_to_all_gpus(
                    library.index_factory(dim, f"IVF{cells},SQ8", library.METRIC_INNER_PRODUCT)
                )
            else:
                made = plain
            started = time.perf_counter()
            made.train(vectors[: min(count, 64 * cells)])
            made.add(vectors)
            facts[f"build_s_{place}"] = time.perf_counter() - started
            searched = library.index_cpu_to_all_gpus(plain) if place == "gpu" else plain
            probes = library.ParameterSpace() if place == "cpu" else library.GpuParameterSpace()
            probes.set_index_parameter(searched, "nprobe", 32)
            for number in (1, queries):
                name = f"queries_per_s_{place}_{number}"
                search = partial(searched.search, asked[:number], k)
                facts[name] = rate(machine, search, number)
            found = searched.search(asked, k)[1]
            facts[f"found_{place}"] = found
        if gpus:
            both = zip(facts.pop("found_cpu"), facts.pop("found_gpu"), strict=True)
            facts["same_hits"] = float(np.mean([len({*a} & {*b}) / k for a, b in both]))
        else:
            facts.pop("found_cpu")
        return facts

    counts = (20_000,) if machine.stand_in else (1_000_000, 10_000_000)
    return lines([(f"{count:,} vectors of 64", lambda n=count: measured(n)) for count in counts])


def training(machine):
    """Train the default encoder's network on made tiles, in single precision and in bf16."""
    from histoseek.artifacts.tilesets import Tile, TileSet
    from histoseek.training.arcface_options import ArcFaceOptions
    from histoseek.training.recipes import RECIPES

    count, batch = (32, 8) if machine.stand_in else (4_096, 128)
    side = 64 if machine.stand_in else 224
    pictures = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    named = tuple(Tile(f"{n:05d}", str(n % 4)) for n in range(count))
    tiles = TileSet("noise", "noise", named, "noise", lambda n: pictures[n])

    def trained(precision, viewing):
        options = ArcFaceOptions(
            epochs=2 if machine.stand_in else 4, batch=batch, folds=0, judge=False,
            accelerator=machine.name, precision=precision, viewing=viewing,
            size_px=side,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            record = RECIPES["arcface"].fit(options, tiles, Path(place) / "run", lambda *_: None)
        return {
            "tiles_per_s": float(np.median([row["tiles_per_s"] for row in record["epochs"][1:]]))
        }

    return lines(
        [
            (f"arcface, {precision}{', viewing changes' if viewing else ''}",
             lambda p=precision, v=viewing: trained(p, v))
            for precision in ("32-true", "bf16-mixed") for viewing in (False, True)
        ]
    )  # fmt: skip


PARTS = {
    "environment": environment, "parity": parity, "pipeline": pipeline, "triton": triton,
    "faiss": faiss, "training": training,
    **{shape: lambda machine, shape=shape: network(machine, shape) for shape in ("default", *NETS)},
}  # fmt: skip


# -- running ----------------------------------------------------------------------------------------


def run_part(name, stand_in, limit_s):
    """Run a part in a process of its own; return its lines, with those before a failure."""
    words = [sys.executable, __file__, "--part", name, *(["--stand-in"] if stand_in else [])]
    started = time.monotonic()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, check=False)
        said, errors, ended = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        said = (
            (late.stdout or b"").decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        )
        errors, ended = f"stopped after {limit_s} s", 1
    rows = []
    for line in said.splitlines():
        if line.startswith("{"):
            rows.append(json.loads(line))
    part = {"lines": rows, "seconds": round(time.monotonic() - started, 1)}
    if ended:
        part["failed"] = errors.strip()[-600:] or f"exit code {ended}"
    return part


def page(facts):
    """Return the results as a page."""
    rehearsal = facts["stand_in"]
    text = [
        "# Rehearsal of the GPU check on a CPU" if rehearsal else "# histoseek on a CUDA device", "",
        "This shows that every part runs. The numbers mean nothing." if rehearsal else
        "`make gpu-check` prints this page.", "", f"{facts['date']}", "",
    ]  # fmt: skip
    for name, part in facts["parts"].items():
        text += [f"## {name}", "", f"{part['seconds']} s", ""]
        if "failed" in part:
            text += [f"**failed**: {part['failed']}", ""]
        text += ["| what | |", "|---|---|"]
        for row in part["lines"]:
            rest = "; ".join(f"{key} {shown(value)}" for key, value in row.items() if key != "what")
            text.append(f"| {row['what']} | {rest} |")
        text.append("")
    return "\n".join(text)


def shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(LIMITS_S))
    given = parser.parse_args()
    if given.part:
        try:
            rows = PARTS[given.part](Machine(given.stand_in))
        except Skipped as reason:
            print(json.dumps({"what": given.part, "skipped": str(reason)}))
            return
        if given.part == "environment":
            print("\n".join(json.dumps(row) for row in rows))
        return
    Machine(given.stand_in)
    given.out.mkdir(parents=True, exist_ok=True)
    facts = {"stand_in": given.stand_in, "date": time.strftime("%Y-%m-%d"), "parts": {}}
    for name in given.only:
        limit = LIMITS_S[name] * (4 if given.stand_in else 1)
        facts["parts"][name] = run_part(name, given.stand_in, limit)
        (given.out / "gpu.json").write_text(json.dumps(facts, indent=1) + "\n")
        (given.out / "gpu.md").write_text(page(facts))
        part = facts["parts"][name]
        bad = "failed" in part or any("failed" in row for row in part["lines"])
        print(f"{name}: {part['seconds']} s{', FAILED' if bad else ''}", flush=True)
    parts = facts["parts"].values()
    if any("failed" in p or any("failed" in row for row in p["lines"]) for p in parts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
