"""Feature files: one HDF5 file per slide or tile set, in TRIDENT's layout.

Source of the layout: TRIDENT (Mahmood lab), ``features`` (N, D) float32 and ``coords`` (N, 2) int64
with their attributes. Added here: ``files`` for tile sets, and attributes that name and describe the
source. Serving writes these files and index reads them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, Damaged, HistoseekError, Mismatch
from ..stopping import shielded
from .hdf5_files import open_hdf5
from .slide_names import SlideName

MAX_ROWS = 20_000_000
MAX_BYTES = 16 * 2**30
IMPORTED = "imported_from"
"""Key under which features of another tool state their file."""
STAIN = "stain"
"""Key under which features of a slide state its stain; also a column of the atlas."""
QUALITY = ("sharpness", "pen", "dark", "glass", "density")
"""What is measured on the pixels of every tile; see :mod:`histoseek.serving.slides.quality`."""


@dataclass(frozen=True)
class LeftOutTiles:
    """Tiles of a slide that were read but not embedded.

    Attributes:
        coords: (M, 2) int64, level-0 top-left x, y.
        quality: (M, Q) float32, one column for each name in :data:`QUALITY`.
        reasons: (M,) ``pen`` or ``blurred``.
    """

    coords: NDArray[np.int64]
    quality: NDArray[np.float32]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Features:
    """The embeddings of one slide or tile set.

    Attributes:
        name: the slide's name.
        encoder: name of the encoder.
        encoder_sha256: SHA-256 that identifies the encoder.
        features: (N, D) float32.
        coords: (N, 2) int64, level-0 top-left x, y; all 0 for a tile set.
        files: (N,) names of the tiles of a tile set, or None for a slide.
        kind: ``slide`` or ``tiles``.
        source: path of the slide or tile set.
        size_px: side of a tile in pixels, as the encoder received it.
        size_px_level0: side of a tile in level-0 pixels; 0 for a tile set.
        overlap_px: overlap of neighbours in tile pixels.
        mpp: micrometres per pixel of level 0, or None.
        target_mpp: micrometres per pixel of the tiles, or None.
        width: of level 0; 0 for a tile set.
        height: of level 0; 0 for a tile set.
        labels: (N,) label per tile ("" for none), or None.
        groups: (N,) group per tile ("" for none), or None.
        quality: (N, Q) float32, what was measured on the tiles' pixels: one column for each name in
            :data:`QUALITY`. None if nothing was measured.
        left_out: tiles that were left out for their quality, or None.
        about: further information, JSON-ready.
    """

    name: str
    encoder: str
    encoder_sha256: str
    features: NDArray[np.float32]
    coords: NDArray[np.int64]
    files: tuple[str, ...] | None = None
    kind: str = "slide"
    source: str = ""
    size_px: int = 0
    size_px_level0: int = 0
    overlap_px: int = 0
    mpp: float | None = None
    target_mpp: float | None = None
    width: int = 0
    height: int = 0
    labels: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    quality: NDArray[np.float32] | None = None
    left_out: LeftOutTiles | None = None
    about: dict[str, Any] = field(default_factory=dict)


def magnification(mpp: float | None) -> int:
    """Return the nominal objective of a pixel size (0.25 µm is 40x, 0.5 µm 20x); 0 if unknown."""
    return max(1, round(10 / mpp)) if mpp else 0


def read_features(path: Path) -> Features:
    """Read and check a feature file.

    Raises:
        BadInput: there is no such file, or its arrays do not match.
        Damaged: the file cannot be read as HDF5.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist; check the path")
    if path.suffix.lower() in {".pt", ".pth", ".pkl"}:
        raise BadInput(f"{path} is a pickle, which can run code when opened; expected .h5 features")
    return parse_features(path.read_bytes(), path)


def parse_features(blob: bytes, path: Path) -> Features:
    """Read and check the bytes of a feature file; messages name it ``path``.

    Raises:
        BadInput: the arrays do not match or are too large.
        Damaged: the bytes cannot be read as HDF5.
    """
    try:
        with shielded(), open_hdf5(blob, path) as stored:
            return _parse(path, stored)
    except HistoseekError:
        raise
    except Exception as error:  # an untrusted file can make HDF5 and its attributes fail in any way
        raise Damaged(
            f"{path} is not a complete feature file ({type(error).__name__}: {error}); embed its slide "
            "again, or let the other tool write it again"
        ) from error


