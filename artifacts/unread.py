"""Recognises files in a folder that are not read: other vendors' formats, parts of slides, other files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

UNREAD_FORMATS = {
    ".czi": "Zeiss CZI", ".lsm": "Zeiss LSM", ".zvi": "Zeiss ZVI", ".dzi": "Deep Zoom",
    ".ets": "Olympus VSI's pixels", ".oib": "Olympus OIB", ".oif": "Olympus OIF", ".oir": "Olympus OIR",
    ".vsi": "Olympus VSI", ".i2syntax": "Philips iSyntax", ".isyntax": "Philips iSyntax", ".ims": "Imaris",
    ".kfb": "KFBIO", ".kfbf": "KFBIO", ".lif": "Leica LIF", ".lof": "Leica LOF", ".mdsx": "Motic MDSX",
    ".nd2": "Nikon ND2", ".sdpc": "TEKSQRAY SDPC", ".svsx": "SVSX", ".tmap": "UNIC TMAP",
    ".tron": "InteMedic TRON", ".zarr": "OME-Zarr",
}  # fmt: skip
ZARR = ".zarr"
"""Suffix of folders that are one image."""
ARCHIVES = frozenset({".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"})
INDEXES = frozenset({".vms", ".vmu"})
"""Index files: text files that name the images of a slide."""


def why_unread(path: Path) -> str:
    """Return the reason why a file in a folder of slides is not read."""
    suffix = path.suffix.lower()
    if suffix in UNREAD_FORMATS:
        return f"slide format that is not read ({UNREAD_FORMATS[suffix]}): convert it to SVS or OME-TIFF"
    if suffix in ARCHIVES:
        return "archive: unpack it first"
    return "DICOM, but not a slide" if is_dicom(path) else "neither a slide nor an image"


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its first bytes; many archives store slides without ``.dcm``."""
    try:
        with open(path, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def belongs_to(here: Path, folders: Sequence[str], files: Sequence[str]) -> dict[str, str | None]:
    """Return the sub-folders with the data of a slide file next to them; see :data:`..walking.Prune`."""
    reasons: dict[str, str | None] = {}
    for name in files:
        stem, suffix = Path(name).stem, Path(name).suffix.lower()
        if suffix == ".mrxs" and (here / stem / "Slidedat.ini").is_file():
            reasons[stem] = None
        elif suffix == ".vsi" and any((here / f"_{stem}_").glob("*/*.ets")):
            reasons[f"_{stem}_"] = None
    zarrs = (name for name in folders if name.lower().endswith(ZARR))
    return reasons | {name: why_unread(Path(name)) for name in zarrs}


def parts_of(files: Iterable[Path]) -> set[Path]:
    """Return the files that an index file (``.vms``, ``.vmu``) next to them names as parts of its slide."""
    parts = set()
    for file in files:
        if file.suffix.lower() not in INDEXES:
            continue
        with open(file, "rb") as stream:
            text = stream.read(2**20).decode("utf-8", errors="replace")
        for line in text.splitlines():
            _, _, name = line.partition("=")
            if name.strip():
                parts.add(file.parent / name.strip())
    return parts
