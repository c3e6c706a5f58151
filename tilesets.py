"""Tile sets: ready pictures, one tile each, with labels and groups, wherever they lie.

A tile set is read from a folder (sub-folders are classes), a CSV manifest (``file,label,group,…``), a
``.tar`` pack (with a ``manifest.csv`` inside, or sub-folders as classes) or an ``.npz`` pack
(``images`` with ``labels``, ``class_names`` and ``group``). Tiles that share a group come from one
source picture or patient, and must never be split between training and validation.
"""

from __future__ import annotations

import hashlib
import tarfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from .errors import BadInput
from .files import sha256_file
from .images import MAX_BYTES, SUFFIXES, Rgb, decode, square
from .tables import parse_table, read_csv, same_text, value_of
from .unread import why_unread
from .walking import LeftOut, is_hidden, walk

MANIFEST = "manifest.csv"
MAX_UNPACKED = 4 * 2**30
SAMPLE = 64


@dataclass(frozen=True)
class Tile:
    """One ready tile: its path inside the set, and what the manifest says of it."""

    file: str
    label: str | None = None
    group: str | None = None
    extra: dict[str, str] = field(default_factory=dict)

    def column(self, name: str) -> str:
        """Return a manifest column by name; empty where the manifest has none."""
        known = {"file": self.file, "label": self.label, "group": self.group}
        return (known[name] or "") if name in known else self.extra.get(name, "")


@dataclass(frozen=True)
class TileSet:
    """Tiles that are read by number; nothing is decoded before it is asked for.

    Attributes:
        name: of the set.
        source: the folder or file.
        tiles: in the order of their numbers.
        fingerprint: of the content.
        notes: what was recognised while its table was read.
        left_out: files and folders that were found and not taken, with the reason.
    """

    name: str
    source: str
    tiles: tuple[Tile, ...]
    fingerprint: str
    _load: Callable[[int], bytes | Rgb] = field(repr=False, compare=False)
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return len(self.tiles)

    def read(self, number: int) -> Rgb:
        """Decode tile ``number`` to uint8 RGB (H, W, 3).

        Raises:
            BadInput: the tile is missing or cannot be decoded; the message names it.
        """
        label = f"{self.source}: {self.tiles[number].file}"
        return decode(self._load(number), name=label)

    def identity(self) -> str:
        """Return a hash of the content with its labels and groups."""
        return _rows_fingerprint(self.tiles, self.fingerprint)

    def take(self, numbers: Sequence[int]) -> TileSet:
        """Return the tile set of the given tiles, in that order."""
        chosen = [int(n) for n in numbers]
        load = self._load
        return replace(
            self,
            tiles=tuple(self.tiles[n] for n in chosen),
            fingerprint=content_hash([self.fingerprint, *map(str, chosen)]),
            _load=lambda n: load(chosen[n]),
        )

    def without(self, column: str, values: Iterable[str]) -> TileSet:
        """Return the tile set less the tiles whose ``column`` has one of ``values``."""
        gone = set(values)
        return self.take([n for n, t in enumerate(self.tiles) if t.column(column) not in gone])

    def relabelled(self, columns: Sequence[str]) -> TileSet:
        """Return the tile set with labels joined from several manifest columns by ``/``."""

        def label_of(tile: Tile) -> str | None:
            parts = [tile.column(column) for column in columns]
            return "/".join(parts) if any(parts) else None

        tiles = (replace(tile, label=label_of(tile)) for tile in self.tiles)
        return replace(self, tiles=tuple(tiles))


def open_tiles(source: Path, manifest: Path | None = None) -> TileSet:
    """Open a folder, CSV manifest, tar pack or npz pack as a tile set.

    Args:
        source: the folder or file.
        manifest: a CSV whose ``file`` column names tiles of ``source``; overrides its own.

    Raises:
        BadInput: nothing there, no tile in it, or a manifest that does not fit; says which.
    """
    if not source.exists():
        raise BadInput(f"{source} does not exist; check the path")
    if source.is_dir():
        tiles = _open_folder(source, manifest)
    elif manifest is not None and source.suffix.lower() in {".csv", ".npz"}:
        raise BadInput(f"{source} has labels of its own; a manifest goes with a folder or a .tar")
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
        raise BadInput(f"{source} holds no tile; expected pictures ({', '.join(sorted(SUFFIXES))})")
    return tiles


