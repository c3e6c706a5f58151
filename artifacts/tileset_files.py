"""Opens tile sets: folders, tables, tar and npz files."""

from __future__ import annotations

import tarfile
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from .files import sha256_file
from .images import MAX_BYTES, SUFFIXES
from .tables import parse_table, read_csv, same_text, value_of
from .tilesets import MANIFEST, MAX_UNPACKED, Tile, TileSet, _rows_fingerprint, content_hash
from .unread import why_unread
from .walking import LeftOut, is_hidden, walk

OWN = ("group",)
"""Further columns of a manifest of tiles with a meaning."""
NPZ_ARRAYS = {"images", "labels", "class_names", "group", "ids"}
"""Arrays of an ``.npz`` pack with a meaning; others with a value per image are columns."""


def open_tiles(source: Path, manifest: Path | None = None) -> TileSet:
    """Open a folder, CSV manifest, tar pack or npz pack as a tile set.

    Args:
        source: the folder or file.
        manifest: a CSV whose ``file`` column names tiles of ``source``; replaces the manifest inside.

    Raises:
        BadInput: the source does not exist, has no tiles, or does not match the manifest; the message
            says which.
    """
    if not source.exists():
        raise BadInput(f"{source} does not exist; check the path")
    if source.is_dir():
        tiles = _open_folder(source, manifest)
    elif manifest is not None and source.suffix.lower() in {".csv", ".npz"}:
        raise BadInput(
            f"{source} contains its labels; leave out the manifest, which is for folders and .tar files"
        )
    elif source.suffix.lower() == ".csv":
        tiles = _open_csv(source, source.parent, source.stem)
    elif source.suffix.lower() == ".npz":
        tiles = _open_npz(source)
    elif ".tar" in source.suffixes or source.suffix.lower() == ".tgz":
        tiles = _open_tar(source, manifest)
    else:
        raise BadInput(
            f"{source} is not a tile set; expected a folder, a .csv manifest, a .tar or an .npz"
        )
    if not tiles.tiles:
        raise BadInput(f"{source} has no tiles; expected images ({', '.join(sorted(SUFFIXES))})")
    return tiles


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not any(map(is_hidden, path.parts))


def _class_of(name: str) -> str | None:
    return PurePosixPath(name).parent.name or None


def _tile(row: dict[str, str]) -> Tile:
    extra = {k: v for k, v in row.items() if k not in {"file", "label", "group"}}
    group = row.get("group") or row.get("patient") or None
    return Tile(row["file"], row.get("label") or None, group, extra)


def _open_csv(path: Path, root: Path, name: str) -> TileSet:
    table = read_csv(path, "file", also=OWN)
    tiles = tuple(_tile(row) for row in table.rows)
    paths = [_as_written(root / tile.file) for tile in tiles]
    fingerprint = _rows_fingerprint(tiles, _stamps(paths))
    return TileSet(
        name, str(path), tiles, fingerprint, lambda n: _file_bytes(paths[n]), table.notes
    )


def _as_written(path: Path) -> Path:
    """Return a path as spelled on disk, if it differs only in the Unicode composition of accents."""
    if path.exists():
        return path
    forms = (Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
    return next((form for form in forms if form.exists()), path)


def _stamps(paths: Iterable[Path]) -> str:
    """Return a hash of the files' sizes and modification times, which detects replaced files."""

    def stamp(path: Path) -> str:
        try:
            stat = path.stat()
            return f"{stat.st_size}:{stat.st_mtime_ns}"
        except OSError:
            return "missing"

    return content_hash(map(stamp, paths))


def _file_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"{path} has more than {MAX_BYTES:,} bytes; crop or downsample it")
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); check the path") from error


def _check_inside(folder: Path, manifest: Path) -> None:
    """Refuse a manifest found in the folder if it names files outside the folder."""
    if manifest.parent != folder:
        return  # the caller gave it and may name any file
    root = folder.resolve()
    for row in read_csv(manifest, "file").rows:
        if not (folder / row["file"]).resolve().is_relative_to(root):
            raise BadInput(f"{manifest} names {row['file']!r}, which is outside {folder}")


def _open_folder(folder: Path, manifest: Path | None) -> TileSet:
    if manifest is None and (folder / MANIFEST).is_file():
        manifest = folder / MANIFEST
    if manifest is not None:
        _check_inside(folder, manifest)
        return replace(_open_csv(manifest, folder, folder.resolve().name), source=str(folder))
    walked = walk(folder)
    names = [file.relative_to(folder).as_posix() for file in walked.files]
    others = (folder / name for name in names if not _is_image(name))
    left_out = [*walked.left_out, *(LeftOut(str(path), why_unread(path)) for path in others)]
    tiles = tuple(Tile(name, _class_of(name)) for name in sorted(filter(_is_image, names)))
    return TileSet(
        name=folder.resolve().name,
        source=str(folder),
        tiles=tiles,
        fingerprint=_rows_fingerprint(tiles, _stamps(folder / tile.file for tile in tiles)),
        _load=lambda n: _file_bytes(folder / tiles[n].file),
        left_out=tuple(left_out),
    )


