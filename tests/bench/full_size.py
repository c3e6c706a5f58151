"""Export published encoders at full size, with random weights: time, peak memory, parity, speed.

Each encoder is exported in a process of its own from a checkpoint in its library's names, through the same
command as a user's. The peak is the process's largest resident memory (ru_maxrss).

    python tests/bench/full_size.py [NAME ...]
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from checkpoints import WRITERS, seeded, timm
from encoder import table

from histoseek.export.from_checkpoint import build_published, made_tiles
from histoseek.export.published import PUBLISHED
from histoseek.serving.encoders.onnx import OnnxEncoder

NAMES = ("kaiko-s16", "h0-mini", "uni", "uni2-h")
SPEED_S = 10.0


def written(name, path):
    """Write a checkpoint with random weights."""
    net = seeded(build_published(PUBLISHED[name]))
    torch.save(WRITERS.get(name, timm)(net), path)


def exported(name, folder):
    """Export in a process of its own; return its record and peak memory in MB."""
    command = [sys.executable, "-m", "histoseek", "export", folder / "net.bin", "--as", name]
    command += ["--out", folder / "bundle", "--json"]
    started = time.monotonic()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name}: the export failed")
    return json.loads(text), time.monotonic() - started, usage.ru_maxrss / 1024


def speed(bundle):
    """Tiles per second in this process, as `embed` runs it."""
    encoder = OnnxEncoder(bundle)
    tiles = made_tiles(encoder.manifest.size_px, 2)
    opened = time.monotonic()
    encoder.embed(tiles)
    done, started = 0, time.monotonic()
    while time.monotonic() - started < SPEED_S:
        encoder.embed(tiles)
        done += len(tiles)
    encoder.close()
    return done / (time.monotonic() - started), started - opened


def main():
    rows = []
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            made = subprocess.run(
                [sys.executable, __file__, "--write", name, folder / "net.bin"], check=False
            )
            if made.returncode:
                raise SystemExit(made.returncode)
            manifest, seconds, peak = exported(name, folder)
            files = sum(f.stat().st_size for f in (folder / "bundle").glob("encoder.onnx*"))
            parity = json.loads((folder / "bundle" / "parity.json").read_text())
            rate, _ = speed(folder / "bundle")
            rows.append(
                [
                    name, str(manifest["dim"]), f"{files / 1e6:,.0f} MB", f"{seconds:.0f} s",
                    f"{peak:,.0f} MB", f"{parity['max_abs']:.1e}", f"{parity['max_cosine_error']:.1e}",
                    f"{rate:.2f}",
                ]
            )  # fmt: skip
            print(rows[-1], flush=True)
    head = [
        "encoder",
        "length",
        "graph",
        "export",
        "peak memory",
        "max abs",
        "1 - cosine",
        "tiles/s",
    ]
    print("\n".join(table(head, rows)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        written(sys.argv[2], Path(sys.argv[3]))
        print(
            f"checkpoint written, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
        )
    else:
        main()