def sample_tiles(tileset: TileSet, size_px: int, count: int = SAMPLE) -> NDArray[np.uint8]:
    """Decode ``count`` tiles spread evenly over a tile set; unreadable ones are passed over.

    Raises:
        BadInput: none could be read.
    """
    chosen = np.unique(np.linspace(0, len(tileset) - 1, min(count, len(tileset))).astype(int))
    tiles: list[NDArray[np.uint8]] = []
    reason = "the tile set is empty"
    for number in chosen:
        try:
            tiles.append(square(tileset.read(int(number)), size_px))
        except BadInput as error:
            reason = str(error)
    if not tiles:
        raise BadInput(f"no tile to prove parity on: {reason}")
    return np.stack(tiles)


def concatenate(sets: Sequence[TileSet]) -> TileSet:
    """Join tile sets; labels and groups are prefixed by each set's name, so none is shared."""
    if len(sets) == 1:
        return sets[0]
    tiles: list[Tile] = []
    places: list[tuple[TileSet, int]] = []
    seen: Counter[str] = Counter()
    for part in sets:
        seen[part.name] += 1
        name = part.name if seen[part.name] == 1 else f"{part.name}-{seen[part.name]}"
        for number, tile in enumerate(part.tiles):
            label = f"{name}/{tile.label}" if tile.label is not None else None
            group = f"{name}/{tile.group}" if tile.group is not None else None
            tiles.append(replace(tile, file=f"{name}/{tile.file}", label=label, group=group))
            places.append((part, number))
    return TileSet(
        name="+".join(part.name for part in sets),
        source="+".join(part.source for part in sets),
        tiles=tuple(tiles),
        fingerprint=content_hash([part.fingerprint for part in sets]),
        _load=lambda n: places[n][0]._load(places[n][1]),
        notes=tuple(note for part in sets for note in part.notes),
        left_out=tuple(left for part in sets for left in part.left_out),
    )


