"""``histoseek doctor``: shows installed parts, accelerators, and how to install missing parts."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import import_module, metadata
from typing import Any

from ... import __version__, console

# part, modules that it needs, extra that installs them, its purpose, whether every user needs it
PARTS = (
    ("embedding", ("onnxruntime",), "cpu", "embed slides, search and assign", True),
    ("index", ("faiss", "hdbscan", "sklearn"), "cpu", "atlas, search, clusters", True),
    (
        "slides",
        ("openslide", "tifffile", "imagecodecs", "simplejpeg", "h5py", "skimage"),
        "cpu",
        "read whole slides",
        True,
    ),
    ("page", ("gradio", "fastapi", "uvicorn", "plotly", "openTSNE"), "ui", "histoseek ui", False),
    (
        "training",
        ("torch", "lightning_fabric", "safetensors", "onnx", "onnxscript"),
        "train",
        "histoseek train and export",
        False,
    ),
    ("openvino", ("openvino",), "openvino", "a faster engine on many CPUs", False),
    ("triton", ("tritonclient.grpc",), "triton", "encoders on a Triton server", False),
    ("ray", ("ray", "fsspec"), "ray", "embed on many machines", False),
    ("metrics", ("prometheus_client",), "metrics", "embed --metrics", False),
    ("milvus", ("pymilvus",), "milvus", "atlas on Milvus", False),
    ("bridges", ("pyarrow", "anndata"), "bridges", "index export to Parquet and AnnData", False),
)
DISTRIBUTIONS = {
    "faiss": ("faiss-cpu", "faiss-gpu-cu12"),
    "sklearn": ("scikit-learn",),
    "skimage": ("scikit-image",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openslide": ("openslide-python",),
    "lightning_fabric": ("lightning-fabric",),
    "tritonclient.grpc": ("tritonclient",),
    "prometheus_client": ("prometheus-client",),
}


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


def _version(module: str) -> str:
    for distribution in DISTRIBUTIONS.get(module, (module,)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "?"


def _accelerators() -> dict[str, Any]:
    found: dict[str, Any] = {"onnxruntime": [], "faiss_gpus": 0, "nvidia": []}
    if "onnxruntime" in sys.modules:
        found["onnxruntime"] = sys.modules["onnxruntime"].get_available_providers()
    if "faiss" in sys.modules and hasattr(sys.modules["faiss"], "get_num_gpus"):
        found["faiss_gpus"] = sys.modules["faiss"].get_num_gpus()
    tool = shutil.which("nvidia-smi")
    if tool:
        command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        found["nvidia"] = answer.stdout.strip().splitlines() if answer.returncode == 0 else []
    return found


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
    console.table("", ("part", "for", "state", "versions, or how to get it"), rows)
    found = report["accelerators"]
    console.say(f"ONNX Runtime: {', '.join(found['onnxruntime']) or 'not installed'}")
    console.say(f"GPUs: {', '.join(found['nvidia']) or 'none found'}; FAISS: {found['faiss_gpus']}")
    encoder = report["encoder"]
    if encoder["ok"]:
        console.say(f"default encoder: {encoder['name']} ({encoder['sha256'][:12]}…)")
    else:
        console.say(f"default encoder: {encoder['reason']}")
    if not report["ok"]:
        console.say("a needed part is missing: install what the table says")
