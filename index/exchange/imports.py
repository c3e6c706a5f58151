"""Imports features of other tools (TRIDENT, CLAM and STAMP files) into an atlas of their encoder.

Layouts: TRIDENT writes ``features`` (N, D) and ``coords`` (N, 2) int64 with attributes. CLAM writes the
same without attributes. STAMP writes ``feats`` float16, ``coords`` in micrometres, and the file attributes
``unit`` and ``tile_size_um``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from ...artifacts.feature_files import (
    IMPORTED,
    MAX_BYTES,
    Features,
    check_features,
    parse_features,
    plain_shape,
    read_features,
    text_of,
)
from ...artifacts.feature_writer import write_features
from ...artifacts.files import discard, temporary
from ...artifacts.hdf5_files import open_hdf5
from ...artifacts.manifest import Manifest
from ...artifacts.tables import number_of
from ...console import Progress, counted, no_progress
from ...errors import BadInput, Damaged, HistoseekError, Mismatch, StorageFailed
from ..atlas import Atlas
from ..clusters.mosaic import mosaic_of_groups
from ..inputs import PICKLES, VECTORS
from ..store.metadata import AddedSlides, Metadata, Row, Rows, match_rows
from ..store.rows import Added
from ..vectors.scan import prepared
from ..writer import Writer
from .encoder_marks import check_alike, mark_of

BY_OPTION = "--encoder"
"""Reported as the source of the encoder's name if the file names none."""
NO_TILE_SIZE = "the file has no tile size; import it again with --tile-px"


def read_tool_features(path: Path, encoder: str, mpp: float | None = None) -> Features:
    """Read the features of one slide from an .h5 file of TRIDENT, CLAM or STAMP.

    Args:
        path: .h5 file.
        encoder: name of the encoder that made them.
        mpp: micrometres per pixel of the slide's level 0; required for STAMP's coordinates.

    Raises:
        BadInput: the file is a pickle, has another layout, or is from STAMP and mpp is missing.
        Mismatch: the file names another encoder.
        Damaged: the HDF5 file is incomplete.
    """
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise BadInput(
            f"{path} is a pickle, which can run code when it is opened; expected .h5 (CLAM writes both: "
            "use its folder h5_files)"
        )
    if not path.is_file():
        raise BadInput(f"{path} does not exist; check the path")
    if suffix in VECTORS or suffix in {".csv", ".tsv"}:
        raise BadInput(
            f"{path} has a layout that is not read; expected .h5 with features (N, D) and coords (N, 2), "
            "one per slide, as TRIDENT and CLAM write it (docs/atlas.md says how to make it from arrays)"
        )
    try:
        blob = path.read_bytes()
        with open_hdf5(blob, path) as stored:
            mark = mark_of(stored, path)
            if mark is not None and mark.encoder != encoder:
                raise Mismatch(
                    f"{path} names the encoder {mark.encoder!r} in {mark.source}, but --encoder is "
                    f"{encoder!r}; pass the name in the file, or import other files"
                )
            nominal = _nominal_mpp(stored)
            item = _read_stamp(path, stored, mpp) if "feats" in stored else None
    except HistoseekError:
        raise
    except Exception as error:  # a file of another tool can make HDF5 fail in any way
        raise Damaged(
            f"{path} is damaged or not an HDF5 file ({type(error).__name__}: {error}); create it again"
        ) from error
    layout = "stamp"
    if item is None:
        item = parse_features(blob, path)
        layout = "trident" if item.size_px_level0 else "clam"
        scale = item.target_mpp or nominal or _scale_of(item, item.mpp or mpp)
        item = replace(item, mpp=item.mpp or mpp, target_mpp=scale)
    name = path.stem if item.name in {"", "features", "coords"} else item.name
    about = {
        **item.about,
        IMPORTED: str(path),
        "layout": layout,
        "encoder_by": BY_OPTION if mark is None else mark.source,
    }
    return replace(item, name=name, encoder=encoder, about=about, labels=None, groups=None)