def content_hash(parts: Iterable[str]) -> str:
    """Return one SHA-256 of texts, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _rows_fingerprint(tiles: Sequence[Tile], content: str) -> str:
    return content_hash([content, *(f"{t.file}|{t.label}|{t.group}" for t in tiles)])


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not any(map(is_hidden, path.parts))


def _class_of(name: str) -> str | None:
    parent = PurePosixPath(name).parent.name
    return parent or None


def _tile(row: dict[str, str]) -> Tile:
    extra = {k: v for k, v in row.items() if k not in {"file", "label", "group"}}
    group = row.get("group") or row.get("patient") or None
    return Tile(row["file"], row.get("label") or None, group, extra)


def _open_csv(path: Path, root: Path, name: str) -> TileSet:
    table = read_csv(path, "file")
    tiles = tuple(_tile(row) for row in table.rows)
    places = [_as_written(root / tile.file) for tile in tiles]
    return TileSet(
        name=name,
        source=str(path),
        tiles=tiles,
        fingerprint=_rows_fingerprint(tiles, _stamps(places)),
        _load=lambda n: _file_bytes(places[n]),
        notes=table.notes,
    )


def _as_written(path: Path) -> Path:
    """Return a path as the disk has it, where that differs only in how accents are composed."""
    if path.exists():
        return path
    forms = (Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
    return next((form for form in forms if form.exists()), path)


def _stamps(paths: Iterable[Path]) -> str:
    """Hash size and time of change of files: enough to see that one was replaced."""

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
            raise BadInput(f"{path} is larger than {MAX_BYTES:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); check the path") from error


def _check_inside(folder: Path, manifest: Path) -> None:
    """Refuse a manifest found in a folder that names files outside of it."""
    if manifest.parent != folder:
        return  # given by the caller, who may name what he likes
    root = folder.resolve()
    for row in read_csv(manifest, "file").rows:
        if not (folder / row["file"]).resolve().is_relative_to(root):
            raise BadInput(f"{manifest} names {row['file']!r}, which is outside of {folder}")


def _open_folder(folder: Path, manifest: Path | None) -> TileSet:
    if manifest is None and (folder / MANIFEST).is_file():
        manifest = folder / MANIFEST
    if manifest is not None:
        _check_inside(folder, manifest)
        return replace(_open_csv(manifest, folder, folder.resolve().name), source=str(folder))
    walked = walk(folder)
    names = [file.relative_to(folder).as_posix() for file in walked.files]
    others = [name for name in names if not _is_picture(name)]
    names = sorted(name for name in names if _is_picture(name))
    left_out = [
        *walked.left_out,
        *(LeftOut(str(folder / n), why_unread(folder / n)) for n in others),
    ]
    tiles = tuple(Tile(name, _class_of(name)) for name in names)
    sizes = _stamps(folder / name for name in names)
    return TileSet(
        name=folder.resolve().name,
        source=str(folder),
        tiles=tiles,
        fingerprint=_rows_fingerprint(tiles, sizes),
        _load=lambda n: _file_bytes(folder / tiles[n].file),
        left_out=tuple(left_out),
    )


def _open_tar(path: Path, manifest: Path | None) -> TileSet:
    try:
        places, blobs, inner, left_out = _tar_members(path)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} is not a readable tar ({error}); copy it again") from error
    notes: tuple[str, ...] = ()
    if manifest is not None or inner is not None:
        table = (
            read_csv(manifest, "file")
            if manifest is not None
            else parse_table(inner or b"", f"{path}:{MANIFEST}", "file")
        )
        tiles, notes = tuple(_tile(row) for row in table.rows), table.notes
    else:
        tiles = tuple(Tile(n, _class_of(n)) for n in sorted(places) if _is_picture(n))
    written = {same_text(name): name for name in places}

    def load(number: int) -> bytes:
        name = written.get(same_text(tiles[number].file), "")
        if not name:
            raise BadInput(f"{path}: {tiles[number].file} is in the manifest but not in the tar")
        if name in blobs:
            return blobs[name]
        offset, size = places[name]
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
    """Return places by name, a compressed tar's bytes, the manifest, and what is left out and why."""
    places: dict[str, tuple[int, int]] = {}
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
            if not (_is_picture(name) or name == MANIFEST):
                hidden = any(map(is_hidden, PurePosixPath(name).parts))
                left_out[name] = "hidden or system file" if hidden else why_unread(Path(name))
                continue
            places[name] = (member.offset_data, member.size)
            unpacked += member.size
            if member.size > MAX_BYTES or (not plain and unpacked > MAX_UNPACKED):
                raise BadInput(f"{path}: {name} makes it unpack to more than is accepted")
            stream = pack.extractfile(member) if name == MANIFEST or not plain else None
            if stream is not None and name == MANIFEST:
                inner = stream.read()
            elif stream is not None:
                blobs[name] = stream.read()
    places.pop(MANIFEST, None)
    return places, blobs, inner, left_out


def _is_plain_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.ReadError:
        return False


def _open_npz(path: Path) -> TileSet:
    try:
        with ZipFile(path) as members:
            unpacked = sum(member.file_size for member in members.infolist())
        if unpacked > MAX_UNPACKED:
            raise BadInput(
                f"{path} unpacks to {unpacked:,} bytes; at most {MAX_UNPACKED:,} are read"
            )
        with np.load(path, allow_pickle=False) as pack:
            arrays = {key: pack[key] for key in pack.files}
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
    tiles = tuple(
        Tile(str(ids[n]) if ids is not None else f"{n:07d}", label_of(n), group_of(n))
        for n in range(count)
    )
    fingerprint = _rows_fingerprint(tiles, sha256_file(path))
    return TileSet(path.stem, str(path), tiles, fingerprint, lambda n: np.asarray(images[n]))
