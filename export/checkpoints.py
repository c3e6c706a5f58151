"""Read a published checkpoint into one of our networks, whatever its parameters are called.

A checkpoint is a .safetensors file or a pickle of plain tensors. Its naming convention is recognised by a
key, its parameters are renamed to timm's names, and they must fit the network exactly: missing, left-over
and misshapen parameters are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import BadInput, Damaged
from .conventions import (
    CHANGES,
    CONVENTIONS,
    DINO_DROPPED,
    TEXT_CONVENTIONS,
    TRUNKS,
    Convention,
    Rule,
)
from .nets.vit import VitShape

Tensors = dict[str, torch.Tensor]

WRAPPERS = ("state_dict", "model", "module", "teacher", "student", "model_state_dict")
"""Keys that hold the parameters in a checkpoint of a training program, in the order they are tried."""
PREFIXES = ("module.", "backbone.", "model.", "encoder.")
"""Prefixes that are cut off if every parameter has them."""
NAMED = 5
"""Maximum number of parameters that a message names."""


@dataclass
class Loaded:
    """What happened while a checkpoint was loaded.

    Attributes:
        convention: name of the recognised convention.
        dropped: parameters that the network does not need.
        notes: what was changed, such as resampled positions.
    """

    convention: str
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_checkpoint(path: Path) -> tuple[Tensors, list[str]]:
    """Read the tensors of a .safetensors file or of a pickle, and look through wrappers and prefixes.

    Returns:
        The tensors by name, and what was looked through or left out.

    Raises:
        BadInput: the file is missing, or holds other objects than tensors.
        Damaged: the file cannot be read.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist or is no file; expected a checkpoint")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as stored:
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise Damaged(f"{path} is not a readable .safetensors file ({error})") from error
        return _without_prefixes(tensors), []
    try:
        document = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(
            f"{path} is not a pickle of plain tensors ({reason}); a pickle may run code, so no other is "
            "read: convert it to .safetensors"
        ) from error
    tensors, notes = _unwrapped(document, path)
    return _without_prefixes(tensors), notes


