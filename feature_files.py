"""Feature files: one HDF5 per slide or tile set, in TRIDENT's layout, written and read the same way.

Source of the layout: TRIDENT (Mahmood lab), ``features`` (N, D) float32 and ``coords`` (N, 2) int64
with their attributes. Added here: ``files`` for tile sets, and attributes that name the source and what
is known of it. Written by serving, read by index.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from .errors import BadInput, Damaged, HistoseekError, Mismatch
from .files import publish_file, storage_failed, temporary

CHUNK_ROWS = 512
MAX_ROWS = 20_000_000
MAX_BYTES = 16 * 2**30


@dataclass(frozen=True)
class Features:
    """The embeddings of one slide or tile set.

    Attributes:
        name: the slide's name.
        encoder: name of the encoder.
        encoder_sha256: its identity.
        features: (N, D) float32.
        coords: (N, 2) int64, level-0 top-left x, y; all 0 for a tile set.
        files: (N,) names of the tiles of a tile set, or None for a slide.
        kind: ``slide`` or ``tiles``.
        source: where the pixels are.
        size_px: side of a tile as the encoder saw it.
        size_px_level0: side of a tile in level-0 pixels; 0 for a tile set.
        overlap_px: overlap of neighbours in tile pixels.
        mpp: micrometres per pixel of level 0, or None.
        target_mpp: micrometres per pixel of the tiles, or None.
        width: of level 0; 0 for a tile set.
        height: of level 0; 0 for a tile set.
        labels: (N,) label per tile ("" for none), or None.
        groups: (N,) group per tile ("" for none), or None.
        about: anything else worth keeping, JSON-ready.
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
    about: dict[str, Any] = field(default_factory=dict)


def write_features(path: Path, item: Features) -> None:
    """Publish a feature file in one step.

    Raises:
        StorageFailed: no space or no permission; a file that was there before is untouched.
    """
    with FeatureWriter(path, item.features.shape[1], len(item.features)) as out:
        out.append(item.features)
        out.publish(item)


class FeatureWriter:
    """Writes a feature file piece by piece; it appears under its name whole, or not at all.

    Memory does not grow with the number of tiles. The same pieces give the same bytes.
    """

    def __init__(self, path: Path, dim: int, expected: int) -> None:
        """Start a temporary file beside ``path``.

        Args:
            path: where the file will be.
            dim: length of an embedding.
            expected: about how many rows will come; sets the size of the chunks.

        Raises:
            StorageFailed: the folder cannot be written.
        """
        self._path, self._rows = path, min(CHUNK_ROWS, max(1, expected))
        self._spool: list[NDArray[np.float32]] = []
        self._count = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._temp = temporary(path)
            self._file = _TolerantFile(self._temp)
        except OSError as error:
            raise storage_failed(path, error) from error
        self._out = h5py.File(self._file, "w")
        self._data = self._out.create_dataset(
            "features",
            shape=(0, dim),
            dtype=np.float32,
            maxshape=(None, dim),
            chunks=(self._rows, dim),
        )

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()

    def _check(self) -> None:
        if self._file.error is not None:
            raise storage_failed(self._path, self._file.error) from self._file.error

    def append(self, features: NDArray[np.float32]) -> None:
        """Add rows (n, D); they are written a chunk at a time."""
        self._spool.append(np.asarray(features, dtype=np.float32))
        if sum(map(len, self._spool)) >= self._rows:
            self._flush()

    def _flush(self) -> None:
        rows = np.concatenate(self._spool) if self._spool else np.zeros((0, self._data.shape[1]))
        self._spool = []
        self._data.resize(self._count + len(rows), axis=0)
        self._data[self._count :] = rows
        self._count += len(rows)
        self._check()

    def publish(self, item: Features) -> None:
        """Write everything but ``item.features``, which were appended, and show the file.

        Raises:
            StorageFailed: no space or no permission; a file that was there before is untouched.
        """
        self._flush()
        _write_rest(self._out, self._data, item, self._path.parent)
        self._out.close()
        self._check()
        self._file.close()
        publish_file(self._temp, self._path)

    def discard(self) -> None:
        """Remove the temporary file, if it was not published."""
        self._out.close()
        self._file.close()
        self._temp.unlink(missing_ok=True)


