"""Finds which encoder made a feature file of another tool, from what the tool stored.

TRIDENT names the encoder in an attribute or in the folder that it saves to (``features_<encoder>``).
STAMP names it in the attribute ``extractor``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py

from ...artifacts.feature_files import plain_shape, text_of
from ...artifacts.hdf5_files import open_hdf5
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


def check_one_encoder(files: Sequence[Path]) -> None:
    """Check that all files name the same encoder; unreadable files are skipped and reported later.

    Raises:
        Mismatch: the files name several encoders; the message lists each one with its number of files.
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for path in files:
        try:
            with open_hdf5(path) as stored:
                mark = mark_of(stored, path)
        except (HistoseekError, OSError, RuntimeError, ValueError, KeyError):
            continue
        if mark is not None:
            counts[repr(mark.encoder)] += 1
            first.setdefault(repr(mark.encoder), f"{path}, {mark.source}")
    if len(counts) > 1:
        raise Mismatch(
            f"the files are from {len(counts)} encoders, whose features cannot be compared: "
            f"{_listed(counts, first)}; nothing was imported: import the folder of one encoder"
        )


def check_one_length(files: Sequence[Path]) -> None:
    """Check that the vectors of all files have one length; unreadable files are skipped and reported later.

    Raises:
        Mismatch: they have several; the message lists each one with its number of files.
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for path in files:
        try:
            with open_hdf5(path) as stored:
                data = stored.get("features", stored.get("feats"))
                if not isinstance(data, h5py.Dataset) or len(shape := plain_shape(data)) != 2:
                    continue
                length = str(shape[1])
        except (HistoseekError, OSError, RuntimeError, ValueError, KeyError, IndexError):
            continue
        counts[length] += 1
        first.setdefault(length, str(path))
    if len(counts) > 1:
        raise Mismatch(
            f"the files have vectors of {len(counts)} lengths, which cannot be compared: "
            f"{_listed(counts, first)}; nothing was imported: give the files of one encoder"
        )


def _listed(counts: Counter[str], first: dict[str, str]) -> str:
    return "; ".join(
        f"{name}: {count} file{'' if count == 1 else 's'} (first {first[name]})"
        for name, count in counts.most_common()
    )