def _nominal_mpp(stored: h5py.File) -> float | None:
    """Return µm per pixel of the tiles from TRIDENT's ``target_magnification`` (20 means 0.5), if given."""
    coords = stored.get("coords")
    attributes = coords.attrs if isinstance(coords, h5py.Dataset) else {}
    power = float(attributes.get("target_magnification", 0.0))
    return 10 / power if 0 < power < 1000 else None


def _scale_of(item: Features, mpp: float | None) -> float | None:
    """Return µm per pixel of the tiles from their two sizes and the mpp of level 0; None if unknown."""
    if not (mpp and item.size_px and item.size_px_level0):
        return None
    return mpp * item.size_px_level0 / item.size_px


def _read_stamp(path: Path, stored: h5py.File, mpp: float | None) -> Features:
    for key in ("feats", "coords"):
        if not isinstance(stored.get(key), h5py.Dataset):
            raise BadInput(f"{path} has datasets {sorted(stored)}; expected 'feats' and 'coords'")
    kind = text_of(stored.attrs.get("feat_type", "tile"))
    if kind != "tile":
        raise BadInput(
            f"{path} contains one vector of a whole {kind} (STAMP's feat_type), not features of tiles; "
            "import the folder with the features of tiles"
        )
    data, coords = stored["feats"], stored["coords"]
    rows, sites = plain_shape(data), plain_shape(coords)
    if len(rows) != 2 or sites != (rows[0], 2) or data.dtype.kind != "f":
        raise BadInput(
            f"{path} has feats {data.dtype} {data.shape} and coords {coords.shape}; expected floats (N, D) "
            "and coords (N, 2)"
        )
    if data.nbytes * 2 + coords.nbytes > MAX_BYTES:
        raise BadInput(
            f"{path} has features of shape {data.shape}; the limit is {MAX_BYTES:,} bytes"
        )
    flat = np.asarray(coords[()], np.float64).reshape(sites)
    coords_um, size_um, size_px = _stamp_coords(path, stored, flat)
    if mpp is None:
        raise BadInput(
            f"{path} has coordinates in micrometres; give the size of a level-0 pixel by --mpp or by a "
            "column mpp in --metadata"
        )
    return Features(
        name=path.stem,
        encoder=text_of(stored.attrs.get("extractor", "unknown")),
        encoder_sha256="",
        features=data[()].reshape(rows).astype(np.float32),
        coords=np.rint(coords_um / mpp).astype(np.int64),
        size_px=size_px,
        size_px_level0=round(size_um / mpp),
        mpp=mpp,
        target_mpp=size_um / size_px if size_px else None,
    )


def _stamp_coords(
    path: Path, stored: h5py.File, coords: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float, int]:
    """Return coordinates (N, 2) and side of a tile in micrometres, and its side in pixels.

    STAMP's versions differ. Newer files have ``tile_size_um`` (or ``tile_size``) with the unit um. The
    first ones have no unit; their coordinates are in pixels of tiles of 256 um and 224 px.
    """
    attributes = stored.attrs
    unit = text_of(attributes["unit"]) if "unit" in attributes else None
    if unit in {"um", "µm"}:
        size_um = float(attributes.get("tile_size_um", attributes.get("tile_size", 0)))
        if size_um > 0:
            return coords, size_um, int(attributes.get("tile_size_px", 0))
        raise BadInput(f"{path} has no tile size; create it with a newer STAMP")
    steps = np.diff(np.unique(coords[:, 0]))
    in_pixels = len(steps) and not (steps % 224).any()
    if unit is None and (round(float(attributes.get("tile_size", 0))) == 224 or in_pixels):
        return coords * (256 / 224), 256.0, 224
    raise BadInput(
        f"{path} has coordinates in unit {unit or 'none'!r}; expected 'um', which STAMP writes"
    )


