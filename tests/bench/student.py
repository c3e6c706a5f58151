"""Students of EfficientNet-Lite0: taught by the network's maps, by its bundle, and by distillation.

The bundle averages eight orientations, as the maps do. All students are MobileNetV3-Small, trained on the
same tiles of histo_mix with the same options and seed; a fifth of the patients or images is held out. The
bench prints retrieval on the held-out tiles and how many of the teacher's nearest tiles a student finds.

    python tests/bench/student.py [--epochs 12] [--out FOLDER]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import torch
from encoder import table
from judged import SHARED

from histoseek.artifacts.files import write_json
from histoseek.artifacts.manifest import MANIFEST, Manifest
from histoseek.export.bundle import write_graph
from histoseek.export.from_checkpoint import made_tiles
from histoseek.export.onnx_graph import OPSET, Graph
from histoseek.training.checkpoint import load_backbone
from histoseek.training.models import build

OPTIONS = (
    "--batch", 64, "--lr", 0.002, "--weight-decay", 0.02, "--rotation-deg", 180, "--zoom", 0.25,
    "--stain", 0.15, "--colour", 0, "--crop-px", 128, "--viewing", "--folds", 5, "--dim", 128,
    "--hidden", 416, "--dropout", 0, "--cut", 3, "--teacher-weight", 6, "--teacher-dim", 256,
    "--teacher-power", 0.5, "--consistency", 0.5,
    "--model-options", "deviation=true,symmetry=true,layers=3+6+8+12",
)  # fmt: skip
CLASSES = ("--target", "label+place", "--label-weight", 0.3, "--margin", 0.3, "--drop-head")
LABELS = ("--label-from", "source_id", "--label-from", "label")


def lite0_bundle(folder):
    """EfficientNet-Lite0's pooled features, averaged over eight orientations, as a bundle."""
    net = build("efficientnet-lite0")
    load_backbone(net.backbone, "efficientnet-lite0")
    graph = Graph(net.eval(), net.mean, net.std, views=8)
    folder.mkdir(parents=True)
    sha256, _ = write_graph(folder, graph, 224, made_tiles(224), 8)
    manifest = Manifest(
        name="lite0", sha256=sha256, arch="efficientnet-lite0", size_px=224, mpp=0.5, dim=net.dim,
        metric="cosine", normalised=True, views=8, training={}, licence="Apache-2.0", opset=OPSET,
        versions={"torch": torch.__version__, "onnx": onnx.__version__},
    )  # fmt: skip
    write_json(folder / MANIFEST, manifest.model_dump())
    return folder


def trained(out, recipe, *words):
    command = [sys.executable, "-m", "histoseek", "train", recipe, SHARED / "histo_mix.tar"]
    command += [*LABELS, *OPTIONS, *words, "--out", out]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    record = json.loads((out / "run.json").read_text())
    rows = {row["name"]: row["value"] for row in record["metrics"]["trained"]["retrieval"]}
    return rows | {row["name"]: row["value"] for row in record["metrics"].get("teacher", [])}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp())
    bundle = out / "lite0"
    if not bundle.exists():
        lite0_bundle(bundle)
    epochs = ("--epochs", given.epochs)
    rows = {
        "arcface, the network's maps": trained(
            out / "maps", "arcface", *CLASSES, *epochs, "--teacher", "efficientnet-lite0"
        ),
        "arcface, its bundle": trained(
            out / "bundle", "arcface", *CLASSES, *epochs, "--teacher", bundle
        ),
        "distill, its bundle": trained(out / "distill", "distill", *epochs, "--teacher", bundle),
    }
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"{given.epochs} epochs; held-out patients or images of histo_mix")
    cells = [
        [name, *(f"{row[n]:.3f}" if n in row else "–" for n in names)] for name, row in rows.items()
    ]
    print("\n".join(table(["student", *names], cells)))


if __name__ == "__main__":
    main()
