"""Recipe ``arcface``: paper 004, an embedding by additive angular margin, judged by clustering.

With pretrained weights: phase 1 trains the head on the frozen backbone, phase 2 the backbone's last
layers too. Without: one phase trains everything from scratch. Held-out groups are only embedded, never
used to choose anything; PCA for clustering is fitted on the training part.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning_fabric
import numpy as np
import torch
from torch import nn

from ..console import Report
from ..errors import BadInput
from ..metrics import Ints
from ..tilesets import TileSet
from .augment import Augmentation, augment
from .checkpoint import load_backbone
from .data import LabelledTiles, describe, describe_split, load, split_by_group
from .evaluate import judge, normalise
from .losses import ArcFace
from .models import Encoder, build
from .run import RunFolder

TARGETS = ("label", "group", "place")


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
        target: what ArcFace tells apart, one or several joined by +: label, group (source picture or
            patient), place (as group, but each cut-out of a large picture by itself).
        cut: cut pictures of at least twice size_px into tiles, instead of shrinking them.
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
    cut: bool = False
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
        if not set(self.target.split("+")) <= set(TARGETS):
            raise BadInput(
                f"target is {self.target!r}; expected one or several, joined by +, of: "
                f"{', '.join(TARGETS)}"
            )
        for name, least in (
            ("hidden", 1),
            ("seed", 0),
            ("batch", 2),
            ("epochs", 0),
            ("size_px", 32),
            ("dim", 1),
            ("devices", 1),
        ):
            if getattr(self, name) < least:
                raise BadInput(f"{name} is {getattr(self, name)}; expected at least {least}")
        for name, low, high in (
            ("dropout", 0, 0.99),
            ("lr", 1e-9, 10),
            ("lr_tail", 1e-9, 10),
            ("weight_decay", 0, 10),
            ("margin", 0, 3.1),
            ("scale", 1e-3, 1000),
            ("warmup", 0, 1),
            ("zoom", 0, 0.9),
            ("stain", 0, 2),
            ("colour", 0, 1),
            ("noise", 0, 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise BadInput(f"{name} is {getattr(self, name)}; expected {low} to {high}")
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

    def architecture(self) -> dict[str, Any]:
        """Return what is needed to build the encoder again."""
        names = ("model", "size_px", "dim", "hidden", "dropout", "relu_embedding")
        return {name: getattr(self, name) for name in names}

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
            loss = (
                loss + next(head.parameters()).sum() * 0.0
            )  # every weight has a gradient, as DDP demands
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


@dataclass(frozen=True)
class _Training:
    """What every epoch needs."""

    fabric: lightning_fabric.Fabric
    options: ArcFaceOptions
    data: LabelledTiles
    train: Ints
    targets: dict[str, torch.Tensor]


def fit(
    options: ArcFaceOptions,
    tileset: TileSet,
    out: Path,
    progress: Report,
    selection: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, judge on the held-out groups and write ``weights.safetensors`` and ``run.json``.

    A run that was killed is taken up after its last whole epoch and ends with the same weights.

    Args:
        options: of the recipe.
        tileset: labelled tiles.
        out: the run's folder.
        progress: called with what is done, of how many, and a text.
        selection: how the tile set was put together, for the record.

    Returns:
        The content of ``run.json``.

    Raises:
        BadInput: data without the target that was asked for.
        Mismatch: ``out`` holds a run with other options or data; says which.
    """
    started = time.monotonic()
    identity = {"recipe": "arcface", "options": asdict(options), "data": tileset.identity()}
    folder = RunFolder(out, identity)
    finished = folder.finished()
    if finished is not None:
        return finished
    fabric = _fabric(options)
    fabric.launch()
    report = progress if fabric.is_global_zero else _silent
    data = load(tileset, options.size_px, report, options.cut)
    train, held_out = split_by_group(data, options.folds, options.fold, options.seed)
    targets = _targets(options, data, train)
    torch.manual_seed(options.seed)
    encoder = build(**options.architecture())
    if options.weights:
        load_backbone(encoder.backbone, Path(options.weights))
    initial = copy.deepcopy(encoder)
    net = ArcFaceNet(encoder, {k: int(v.max()) + 1 for k, v in targets.items()}, options)
    history = _train(_Training(fabric, options, data, train, targets), net, folder, report)
    record: dict[str, Any] = {}
    if fabric.is_global_zero:
        basis, metrics = judge(encoder, initial, data, train, held_out, options.seed)
        weights = dict(encoder.state_dict())
        weights |= {f"pca.{k}": torch.from_numpy(v) for k, v in basis.items()}
        record = {
            "recipe": "arcface",
            "paper": "004: MobileNetV3-Small + ArcFace, k-means and HDBSCAN",
            "options": asdict(options),
            "data": {**describe(data, tileset), "selection": selection or {}},
            "split": describe_split(data, train, held_out),
            "metrics": metrics,
            "epochs": history,
            "seconds": round(time.monotonic() - started, 1),
        }
        record = folder.finish(weights, options.architecture(), record)
    fabric.barrier()
    return record


