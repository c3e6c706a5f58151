"""An atlas for other tools: NumPy, Parquet, AnnData, TensorBoard's projector, GeoJSON for QuPath.

Every format carries the vectors (but GeoJSON) and, per tile, what a hit would say of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, MissingPart, unknown_name
from ..feature_files import read_about
from ..files import (
    discard,
    publish_file,
    publish_folder,
    storage_failed,
    temporary,
    write_atomic,
)
from ..spreadsheets import inert
from . import cluster_report, clusterings
from .column_names import for_anndata, for_numpy, for_tsv, one_cell, unique_names
from .columns import NOT_PLACED, Coded, Columns
from .records import plain_name
from .search import Mask, allowed
from .vectors import prepared

if TYPE_CHECKING:
    from .atlas import Atlas

FIRST = 6
"""Own columns that stand before those of the metadata."""

COLOURS = (0x4C78A8, 0xF58518, 0xE45756, 0x72B7B2, 0x54A24B, 0xEECA3B, 0xB279A2, 0xFF9DA6, 0x9D755D)
UNKNOWN_COLOUR = 0x9E9E9E
UNKNOWN = -3
"""Stands for a tile that no cluster knows, where it is drawn."""


@dataclass(frozen=True)
class Table:
    """What is exported.

    Attributes:
        vectors: (N, D).
        columns: by name, each (N,): numbers, or coded texts.
        encoder: name and sha256.
        original: by name of a column the name in the metadata, where that was taken by another column.
    """

    vectors: NDArray[np.float32]
    columns: dict[str, NDArray[Any] | Coded]
    encoder: dict[str, Any]
    original: dict[str, str] = field(default_factory=dict)

    def numbers(self, name: str) -> NDArray[Any]:
        """Return a column of numbers."""
        column = self.columns[name]
        assert not isinstance(column, Coded)
        return column


def table_of(atlas: Atlas, where: str | None) -> Table:
    """Gather the tiles of an atlas that pass a filter, in the order of the index.

    Raises:
        BadInput: no tile passes, or the filter cannot be read.
    """
    view = atlas.view()
    columns = view.columns
    alive = np.repeat([bool(s["name"]) for s in columns.slides], np.diff(columns.starts))
    passing = allowed(view, where)
    mask: Mask = alive if passing is None else alive & passing
    rows = np.flatnonzero(mask)
    if not len(rows):
        raise BadInput("no tile passes the filter; loosen it")
    vectors = np.empty((len(rows), atlas.manifest.dim), dtype=np.float32)
    at = 0
    for number, slide in enumerate(columns.slides):
        start = int(columns.starts[number])
        inside = np.flatnonzero(mask[start : start + slide["tiles"]])
        if len(inside):
            vectors[at : at + len(inside)] = atlas.generations.vectors_of(slide)[inside]
            at += len(inside)
    manifest = atlas.manifest
    encoder = {"name": manifest.name, "sha256": manifest.sha256, "metric": manifest.metric}
    own = _own_columns(atlas, columns, rows)
    names = unique_names(columns.names(), taken=own)
    given: dict[str, NDArray[Any] | Coded] = {}
    for name, called in names.items():
        coded = columns.coded(name)
        given[called] = Coded(coded.names, coded.codes[rows])
    first = dict(list(own.items())[:FIRST])
    original = {called: name for name, called in names.items() if called != name}
    return Table(vectors, {**first, **given, **own}, encoder, original)


def _own_columns(
    atlas: Atlas, columns: Columns, rows: NDArray[np.int64]
) -> dict[str, NDArray[Any] | Coded]:
    """Return what histoseek itself says of each tile; no column of the metadata may take its place."""
    places = columns.places()[rows]
    slide = columns.slide_of(rows)
    scales = {
        key: np.array([np.nan if s[key] is None else s[key] for s in columns.slides], np.float64)
        for key in ("mpp", "target_mpp")
    }
    size = np.array([s["size_px_level0"] for s in columns.slides])
    found: dict[str, NDArray[Any] | Coded] = {
        "tile": columns.ids(rows),
        "x": places[:, 0],
        "y": places[:, 1],
        "size_px_level0": size[slide],
        "mpp": scales["mpp"][slide],
        "target_mpp": scales["target_mpp"][slide],
    }
    files = [columns.files(n) for n in range(len(columns.slides))]
    if any(f is not None for f in files):
        inside = rows - columns.starts[slide]
        pairs = zip(slide.tolist(), inside.tolist(), strict=True)
        found["file"] = np.array([_name(files[s], r) for s, r in pairs])
    for name in columns.clusterings():
        found |= _placed(atlas, columns, name, rows, slide)
    return found


def _placed(
    atlas: Atlas,
    columns: Columns,
    name: str,
    rows: NDArray[np.int64],
    slide: NDArray[np.int64],
) -> dict[str, NDArray[Any]]:
    """Return cluster (-1 noise, -2 not placed), strength and whether unknown, of a clustering."""
    known = clusterings.placements(atlas.catalog, name)
    cluster = np.full(len(rows), NOT_PLACED, dtype=np.int64)
    strength = np.zeros(len(rows))
    unknown = np.ones(len(rows), dtype=bool)
    for number in np.unique(slide).tolist():
        there = slide == number
        where = known.get(columns.slides[number]["id"])
        if where is not None:
            part = where[0].part(rows[there] - columns.starts[number])
            cluster[there], strength[there] = part.cluster, part.strength
            unknown[there] = part.unknown
    return {
        f"cluster.{name}": cluster,
        f"strength.{name}": strength,
        f"unknown.{name}": unknown,
    }


def _name(files: list[str | None] | None, row: int) -> str:
    return "" if files is None else files[row] or ""


def export(atlas: Atlas, out: Path, kind: str, where: str | None = None, **more: Any) -> int:
    """Write an atlas, or the tiles that pass a filter, for another tool.

    Args:
        atlas: to export.
        out: file or folder that is not there yet.
        kind: ``numpy``, ``parquet``, ``anndata``, ``projector`` or ``geojson``.
        where: metadata filter.
        more: of ``geojson``: ``clustering``, or ``like``, the id of a tile that all are compared with.

    Returns:
        How many tiles were written.

    Raises:
        BadInput: an unknown kind, a file that exists, or nothing to export.
        MissingPart: a package is missing.
        StorageFailed: no space.
    """
    return write(atlas, out, kind, where, **more).tiles


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        tiles: how many.
        renamed: by column of the metadata the name that it has there, where it could not keep its own.
    """

    tiles: int
    renamed: dict[str, str] = field(default_factory=dict)


