"""Exports an atlas for other tools: NumPy, Parquet, AnnData, TensorBoard's projector, GeoJSON for QuPath.

Every format except GeoJSON contains the vectors. All contain, per tile, the fields of a hit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.files import discard, publish_file, publish_folder, storage_failed, temporary
from ...artifacts.spreadsheets import inert
from ...errors import BadInput, MissingPart, unknown_name
from ..atlas import Atlas
from ..search.columns import Coded
from ..view import View
from .column_names import for_anndata, for_numpy, for_tsv, one_cell, unique_names
from .qupath import write_geojson
from .table import Table, table_of


@dataclass(frozen=True)
class Exported:
    """The number of tiles written, and the new name of each renamed metadata column by its old name."""

    tiles: int
    renamed: dict[str, str] = field(default_factory=dict)


def export(atlas: Atlas, out: Path, kind: str, where: str | None = None, **more: Any) -> Exported:
    """Write an atlas, or the tiles that pass a filter, for another tool.

    Args:
        atlas: to export.
        out: file or folder that does not exist yet.
        kind: ``numpy``, ``parquet``, ``anndata``, ``projector`` or ``geojson``.
        where: metadata filter.
        more: for ``geojson``: ``clustering``, or ``like``, the id of a tile to compare all tiles with.

    Raises:
        BadInput: the kind is unknown, the file exists, or there is nothing to export.
        MissingPart: a package is missing.
        StorageFailed: no space.
    """
    if kind not in KINDS:
        raise unknown_name("kind of export", kind, KINDS)
    if out.exists():
        raise BadInput(f"{out} exists already; choose another name or remove it first")
    if kind == "geojson":
        return atlas.ask(_geojson, out, where, **more)
    table = atlas.ask(table_of, where)
    return Exported(len(table.vectors), KINDS[kind](table, out))


def _geojson(view: View, /, out: Path, where: str | None, **more: Any) -> Exported:
    return Exported(write_geojson(view, table_of(view, where), out, **more))


def _renamed(table: Table, names: dict[str, str]) -> dict[str, str]:
    """Return the exported name of each renamed column, by its name in the metadata."""
    before = {name: table.original.get(name, name) for name in names}
    return {before[name]: called for name, called in names.items() if called != before[name]}


def _numpy(table: Table, out: Path) -> dict[str, str]:
    """Write one .npz without pickles: ``vectors`` and all columns; texts as ``codes`` into ``names``."""
    arrays: dict[str, Any] = {}
    called = unique_names(table.columns, for_numpy)
    renamed = _renamed(table, called)
    for column, values in table.columns.items():
        name = called[column]
        if isinstance(values, Coded):
            arrays[f"codes_{name}"] = values.codes
            arrays[f"names_{name}"] = np.array(values.names or [""])
        else:
            arrays[f"column_{name}"] = values
    _publish(
        out,
        ".npz",
        lambda path: np.savez(
            path,
            allow_pickle=False,
            vectors=table.vectors,
            encoder=json.dumps(table.encoder),
            renamed_columns=json.dumps(renamed),
            **arrays,
        ),
    )
    return renamed


def _parquet(table: Table, out: Path) -> dict[str, str]:
    """Write one Parquet file: all columns, ``vector``, and two principal components for plotting."""
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
    """Write AnnData as .h5ad or .zarr.

    Vectors are in ``X``, level-0 coordinates in ``obsm['spatial']``, all other columns in ``obs``.
    """
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
    coords = np.stack([table.numbers("x"), table.numbers("y")], axis=1).astype(np.float64)
    uns = {"encoder": dict(table.encoder), "renamed_columns": json.dumps(renamed)}
    made = anndata.AnnData(X=table.vectors, obs=obs, obsm={"spatial": coords}, uns=uns)
    if out.suffix == ".zarr":
        with publish_folder(out) as folder:
            made.write_zarr(folder)
    else:
        _publish(out, ".h5ad", made.write_h5ad)
    return renamed


def _projector(table: Table, out: Path) -> dict[str, str]:
    """Write a folder for TensorBoard's projector: tensors, metadata, and its configuration."""

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
    """Let a library write a file, which appears under its name only when it is complete."""
    if out.suffix != suffix:
        raise BadInput(
            f"the name {out} must end in {suffix} for this format; change it, or choose another with --to"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_failed(out, error) from error
    temp = temporary(out)
    named = temp.with_name(temp.name + suffix)  # libraries append the suffix that they expect
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
