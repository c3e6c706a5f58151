"""Opens untrusted HDF5 files: only data in the file itself is read.

HDF5 can take a dataset's bytes from any other file of the machine (external storage), or point to
objects in other files (external links, virtual datasets). Such a feature file would read files that the
user did not name, and its checksum would not cover them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from ..errors import BadInput

MAX_OBJECTS = 100_000
_FILTERS = {
    getattr(h5py.h5z, f"FILTER_{name}")
    for name in ("DEFLATE", "SHUFFLE", "FLETCHER32", "SZIP", "NBIT", "SCALEOFFSET", "LZF")
}
"""Filters built into HDF5 and h5py; any other filter is code that HDF5 would load from a folder."""


@contextmanager
def open_hdf5(source: Path | bytes, name: Path | None = None) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading and check that it refers to no other file.

    Args:
        source: the file, or its bytes.
        name: name of the file in messages; None for its path.

    Raises:
        BadInput: data or links are outside the file; the message names them.
        OSError: the file is not HDF5.
    """
    if isinstance(source, Path):
        opened = h5py.File(source, "r", locking=False)
    else:
        opened = h5py.File(io.BytesIO(source), "r")
    with opened as stored:
        check_self_contained(stored, name or Path(str(stored.filename)))
        yield stored


def check_self_contained(stored: h5py.File, name: Path) -> None:
    """Refuse a file that takes data or objects from other files, without reading these.

    Raises:
        BadInput: the file has external storage, an external link, a virtual dataset, references, or a
            filter that needs a plugin; the message says which, and where.
    """
    todo: list[h5py.Group] = [stored]
    seen = {_address(stored)}
    count = 0
    while todo:
        group = todo.pop()
        for key in group:
            count += 1
            if count > MAX_OBJECTS:
                raise BadInput(f"{name} has more than {MAX_OBJECTS:,} objects; expected features")
            inside = f"{group.name.rstrip('/')}/{key}"
            if not _is_hard_link(group, key, inside, name):
                continue
            item = group[key]
            if isinstance(item, h5py.Dataset):
                _check_dataset(item, inside, name)
            elif isinstance(item, h5py.Group) and _address(item) not in seen:
                seen.add(_address(item))
                todo.append(item)


def _is_hard_link(group: h5py.Group, key: str, inside: str, name: Path) -> bool:
    """Whether a link is a hard link; refuse a link to another file. A soft link is not followed."""
    try:
        link = group.get(key, getlink=True)
    except TypeError as error:  # a user-defined link type
        raise BadInput(f"{name}: {inside} is a link of an unknown kind; {_REMEDY}") from error
    if isinstance(link, h5py.ExternalLink):
        raise BadInput(
            f"{name}: {inside} is an external link to {link.path!r} in the file {link.filename!r}; "
            f"{_REMEDY}"
        )
    return isinstance(link, h5py.HardLink)


def _check_dataset(data: h5py.Dataset, inside: str, name: Path) -> None:
    if data.external:
        files = ", ".join(sorted({repr(str(part[0])) for part in data.external})[:3])
        raise BadInput(f"{name}: {inside} has external storage in the file {files}; {_REMEDY}")
    if data.is_virtual:
        files = ", ".join(sorted({repr(str(s.file_name)) for s in data.virtual_sources()})[:3])
        raise BadInput(f"{name}: {inside} is a virtual dataset of the file {files}; {_REMEDY}")
    if h5py.check_ref_dtype(data.dtype) is not None:
        raise BadInput(f"{name}: {inside} has references to other objects; {_REMEDY}")
    settings: Any = data.id.get_create_plist()
    for number in range(settings.get_nfilters()):
        code, _, _, label = settings.get_filter(number)
        if code not in _FILTERS:
            kind = label.decode("utf-8", "replace") or "an unknown filter"
            raise BadInput(
                f"{name}: {inside} is compressed by {kind!r} (HDF5 filter {code}), which would load a "
                "plugin; write it with gzip, or without compression"
            )


_REMEDY = "expected data in the file itself: write its datasets into one plain file"


def _address(item: h5py.Group) -> tuple[int, int]:
    about = h5py.h5o.get_info(item.id)
    return int(about.fileno), int(about.addr)
