"""Features that other tools made: TRIDENT, CLAM and STAMP files, taken into an atlas of their encoder.

Layouts as those tools write them: TRIDENT ``features`` (N, D) with ``coords`` (N, 2) int64 and their
attributes; CLAM the same without attributes; STAMP ``feats`` float16 with ``coords`` in micrometres and the
file attributes ``unit`` and ``tile_size_um``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from ..console import Report
from ..errors import BadInput, Damaged, HistoseekError, Mismatch, StorageFailed
from ..feature_files import MAX_BYTES, Features, parse_features
from ..feature_writer import write_features
from ..files import temporary
from .records import Added

if TYPE_CHECKING:
    from .atlas import Atlas


def read_foreign(path: Path, encoder: str, mpp: float | None = None) -> Features:
    """Read the features of one slide as TRIDENT, CLAM or STAMP wrote them.

    Args:
        path: .h5 file.
        encoder: name of the encoder that made them.
        mpp: micrometres per pixel of the slide's level 0; STAMP's places need it.

    Raises:
        BadInput: a pickle, another layout, or STAMP's without mpp.
        Mismatch: the file names another encoder.
        Damaged: not a whole HDF5 file.
    """
    if path.suffix.lower() in {".pt", ".pth", ".pkl"}:
        raise BadInput(
            f"{path} is a pickle, which can run code when opened; expected .h5 (CLAM writes both: take the "
            "folder h5_files)"
        )
    if not path.is_file():
        raise BadInput(f"{path} does not exist; check the path")
    try:
        with h5py.File(path, "r") as stored:
            keys = set(stored)
            item = _read_stamp(path, stored, mpp) if "feats" in keys else None
    except HistoseekError:
        raise
    except Exception as error:  # a foreign file can make HDF5 fail in any way
        raise Damaged(
            f"{path} is not a whole HDF5 file ({type(error).__name__}: {error}); make it again"
        ) from error
    layout = "stamp"
    if item is None:
        item = parse_features(path.read_bytes(), path)
        layout = "trident" if item.size_px_level0 else "clam"
        item = replace(item, mpp=item.mpp or mpp)
    if item.encoder not in {"unknown", encoder}:
        raise Mismatch(
            f"{path} says that its features are of encoder {item.encoder!r}; you said {encoder!r}"
        )
    name = path.stem if item.name in {"", "features", "coords"} else item.name
    about = {**item.about, "imported_from": str(path), "layout": layout}
    return replace(item, name=name, encoder=encoder, about=about, labels=None, groups=None)


def _read_stamp(path: Path, stored: h5py.File, mpp: float | None) -> Features:
    for key in ("feats", "coords"):
        if not isinstance(stored.get(key), h5py.Dataset):
            raise BadInput(f"{path} has datasets {sorted(stored)}; expected 'feats' and 'coords'")
    data, places = stored["feats"], stored["coords"]
    if data.ndim != 2 or places.shape != (data.shape[0], 2) or data.dtype.kind != "f":
        raise BadInput(
            f"{path}: feats {data.dtype} {data.shape} and coords {places.shape} do not fit"
        )
    if data.nbytes * 2 + places.nbytes > MAX_BYTES:
        raise BadInput(f"{path} claims {data.shape} features; at most {MAX_BYTES:,} bytes are read")
    unit = stored.attrs.get("unit", "um")
    if unit not in {"um", "µm"}:
        raise BadInput(f"{path} has places in {unit!r}; expected um, as STAMP writes them")
    if mpp is None:
        raise BadInput(
            f"{path} has places in micrometres; say how large a pixel of level 0 is, by --mpp or a column "
            "mpp of --metadata"
        )
    size_um = float(stored.attrs.get("tile_size_um", 0))
    size_px = int(stored.attrs.get("tile_size_px", 0))
    return Features(
        name=path.stem,
        encoder=str(stored.attrs.get("extractor", "unknown")),
        encoder_sha256="",
        features=data[()].astype(np.float32),
        coords=np.rint(np.asarray(places[()], dtype=np.float64) / mpp).astype(np.int64),
        size_px=size_px,
        size_px_level0=round(size_um / mpp),
        mpp=mpp,
        target_mpp=size_um / size_px if size_px else None,
    )


def import_features(
    path: Path,
    files: Sequence[Path],
    encoder: str,
    metadata: dict[str, dict[str, str]],
    mpp: float | None = None,
    metric: str = "cosine",
    replace_known: bool = False,
    progress: Report = lambda done, total, text: None,
) -> tuple[Atlas, list[Added]]:
    """Take features of another tool into an atlas, which is made if it is not there.

    Args:
        path: the atlas; bound to ``encoder`` by its name.
        files: one per slide.
        encoder: name of the encoder that made them all.
        metadata: by slide: label, patient, mpp and any other column.
        mpp: of level 0, where neither file nor metadata says.
        metric: cosine or l2, for an atlas that is made.
        replace_known: put other features of a slide that is there in the place of the old ones.
        progress: called after each file.

    Returns:
        The atlas, and what became of each file.

    Raises:
        BadInput: no file could be read for an atlas that is to be made.
        Mismatch: the atlas is of another encoder.
    """
    from .atlas import Atlas

    def mpp_of(file: Path) -> float | None:
        given = metadata.get(file.stem, {}).get("mpp") or mpp
        try:
            return float(given) if given else None
        except ValueError as error:
            raise BadInput(f"mpp of {file.stem!r} is {given!r}; expected a number") from error

    if not path.exists():
        item = read_foreign(files[0], encoder, mpp_of(files[0]))
        Atlas.create_external(path, encoder, item.features.shape[1], metric, item.target_mpp)
    atlas = Atlas(path)
    if not atlas.manifest.external or atlas.manifest.name != encoder:
        raise Mismatch(
            f"{path} is bound to encoder {atlas.manifest.name!r}; features of {encoder!r} made elsewhere "
            "belong in an atlas of their own"
        )
    results: list[Added] = []
    with atlas.writing() as writer:
        writer.tidy()
        for number, file in enumerate(files, start=1):
            try:
                item = read_foreign(file, encoder, mpp_of(file))
                item = replace(item, encoder_sha256=atlas.manifest.sha256)
                blob = _as_file(item, atlas.path)
                results.append(writer.add_features(item, blob, str(file), metadata, replace_known))
            except StorageFailed:
                raise
            except HistoseekError as error:
                results.append(Added(str(file), file.stem, "failed", reason=str(error)))
            progress(number, len(files), file.stem)
        writer.finish()
    return atlas, results


def _as_file(item: Features, folder: Path) -> bytes:
    """Return features as the bytes of our own feature file."""
    temp = temporary(folder / "import.h5")
    try:
        write_features(temp, item)
        return temp.read_bytes()
    finally:
        temp.unlink(missing_ok=True)
