"""The papers' data sets in their published layouts, opened as tile sets.

No pickle is read: CIFAR-10 and CIFAR-100 need the binary version, not the one "for Python".
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..artifacts.files import sha256_file
from ..artifacts.images import SUFFIXES
from ..artifacts.tables import read_csv
from ..artifacts.tileset_files import open_tiles
from ..artifacts.tilesets import Tile, TileSet, content_hash
from ..artifacts.walking import walk
from ..errors import BadInput

CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
STL10 = (
    "airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck",
)  # fmt: skip
IDC = re.compile(r"^(?P<patient>[^_/]+)_idx\d+_x\d+_y\d+_class(?P<label>[01])\.\w+$")
CHEST = "Data_Entry_2017"
Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def open_data(path: Path) -> TileSet:
    """Open a data set in a layout recognised by its files, or else as a tile set.

    Known layouts: MNIST and Fashion-MNIST (idx, also .gz), CIFAR-10 and CIFAR-100 (binary; CIFAR-100 with
    its 20 superclasses), STL-10 (binary, labelled part), SVHN (cropped, .mat), IDC (folders of patients,
    ``<patient>_idx5_x…_y…_class<0|1>.png``), ChestX-ray14 (``Data_Entry_2017….csv`` next to its images).
    Training and test parts are joined; the column ``part`` tells them apart.

    Raises:
        BadInput: ``path`` does not exist or cannot be read; the message says what is expected.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist; check the path")
    for recognise in (_idx, _cifar, _stl, _svhn, _idc, _chest):
        found = recognise(path)
        if found is not None:
            return found
    return open_tiles(path)


def _packed(
    name: str,
    path: Path,
    sources: Sequence[Path],
    parts: dict[str, Arrays],
    names: Sequence[str] | None,
) -> TileSet:
    """Return a tile set of the images in ``parts``: uint8 (N, H, W[, 3]) and labels (N,) by part."""
    for part, (pictures, numbers) in parts.items():
        if len(pictures) != len(numbers):
            raise BadInput(
                f"{path}: part {part} has {len(pictures)} images, but {len(numbers)} labels"
            )
        if names and len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(names):
            raise BadInput(f"{path}: part {part} has a label outside 0 to {len(names) - 1}")
    if not parts:
        raise BadInput(f"{path} contains images of {name}, but no labels; copy both files")
    images = np.concatenate([pictures for pictures, _ in parts.values()])
    labels = np.concatenate([numbers for _, numbers in parts.values()])
    part_of = [part for part, (pictures, _) in parts.items() for _ in range(len(pictures))]
    tiles = tuple(
        Tile(
            f"{part}/{number:06d}",
            names[label] if names else str(label),
            None,
            {"part": part},
        )
        for number, (part, label) in enumerate(zip(part_of, labels.tolist(), strict=True))
    )
    content = content_hash([name, *(sha256_file(source) for source in sources)])
    return TileSet(name, str(path), tiles, content, lambda n: np.asarray(images[n]))


def _folder_files(path: Path) -> dict[str, Path]:
    """Return the files of a folder by their name without ``.gz``; {} if ``path`` is a file."""
    if not path.is_dir():
        return {}
    return {entry.name.removesuffix(".gz"): entry for entry in path.iterdir() if entry.is_file()}


def _raw(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read ({error}); copy it again") from error


def _idx(path: Path) -> TileSet | None:
    files = _folder_files(path)
    parts: dict[str, Arrays] = {}
    sources: list[Path] = []
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
        if images in files and labels in files:
            pictures, numbers = _idx_array(files[images], 3), _idx_array(files[labels], 1)
            parts[part] = pictures, numbers.astype(np.int64)
            sources += [files[images], files[labels]]
    return _packed(path.resolve().name, path, sources, parts, None) if parts else None


def _idx_array(path: Path, axes: int) -> NDArray[np.uint8]:
    blob = _raw(path)
    if len(blob) < 4 + 4 * axes or blob[:4] != bytes([0, 0, 8, axes]):
        raise BadInput(f"{path} is not an idx file of bytes with {axes} axes; copy it again")
    shape = np.frombuffer(blob, ">u4", axes, 4).astype(np.int64)
    if len(blob) != 4 + 4 * axes + int(np.prod(shape)):
        raise BadInput(f"{path} is truncated: expected {tuple(shape)} bytes; copy it again")
    return np.frombuffer(blob, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _records(path: Path, header: int, pixels: int) -> Arrays:
    """Read rows of ``header`` label bytes and a planar image; the first byte is the label."""
    blob = np.frombuffer(_raw(path), np.uint8)
    if len(blob) == 0 or len(blob) % (header + 3 * pixels):
        raise BadInput(
            f"{path} is truncated: expected rows of {header + 3 * pixels} bytes; copy it again"
        )
    rows = blob.reshape(-1, header + 3 * pixels)
    side = round(pixels**0.5)
    pictures = rows[:, header:].reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pictures), rows[:, 0].astype(np.int64)


def _cifar(path: Path) -> TileSet | None:
    files = _folder_files(path)
    if "data_batch_1" in files or ("train" in files and "meta" in files):
        raise BadInput(
            f"{path} contains CIFAR's pickles, which can run code and are not read: use the binary "
            "version (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz)"
        )
    ten = sorted(name for name in files if re.fullmatch(r"data_batch_\d\.bin", name))
    if ten:
        used = [files[name] for name in ten]
        batches = [_records(file, 1, 1024) for file in used]
        parts = {"train": _joined(batches)}
        if "test_batch.bin" in files:
            used.append(files["test_batch.bin"])
            parts["test"] = _records(used[-1], 1, 1024)
        return _packed("cifar10", path, used, parts, CIFAR10)
    if "train.bin" in files and "coarse_label_names.txt" in files:
        names = files["coarse_label_names.txt"].read_text().split()
        used = [files[f"{part}.bin"] for part in ("train", "test") if f"{part}.bin" in files]
        parts = {file.stem: _records(file, 2, 1024) for file in used}
        return _packed("cifar100", path, used, parts, names)
    return None


def _joined(batches: Sequence[Arrays]) -> Arrays:
    return np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])


