"""Writes feature files in pieces; a file appears under its name complete, or not at all."""

from __future__ import annotations

import io
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..stopping import shielded
from .feature_files import QUALITY, Features, magnification
from .files import discard, publish_file, replacing, storage_failed, temporary

CHUNK_ROWS = 512


def write_features(path: Path, item: Features) -> None:
    """Write a feature file in one step.

    Raises:
        StorageFailed: no space or no permission; an existing file is unchanged.
    """
    with FeatureWriter(path, item.features.shape[1], len(item.features)) as out:
        out.append(item.features)
        out.publish(item)


def amend(path: Path, source: str, about: dict[str, Any]) -> None:
    """Update the source path and ``about`` of a feature file, in one step.

    Raises:
        StorageFailed: no space or no permission; the file is unchanged.
    """
    with replacing(path) as temp, shielded():
        shutil.copyfile(path, temp)
        with h5py.File(temp, "r+") as stored:
            document = {**json.loads(str(stored.attrs["about"])), **about, "source": source}
            stored.attrs["source"] = source
            stored.attrs["about"] = json.dumps(document, sort_keys=True)


class FeatureWriter:
    """Writes a feature file in pieces; it appears under its name complete, or not at all.

    Memory does not grow with the number of tiles. The same pieces give the same bytes.
    """

    def __init__(self, path: Path, dim: int, expected: int) -> None:
        """Start a temporary file beside ``path``.

        Args:
            path: path of the finished file.
            dim: length of an embedding.
            expected: approximate number of rows; sets the size of the chunks.

        Raises:
            StorageFailed: the folder cannot be written.
        """
        self._path, self._rows = path, min(CHUNK_ROWS, max(1, expected))
        self._spool: list[NDArray[np.float32]] = []
        self._count = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with shielded():  # after a Ctrl-C the temporary file is still deleted
                self._temp = temporary(path)
                weakref.finalize(self, discard, self._temp)
            self._file = _TolerantFile(self._temp)
        except OSError as error:
            raise storage_failed(path, error) from error
        try:
            self._start(dim)
        except BaseException:
            discard(self._temp)
            raise

    @shielded()
    def _start(self, dim: int) -> None:
        self._out = h5py.File(self._file, "w")
        self._data = self._out.create_dataset(
            "features", (0, dim), np.float32, maxshape=(None, dim), chunks=(self._rows, dim)
        )

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()

    def _check(self) -> None:
        error = self._file.error
        if isinstance(error, OSError):
            raise storage_failed(self._path, error) from error
        if error is not None:
            raise error

    @shielded()
    def append(self, features: NDArray[np.float32]) -> None:
        """Append rows (n, D); they are written in chunks."""
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

    @shielded()
    def publish(self, item: Features) -> None:
        """Write all of ``item`` except the features, which were appended, and move the file into place.

        Raises:
            StorageFailed: no space or no permission; an existing file is unchanged.
        """
        self._flush()
        _write_rest(self._out, self._data, item, self._path.parent)
        self._out.close()
        self._check()
        self._file.close()
        publish_file(self._temp, self._path)

    @shielded()
    def discard(self) -> None:
        """Delete the temporary file if it was not published."""
        self._out.close()
        self._file.close()
        discard(self._temp)


class _TolerantFile(io.FileIO):
    """A file that stores its first error, such as a full disk, instead of raising it inside HDF5."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "r+b")
        self.error: Exception | None = None

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        got = super().readinto(view) or 0
        view[got:] = bytes(len(view) - got)
        return len(view)

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += super().write(view[done:]) or 0
        except Exception as error:
            self.error = self.error or error
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return super().truncate(size)
        except Exception as error:
            self.error = self.error or error
            return size or 0


def _write_rest(out: h5py.File, data: h5py.Dataset, item: Features, folder: Path) -> None:
    common = {"name": item.name, "savetodir": str(folder)}
    data.attrs.update({**common, "encoder": item.encoder, "encoder_sha256": item.encoder_sha256})
    coords = out.create_dataset(
        "coords", data=item.coords.astype(np.int64), maxshape=(None, 2), chunks=(data.chunks[0], 2)
    )
    sizes = {
        "patch_size": item.size_px,
        "patch_size_level0": item.size_px_level0,
        "level0_magnification": magnification(item.mpp),
        "target_magnification": magnification(item.target_mpp),
        "overlap": item.overlap_px,
        "level0_width": item.width,
        "level0_height": item.height,
    }
    scales = {"mpp": item.mpp, "target_mpp": item.target_mpp}
    coords.attrs.update({**common, **sizes, **{k: v for k, v in scales.items() if v is not None}})
    for key, values in (("files", item.files), ("labels", item.labels), ("groups", item.groups)):
        if values is not None:
            out.create_dataset(key, data=list(values), dtype=h5py.string_dtype("utf-8"))
    if item.quality is not None:
        _write_quality(out, item.quality)
    if item.left_out is not None:
        group = out.create_group("left_out")
        group.create_dataset("coords", data=item.left_out.coords.astype(np.int64))
        reasons = list(item.left_out.reasons)
        group.create_dataset("reasons", data=reasons, dtype=h5py.string_dtype("utf-8"))
        _write_quality(group, item.left_out.quality)
    about = json.dumps(item.about, sort_keys=True)
    out.attrs.update({"kind": item.kind, "source": item.source, "about": about})


def _write_quality(out: h5py.Group, quality: NDArray[np.float32]) -> None:
    stored = out.create_dataset("quality", data=quality.astype(np.float32))
    stored.attrs["names"] = ",".join(QUALITY)