def read_about(path: Path) -> dict[str, Any] | None:
    """Return ``about`` of a feature file; None if the file is missing, damaged or refused."""
    try:
        with shielded(), open_hdf5(path) as stored:
            if "features" not in stored or "coords" not in stored:
                return None
            about = json.loads(str(stored.attrs["about"]))
            return about if isinstance(about, dict) else None
    except (OSError, RuntimeError, ValueError, KeyError, BadInput):
        return None


def name_in(path: Path) -> SlideName:
    """Return the name and source path of a feature file's slide; for a damaged file, its file name."""
    try:
        with open_hdf5(path) as stored:
            data = stored.get("features")
            name = str(data.attrs.get("name", "")) if isinstance(data, h5py.Dataset) else ""
            source = str(stored.attrs.get("source", ""))
    except (HistoseekError, OSError, RuntimeError, ValueError, KeyError):
        name = source = ""
    if name in {"", "features", "coords"}:
        name = path.stem
    return SlideName(name, (source,) if source else ())


def _parse(path: Path, stored: h5py.File) -> Features:
    for key in ("features", "coords"):
        if not isinstance(stored.get(key), h5py.Dataset):
            raise BadInput(
                f"{path} has datasets {sorted(stored)}; expected 'features' and 'coords'"
            )
    data, coords = stored["features"], stored["coords"]
    shape, coords_shape = plain_shape(data), plain_shape(coords)
    if len(shape) != 2 or coords_shape != (shape[0], 2):
        raise BadInput(
            f"{path}: features {data.shape} and coords {coords.shape}; expected (N, D) and (N, 2)"
        )
    if data.nbytes + coords.nbytes > MAX_BYTES:
        raise BadInput(
            f"{path} has {data.shape} features; expected at most {MAX_BYTES:,} bytes: split it"
        )
    if shape[0] > MAX_ROWS or data.dtype.kind != "f" or coords.dtype.kind not in "iuf":
        raise BadInput(
            f"{path}: features are {data.dtype} {data.shape}, coords {coords.dtype}; expected at most "
            f"{MAX_ROWS:,} rows of floating-point features, and coords of numbers"
        )
    attributes = coords.attrs

    def texts(key: str) -> tuple[str, ...] | None:
        if key not in stored:
            return None
        if stored[key].shape != shape[:1]:  # before anything is read
            raise BadInput(
                f"{path}: {key!r} has shape {stored[key].shape}, 'features' has {shape[0]} rows"
            )
        return tuple(v.decode("utf-8") for v in stored[key][()])

    def number(key: str) -> float | None:
        return float(attributes[key]) if key in attributes else None

    about = json.loads(text_of(stored.attrs.get("about", "{}")))
    if not isinstance(about, dict):
        raise BadInput(f"{path}: its attribute 'about' is not a JSON object; create it again")
    return Features(
        name=text_of(data.attrs.get("name", path.stem)),
        encoder=text_of(data.attrs.get("encoder", "unknown")),
        encoder_sha256=text_of(data.attrs.get("encoder_sha256", "")),
        features=data[()].reshape(shape).astype(np.float32),
        coords=whole_pixels(np.asarray(coords[()]).reshape(coords_shape), path),
        files=texts("files"),
        kind=text_of(stored.attrs.get("kind", "slide")),
        source=text_of(stored.attrs.get("source", "")),
        size_px=int(attributes.get("patch_size", 0)),
        size_px_level0=int(attributes.get("patch_size_level0", 0)),
        overlap_px=int(attributes.get("overlap", 0)),
        mpp=number("mpp"),
        target_mpp=number("target_mpp"),
        width=int(attributes.get("level0_width", 0)),
        height=int(attributes.get("level0_height", 0)),
        labels=texts("labels"),
        groups=texts("groups"),
        quality=_quality(path, stored, "quality", shape[0]),
        left_out=_left_out(path, stored),
        about=about,
    )


def _quality(path: Path, stored: h5py.Group, key: str, rows: int) -> NDArray[np.float32] | None:
    """Return measures (rows, Q); None without any, or if another program wrote this dataset."""
    data = stored.get(key)
    names = None if data is None else data.attrs.get("names")
    if not isinstance(data, h5py.Dataset) or not isinstance(names, str):
        return None
    if names.split(",") != list(QUALITY):
        return None
    if data.shape != (rows, len(QUALITY)) or data.dtype.kind != "f":
        raise BadInput(
            f"{path}: {key!r} is {data.dtype} {data.shape}; expected floating-point numbers of the shape "
            f"{(rows, len(QUALITY))}"
        )
    values: NDArray[np.float32] = data[()].astype(np.float32)
    return values


