"""Save weights and the state of a training run without pickles: safetensors with a JSON header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..artifacts.files import write_atomic
from ..errors import BadInput, Damaged, Mismatch
from .models import Encoder, build
from .pretrained import find_weights

Tensors = dict[str, torch.Tensor]


def save_tensors(path: Path, tensors: Tensors, about: dict[str, Any]) -> None:
    """Write tensors and a JSON-ready description to one file, atomically."""
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomic(path, save(plain, metadata={"about": json.dumps(about, sort_keys=True)}))


def load_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read what :func:`save_tensors` wrote.

    Raises:
        BadInput: the file does not exist.
        Damaged: the file is not a safetensors file.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist; check the path")
    try:
        with safe_open(path, framework="pt") as stored:
            about = json.loads((stored.metadata() or {}).get("about", "{}"))
            return {key: stored.get_tensor(key) for key in stored.keys()}, about  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise Damaged(f"{path} is not a complete safetensors file ({error})") from error


def flatten_optimizer(state: dict[str, Any]) -> tuple[Tensors, list[dict[str, Any]]]:
    """Split an optimiser's state dict into tensors and JSON-ready parameter groups."""
    tensors = {
        f"optimizer.{number}.{key}": torch.as_tensor(value)
        for number, entry in state["state"].items()
        for key, value in entry.items()
    }
    return tensors, state["param_groups"]


def restore_optimizer(tensors: Tensors, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Undo :func:`flatten_optimizer`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = tensor
    return {"state": state, "param_groups": groups}


def load_backbone(backbone: torch.nn.Module, source: str, sha256: str = "") -> None:
    """Load a checkpoint with torchvision's keys (.pth or .safetensors) into a backbone.

    Classifier weights in the file are ignored; every tensor of the backbone must be in the file. A backbone
    may list keys that are not loaded (``fresh``) and rename old keys (``rename``).

    Args:
        backbone: network that receives the weights.
        source: a path, an https:// address, or ``efficientnet-lite0`` (see :mod:`.pretrained`).
        sha256: expected SHA-256 of the file.

    Raises:
        BadInput: the file does not exist, or an address has no hash.
        Mismatch: a backbone tensor is missing in the file or has another shape, or the hash differs.
    """
    path = find_weights(source, sha256)
    tensors = _read_checkpoint(path)
    rename = getattr(backbone, "rename", str)
    tensors = {rename(key): value for key, value in tensors.items()}
    fresh = tuple(getattr(backbone, "fresh", ()))
    expected = {k: v for k, v in backbone.state_dict().items() if not k.startswith(fresh)}
    wrong = [
        key
        for key, value in expected.items()
        if not key.endswith("num_batches_tracked")
        and (key not in tensors or tensors[key].shape != value.shape)
    ]
    if wrong:
        raise Mismatch(
            f"{source} does not fit the backbone: {len(wrong)} of {len(expected)} tensors are missing "
            f"or have another shape, first {wrong[0]!r}; expected torchvision's state-dict keys"
        )
    backbone.load_state_dict({k: v for k, v in tensors.items() if k in expected}, strict=False)


def load_run_weights(encoder: torch.nn.Module, run: Path) -> None:
    """Load the weights of a finished run of the same architecture.

    Raises:
        BadInput: the folder holds no finished run.
        Mismatch: its weights belong to another architecture.
    """
    tensors, about = load_tensors(run / "weights.safetensors")
    own = {k: v for k, v in tensors.items() if not k.startswith(("pca.", "clusters."))}
    try:
        encoder.load_state_dict(own)
    except RuntimeError as error:
        raise Mismatch(f"{run} is a run of {about.get('architecture')}: {error}") from error


def load_encoder(run: Path) -> Encoder:
    """Rebuild the encoder of a finished run, with its weights.

    Raises:
        BadInput: the folder holds no finished run.
    """
    _, about = load_tensors(run / "weights.safetensors")
    encoder = build(**about["architecture"])
    load_run_weights(encoder, run)
    return encoder.eval()


def _read_checkpoint(path: Path) -> Tensors:
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInput(f"{path} does not exist; check the path") from error
    except Exception as error:
        raise Damaged(f"{path} is not a checkpoint of plain tensors ({error})") from error
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise Damaged(f"{path} is not a checkpoint of plain tensors; expected a state dict")
    return tensors
