"""Finds which encoder made a feature file of another tool, from what the tool stored.

TRIDENT names the encoder in an attribute or in the folder that it saves to (``features_<encoder>``).
STAMP names it in the attribute ``extractor``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py

from ...artifacts.feature_files import plain_shape, text_of
from ...artifacts.hdf5_files import open_hdf5
from ...console import counted
from ...errors import HistoseekError, Mismatch

_FOLDER = re.compile(r"features_(.+)")
_UNKNOWN = {"", "unknown", "None", "none"}


@dataclass(frozen=True)
class Mark:
    """The name of the encoder that made a file, and where it was found: an attribute or a folder."""

    encoder: str
    source: str


def mark_of(stored: h5py.File, path: Path) -> Mark | None:
    """Return the encoder that an open file names: in an attribute, else in ``savetodir``, else folder."""
    data = stored.get("features")
    of_features = data.attrs if isinstance(data, h5py.Dataset) else {}
    for attributes, key in ((of_features, "encoder"), (stored.attrs, "extractor")):
        name = text_of(attributes.get(key, "")).strip()
        if name not in _UNKNOWN:
            return Mark(name, f"its attribute {key!r}")
    saved = [p for p in re.split(r"[\\/]+", text_of(of_features.get("savetodir", ""))) if p]
    if saved and (match := _FOLDER.fullmatch(saved[-1])):
        return Mark(match[1], f"its attribute 'savetodir', which ends in {saved[-1]!r}")
    if match := _FOLDER.fullmatch(path.absolute().parent.name):
        return Mark(match[1], f"its folder {path.absolute().parent.name!r}")
    return None


def check_alike(files: Sequence[Path], one_length: bool) -> None:
    """Check that the features of all files can be compared; unreadable files are reported later.

    Args:
        files: opened once each; only names and shapes are read.
        one_length: also check the length of the vectors, as for a new atlas.

    Raises:
        Mismatch: the files name several encoders, or have vectors of several lengths; the message lists
            each one with its number of files.
    """
    encoders: dict[str, list[str]] = {}
    lengths: dict[str, list[str]] = {}
    for path in files:
        try:
            with open_hdf5(path) as stored:
                mark, length = mark_of(stored, path), _length_of(stored)
        except (HistoseekError, OSError, RuntimeError, ValueError, KeyError):
            continue
        if mark is not None:
            encoders.setdefault(repr(mark.encoder), []).append(f"{path}, {mark.source}")
        if length is not None:
            lengths.setdefault(str(length), []).append(str(path))
    if len(encoders) > 1:
        raise Mismatch(
            f"the files are from {len(encoders)} encoders, whose features cannot be compared: "
            f"{_listed(encoders)}; nothing was imported: import the folder of one encoder"
        )
    if one_length and len(lengths) > 1:
        raise Mismatch(
            f"the files have vectors of {len(lengths)} lengths, which cannot be compared: "
            f"{_listed(lengths)}; nothing was imported: give the files of one encoder"
        )


def _length_of(stored: h5py.File) -> int | None:
    """Return the length of the vectors of a file's tiles; None if it has none of the known layouts."""
    data = stored.get("features", stored.get("feats"))
    shape = plain_shape(data) if isinstance(data, h5py.Dataset) else ()
    return shape[1] if len(shape) == 2 else None


def _listed(found: dict[str, list[str]]) -> str:
    most = sorted(found.items(), key=lambda item: -len(item[1]))
    return "; ".join(
        f"{name}: {counted(len(files), 'file')} (first {files[0]})" for name, files in most
    )
