"""Cost and gain of lower precision on this machine: tiles per second, bytes, and retrieval.

Run by `make bench-serving`. It uses the default encoder and tiles of groups that were not in its training:
retrieval on those of LC25000, everything else also on those of histo_mix.
"""

import statistics
import tempfile
from pathlib import Path

import numpy as np
from judged import trained_and_held_out

from histoseek.artifacts.manifest import GRAPH
from histoseek.export.half_precision import to_fp16
from histoseek.metrics import retrieval_report
from histoseek.serving.encoders.engine_choice import rate_of
from histoseek.serving.encoders.engines import ENGINES, EnginePlan, cores
from histoseek.serving.encoders.onnx import OnnxEncoder
from histoseek.serving.encoders.open import DEFAULT_BUNDLE

ROUNDS = 3


def to_int8(graph, out, tiles, operators):
    """Static quantisation with ONNX Runtime's own tool: QDQ, weights per channel."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter([{"tiles": tile[None]} for tile in tiles])

        def get_next(self):
            return next(self.left, None)

    quantize_static(
        graph, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        op_types_to_quantize=operators,
    )  # fmt: skip


def nearest_other(queries, vectors):
    """For every tile the nearest other one, (N,)."""
    similarity = queries @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity.argmax(1)


def main():
    train, held_out = trained_and_held_out()
    asked = held_out["lc25000"]
    tiles = np.concatenate([asked.tiles, held_out["histo_mix"].tiles])
    calibration = train.tiles[:: max(1, len(train.tiles) // 128)]
    manifest = OnnxEncoder(DEFAULT_BUNDLE).manifest
    print(
        f"\nprecision, {manifest.name}, {len(tiles)} held-out tiles, {len(asked.tiles)} of them of "
        f"LC25000, {cores()} streams"
    )
    with tempfile.TemporaryDirectory() as temp:
        files = {"FP32": DEFAULT_BUNDLE}
        for name in ("FP16 weights", "INT8 convolutions", "INT8 everything"):
            files[name] = Path(temp) / name
            files[name].mkdir()
        to_fp16(DEFAULT_BUNDLE / GRAPH, files["FP16 weights"] / GRAPH)
        whole = str(DEFAULT_BUNDLE / GRAPH)
        to_int8(whole, str(files["INT8 convolutions"] / GRAPH), calibration, ["Conv"])
        everything = ["Conv", "Gemm", "MatMul", "Mul", "Add"]
        to_int8(whole, str(files["INT8 everything"] / GRAPH), calibration, everything)
        rows = [(name, engine, "f32") for name in files for engine in ENGINES]
        rows.insert(2, ("FP32", "openvino", "bf16"))
        engines = {}
        for name, engine, precision in rows:
            plan = EnginePlan(engine, precision, 2, cores())
            engines[name, engine, precision] = ENGINES[engine](files[name], manifest, plan)
        speeds = {key: [] for key in rows}
        for _ in range(ROUNDS):
            for key in rows:
                speeds[key].append(rate_of(engines[key], tiles[:2], 1.5))
        exact = None
        base = statistics.median(speeds[rows[0]])
        for key in rows:
            pairs = [tiles[n : n + 2] for n in range(0, len(tiles), 2)]
            vectors = np.concatenate([engines[key].run(pair) for pair in pairs])
            exact = vectors if exact is None else exact
            found = vectors[: len(asked.tiles)]
            recall = retrieval_report(found, asked.labels, asked.groups)[0]
            same = (nearest_other(exact, exact) == nearest_other(vectors, exact)).mean()
            name, engine, precision = key
            size = (files[name] / GRAPH).stat().st_size / 1e6
            speed = statistics.median(speeds[key])
            print(
                f"  {name:18} {engine:11} {precision:4} {speed:6.0f} tiles/s x{speed / base:.2f}  "
                f"{size:4.1f} MB  least cosine to FP32 {(vectors * exact).sum(1).min():.4f}  "
                f"same nearest {same:.3f}  "
                f"{recall.name} {recall.value:.3f}"
            )


if __name__ == "__main__":
    main()