class _TolerantFile(io.RawIOBase):
    """A file that keeps its first error for later, because HDF5 breaks the process on a full disk."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._raw = open(path, "r+b", buffering=0)  # noqa: SIM115 - closed by close()
        self.error: OSError | None = None

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        got = self._raw.readinto(view) or 0
        view[got:] = bytes(len(view) - got)
        return len(view)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += self._raw.write(view[done:]) or 0
        except OSError as error:
            self.error = self.error or error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._raw.truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def close(self) -> None:
        self._raw.close()
        super().close()


def _write_rest(out: h5py.File, data: h5py.Dataset, item: Features, folder: Path) -> None:
    common = {"name": item.name, "savetodir": str(folder)}
    data.attrs.update({**common, "encoder": item.encoder, "encoder_sha256": item.encoder_sha256})
    coords = out.create_dataset(
        "coords",
        data=item.coords.astype(np.int64),
        maxshape=(None, 2),
        chunks=(data.chunks[0], 2),
    )
    coords.attrs.update({**common, **_coords_attributes(item)})
    for key, values in (("files", item.files), ("labels", item.labels), ("groups", item.groups)):
        if values is not None:
            out.create_dataset(key, data=list(values), dtype=h5py.string_dtype("utf-8"))
    out.attrs.update(
        {
            "kind": item.kind,
            "source": item.source,
            "about": json.dumps(item.about, sort_keys=True),
        }
    )


def _coords_attributes(item: Features) -> dict[str, Any]:
    known = {"mpp": item.mpp, "target_mpp": item.target_mpp}
    return {
        "patch_size": item.size_px,
        "patch_size_level0": item.size_px_level0,
        "level0_magnification": magnification(item.mpp),
        "target_magnification": magnification(item.target_mpp),
        "overlap": item.overlap_px,
        "level0_width": item.width,
        "level0_height": item.height,
        **{k: v for k, v in known.items() if v is not None},
    }


def magnification(mpp: float | None) -> int:
    """Return the nominal objective of a pixel size (0.25 µm is 40x, 0.5 µm 20x); 0 if unknown."""
    return max(1, round(10 / mpp)) if mpp else 0


def read_features(path: Path) -> Features:
    """Read and check a feature file.

    Raises:
        BadInput: no such file, or arrays that do not fit each other.
        Damaged: not a readable HDF5 file.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist; check the path")
    if path.suffix.lower() in {".pt", ".pth", ".pkl"}:
        raise BadInput(f"{path} is a pickle, which can run code when opened; expected .h5 features")
    return parse_features(path.read_bytes(), path)


def parse_features(blob: bytes, path: Path) -> Features:
    """Read and check the bytes of a feature file; ``path`` is what messages call it.

    Raises:
        BadInput: arrays that do not fit each other, or too large ones.
        Damaged: not a readable HDF5 file.
    """
    try:
        with h5py.File(io.BytesIO(blob), "r") as stored:
            return _parse(path, stored)
    except HistoseekError:
        raise
    except Exception as error:  # a foreign file can make HDF5 and its attributes fail in any way
        raise Damaged(
            f"{path} is not a whole feature file ({type(error).__name__}: {error}); embed its slide "
            "again"
        ) from error


def read_about(path: Path) -> dict[str, Any] | None:
    """Return what a feature file says of its making, or None if it is missing or damaged."""
    try:
        with h5py.File(path, "r", locking=False) as stored:
            if "features" not in stored or "coords" not in stored:
                return None
            about = json.loads(str(stored.attrs["about"]))
            return about if isinstance(about, dict) else None
    except (OSError, RuntimeError, ValueError, KeyError):
        return None