def _fabric(options: ArcFaceOptions) -> lightning_fabric.Fabric:
    try:
        return lightning_fabric.Fabric(
            accelerator=options.accelerator,
            devices=options.devices,
            precision=options.precision,  # type: ignore[arg-type]  # Lightning checks the name
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise BadInput(
            f"accelerator {options.accelerator!r}, devices {options.devices}, precision "
            f"{options.precision!r}: {error}"
        ) from error


def _silent(done: int, total: int, text: str) -> None:
    pass


def _targets(options: ArcFaceOptions, data: LabelledTiles, train: Ints) -> dict[str, torch.Tensor]:
    """Number the classes of the training part from 0; what it does not hold becomes -1."""
    result: dict[str, torch.Tensor] = {}
    for name in options.target.split("+"):
        if name != "label" and not data.grouped:
            raise BadInput(f"target asks for {name}s, but the data names no group (column 'group')")
        values = {"label": data.labels, "group": data.groups, "place": data.places}[name]
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
    run: _Training, net: ArcFaceNet, folder: RunFolder, report: Report
) -> list[dict[str, Any]]:
    """Run the phases epoch by epoch, saving the whole state after each; returns the history."""
    options, fabric = run.options, run.fabric
    state = folder.resume(net)
    total = sum(phase.epochs for phase in options.phases())
    last = 0
    for phase in options.phases():
        first, last = last, last + phase.epochs
        if state.epoch >= last:
            continue
        net.set_phase(phase)
        trained = [p for p in net.parameters() if p.requires_grad]
        plain = torch.optim.AdamW(trained, lr=phase.lr, weight_decay=options.weight_decay)
        model, optimizer = fabric.setup(net, plain)
        if state.epoch > first:
            folder.resume_optimizer(plain)  # after setup: its state goes where the weights are
        for epoch in range(state.epoch, last):
            net.set_phase(phase)
            loss, rate = _epoch(run, model, optimizer, phase, epoch - first, epoch)
            state.epoch = epoch + 1
            state.history.append(
                {"epoch": epoch + 1, "phase": phase.name, "loss": loss, "tiles_per_s": rate}
            )
            if fabric.is_global_zero:
                folder.save(net, optimizer, state)
            report(epoch + 1, total, f"{phase.name}, loss {loss:.3f}, {rate:.0f} tiles/s")
    return state.history


def _epoch(
    run: _Training, model: Any, optimizer: Any, phase: Phase, phase_epoch: int, epoch: int
) -> tuple[float, float]:
    """Train one epoch; all randomness follows from seed, epoch and rank. Returns loss, tiles/s."""
    started = time.monotonic()
    options, rank, ranks = run.options, run.fabric.global_rank, run.fabric.world_size
    order = np.random.default_rng((options.seed, epoch)).permutation(run.train)
    step_size = options.batch * ranks
    steps = max(1, len(order) // step_size)
    seed = int(np.random.SeedSequence((options.seed, epoch, rank)).generate_state(1)[0])
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    ranges, total = options.augmentation(), 0.0
    for step in range(steps):
        share = order[step * step_size : (step + 1) * step_size][rank::ranks]
        factor = _schedule(phase_epoch * steps + step, phase.epochs * steps, options.warmup)
        for group in optimizer.param_groups:
            group["lr"] = phase.lr * factor
        pixels = torch.from_numpy(run.data.tiles[share]).to(run.fabric.device)
        tiles = augment(pixels.permute(0, 3, 1, 2).float() / 255, ranges, generator)
        tiles = normalise(model.encoder, tiles).contiguous(memory_format=torch.channels_last)
        targets = {k: v[share].to(run.fabric.device) for k, v in run.targets.items()}
        loss = model(tiles, targets)
        if not torch.isfinite(loss):
            raise BadInput(
                f"the loss is {float(loss.detach())} in epoch {epoch + 1}, step {step + 1}; the last "
                "whole epoch is kept: lower --lr or check the data"
            )
        optimizer.zero_grad()
        run.fabric.backward(loss)
        optimizer.step()
        total += float(loss.detach())
    return total / steps, steps * step_size / (time.monotonic() - started)


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the learning rate: a linear rise, then half a cosine to a hundredth."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    share = (step - rise) / max(1, steps - rise)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))
