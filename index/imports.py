"""Features that other tools made: TRIDENT, CLAM and STAMP files, taken into an atlas of their encoder.

Layouts as those tools write them: TRIDENT ``features`` (N, D) with ``coords`` (N, 2) int64 and their
attributes; CLAM the same without attributes; STAMP ``feats`` float16 with ``coords`` in micrometres and the
file attributes ``unit`` and ``tile_size_um``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
from numpy.typing import NDArray

from ..console import Report
from ..errors import BadInput, Damaged, HistoseekError, Mismatch, StorageFailed
from ..feature_files import MAX_BYTES, Features, check_features, parse_features, read_features
from ..feature_writer import write_features
from ..files import discard, temporary
from ..manifest import Manifest
from .records import Added, by_stem, row_of

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
    places_um, size_um, size_px = _stamp_places(path, stored, np.asarray(places[()], np.float64))
    if mpp is None:
        raise BadInput(
            f"{path} has places in micrometres; say how large a pixel of level 0 is, by --mpp or a column "
            "mpp of --metadata"
        )
    return Features(
        name=path.stem,
        encoder=str(stored.attrs.get("extractor", "unknown")),
        encoder_sha256="",
        features=data[()].astype(np.float32),
        coords=np.rint(places_um / mpp).astype(np.int64),
        size_px=size_px,
        size_px_level0=round(size_um / mpp),
        mpp=mpp,
        target_mpp=size_um / size_px if size_px else None,
    )


def _stamp_places(
    path: Path, stored: h5py.File, places: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float, int]:
    """Return places (N, 2) and side of a tile in micrometres, and its side in pixels.

    STAMP's versions differ: ``tile_size_um`` (or ``tile_size``) with the unit um; the first ones had no
    unit, and counted in pixels of tiles of 256 um and 224 px.
    """
    attributes = stored.attrs
    unit = attributes.get("unit")
    if unit in {"um", "µm"}:
        size_um = float(attributes.get("tile_size_um", attributes.get("tile_size", 0)))
        if size_um > 0:
            return places, size_um, int(attributes.get("tile_size_px", 0))
        raise BadInput(f"{path} does not say how large a tile is; make it with a newer STAMP")
    steps = np.diff(np.unique(places[:, 0])) if len(places) else np.zeros(0)
    in_pixels = len(steps) and not (steps % 224).any()
    if unit is None and (round(float(attributes.get("tile_size", 0))) == 224 or in_pixels):
        return places * (256 / 224), 256.0, 224
    raise BadInput(f"{path} has places in {unit or 'no unit'!r}; expected um, as STAMP writes them")


def read_query(path: Path, manifest: Manifest) -> NDArray[np.float32]:
    """Read the features (N, D) of a new slide to ask an atlas with: ours, or of an external encoder's tool.

    Raises:
        BadInput: not readable as such.
        Mismatch: of another encoder, or length.
    """
    item = read_foreign(path, manifest.name, 1.0) if manifest.external else read_features(path)
    if manifest.external:
        item = replace(item, encoder_sha256=manifest.sha256)
    check_features(item, manifest.name, manifest.sha256, manifest.dim, path)
    if not len(item.features):
        raise BadInput(f"{path} holds no tiles; there is nothing to ask with")
    return item.features


def import_features(
    path: Path,
    files: Sequence[Path],
    encoder: str,
    metadata: dict[str, dict[str, str]],
    mpp: float | None = None,
    tile_px: int | None = None,
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
        tile_px: side of a tile in pixels of level 0, where no file says (CLAM's do not).
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

    metadata = by_stem(metadata)

    def mpp_of(file: Path) -> float | None:
        given = (row_of(metadata, file.stem, "") or {}).get("mpp") or mpp
        try:
            found = float(given) if given else None
        except ValueError as error:
            raise BadInput(f"mpp of {file.stem!r} is {given!r}; expected a number") from error
        if found is not None and not 0 < found < 1000:
            raise BadInput(
                f"mpp of {file.stem!r} is {found}; expected micrometres per pixel, above 0"
            )
        return found

    if not path.exists():
        item = _first_readable(files, lambda file: read_foreign(file, encoder, mpp_of(file)))
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
                size = item.size_px_level0 or tile_px or 0
                item = replace(item, encoder_sha256=atlas.manifest.sha256, size_px_level0=size)
                blob = _as_file(item, atlas.path)
                added = writer.add_features(item, blob, str(file), metadata, replace_known)
                if not size and not added.reason:
                    text = "no file says how large its tiles are: import it again with --tile-px"
                    added = replace(added, reason=text)
                results.append(added)
            except StorageFailed:
                raise
            except HistoseekError as error:
                results.append(Added(str(file), file.stem, "failed", reason=str(error)))
            progress(number, len(files), file.stem)
        writer.finish()
    return atlas, results


def _first_readable(files: Sequence[Path], read: Callable[[Path], Features]) -> Features:
    first: HistoseekError | None = None
    for file in files:
        try:
            return read(file)
        except HistoseekError as error:
            first = first or error
    assert first is not None
    raise first


def _as_file(item: Features, folder: Path) -> bytes:
    """Return features as the bytes of our own feature file."""
    temp = temporary(folder / "import.h5")
    try:
        write_features(temp, item)
        return temp.read_bytes()
    finally:
        discard(temp)
