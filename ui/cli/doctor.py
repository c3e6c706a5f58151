"""``histoseek doctor``: installed parts, accelerators, and how to install missing parts."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module, metadata
from typing import Any

from ... import __version__, console

# part, modules that it needs, extra that installs them, its purpose, whether every user needs it
PARTS = (
    ("embedding", ("onnxruntime",), "cpu", "embed slides, search and assign", True),
    ("index", ("faiss", "hdbscan", "sklearn"), "cpu", "atlas, search, clusters", True),
    ("slides", ("openslide", "tifffile", "imagecodecs", "simplejpeg", "h5py", "skimage"), "cpu",
     "read whole slides", True),
    ("page", ("gradio", "fastapi", "uvicorn", "openTSNE"), "ui", "histoseek ui", False),
    ("assistant", ("mcp",), "mcp", "histoseek mcp", False),
    ("training", ("torch", "lightning_fabric", "safetensors", "onnx", "onnxscript"), "train",
     "histoseek train and export", False),
    ("openvino", ("openvino",), "openvino", "faster embedding on many CPUs", False),
    ("text", ("tokenizers",), "text", "search by words, with encoders that have a text network", False),
    ("triton", ("tritonclient.grpc",), "triton", "encoders on a Triton server", False),
    ("ray", ("ray", "fsspec"), "ray", "embed on many machines", False),
    ("s3", ("s3fs",), "s3", "slides and features in S3", False),
    ("DICOMweb", ("requests",), "dicomweb", "slides of a PACS", False),
    ("CZI", ("pylibCZIrw",), "czi", "Zeiss CZI slides", False),
    ("OME-Zarr", ("zarr",), "zarr", "OME-Zarr slides", False),
    ("metrics", ("prometheus_client",), "metrics", "metrics of histoseek embed", False),
    ("milvus", ("pymilvus",), "milvus", "search in Milvus", False),
    ("bridges", ("pyarrow", "anndata"), "bridges", "export to Parquet and AnnData", False),
)  # fmt: skip


def examine() -> dict[str, Any]:
    """Return the installed and the missing parts; ``ok`` states whether the core works."""
    parts = [_part(*row) for row in PARTS]
    return {
        "ok": all(part["installed"] for part in parts if part["needed"]),
        "histoseek": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "parts": parts,
        "accelerators": _accelerators(),
        "encoder": _encoder(),
    }


def _part(
    name: str, modules: tuple[str, ...], extra: str, purpose: str, needed: bool
) -> dict[str, Any]:
    missing = []
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # never loaded
    for module in modules:
        try:
            import_module(module)
        except Exception as error:
            missing.append(module if isinstance(error, ImportError) else f"{module} ({error})")
    return {
        "name": name,
        "for": purpose,
        "needed": needed,
        "installed": not missing,
        "missing": missing,
        "versions": {m: _version(m) for m in modules if m not in missing},
        "remedy": f"pip install 'histoseek[{extra}]'" if missing else "",
    }


_distributions = cache(metadata.packages_distributions)


def _version(module: str) -> str:
    distributions = _distributions().get(module.partition(".")[0], [])
    return metadata.version(distributions[0]) if distributions else "?"


def _accelerators() -> dict[str, Any]:
    accelerators: dict[str, Any] = {"onnxruntime": [], "faiss_gpus": 0, "nvidia": []}
    if "onnxruntime" in sys.modules:
        accelerators["onnxruntime"] = sys.modules["onnxruntime"].get_available_providers()
    if "faiss" in sys.modules and hasattr(sys.modules["faiss"], "get_num_gpus"):
        accelerators["faiss_gpus"] = sys.modules["faiss"].get_num_gpus()
    tool = shutil.which("nvidia-smi")
    if tool:
        command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        accelerators["nvidia"] = (
            answer.stdout.strip().splitlines() if answer.returncode == 0 else []
        )
    return accelerators


def _encoder() -> dict[str, Any]:
    from ...artifacts.manifest import read_manifest
    from ...errors import HistoseekError
    from ...serving.encoders.open import DEFAULT_BUNDLE

    try:
        manifest = read_manifest(DEFAULT_BUNDLE)
    except HistoseekError as error:
        return {"ok": False, "reason": str(error)}
    return {"ok": True, "name": manifest.name, "sha256": manifest.sha256}


def show(report: dict[str, Any]) -> None:
    """Print the report as text."""
    console.say(f"histoseek {report['histoseek']}, Python {report['python']}, {report['platform']}")
    rows = []
    for part in report["parts"]:
        state = "ok" if part["installed"] else f"missing {', '.join(part['missing'])}"
        versions = ", ".join(f"{k} {v}" for k, v in part["versions"].items())
        rows.append((part["name"], part["for"], state, part["remedy"] or versions))
    console.table("", ("part", "needed for", "state", "versions, or how to install"), rows)
    accelerators = report["accelerators"]
    console.say(f"ONNX Runtime: {', '.join(accelerators['onnxruntime']) or 'not installed'}")
    gpus = ", ".join(accelerators["nvidia"]) or "none found"
    console.say(f"GPUs: {gpus}; usable by FAISS: {accelerators['faiss_gpus']}")
    encoder = report["encoder"]
    text = f"{encoder['name']} ({encoder['sha256'][:12]}…)" if encoder["ok"] else encoder["reason"]
    console.say(f"default encoder: {text}")
    if not report["ok"]:
        console.say("a required part is missing; run the command in its row of the table")