def write(atlas: Atlas, out: Path, kind: str, where: str | None = None, **more: Any) -> Exported:
    """Write an atlas as :func:`export` does, and say which columns were renamed."""
    if kind not in KINDS:
        raise unknown_name("kind of export", kind, KINDS)
    if out.exists():
        raise BadInput(f"{out} exists already; choose another name or remove it first")
    table = table_of(atlas, where)
    if kind == "geojson":
        return Exported(_geojson(atlas, table, out, **more))
    return Exported(len(table.vectors), KINDS[kind](table, out))


def _renamed(table: Table, names: dict[str, str]) -> dict[str, str]:
    """Return by the name in the metadata the name in the export, of those that differ."""
    before = {name: table.original.get(name, name) for name in names}
    return {before[name]: called for name, called in names.items() if called != before[name]}


def _numpy(table: Table, out: Path) -> dict[str, str]:
    """One .npz without pickles: ``vectors`` and a column each; texts as ``codes`` of ``names``."""
    names: dict[str, Any] = {}
    called = unique_names(table.columns, for_numpy)
    renamed = _renamed(table, called)
    for column, values in table.columns.items():
        name = called[column]
        if isinstance(values, Coded):
            names[f"codes_{name}"] = values.codes
            names[f"names_{name}"] = np.array(values.names or [""])
        else:
            names[f"column_{name}"] = values
    _publish(
        out,
        ".npz",
        lambda path: np.savez(
            path,
            allow_pickle=False,
            vectors=table.vectors,
            encoder=json.dumps(table.encoder),
            renamed_columns=json.dumps(renamed),
            **names,
        ),
    )
    return renamed