def _open_tar(path: Path, manifest: Path | None) -> TileSet:
    try:
        extents, blobs, inner, left_out = _tar_members(path)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} is not a readable tar ({error}); copy it again") from error
    table = None
    if manifest is not None:
        table = read_csv(manifest, "file", also=OWN)
    elif inner is not None:
        table = parse_table(inner, f"{path}:{MANIFEST}", "file", also=OWN)
    if table is not None:
        tiles, notes = tuple(_tile(row) for row in table.rows), table.notes
    else:
        tiles, notes = tuple(Tile(name, _class_of(name)) for name in sorted(extents)), ()
    composed = {same_text(name): name for name in extents}

    def load(number: int) -> bytes:
        name = composed.get(same_text(tiles[number].file), "")
        if not name:
            raise BadInput(f"{path}: {tiles[number].file} is in the manifest but not in the tar")
        if name in blobs:
            return blobs[name]
        offset, size = extents[name]
        with open(path, "rb") as stream:
            stream.seek(offset)
            return stream.read(size)

    name = path.name.split(".tar")[0].removesuffix(".tgz")
    fingerprint = _rows_fingerprint(tiles, sha256_file(path))
    others = tuple(LeftOut(f"{path}:{name}", reason) for name, reason in sorted(left_out.items()))
    return TileSet(name, str(path), tiles, fingerprint, load, notes, others)


def _tar_members(
    path: Path,
) -> tuple[dict[str, tuple[int, int]], dict[str, bytes], bytes | None, dict[str, str]]:
    """List the members of a tar file.

    Returns:
        Offset and size (bytes) by name; the data by name if the tar is compressed; the manifest; the reason
        for each member that is left out, by name.
    """
    extents: dict[str, tuple[int, int]] = {}
    blobs: dict[str, bytes] = {}
    inner: bytes | None = None
    left_out: dict[str, str] = {}
    unpacked = 0
    plain = _is_plain_tar(path)
    with tarfile.open(path, "r:" if plain else "r:*") as pack:
        for member in pack:
            name = member.name.removeprefix("./")
            if not member.isfile():
                continue
            if not (_is_image(name) or name == MANIFEST):
                hidden = any(map(is_hidden, PurePosixPath(name).parts))
                left_out[name] = "hidden or system file" if hidden else why_unread(Path(name))
                continue
            extents[name] = (member.offset_data, member.size)
            unpacked += member.size
            if member.size > MAX_BYTES:
                raise BadInput(f"{path}: {name} has more than {MAX_BYTES:,} bytes")
            if not plain and unpacked > MAX_UNPACKED:
                raise BadInput(f"{path} unpacks to more than {MAX_UNPACKED:,} bytes; split it")
            stream = pack.extractfile(member) if name == MANIFEST or not plain else None
            if stream is not None and name == MANIFEST:
                inner = stream.read()
            elif stream is not None:
                blobs[name] = stream.read()
    extents.pop(MANIFEST, None)
    return extents, blobs, inner, left_out


def _is_plain_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.ReadError:
        return False


def _readable(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array, with bytes as text."""
    return np.char.decode(array, "utf-8", "replace") if array.dtype.kind == "S" else array


def _open_npz(path: Path) -> TileSet:
    try:
        with ZipFile(path) as members:
            unpacked = sum(member.file_size for member in members.infolist())
        if unpacked > MAX_UNPACKED:
            raise BadInput(
                f"{path} unpacks to {unpacked:,} bytes; expected at most {MAX_UNPACKED:,}: split it"
            )
        with np.load(path, allow_pickle=False) as pack:
            arrays = {key: _readable(pack[key]) for key in pack.files}
    except (OSError, ValueError, EOFError, BadZipFile, MemoryError, zlib.error) as error:
        raise BadInput(f"{path} is not a readable .npz of plain arrays ({error})") from error
    images = arrays.get("images")
    if images is None or images.dtype != np.uint8 or images.ndim not in {3, 4}:
        raise BadInput(
            f"{path} has arrays {sorted(arrays)}; expected uint8 'images' (N, H, W[, 3])"
        )
    count = len(images)
    for key in ("labels", "group", "ids"):
        if key in arrays and len(arrays[key]) != count:
            raise BadInput(f"{path}: {key!r} has {len(arrays[key])} rows, 'images' has {count}")
    for key, meant in (("label", "labels"), ("file", "ids")):
        if key in arrays:
            raise BadInput(f"{path} has an array {key!r}; expected {meant!r}: rename it")
    names = arrays.get("class_names")
    labels = arrays.get("labels")

    def label_of(row: int) -> str | None:
        if labels is None:
            return None
        value = labels[row]
        if names is None or not np.issubdtype(labels.dtype, np.integer):
            return value_of(value) or None
        return str(names[value]) if 0 <= value < len(names) else None

    def group_of(row: int) -> str | None:
        return value_of(arrays["group"][row]) or None if "group" in arrays else None

    ids = arrays.get("ids")
    further = {
        key: array
        for key, array in arrays.items()
        if key not in NPZ_ARRAYS and array.shape == (count,)
    }

    def extra_of(row: int) -> dict[str, str]:
        return {key: value_of(array[row]) for key, array in further.items()}

    tiles = tuple(
        Tile(str(ids[n]) if ids is not None else f"{n:07d}", label_of(n), group_of(n), extra_of(n))
        for n in range(count)
    )
    fingerprint = _rows_fingerprint(tiles, sha256_file(path))
    return TileSet(path.stem, str(path), tiles, fingerprint, lambda n: np.asarray(images[n]))