def _left_out(path: Path, stored: h5py.File) -> LeftOutTiles | None:
    """Return the tiles left out; None without any, or if the group has another form."""
    group = stored.get("left_out")
    try:
        if not isinstance(group, h5py.Group) or group["coords"].shape[0] > MAX_ROWS:
            return None
        coords = whole_pixels(np.asarray(group["coords"][()]).reshape(-1, 2), path)
        texts = tuple(value.decode("utf-8") for value in group["reasons"][()])
        quality = _quality(path, group, "quality", len(coords))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, BadInput):
        return None  # of another program
    if quality is None or len(texts) != len(coords):
        return None
    return LeftOutTiles(coords, quality, texts)


def read_places(path: Path) -> tuple[NDArray[np.int64], LeftOutTiles | None]:
    """Return the coordinates (N, 2) of a feature file's tiles, and the tiles that were left out.

    Raises:
        HistoseekError: the file cannot be read.
    """
    with shielded(), open_hdf5(path) as stored:
        coords = whole_pixels(np.asarray(stored["coords"][()]).reshape(-1, 2), path)
        return coords, _left_out(path, stored)


def plain_shape(data: h5py.Dataset) -> tuple[int, ...]:
    """Return a dataset's shape without a leading axis of length 1, which some tools add."""
    shape = tuple(int(n) for n in data.shape)
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def text_of(value: Any) -> str:
    """Return an attribute as text; some tools store bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def whole_pixels(coords: NDArray[Any], path: Path) -> NDArray[np.int64]:
    """Return coordinates (N, 2) in pixels as integers; floating-point values must be whole numbers.

    Raises:
        BadInput: a value is fractional or not a number, so the unit is not level-0 pixels.
    """
    wrong = np.zeros(len(coords), dtype=bool)
    if coords.dtype.kind == "f":
        wrong = ~(np.isfinite(coords) & (coords == np.rint(coords))).all(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise BadInput(
            f"{path}: {int(wrong.sum())} of {len(coords)} coords are not whole pixels; the first is "
            f"{coords[row].tolist()} in row {row}; expected level-0 pixels: convert or round them"
        )
    pixels: NDArray[np.int64] = coords.astype(np.int64)
    return pixels


def content_sha256(item: Features) -> str:
    """Return a hash of vectors, coordinates and tile names, independent of the file's path."""
    digest = hashlib.sha256(item.encoder_sha256.encode())
    digest.update(np.ascontiguousarray(item.features).tobytes())
    digest.update(np.ascontiguousarray(item.coords).tobytes())
    for names in (item.files, item.labels, item.groups):
        digest.update(json.dumps(names).encode())
    return digest.hexdigest()


def check_features(item: Features, encoder: str, sha256: str, dim: int, origin: Path) -> None:
    """Check that features belong to an encoder and are finite.

    Raises:
        Mismatch: they have another encoder or another length; the message gives both.
        BadInput: values are not finite; the message says how many and where the first is.
    """
    if item.encoder_sha256 != sha256:
        other = item.encoder_sha256[:12] or "no sha256"
        raise Mismatch(
            f"{origin} has features of encoder {item.encoder!r} ({other}); this atlas is bound to "
            f"{encoder!r} ({sha256[:12]}): embed the slide with the atlas's encoder"
        )
    if item.features.shape[1] != dim:
        remedy = (
            "import files of one encoder" if IMPORTED in item.about else "embed the slide again"
        )
        raise Mismatch(
            f"{origin} has {item.features.shape[1]}-dimensional features; encoder {encoder!r} gives "
            f"{dim} dimensions: {remedy}"
        )
    broken = np.asarray(~np.isfinite(item.features).all(axis=1))
    if broken.any():
        remedy = "create the file again" if IMPORTED in item.about else "embed the slide again"
        verb = "contains" if broken.sum() == 1 else "contain"
        raise BadInput(
            f"{origin}: {int(broken.sum())} of {len(broken)} feature rows {verb} NaN or infinity; the "
            f"first is row {int(broken.argmax())}; {remedy}"
        )