def _parse(path: Path, stored: h5py.File) -> Features:
    for key in ("features", "coords"):
        if not isinstance(stored.get(key), h5py.Dataset):
            raise BadInput(
                f"{path} has datasets {sorted(stored)}; expected 'features' and 'coords'"
            )
    data, places = stored["features"], stored["coords"]
    if data.ndim != 2 or places.shape != (data.shape[0], 2):
        raise BadInput(
            f"{path}: features {data.shape} and coords {places.shape}; expected (N, D) and (N, 2)"
        )
    if data.nbytes + places.nbytes > MAX_BYTES:
        raise BadInput(f"{path} claims {data.shape} features; at most {MAX_BYTES:,} bytes are read")
    if data.shape[0] > MAX_ROWS or data.dtype.kind != "f" or places.dtype.kind not in "iu":
        raise BadInput(f"{path}: features are {data.dtype} {data.shape}, coords {places.dtype}")
    attributes, about = places.attrs, str(stored.attrs.get("about", "{}"))

    def text(key: str) -> tuple[str, ...] | None:
        if key not in stored:
            return None
        values = tuple(v.decode("utf-8") for v in stored[key][()])
        if len(values) != data.shape[0]:
            raise BadInput(
                f"{path}: {key!r} has {len(values)} rows, 'features' has {data.shape[0]}"
            )
        return values

    def number(key: str) -> float | None:
        return float(attributes[key]) if key in attributes else None

    known = json.loads(about)
    if not isinstance(known, dict):
        raise BadInput(f"{path}: its attribute 'about' is no JSON object; embed its slide again")
    return Features(
        name=str(data.attrs.get("name", path.stem)),
        encoder=str(data.attrs.get("encoder", "unknown")),
        encoder_sha256=str(data.attrs.get("encoder_sha256", "")),
        features=data[()].astype(np.float32),
        coords=places[()].astype(np.int64),
        files=text("files"),
        kind=str(stored.attrs.get("kind", "slide")),
        source=str(stored.attrs.get("source", "")),
        size_px=int(attributes.get("patch_size", 0)),
        size_px_level0=int(attributes.get("patch_size_level0", 0)),
        overlap_px=int(attributes.get("overlap", 0)),
        mpp=number("mpp"),
        target_mpp=number("target_mpp"),
        width=int(attributes.get("level0_width", 0)),
        height=int(attributes.get("level0_height", 0)),
        labels=text("labels"),
        groups=text("groups"),
        about=known,
    )


def content_sha256(item: Features) -> str:
    """Return a hash of what was embedded: vectors, places and names, wherever the file lies."""
    digest = hashlib.sha256(item.encoder_sha256.encode())
    digest.update(np.ascontiguousarray(item.features).tobytes())
    digest.update(np.ascontiguousarray(item.coords).tobytes())
    for names in (item.files, item.labels, item.groups):
        digest.update(json.dumps(names).encode())
    return digest.hexdigest()


def check_features(item: Features, encoder: str, sha256: str, dim: int, origin: Path) -> None:
    """Check that features belong to an encoder and hold numbers.

    Raises:
        Mismatch: made by another encoder, or of another length; names both.
        BadInput: values that are not finite; says how many and where first.
    """
    if item.encoder_sha256 != sha256:
        found = item.encoder_sha256[:12] or "no sha256"
        raise Mismatch(
            f"{origin} holds features of encoder {item.encoder!r} ({found}); this atlas is bound to "
            f"{encoder!r} ({sha256[:12]}): embed the slide with the atlas's encoder"
        )
    if item.features.shape[1] != dim:
        raise Mismatch(
            f"{origin} holds {item.features.shape[1]}-dimensional features; encoder {encoder!r} gives "
            f"{dim}: embed the slide again"
        )
    broken = np.asarray(~np.isfinite(item.features).all(axis=1))
    if broken.any():
        raise BadInput(
            f"{origin}: {int(broken.sum())} of {len(broken)} feature rows hold NaN or infinity, first "
            f"row {int(broken.argmax())}; embed the slide again"
        )
