"""Encoder bundles behind URLs: copied once into the cache, and again when the bundle changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

from ... import stopping
from ...artifacts.files import cache_folder, publish_folder
from ...artifacts.manifest import MANIFEST
from ...artifacts.remote import Remote, below, joined, require_room
from ...errors import BadInput, HistoseekError

SERVERS = ("triton://", "tritons://")


def is_server(spec: str) -> bool:
    """Whether an encoder is named by the address of a server."""
    return spec.startswith(SERVERS)


def fetched(url: str) -> Path:
    """Return a local copy of the bundle at a URL.

    The copy is named after the manifest's content, which holds the graph's SHA-256; opening the bundle
    checks it.

    Raises:
        BadInput: there is no bundle, or it cannot be read.
        StorageFailed: the disk is full.
    """
    with TemporaryDirectory(prefix="histoseek-encoder-") as temp:
        manifest = Path(temp) / MANIFEST
        try:
            Remote(joined(url, MANIFEST)).fetch(manifest)
        except BadInput as error:
            raise BadInput(f"{url} is not an encoder bundle: {error}") from error
        mark = hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
    folder = cache_folder() / "encoders" / mark
    if folder.is_dir():
        return folder
    files = Remote(url).files()
    try:
        with publish_folder(folder) as part:
            require_room(part, sum(file.size for file in files), url)
            for file in files:
                stopping.check()
                Remote(file.url).fetch(part / below(file.url, url))
    except HistoseekError:
        if not folder.is_dir():  # another process has just copied it
            raise
    return folder