def _unwrapped(document: Any, path: Path) -> tuple[Tensors, list[str]]:
    notes = []
    while (wrapper := next((key for key in WRAPPERS if _holds(document, key)), None)) is not None:
        others = sorted(str(key) for key in document if key != wrapper)
        text = f"read the parameters under {wrapper!r}"
        notes.append(f"{text}, not {', '.join(others[:NAMED])}" if others else text)
        document = document[wrapper]
    if not isinstance(document, dict):
        raise BadInput(f"{path} holds a {type(document).__name__}; expected tensors by name")
    tensors = {key: value for key, value in document.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise BadInput(
            f"{path} holds no tensors, but: {', '.join(map(str, list(document)[:NAMED]))}; expected "
            "parameters by name"
        )
    return tensors, notes


def _holds(document: Any, key: str) -> bool:
    return isinstance(document, dict) and isinstance(document.get(key), dict)


def _without_prefixes(tensors: Tensors) -> Tensors:
    found = True
    while found:
        found = False
        for prefix in PREFIXES:
            kept = {key for key in tensors if not re.fullmatch("|".join(DINO_DROPPED), key)}
            if kept and all(key.startswith(prefix) for key in kept):
                tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
                found = True
    return tensors


def load(net: nn.Module, tensors: Tensors, source: str) -> Loaded:
    """Load a checkpoint's image network, strictly.

    Args:
        net: network with timm's names; a transformer with a head is ``net.trunk``.
        tensors: from :func:`read_checkpoint`.
        source: name of the checkpoint, for messages.

    Raises:
        BadInput: the naming convention is unknown, or parameters are missing, left over or misshapen.
    """
    convention, tensors, outside = _recognised(tensors, source)
    report = Loaded(convention.name, dropped=outside)
    renamed, names = _translated(tensors, convention, report)
    if hasattr(net, "trunk") and not any(name.startswith("trunk.") for name in renamed):
        renamed = {f"trunk.{name}": value for name, value in renamed.items()}
        names = {f"trunk.{name}": key for name, key in names.items()}
    _shape_tokens(net, renamed, report)
    _fill(net, renamed, names, source, convention)
    return report


def in_our_names(tensors: Tensors, source: str) -> tuple[str, Tensors]:
    """Return the name of a checkpoint's convention, and its parameters under timm's names.

    Raises:
        BadInput: the naming convention is unknown.
    """
    convention, tensors, _ = _recognised(tensors, source)
    renamed, _ = _translated(tensors, convention, Loaded(convention.name))
    return convention.name, renamed


def has_text(tensors: Tensors) -> bool:
    """Return whether a checkpoint has a text network that :func:`load_text` can read."""
    return any(re.fullmatch(c.sign, key) for c in TEXT_CONVENTIONS for key in tensors)


def load_text(net: nn.Module, tensors: Tensors, source: str) -> Loaded:
    """Load the text network beside a checkpoint's image network, strictly.

    Args:
        net: network from :func:`~histoseek.export.nets.text.text_net`.
        tensors: from :func:`read_checkpoint`.
        source: name of the checkpoint, for messages.

    Raises:
        BadInput: there is no text network of a known convention, or parameters do not fit.
    """
    for convention in TEXT_CONVENTIONS:
        if any(re.fullmatch(convention.sign, key) for key in tensors):
            break
    else:
        raise BadInput(
            f"{source} has no text network of a known convention; expected the names of "
            f"{', '.join(c.name for c in TEXT_CONVENTIONS)}"
        )
    report = Loaded(convention.name)
    renamed, names = _translated(tensors, convention, report)
    report.dropped = []  # the image network, which is no loss here
    places = net.get_parameter("pos_embed").shape[0]
    stored = renamed.get("pos_embed")
    if stored is not None and len(stored) > places:
        renamed["pos_embed"] = stored[:places]
        report.notes.append(f"kept the first {places} of {len(stored)} positions of the text")
    _fill(net, renamed, names, source, convention)
    return report


def _translated(
    tensors: Tensors, convention: Convention, report: Loaded
) -> tuple[Tensors, dict[str, str]]:
    """Return the parameters under our names, and the checkpoint's name of each."""
    names: dict[str, str] = {}
    renamed: Tensors = {}
    for key, value in tensors.items():
        if any(re.fullmatch(pattern, key) for pattern in convention.dropped):
            report.dropped.append(key)
            continue
        name = _renamed(key, convention.rules)
        for ending, change in CHANGES.items():
            if name.endswith(ending):
                name, value = name.removesuffix(ending), change(value)
        renamed[name], names[name] = value, key
    _join(renamed, names, convention)
    for whole, parts in convention.split:
        if whole in renamed:
            pieces = renamed.pop(whole).chunk(len(parts))
            renamed.update(zip(parts, pieces, strict=True))
            names.update(dict.fromkeys(parts, names.pop(whole)))
    return renamed, names


def _fill(
    net: nn.Module, renamed: Tensors, names: dict[str, str], source: str, convention: Convention
) -> None:
    for name, value in net.state_dict().items():
        if any(re.fullmatch(pattern, name) for pattern in convention.absent):
            renamed.setdefault(name, torch.zeros(value.shape))
        if name.endswith(".num_batches_tracked"):  # counts training steps only
            renamed[name] = torch.tensor(0)
    _check(net, renamed, names, source, convention.name)
    floats = {
        name: value.float() if value.is_floating_point() else value
        for name, value in renamed.items()
    }
    net.load_state_dict(floats, assign=True)


def _recognised(tensors: Tensors, source: str) -> tuple[Convention, Tensors, list[str]]:
    """Return the convention, the parameters of the image network, and the names of all others."""
    candidates = [("", tensors)]
    for prefix in TRUNKS:
        inner = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        if inner:
            candidates.append((prefix, inner))
    for convention in CONVENTIONS:
        for prefix, candidate in candidates:
            if any(re.fullmatch(convention.sign, key) for key in candidate):
                outside = sorted(key for key in tensors if not key.startswith(prefix))
                return convention, candidate, outside
    raise BadInput(
        f"{source}: the names of its parameters are of no known convention "
        f"({', '.join(sorted(tensors)[:NAMED])} …); expected those of "
        f"{', '.join(c.name for c in CONVENTIONS)}"
    )


def _renamed(key: str, rules: Iterable[Rule]) -> str:
    for pattern, name in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(name)
    return key


def _join(renamed: Tensors, names: dict[str, str], convention: Convention) -> None:
    """Join queries, keys and values, and the two halves of a gate, in place."""
    for parts, whole in convention.joined:
        first = re.escape(parts[0]).replace(r"\{\}", "(.+)")
        for name in list(renamed):
            match = re.fullmatch(first, name)
            if not match:
                continue
            members = [part.format(*match.groups()) for part in parts]
            if not all(member in renamed for member in members):
                continue
            joined = whole.format(*match.groups())
            names[joined] = ", ".join(names.pop(member) for member in members)
            renamed[joined] = torch.cat([renamed.pop(member) for member in members])


def _shape_tokens(net: nn.Module, renamed: Tensors, report: Loaded) -> None:
    """Give tokens and positions the network's layout and grid, in place."""
    trunk: Any = getattr(net, "trunk", None)
    shape = getattr(trunk, "shape", None)
    places = renamed.get("trunk.pos_embed")
    token = renamed.get("trunk.cls_token")
    if shape is None or places is None or token is None:
        return
    renamed["trunk.cls_token"] = token = token.reshape(1, 1, -1)
    places = places[None] if places.ndim == 2 else places
    extra = _without_grid(places.shape[1])
    if (
        extra == 1 and shape.placed == 0
    ):  # added to the class token before the registers are inserted
        renamed["trunk.cls_token"] = token.float() + places[:, :1].float()
        places, extra = places[:, 1:], 0
        report.notes.append("added the class token's position to the class token")
    side = round((places.shape[1] - extra) ** 0.5)
    if extra == shape.placed and (side != shape.grid or shape.built_grid):
        grid = places[:, extra:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid, how = _resampled(grid, shape)
        places = torch.cat([places[:, :extra].float(), grid.flatten(2).transpose(1, 2)], 1)
        report.notes.append(
            f"resampled positions from {side} x {side} to {shape.grid} x {shape.grid} patches ({how})"
        )
    renamed["trunk.pos_embed"] = places


def _resampled(grid: torch.Tensor, shape: VitShape) -> tuple[torch.Tensor, str]:
    """Resample positions (1, D, side, side) to the network's grid; return them, and how."""
    if not shape.built_grid:
        size = (shape.grid, shape.grid)
        resized = nn.functional.interpolate(grid, size, mode="bicubic", antialias=True)
        return resized, "bicubic, with antialiasing, as timm does"
    built = shape.built_grid
    if grid.shape[2] != built:
        grid = nn.functional.interpolate(grid, (built, built), mode="bilinear")
    factor = (shape.grid + 0.1) / built  # as DINO's code scales
    resized = nn.functional.interpolate(grid, scale_factor=factor, mode="bicubic")
    return resized, f"over {built} x {built}, bicubic, as DINO does"


def _without_grid(count: int) -> int:
    """Return how many positions are left over when the others form the largest possible square."""
    return count - int(count**0.5) ** 2


def _check(
    net: nn.Module, renamed: Tensors, names: dict[str, str], source: str, convention: str
) -> None:
    expected = net.state_dict()
    missing = sorted(expected.keys() - renamed.keys())
    more = sorted(names.get(name, name) for name in renamed.keys() - expected.keys())
    misshapen = [
        f"{names.get(name, name)} is {_text(renamed[name])}, expected {_text(value)}"
        for name, value in expected.items()
        if name in renamed and renamed[name].shape != value.shape
    ]
    problems = [
        f"{title}: {', '.join(found[:NAMED])}"
        + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")
        for title, found in (
            ("missing", missing),
            ("left over", more),
            ("of another shape", misshapen),
        )
        if found
    ]
    if problems:
        raise BadInput(
            f"{source} does not fit the network ({convention} names); {'; '.join(problems)}. Expected "
            "a checkpoint of the encoder that --as names (check the name), or with --arch a plain network"
        )


def _text(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"