def read_query(path: Path, manifest: Manifest) -> NDArray[np.float32]:
    """Read the vectors (Q, D) of a new slide's mosaic, from our feature file or one of an external encoder.

    Raises:
        BadInput: the file cannot be read as features.
        Mismatch: the features have another encoder or length.
    """
    item = (
        read_tool_features(path, manifest.name, 1.0) if manifest.external else read_features(path)
    )
    if manifest.external:
        item = replace(item, encoder_sha256=manifest.sha256)
    check_features(item, manifest.name, manifest.sha256, manifest.dim, path)
    if not len(item.features):
        raise BadInput(f"{path} contains no tiles; choose a file with tiles as the query")
    vectors = prepared(item.features, manifest.metric)
    return item.features[mosaic_of_groups(vectors, item.coords, item.groups)]


def import_features(
    path: Path,
    files: Sequence[Path],
    encoder: str,
    metadata: Metadata,
    mpp: float | None = None,
    tile_px: int | None = None,
    metric: str = "cosine",
    replace_known: bool = False,
    mixed_scales: bool = False,
    progress: Progress = no_progress,
    projection: NDArray[np.float32] | None = None,
) -> tuple[Atlas, AddedSlides]:
    """Import features of another tool into an atlas; create the atlas if it does not exist.

    Args:
        path: the atlas; bound to ``encoder`` by name.
        files: one per slide.
        encoder: name of the encoder that made them all.
        metadata: by slide: label, patient, mpp and any other column.
        mpp: micrometres per pixel of level 0, used if neither file nor metadata has it.
        tile_px: side of a tile in level-0 pixels, used if the file does not have it (CLAM's do not).
        metric: cosine or l2, for a new atlas.
        replace_known: replace the features of a slide that is already in the atlas.
        mixed_scales: from now on, allow tiles of different µm per pixel in the atlas.
        progress: called after each file.
        projection: (F, D) map that features (F,) are multiplied by, such as the last one of the encoder's
            head, which the other tool left out. The atlas is then bound to the name with ``-projected``
            behind it.

    Returns:
        The atlas, and the result for each file.

    Raises:
        BadInput: the atlas is new and no file could be read, or a size is not positive.
        Mismatch: the atlas has another encoder; or the files name several encoders or, for a new atlas,
            have vectors of several lengths. Nothing is written.
    """
    if mpp is not None and not 0 < mpp < 1000:
        raise BadInput(f"mpp is {mpp:g}; expected µm per pixel, such as 0.25")
    if tile_px is not None and tile_px < 1:
        raise BadInput(f"tile_px is {tile_px}; expected the side of a tile in level-0 pixels")
    check_alike(files, one_length=not path.exists())
    slides = Atlas(path).slides() if path.exists() else []
    rows = match_rows(metadata, files, slides)
    source = _Source(encoder, rows, mpp, tile_px, projection)
    encoder = source.called
    if not path.exists():
        item = _first_readable(files, source.read)
        Atlas.create_external(path, encoder, item.features.shape[1], metric, item.target_mpp)
    atlas = Atlas(path)
    if encoder != (atlas.store.bound_from or (atlas.manifest.external and atlas.manifest.name)):
        name = atlas.store.bound_from or atlas.manifest.name
        raise Mismatch(
            f"{path} is bound to encoder {name!r}; import features of {encoder!r}, made by "
            "another tool, into a separate atlas"
        )
    results: list[Added] = []
    with atlas.writing() as writer:
        writer.tidy()
        if mixed_scales:
            writer.allow_mixed_scales()
        for number, file in enumerate(files, start=1):
            try:
                results.append(source.add(atlas, writer, file, replace_known))
            except StorageFailed:
                raise
            except HistoseekError as error:
                results.append(Added(str(file), file.stem, "failed", reason=str(error)))
            progress(number, len(files), file.stem)
        writer.finish()
    return atlas, AddedSlides(results, rows)


