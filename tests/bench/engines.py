"""Engines for vision transformers: torch eager, ONNX Runtime and OpenVINO on the same random weights.

Every engine embeds the same tiles on the same cores, in turns; the rate is the median over rounds. The
engines are those of `histoseek embed --engine`; torch runs the graph's own module in inference mode.
bf16 is left out if the CPU has none.

    python tests/bench/engines.py [vit-s16 vit-b16 vit-l16]
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))

from checkpoints import seeded, timm
from encoder import table

from histoseek.artifacts.manifest import read_manifest
from histoseek.errors import HistoseekError
from histoseek.export.from_checkpoint import (
    build_published,
    describe,
    export_checkpoint,
    made_tiles,
)
from histoseek.export.onnx_graph import Graph
from histoseek.export.options import ExportOptions
from histoseek.export.published import PUBLISHED
from histoseek.metrics import cosine_error
from histoseek.serving.encoders.engine_choice import rate_of
from histoseek.serving.encoders.engines import ENGINES, EnginePlan, cores, load_openvino

SHAPES = {"vit-s16": "lunit-s16", "vit-b16": "kaiko-b16", "vit-l16": "uni"}
ROUNDS, SECONDS = 5, 4.0


def torch_rate(graph, tiles):
    done, started = 0, time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - started < SECONDS:
            graph(torch.from_numpy(tiles))
            done += len(tiles)
    return done / (time.perf_counter() - started)


def product_rate(net, tokens):
    """Multiply-adds per second of the net's largest map alone: what no engine can exceed by much."""
    layer = max(
        (m for m in net.modules() if hasattr(m, "in_features")), key=lambda m: m.weight.numel()
    )
    rows, weight = torch.randn(4 * tokens, layer.in_features), layer.weight.detach().T.contiguous()
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        rows @ weight
        done += rows.shape[0] * weight.numel()
    return done / (time.perf_counter() - started)


def plans():
    side = cores()
    bf16 = "BF16" in load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    found = {
        "ONNX Runtime, batch 1 per core": EnginePlan("onnxruntime", "f32", 1, side),
        "ONNX Runtime, batch 4 per core": EnginePlan("onnxruntime", "f32", 4, side),
        "ONNX Runtime, batch 4, all cores per run": EnginePlan("onnxruntime", "f32", 4, 1, side),
        "OpenVINO f32, batch 1 per core": EnginePlan("openvino", "f32", 1, side),
        "OpenVINO bf16, batch 1 per core": EnginePlan("openvino", "bf16", 1, side),
        "OpenVINO bf16, batch 4 per core": EnginePlan("openvino", "bf16", 4, side),
    }
    return {text: plan for text, plan in found.items() if bf16 or plan.precision != "bf16"}


def main():
    rows = []
    for shape in sys.argv[1:] or SHAPES:
        name = SHAPES[shape]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            net = seeded(build_published(PUBLISHED[name]))
            torch.save(timm(net), folder / "net.bin")
            size = PUBLISHED[name].shape.size_px
            options = ExportOptions(published=name, tile_px=size)
            export_checkpoint(folder / "net.bin", folder / "bundle", options)
            manifest = read_manifest(folder / "bundle")
            graph = Graph(net, *PUBLISHED[name].colours).eval()
            tiles = made_tiles(size, 4)
            with torch.inference_mode():
                wanted = graph(torch.from_numpy(tiles)).numpy()
            engines = {}
            for text, plan in plans().items():
                try:
                    engines[text] = ENGINES[plan.engine](folder / "bundle", manifest, plan)
                except HistoseekError as error:
                    print(f"{shape}: {text}: {error}")
            known = PUBLISHED[name].shape
            bound = product_rate(net, 1 + known.grid**2) / describe(name, PUBLISHED[name])["macs"]
            rates = {text: [] for text in ("torch eager, batch 4", *engines)}
            for _ in range(ROUNDS):
                rates["torch eager, batch 4"].append(torch_rate(graph, tiles))
                for text, engine in engines.items():
                    rates[text].append(rate_of(engine, tiles[: engine.plan.batch], SECONDS))
            base = statistics.median(rates["torch eager, batch 4"])
            rows.append(
                [shape, "its largest product alone", f"{bound:.2f}", f"{bound / base:.2f}", ""]
            )
            for text, found in rates.items():
                engine = engines.get(text)
                error = ""
                if engine is not None:
                    batch = engine.plan.batch
                    parts = [engine.run(tiles[n : n + batch]) for n in range(0, 4, batch)]
                    error = f"{cosine_error(wanted, np.concatenate(parts)):.0e}"
                rate = statistics.median(found)
                rows.append([shape, text, f"{rate:.2f}", f"{rate / base:.2f}", error])
                print(rows[-1], flush=True)
    head = ["net", "engine", "tiles/s", "x torch", "1 - cosine"]
    print(f"{cores()} cores, torch {torch.get_num_threads()} threads")
    print("\n".join(table(head, rows)))


if __name__ == "__main__":
    main()
