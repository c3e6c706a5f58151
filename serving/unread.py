"""What lies in a folder of slides and is not read: other vendors' formats, parts of slides, other files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

UNREAD_FORMATS = {
    ".czi": "Zeiss CZI",
    ".dzi": "Deep Zoom",
    ".ets": "Olympus VSI's pixels",
    ".i2syntax": "Philips iSyntax",
    ".ims": "Imaris",
    ".isyntax": "Philips iSyntax",
    ".kfb": "KFBIO",
    ".kfbf": "KFBIO",
    ".lif": "Leica LIF",
    ".lof": "Leica LOF",
    ".lsm": "Zeiss LSM",
    ".mdsx": "Motic MDSX",
    ".nd2": "Nikon ND2",
    ".oib": "Olympus OIB",
    ".oif": "Olympus OIF",
    ".oir": "Olympus OIR",
    ".sdpc": "TEKSQRAY SDPC",
    ".svsx": "SVSX",
    ".tmap": "UNIC TMAP",
    ".tron": "InteMedic TRON",
    ".vsi": "Olympus VSI",
    ".zarr": "OME-Zarr",
    ".zvi": "Zeiss ZVI",
}
ARCHIVES = frozenset({".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"})
INDEXES = frozenset({".vms", ".vmu"})
"""Text files that name the pictures that make up a slide."""


def why_unread(path: Path) -> str:
    """Return why a file of a folder of slides is not taken."""
    suffix = path.suffix.lower()
    if suffix in UNREAD_FORMATS:
        return f"slide format that is not read ({UNREAD_FORMATS[suffix]}): convert it to SVS or OME-TIFF"
    if suffix in ARCHIVES:
        return "archive: unpack it first"
    return "neither a slide nor a picture"


def belongs_to(folders: Sequence[str], files: Sequence[str]) -> dict[str, str | None]:
    """Return the sub-folders that hold the data of a slide beside them; see :func:`..walking.walk`."""
    found: dict[str, str | None] = {}
    for name in files:
        stem, suffix = Path(name).stem, Path(name).suffix.lower()
        if suffix == ".mrxs":
            found[stem] = None
        elif suffix == ".vsi":
            found[f"_{stem}_"] = None
    for name in folders:
        if name.lower().endswith(".zarr"):
            found[name] = why_unread(Path(name))
    return found


def parts_of(files: Iterable[Path]) -> set[Path]:
    """Return the files that an index file (``.vms``, ``.vmu``) beside them names as parts of its slide."""
    parts = set()
    for file in files:
        if file.suffix.lower() not in INDEXES:
            continue
        text = file.read_bytes()[: 2**20].decode("utf-8", errors="replace")
        for line in text.splitlines():
            _, _, name = line.partition("=")
            if name.strip():
                parts.add(file.parent / name.strip())
    return parts
