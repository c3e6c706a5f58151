"""Create tests/former.tar.gz, an archive of files written by the version that is checked out.

Run it only on a version whose files later versions must open: ``python tests/former_make.py OUT.tar.gz``.
The pixels are scikit-image's sample images, so the archive contains no patient's data.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import skimage.data
import tifffile
from PIL import Image


def histoseek(*words):
    """Run one command; return its JSON document."""
    done = subprocess.run(
        [sys.executable, "-m", "histoseek", *map(str, words), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{words}: {done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def make_inputs(folder):
    """Write 32 labelled tiles of 32 px, two slides of 640 px and a table about them."""
    tissue = skimage.data.immunohistochemistry()
    pictures = {"tissue": tissue, "retina": skimage.data.retina()[300:, 300:]}
    rows = ["file,label,group"]
    for name, picture in pictures.items():
        (folder / "tiles" / name).mkdir(parents=True)
        for n in range(16):
            y, x = 24 * n, 20 * n
            file = f"{name}/{n:02d}.png"
            Image.fromarray(picture[y : y + 32, x : x + 32]).save(folder / "tiles" / file)
            rows.append(f"{file},{name},{name}-{n // 4}")
    (folder / "tiles" / "manifest.csv").write_text("\n".join(rows) + "\n")
    (folder / "slides").mkdir()
    for n in (1, 2):
        side = np.asarray(Image.fromarray(np.rot90(tissue, n)).resize((640, 640)))
        tifffile.imwrite(
            folder / "slides" / f"case-{n}.tiff", side, tile=(256, 256), compression="jpeg",
            compressionargs={"level": 60},
            photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER",
        )  # fmt: skip
    (folder / "cases.csv").write_text("slide,patient,organ\ncase-1,P1,colon\ncase-2,P2,lung\n")


def make(folder):
    """Run the whole path from training to an atlas with clusters, names and a removed tile set."""
    make_inputs(folder)
    atlas = folder / "atlas"
    histoseek(
        "train", "autoencoder", folder / "tiles", "--out", folder / "run", "--model", "topology-cae",
        "--epochs", 1, "--batch", 8, "--folds", 3, "--clusters", 2, "--accelerator", "cpu",
    )  # fmt: skip
    histoseek(
        "export", folder / "run", "--out", folder / "bundle", "--name", "former", "--mpp", 0.5
    )
    features = folder / "features"
    histoseek(
        "embed", folder / "slides", folder / "tiles", "--encoder", folder / "bundle", "--out", features,
        "--no-overlays",
    )  # fmt: skip
    histoseek("index", "create", atlas, "--encoder", folder / "bundle")
    histoseek("index", "add", atlas, features, "--metadata", folder / "cases.csv")
    histoseek("index", "fit", atlas, "--method", "hdbscan", "--min-cluster-size", 5)
    histoseek("index", "fit", atlas, "--method", "kmeans", "--k", 3)
    histoseek("index", "name", atlas, "0", "stroma")
    histoseek("index", "tune", atlas)
    histoseek("index", "relabel", atlas, "--metadata", folder / "relabel.csv")
    hits = histoseek("index", "search", atlas, folder / "tiles/tissue/03.png", "-k", 5)["answers"]
    similar = histoseek("index", "similar", atlas, "case-1")["answers"]
    answers = {"hits": hits, "similar": similar, "stats": histoseek("index", "stats", atlas)}
    (folder / "answers.json").write_text(json.dumps(answers, indent=1))


def main():
    """Make everything in a temporary folder and pack what later versions read."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "former"
        folder.mkdir()
        (folder / "relabel.csv").write_text("slide,label\ncase-1,tumour\n")
        make(folder)
        with tarfile.open(sys.argv[1], "w:gz") as tar:
            tar.add(folder, "former")


if __name__ == "__main__":
    main()
