"""The folder of a run: its identity, the checkpoint from which it resumes, and its final record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric.__version__ import version

from ..artifacts.files import read_json, write_json
from ..errors import Mismatch
from .checkpoint import Tensors, flatten_optimizer, load_tensors, restore_optimizer, save_tensors

RECORD = "run.json"
WEIGHTS = "weights.safetensors"
CHECKPOINT = "checkpoint.safetensors"
BEST = "best.safetensors"


class RunFolder:
    """One run on disk. A folder belongs to the run if the identity (recipe, options, data) is the same."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Set the folder and the identity of the run; nothing is written yet."""
        self.path = path
        self.identity = identity
        self._stored: Tensors = {}
        self._about: dict[str, Any] = {}

    def finished(self) -> dict[str, Any] | None:
        """Return the record if this run is finished already, else None.

        Raises:
            Mismatch: the folder holds a run with other options or data; the message names the difference.
        """
        record: dict[str, Any] | None = None
        earlier: dict[str, Any] | None = None
        if (self.path / RECORD).is_file():
            record = read_json(self.path / RECORD)
            earlier = record.get("identity", {}) if isinstance(record, dict) else {}
        elif (self.path / CHECKPOINT).is_file():
            earlier = load_tensors(self.path / CHECKPOINT)[1].get("identity")
        if earlier is not None and earlier != self.identity:
            raise Mismatch(
                f"{self.path} contains a run with other settings ({self._difference(earlier)}); choose "
                "another --out, or repeat the command with the settings that the run was started with"
            )
        return record if (self.path / WEIGHTS).is_file() else None

    def _difference(self, earlier: dict[str, Any]) -> str:
        if "options" not in earlier:
            return "it is not from a training run"
        old, new = earlier["options"], self.identity["options"]
        other = [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in new if old.get(k) != new.get(k)]
        if earlier.get("data") != self.identity["data"]:
            other.append("the training data")
        if earlier.get("recipe") != self.identity["recipe"]:
            other.insert(0, f"recipe: {earlier.get('recipe')!r} -> {self.identity['recipe']!r}")
        return "; ".join(other)

    def resume(self, net: torch.nn.Module) -> list[dict[str, Any]]:
        """Load the last completed epoch, if any, into ``net``; returns the measurements of each epoch."""
        path = self.path / CHECKPOINT
        if not path.is_file():
            return []
        self._stored, self._about = load_tensors(path)
        net.load_state_dict(_of_net(self._stored))
        history: list[dict[str, Any]] = self._about["history"]
        return history

    def resume_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the optimiser's state after the last completed epoch.

        The moments get the strides of their weights (channels last), which torch's fused step expects
        without a check. Whether the step is fused is decided anew, because the device may be another one.
        """
        optimizer.load_state_dict(restore_optimizer(self._stored, self._about["optimizer"]))
        for group in optimizer.param_groups:
            if "fused" in group:
                group["fused"] = optimizer.defaults["fused"]
        for weight, state in optimizer.state.items():
            for name, moment in state.items():
                if torch.is_tensor(moment) and moment.shape == weight.shape:
                    state[name] = torch.empty_like(weight, dtype=moment.dtype).copy_(moment)

    def resume_scaler(self, scaler: Any) -> None:
        """Load the state of the gradient scaler (AMP) after the last completed epoch."""
        if scaler is not None and self._about.get("scaler"):
            scaler.load_state_dict(self._about["scaler"])

    def save(
        self,
        net: torch.nn.Module,
        optimizer: Any,
        history: list[dict[str, Any]],
        scaler: Any = None,
        best: bool = False,
    ) -> None:
        """Write the state after a completed epoch atomically; ``best`` also saves the weights apart."""
        moments, groups = flatten_optimizer(optimizer.state_dict())
        weights = {f"net.{k}": v for k, v in net.state_dict().items()}
        if best:  # first: if the run is killed in between, the repeated epoch writes it again
            save_tensors(self.path / BEST, weights, {})
        about = {
            "identity": self.identity,
            "history": history,
            "optimizer": groups,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        save_tensors(self.path / CHECKPOINT, {**weights, **moments}, about)

    def load_best(self, net: torch.nn.Module) -> None:
        """Load the weights of the best epoch."""
        net.load_state_dict(_of_net(load_tensors(self.path / BEST)[0]))

    def finish(
        self, weights: Tensors, architecture: dict[str, Any], record: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the weights, then the record, which marks the run as finished; delete the checkpoint."""
        save_tensors(self.path / WEIGHTS, weights, {"architecture": architecture})
        whole = {
            "format": 1,
            "architecture": architecture,
            **record,
            "versions": {
                "torch": torch.__version__,
                "lightning-fabric": version,
                "numpy": np.__version__,
            },
            "identity": self.identity,
        }
        write_json(self.path / RECORD, whole)
        for name in (CHECKPOINT, BEST):
            (self.path / name).unlink(missing_ok=True)
        return whole


def _of_net(tensors: Tensors) -> Tensors:
    return {k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")}