def _parquet(table: Table, out: Path) -> dict[str, str]:
    """One Parquet file: a column each, ``vector``, and two principal components to draw."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise _missing("pyarrow") from error
    plane = _plane(table.vectors)
    flat = pa.array(table.vectors.ravel())
    called = unique_names(table.columns, taken=("vector", "projection_x", "projection_y"))
    renamed = _renamed(table, called)
    columns = {
        called[name]: _dictionary(pa, values) if isinstance(values, Coded) else pa.array(values)
        for name, values in table.columns.items()
    }
    columns["projection_x"], columns["projection_y"] = pa.array(plane[:, 0]), pa.array(plane[:, 1])
    columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, table.vectors.shape[1])
    about = {"encoder": json.dumps(table.encoder), "renamed_columns": json.dumps(renamed)}
    sheet = pa.table(columns).replace_schema_metadata(about)
    _publish(out, ".parquet", lambda path: parquet.write_table(sheet, path))
    return renamed


def _dictionary(pa: Any, values: Coded) -> Any:
    codes = pa.array(values.codes, mask=values.codes < 0)
    return pa.DictionaryArray.from_arrays(codes, pa.array(values.names, type=pa.string()))


def _anndata(table: Table, out: Path) -> dict[str, str]:
    """AnnData as .h5ad or .zarr: vectors in ``X``, places in ``obsm['spatial']``, the rest in ``obs``."""
    try:
        import anndata
        import pandas
    except ImportError as error:
        raise _missing("anndata") from error
    called = unique_names(table.columns, for_anndata, taken=("_index",))
    renamed = _renamed(table, called)
    obs = pandas.DataFrame(
        {
            called[name]: pandas.Categorical.from_codes(values.codes, values.names)
            if isinstance(values, Coded)
            else values
            for name, values in table.columns.items()
        },
        index=[str(tile) for tile in table.numbers("tile").tolist()],
    )
    places = np.stack([table.numbers("x"), table.numbers("y")], axis=1).astype(np.float64)
    uns = {"encoder": dict(table.encoder), "renamed_columns": json.dumps(renamed)}
    made = anndata.AnnData(X=table.vectors, obs=obs, obsm={"spatial": places}, uns=uns)
    if out.suffix == ".zarr":
        with publish_folder(out) as folder:
            made.write_zarr(folder)
    else:
        _publish(out, ".h5ad", made.write_h5ad)
    return renamed


def _projector(table: Table, out: Path) -> dict[str, str]:
    """A folder that TensorBoard's projector opens: tensors, metadata, and the file that names them."""

    def lines(names: list[str]) -> list[str]:
        columns = [_texts(table.columns[name]) for name in names]
        clean = [[inert(one_cell(v)) for v in column] for column in columns]
        return ["\t".join(row) for row in zip(*clean, strict=True)]

    names = list(table.columns)
    called = unique_names(names, for_tsv)
    with publish_folder(out) as folder:
        (folder / "tensors.bytes").write_bytes(table.vectors.astype("<f4").tobytes())
        text = "\n".join(["\t".join(called.values()), *lines(names)]) + "\n"
        (folder / "metadata.tsv").write_text(text, encoding="utf-8")
        count, dim = table.vectors.shape
        (folder / "projector_config.pbtxt").write_text(
            "embeddings {\n"
            f'  tensor_name: "{table.encoder["name"]}"\n'
            f"  tensor_shape: {count}\n  tensor_shape: {dim}\n"
            '  tensor_path: "tensors.bytes"\n  metadata_path: "metadata.tsv"\n}\n'
        )
    return _renamed(table, called)


def _texts(column: NDArray[Any] | Coded) -> list[str]:
    if isinstance(column, Coded):
        names = [*column.names, ""]
        return [names[code] for code in column.codes.tolist()]
    return [str(value) for value in column.tolist()]


def _geojson(
    atlas: Atlas, table: Table, out: Path, clustering: str | None = None, like: int | None = None
) -> int:
    """A folder with ``<slide>.geojson``: tiles as detections of their cluster, or with their similarity.

    Tiles are in QuPath's frame: (0, 0) is the corner of the scanned area.
    """
    values: NDArray[Any]
    if like is not None:
        query = prepared(atlas.vectors_of([like]), atlas.manifest.metric)
        vectors = prepared(table.vectors, atlas.manifest.metric)
        cosine = atlas.manifest.metric == "cosine"
        values = vectors @ query[0] if cosine else -np.linalg.norm(vectors - query[0], axis=1)
        given: dict[int, tuple[str, str]] = {}
    else:
        chosen, _ = atlas.clustering(clustering)
        values = table.numbers(f"cluster.{chosen}").copy()
        values[table.numbers(f"unknown.{chosen}")] = UNKNOWN
        given = cluster_report.names(atlas.catalog, chosen)
    slides = table.columns["slide"]
    assert isinstance(slides, Coded)
    drawn = np.flatnonzero(table.numbers("size_px_level0") > 0)
    if not len(drawn):
        raise BadInput(
            "none of the tiles has a size on its slide: tile sets have no places, and CLAM's files do not "
            "say (import them with --tile-px)"
        )
    order = drawn[np.argsort(slides.codes[drawn], kind="stable")]
    corners = origins(atlas)
    parts = np.split(order, np.flatnonzero(np.diff(slides.codes[order])) + 1)
    with publish_folder(out) as folder:
        for rows in parts:
            slide = slides.names[int(slides.codes[rows[0]])]
            origin = corners.get(slide) or (0, 0)
            features = [
                _feature(table, row, values[row], given, like, origin) for row in rows.tolist()
            ]
            document = {"type": "FeatureCollection", "features": features}
            name = plain_name(slide)
            if (folder / f"{name}.geojson").exists():  # another slide of nearly that name
                name = f"{name[:80]}-{hashlib.sha256(slide.encode()).hexdigest()[:8]}"
            write_atomic(folder / f"{name}.geojson", json.dumps(document, ensure_ascii=False))
    return len(drawn)