@dataclass(frozen=True)
class _Source:
    """What is known of the files besides their contents; see :func:`import_features`."""

    encoder: str
    rows: Rows
    mpp: float | None
    tile_px: int | None
    projection: NDArray[np.float32] | None

    @property
    def called(self) -> str:
        """The encoder's name in the atlas: projected features are not those of the tool."""
        return self.encoder if self.projection is None else f"{self.encoder}-projected"

    def read(self, file: Path) -> Features:
        item = read_tool_features(file, self.encoder, self._mpp_of(file))
        if self.projection is None:
            return item
        if item.features.shape[1] != len(self.projection):
            raise BadInput(
                f"{file} has features of {item.features.shape[1]} numbers, the projection takes "
                f"{len(self.projection)}: the features are of another encoder"
            )
        return replace(item, encoder=self.called, features=item.features @ self.projection)

    def _mpp_of(self, file: Path) -> float | None:
        given = self.rows.of(file).get("mpp") or self.mpp
        mpp = number_of(str(given)) if given else None
        if given and (mpp is None or not 0 < mpp < 1000):
            raise BadInput(
                f"mpp of {file.stem!r} is {given!r}; expected a number of micrometres per pixel above 0"
            )
        return mpp

    def add(self, atlas: Atlas, writer: Writer, file: Path, replace_known: bool) -> Added:
        row = self.rows.of(file)
        item, note = _with_metadata_mpp(self.read(file), row)
        size = item.size_px_level0 or self.tile_px or 0
        item = replace(item, encoder_sha256=atlas.store.imported_sha256, size_px_level0=size)
        blob = _as_file(item, atlas.path)
        added = writer.add_features(item, blob, str(file), row, replace_known)
        stored = added.state not in {"failed", "unchanged"}
        reasons = [added.reason, NO_TILE_SIZE if stored and not size else "", note]
        reasons += [_zeros(item), _contradiction(item)] if stored else []
        encoder_by = str(item.about["encoder_by"])
        return replace(added, reason="; ".join(filter(None, reasons)), encoder_by=encoder_by)


def _with_metadata_mpp(item: Features, row: Row) -> tuple[Features, str]:
    """Replace the file's mpp by the metadata's; also return a note if the two differ."""
    mpp = number_of(row.get("mpp", ""))
    if mpp is None or item.mpp is None or abs(mpp - item.mpp) <= 0.01 * mpp:
        return item, ""
    note = f"the metadata's {mpp:g} µm per pixel was used instead of the file's {item.mpp:g}"
    return replace(item, mpp=mpp), note


def _zeros(item: Features) -> str:
    """Return a note on tiles whose vector is zero; "" if there are none."""
    count = int((~item.features.any(axis=1)).sum())
    tiles = f"{counted(count, 'tile')} {'has' if count == 1 else 'have'}"
    return f"{tiles} only zeros as vector, which is often padding" if count else ""


def _contradiction(item: Features) -> str:
    """Return a note if the µm per pixel of the tiles does not follow from those of level 0."""
    implied = _scale_of(item, item.mpp)
    if implied is None or not item.target_mpp or abs(implied - item.target_mpp) <= 0.05 * implied:
        return ""
    return (
        f"the file states {item.target_mpp:g} µm per pixel of its tiles, but {item.size_px_level0} level-0 "
        f"pixels of {item.mpp:g} µm as {item.size_px} pixels give {implied:g}"
    )


def _first_readable(files: Sequence[Path], read: Callable[[Path], Features]) -> Features:
    first: HistoseekError | None = None
    for file in files:
        try:
            return read(file)
        except HistoseekError as error:
            first = first or error
    raise first or BadInput("there are no files to import")


def _as_file(item: Features, folder: Path) -> bytes:
    """Return features as the bytes of our own feature file."""
    temp = temporary(folder / "import.h5")
    try:
        write_features(temp, item)
        return temp.read_bytes()
    finally:
        discard(temp)