def _stl(path: Path) -> TileSet | None:
    files = _folder_files(path)
    if "train_X.bin" not in files:
        return None
    parts: dict[str, Arrays] = {}
    used: list[Path] = []
    for part in ("train", "test"):
        if f"{part}_X.bin" in files and f"{part}_y.bin" in files:
            pictures, labels = files[f"{part}_X.bin"], files[f"{part}_y.bin"]
            blob = np.frombuffer(_raw(pictures), np.uint8)
            if len(blob) % (3 * 96 * 96):
                raise BadInput(
                    f"{pictures} is truncated: expected images of 27,648 bytes; copy it again"
                )
            turned = blob.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)  # stored by columns
            numbers = np.frombuffer(_raw(labels), np.uint8).astype(np.int64) - 1
            parts[part] = np.ascontiguousarray(turned), numbers
            used += [pictures, labels]
    return _packed("stl10", path, used, parts, STL10)


def _svhn(path: Path) -> TileSet | None:
    files = _folder_files(path)
    used = [files[n] for n in ("train_32x32.mat", "test_32x32.mat") if n in files]
    if not used:
        return None
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    parts: dict[str, Arrays] = {}
    for file in used:
        try:
            content = loadmat(io.BytesIO(_raw(file)))
            pictures = np.ascontiguousarray(content["X"].transpose(3, 0, 1, 2))
            labels = content["y"].reshape(-1).astype(np.int64) % 10  # the digit 0 is stored as 10
        except (KeyError, ValueError, TypeError, MatReadError) as error:
            raise BadInput(f"{file} is not a cropped SVHN file ({error}); copy it again") from error
        parts[file.name.split("_")[0]] = pictures, labels
    return _packed("svhn", path, used, parts, None)


def _idc(path: Path) -> TileSet | None:
    """Read IDC, recognised by its file names; the patient is the group."""
    if path.is_dir():
        if not any(IDC.match(file.name) for file in walk(path).files):
            return None
    elif not _tar_names_match(path, lambda name: bool(IDC.match(name))):
        return None
    whole = open_tiles(path)
    tiles = []
    for tile in whole.tiles:
        known = IDC.match(Path(tile.file).name)
        if known is None:
            raise BadInput(
                f"{path}: the name of {tile.file} is not that of an IDC image; move it away"
            )
        tiles.append(Tile(tile.file, known["label"], known["patient"], tile.extra))
    return replace(whole, tiles=tuple(tiles))


def _tar_names_match(path: Path, fits: Callable[[str], bool]) -> bool:
    if ".tar" not in path.suffixes:
        return False
    try:
        with tarfile.open(path) as pack:
            names = [Path(m.name).name for m in pack if m.isfile()]
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        return False
    pictures = [name for name in names if Path(name).suffix.lower() in SUFFIXES]
    return bool(pictures) and all(map(fits, pictures))


def _chest(path: Path) -> TileSet | None:
    """Read NIH's table; the label is the exact combination of findings, and the group is the patient."""
    table = path if path.is_file() else next(iter(sorted(path.glob(f"{CHEST}*.csv"))), None)
    if table is None or not table.name.startswith(CHEST):
        return None
    walked = walk(table.parent)
    pictures = {file.name: file for file in walked.files if file.suffix.lower() in SUFFIXES}
    tiles = []
    places = []
    listed = read_csv(table, "Image Index")
    for row in listed.rows:
        if row["Image Index"] in pictures:
            findings, patient = row.get("Finding Labels", ""), row.get("Patient ID", "")
            tiles.append(Tile(row["Image Index"], findings or None, patient or None, row))
            places.append(pictures[row["Image Index"]])
    if not tiles:
        raise BadInput(f"no image that {table} names is in {table.parent} or its subfolders")
    content = content_hash([sha256_file(table), *(t.file for t in tiles)])
    return TileSet(
        "chestxray14",
        str(table),
        tuple(tiles),
        content,
        lambda n: places[n].read_bytes(),
        listed.notes,
        walked.left_out,
    )