def origins(atlas: Atlas) -> dict[str, tuple[int, int] | None]:
    """Return by slide the corner of its scanned area in level-0 pixels, which QuPath shows as (0, 0).

    None where nobody wrote it down: in features of other tools, or made before it was kept.
    """
    found: dict[str, tuple[int, int] | None] = {}
    for slide in atlas.slides():
        if slide["kind"] != "slide":
            continue
        about = read_about(atlas.path / slide["features_file"]) or {}
        bounds = about.get("bounds") or [0, 0]
        found[slide["name"]] = (int(bounds[0]), int(bounds[1])) if "bounds" in about else None
    return found


def without_size(atlas: Atlas, where: str | None = None) -> dict[str, int]:
    """Return how many tiles of which slides have no size on a slide, and so no outline to draw."""
    view = atlas.view()
    passing = allowed(view, where)
    columns = view.columns
    found = {}
    for number, slide in enumerate(columns.slides):
        rows = slice(int(columns.starts[number]), int(columns.starts[number + 1]))
        count = slide["tiles"] if passing is None else int(passing[rows].sum())
        if slide["name"] and not slide["size_px_level0"] and count:
            found[slide["name"]] = count
    return found


def _feature(
    table: Table,
    row: int,
    value: Any,
    given: dict[int, tuple[str, str]],
    like: int | None,
    origin: tuple[int, int],
) -> dict[str, Any]:
    x, y, size = (int(table.numbers(key)[row]) for key in ("x", "y", "size_px_level0"))
    x, y = x - origin[0], y - origin[1]
    ring = [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]
    properties: dict[str, Any] = {"objectType": "detection"}
    if like is not None:
        properties["measurements"] = {"similarity": round(float(value), 6)}
    else:
        number = int(value)
        name = "unknown" if number == UNKNOWN else given.get(number, ("", ""))[0]
        name = name or ("noise" if number < 0 else f"cluster {number}")
        colour = UNKNOWN_COLOUR if number < 0 else COLOURS[number % len(COLOURS)]
        rgb = [colour >> 16, colour >> 8 & 0xFF, colour & 0xFF]
        properties["classification"] = {"name": name, "color": rgb}
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": properties,
    }


KINDS: dict[str, Callable[..., Any]] = {
    "numpy": _numpy,
    "parquet": _parquet,
    "anndata": _anndata,
    "projector": _projector,
    "geojson": _geojson,
}


def _plane(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the first two principal components (N, 2)."""
    centred = vectors - vectors.mean(axis=0)
    _, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    plane: NDArray[np.float32] = (centred @ axes[:, ::-1][:, :2]).astype(np.float32)
    return plane


def _publish(out: Path, suffix: str, write: Callable[[Path], Any]) -> None:
    """Let a library write a file, which appears under its name whole or not at all."""
    if out.suffix != suffix:
        raise BadInput(f"{out} is to end in {suffix}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = temporary(out)
    named = temp.with_name(temp.name + suffix)  # libraries add the ending that they expect
    try:
        write(named)
        os.replace(named, temp)
        publish_file(temp, out)
    except OSError as error:
        raise storage_failed(out, error) from error
    finally:
        discard(temp)
        if named.is_dir():
            shutil.rmtree(named)
        else:
            named.unlink(missing_ok=True)


def _missing(package: str) -> MissingPart:
    return MissingPart(f"this export needs {package}: pip install 'histoseek[bridges]'")
