"""Recipe ``arcface``: paper 004, an embedding by additive angular margin, judged by clustering.

With pretrained weights: phase 1 trains the head on the frozen backbone, phase 2 the backbone's last
layers too. Without: one phase trains everything from scratch. Held-out groups are only embedded, never
used to choose anything; PCA for clustering is fitted on the training part.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning_fabric
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import BadInput, Mismatch
from ..files import read_json, write_json
from ..metrics import Ints
from ..tilesets import TileSet
from .augment import Augmentation, augment
from .checkpoint import (
    Tensors,
    flatten_optimizer,
    load_backbone,
    load_tensors,
    restore_optimizer,
    save_tensors,
)
from .data import LabelledTiles, Progress, load, split_by_group
from .evaluate import calibrate, embed, evaluate, pca_basis
from .losses import ArcFace
from .models import Encoder, build

TARGETS = ("label", "group", "label+group")


@dataclass(frozen=True)
class ArcFaceOptions:
    """Options of the recipe ``arcface``; every field is a flag of ``histoseek train arcface``.

    Attributes:
        model: architecture, a name of the registry.
        weights: torchvision-keyed checkpoint of the backbone; empty trains from scratch.
        size_px: side of a tile.
        dim: length of the embedding.
        hidden: width of the head's hidden layer.
        dropout: in the head.
        relu_embedding: end the head with a ReLU.
        target: what ArcFace tells apart: label, group (source picture or patient) or label+group.
        scale: s of ArcFace.
        margin: m of ArcFace, radians.
        easy_margin: apply the margin only where the cosine is positive.
        epochs: of training from scratch.
        epochs_head: of phase 1 (with weights).
        epochs_tail: of phase 2 (with weights).
        lr: from scratch and for phase 1.
        lr_tail: for phase 2.
        weight_decay: decoupled (AdamW).
        warmup: share of a phase in which the learning rate rises; then it falls as a cosine.
        batch: tiles per step and device.
        rotation_deg: augmentation: rotate by up to this angle.
        zoom: augmentation: scale by 1 - zoom to 1 + zoom.
        flip: augmentation: mirror.
        stain: augmentation: stain density by up to this share.
        colour: augmentation: brightness and contrast by up to this share.
        noise: augmentation: Gaussian pixel noise.
        crop_px: augmentation: train on random crops of this side at the tile's scale; 0 for none.
        folds: number of folds, by group; 0 trains on everything and judges nothing.
        fold: the fold that is held out.
        seed: of the split, the initial weights and every random change.
        accelerator: cpu, cuda, mps or auto.
        devices: how many; more than one trains data-parallel (DDP).
        precision: Lightning's name, such as 32-true or 16-mixed.
    """

    model: str = "mobilenet-v3-small"
    weights: str = ""
    size_px: int = 224
    dim: int = 64
    hidden: int = 256
    dropout: float = 0.3
    relu_embedding: bool = False
    target: str = "label"
    scale: float = 30.0
    margin: float = 0.5
    easy_margin: bool = False
    epochs: int = 30
    epochs_head: int = 10
    epochs_tail: int = 20
    lr: float = 1e-3
    lr_tail: float = 1e-4
    weight_decay: float = 1e-2
    warmup: float = 0.05
    batch: int = 32
    rotation_deg: float = 15.0
    zoom: float = 0.1
    flip: bool = True
    stain: float = 0.2
    colour: float = 0.1
    noise: float = 0.0
    crop_px: int = 0
    folds: int = 10
    fold: int = 0
    seed: int = 0
    accelerator: str = "auto"
    devices: int = 1
    precision: str = "32-true"

    def __post_init__(self) -> None:
        """Check every value that has a range.

        Raises:
            BadInput: naming the option, its value and what was expected.
        """
        if self.target not in TARGETS:
            raise BadInput(f"target is {self.target!r}; expected one of: {', '.join(TARGETS)}")
        for name, least in (
            ("batch", 2),
            ("epochs", 0),
            ("size_px", 32),
            ("dim", 1),
            ("devices", 1),
        ):
            if getattr(self, name) < least:
                raise BadInput(f"{name} is {getattr(self, name)}; expected at least {least}")
        if self.folds == 1 or self.folds < 0 or not 0 <= self.fold < max(self.folds, 1):
            raise BadInput(
                f"folds is {self.folds} and fold {self.fold}; expected 0 <= fold < folds"
            )
        if not 0 <= self.crop_px <= self.size_px:
            raise BadInput(f"crop_px is {self.crop_px}; expected 0 to size_px ({self.size_px})")

    def phases(self) -> tuple[Phase, ...]:
        """Return the phases of training, in order."""
        if not self.weights:
            return (Phase("all layers", self.epochs, self.lr, all_layers=True),)
        return (
            Phase("head", self.epochs_head, self.lr),
            Phase("last layers", self.epochs_tail, self.lr_tail, tail=True),
        )

    def augmentation(self) -> Augmentation:
        """Return the ranges of the random changes."""
        return Augmentation(
            rotation_deg=self.rotation_deg,
            zoom=self.zoom,
            flip=self.flip,
            stain=self.stain,
            colour=self.colour,
            noise=self.noise,
            crop_px=self.crop_px,
        )


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs in which the same layers are trained."""

    name: str
    epochs: int
    lr: float
    tail: bool = False
    all_layers: bool = False


class ArcFaceNet(nn.Module):
    """The encoder with one ArcFace head per target; forward returns the summed loss."""

    def __init__(self, encoder: Encoder, classes: dict[str, int], options: ArcFaceOptions) -> None:
        """Make a head of ``classes[name]`` classes for every target."""
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(
            {
                name: ArcFace(
                    encoder.dim, count, options.scale, options.margin, options.easy_margin
                )
                for name, count in classes.items()
            }
        )

    def forward(self, tiles: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of tiles (N, 3, S, S); a target of -1 is unknown and costs nothing."""
        embeddings = self.encoder(tiles)
        loss = embeddings.sum() * 0.0
        for name, head in self.heads.items():
            known = targets[name] >= 0
            if known.any():
                loss = loss + head(embeddings[known], targets[name][known])
        total: torch.Tensor = loss
        return total

    def set_phase(self, phase: Phase) -> None:
        """Freeze what the phase does not train; frozen batch norms keep their statistics."""
        self.train()
        backbone = self.encoder.backbone
        tail = self.encoder.tail if phase.tail else ()
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(
                phase.all_layers or name.startswith(tuple(f"{t}." for t in tail))
            )
        if not phase.all_layers:
            backbone.eval()
            for name in tail:
                backbone.get_submodule(name).train()


@dataclass
class _State:
    """Where a run stands: epochs done over all phases, and what they measured."""

    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def fit(
    options: ArcFaceOptions,
    tileset: TileSet,
    out: Path,
    progress: Progress,
    selection: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, judge on the held-out groups and write ``weights.safetensors`` and ``run.json``.

    Args:
        options: of the recipe.
        tileset: labelled tiles.
        out: the run's folder.
        progress: called with what is done, of how many, and a text.
        selection: how the tile set was put together, for the record.

    A run that was killed is taken up after its last whole epoch and ends with the same weights.

    Returns:
        The content of ``run.json``.

    Raises:
        BadInput: data without the target that was asked for.
        Mismatch: ``out`` holds a run with other options or data; says which.
    """
    started = time.monotonic()
    identity = {"recipe": "arcface", "options": asdict(options), "data": tileset.identity()}
    finished = _check_same_run(out, identity)
    if finished is not None:
        return finished
    fabric = lightning_fabric.Fabric(
        accelerator=options.accelerator,
        devices=options.devices,
        precision=options.precision,  # type: ignore[arg-type]  # Lightning checks the name
    )
    fabric.launch()
    data = load(tileset, options.size_px, progress if fabric.is_global_zero else _silent)
    train, held_out = split_by_group(data, options.folds, options.fold, options.seed)
    targets = _targets(options, data, train)
    torch.manual_seed(options.seed)
    encoder = build(
        options.model,
        size_px=options.size_px,
        dim=options.dim,
        hidden=options.hidden,
        dropout=options.dropout,
        relu_embedding=options.relu_embedding,
    )
    if options.weights:
        load_backbone(encoder.backbone, Path(options.weights))
    untrained = _untrained(encoder, data, train, held_out)
    net = ArcFaceNet(encoder, {k: int(v.max()) + 1 for k, v in targets.items()}, options)
    state = _train(fabric, net, options, data, train, targets, out, identity, progress)
    result: dict[str, Any] = {}
    if fabric.is_global_zero:
        result = _finish(options, encoder, data, train, held_out, untrained, out, state, tileset)
        result["data"]["selection"] = selection or {}
        result["identity"] = identity
        result["seconds"] = round(time.monotonic() - started, 1)
        write_json(out / "run.json", result)
        (out / "checkpoint.safetensors").unlink(missing_ok=True)
    fabric.barrier()
    return result


def _untrained(
    encoder: Encoder, data: LabelledTiles, train: Ints, held_out: Ints
) -> NDArray[np.float32]:
    """Embed the held-out tiles by the initial weights, with batch norms calibrated on some tiles."""
    initial = copy.deepcopy(encoder)
    calibrate(initial, data.tiles[train[:: max(1, len(train) // 512)]])
    return embed(initial, data.tiles[held_out])


def _silent(done: int, total: int, text: str) -> None:
    pass


def _check_same_run(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return a finished run's record; refuse a folder that holds another run."""
    earlier: dict[str, Any] | None = None
    record: dict[str, Any] | None = None
    if (out / "run.json").is_file():
        record = read_json(out / "run.json")
        earlier = (record or {}).get("identity")
    elif (out / "checkpoint.safetensors").is_file():
        earlier = load_tensors(out / "checkpoint.safetensors")[1].get("identity")
    if earlier is None:
        return None
    if earlier != identity:
        old, new = earlier.get("options", {}), identity["options"]
        other = [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in new if old.get(k) != new.get(k)]
        if earlier.get("data") != identity["data"]:
            other.append("the training data")
        raise Mismatch(
            f"{out} holds a run with other settings ({'; '.join(other)}); choose another --out, "
            "or repeat the command with the settings that the run was started with"
        )
    return record


def _targets(options: ArcFaceOptions, data: LabelledTiles, train: Ints) -> dict[str, torch.Tensor]:
    """Number the classes of the training part from 0; what it does not hold becomes -1."""
    result: dict[str, torch.Tensor] = {}
    for name in options.target.split("+"):
        if name == "group" and not data.grouped:
            raise BadInput("target asks for groups, but the data names none (column 'group')")
        values = data.labels if name == "label" else data.groups
        present = np.unique(values[train][values[train] >= 0])
        if len(present) < 2:
            raise BadInput(
                f"the data has {len(present)} {name}(s) to train on; expected at least 2"
            )
        numbers = np.full(int(values.max()) + 2, -1, dtype=np.int64)
        numbers[present] = np.arange(len(present))
        result[name] = torch.from_numpy(numbers[values])
    return result


def _train(
    fabric: lightning_fabric.Fabric,
    net: ArcFaceNet,
    options: ArcFaceOptions,
    data: LabelledTiles,
    train: Ints,
    targets: dict[str, torch.Tensor],
    out: Path,
    identity: dict[str, Any],
    progress: Progress,
) -> _State:
    """Run the phases epoch by epoch, saving the whole state after each."""
    path = out / "checkpoint.safetensors"
    stored, about = load_tensors(path) if path.is_file() else ({}, {})
    state = _State(about.get("epoch", 0), about.get("history", []))
    if state.epoch:
        weights = {k.removeprefix("net."): v for k, v in stored.items() if k.startswith("net.")}
        net.load_state_dict(weights)
    total = sum(phase.epochs for phase in options.phases())
    first = 0
    for phase in options.phases():
        last = first + phase.epochs
        if state.epoch >= last:
            first = last
            continue
        net.set_phase(phase)
        trained = [p for p in net.parameters() if p.requires_grad]
        plain = torch.optim.AdamW(trained, lr=phase.lr, weight_decay=options.weight_decay)
        if state.epoch > first:
            plain.load_state_dict(restore_optimizer(stored, about["optimizer"]))
        model, optimizer = fabric.setup(net, plain)
        for epoch in range(state.epoch, last):
            net.set_phase(phase)
            loss, rate = _epoch(
                fabric, model, optimizer, phase, epoch - first, epoch, options, data, train, targets
            )
            state.epoch = epoch + 1
            record = {"epoch": epoch + 1, "phase": phase.name, "loss": loss, "tiles_per_s": rate}
            state.history.append(record)
            if fabric.is_global_zero:
                _save(path, net, optimizer, state, identity)
                text = f"{phase.name}, loss {loss:.3f}, {rate:.0f} tiles/s"
                progress(state.epoch, total, text)
        first = last
    return state


def _save(
    path: Path, net: ArcFaceNet, optimizer: Any, state: _State, identity: dict[str, Any]
) -> None:
    moments, groups = flatten_optimizer(optimizer.state_dict())
    tensors: Tensors = {**{f"net.{k}": v for k, v in net.state_dict().items()}, **moments}
    about = {
        "identity": identity,
        "epoch": state.epoch,
        "history": state.history,
        "optimizer": groups,
    }
    save_tensors(path, tensors, about)


def _epoch(
    fabric: lightning_fabric.Fabric,
    model: Any,
    optimizer: Any,
    phase: Phase,
    phase_epoch: int,
    epoch: int,
    options: ArcFaceOptions,
    data: LabelledTiles,
    train: Ints,
    targets: dict[str, torch.Tensor],
) -> tuple[float, float]:
    """Train one epoch; all randomness follows from seed, epoch and rank. Returns loss, tiles/s."""
    started = time.monotonic()
    order = np.random.default_rng((options.seed, epoch)).permutation(train)
    step_size = options.batch * fabric.world_size
    steps = max(1, len(order) // step_size)
    seed = int(
        np.random.SeedSequence((options.seed, epoch, fabric.global_rank)).generate_state(1)[0]
    )
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    mean, std = _normalisation(model.encoder, fabric.device)
    ranges, total = options.augmentation(), 0.0
    for step in range(steps):
        share = order[step * step_size : (step + 1) * step_size][
            fabric.global_rank :: fabric.world_size
        ]
        for group in optimizer.param_groups:
            group["lr"] = phase.lr * _schedule(
                phase_epoch * steps + step, phase.epochs * steps, options
            )
        pixels = torch.from_numpy(np.ascontiguousarray(data.tiles[share])).to(fabric.device)
        tiles = augment(pixels.permute(0, 3, 1, 2).float() / 255, ranges, generator)
        tiles = ((tiles - mean) / std).contiguous(memory_format=torch.channels_last)
        batch_targets = {k: v[share].to(fabric.device) for k, v in targets.items()}
        loss = model(tiles, batch_targets)
        if not torch.isfinite(loss):
            raise BadInput(
                f"the loss is {float(loss)} in epoch {epoch + 1}, step {step + 1}; the last whole epoch "
                "is kept: lower --lr or check the data"
            )
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        total += float(loss.detach())
    seconds = time.monotonic() - started
    return total / steps, steps * step_size / seconds


def _normalisation(encoder: Encoder, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean = torch.tensor(encoder.mean, device=device)[:, None, None]
    std = torch.tensor(encoder.std, device=device)[:, None, None]
    return mean, std


def _schedule(step: int, steps: int, options: ArcFaceOptions) -> float:
    """Return the factor on the learning rate: a linear rise, then half a cosine to a hundredth."""
    rise = max(1, round(options.warmup * steps))
    if step < rise:
        return (step + 1) / rise
    share = (step - rise) / max(1, steps - rise)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))


def _finish(
    options: ArcFaceOptions,
    encoder: Encoder,
    data: LabelledTiles,
    train: Ints,
    held_out: Ints,
    untrained: NDArray[np.float32],
    out: Path,
    state: _State,
    tileset: TileSet,
) -> dict[str, Any]:
    """Judge the trained encoder beside the untrained one, and write the weights."""
    fitted = embed(encoder, data.tiles[train])
    basis = pca_basis(fitted)
    metrics: dict[str, Any] = {}
    if len(held_out):
        labels, groups = data.labels[held_out], data.groups[held_out]
        found = embed(encoder, data.tiles[held_out])
        metrics["trained"] = evaluate(found, labels, groups, data.grouped, basis, options.seed)
        own = pca_basis(untrained)
        metrics["random_init"] = evaluate(
            untrained, labels, groups, data.grouped, own, options.seed
        )
    weights = dict(encoder.state_dict())
    weights |= {f"pca.{k}": torch.from_numpy(v) for k, v in basis.items()}
    architecture = {
        "model": options.model,
        "size_px": options.size_px,
        "dim": options.dim,
        "hidden": options.hidden,
        "dropout": options.dropout,
        "relu_embedding": options.relu_embedding,
    }
    save_tensors(out / "weights.safetensors", weights, {"architecture": architecture})
    return {
        "format": 1,
        "recipe": "arcface",
        "paper": "004: MobileNetV3-Small + ArcFace, k-means and HDBSCAN",
        "architecture": architecture,
        "options": asdict(options),
        "data": {
            "name": tileset.name,
            "fingerprint": tileset.fingerprint,
            "tiles": len(data.labels),
            "classes": list(data.label_names),
            "groups": int(data.groups.max()) + 1 if data.grouped else None,
            "unreadable": list(data.unreadable),
        },
        "split": {
            "by": "group" if data.grouped else "tile (the data names no groups)",
            "train_tiles": len(train),
            "held_out_tiles": len(held_out),
        },
        "metrics": metrics,
        "epochs": state.history,
        "versions": {
            "torch": torch.__version__,
            "lightning-fabric": metadata.version("lightning-fabric"),
            "numpy": np.__version__,
        },
    }
