"""The store: an atlas's folder with its catalog and feature files, the source of truth.

The index, the clusters and the search are derived from it; no module here imports them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...artifacts.feature_files import Features, check_features, parse_features
from ...artifacts.manifest import Manifest, external_sha256, read_manifest
from ...errors import BadInput, Damaged
from .catalog import ATLAS_ID, Catalog, now
from .packing import SEAL
from .scales import MIXED
from .uploads import source_now

T = TypeVar("T")
ENCODER = "encoder"
"""Folder of the atlas's copy of its encoder bundle, unless the catalog names another."""
ENCODER_FOLDER = "encoder_folder"
"""Property of the catalog: folder of the bundle that the atlas was bound to after its creation."""
ENCODER_LINK = "encoder_link"
"""Property of the catalog: absolute path of the bundle, if the atlas has no copy of its graphs."""
GRAPHS = ("*.onnx", "*.onnx.data")
"""Files of a bundle that a linked atlas does not copy."""
BOUND_FROM = "bound_from"
"""Property of the catalog: name of the encoder that another tool used, before the atlas was bound."""
FEATURES = "features"
"""Folder of the feature files."""
LOCK = ".lock"
RESTORE = "restore it from a copy, or embed the slide again and add it with --replace"
"""The remedy for a damaged feature file."""
RETRIES = 100


class StateGone(Damaged):
    """The state cannot be read completely any more, because a writer has replaced it."""


class Store:
    """The folder of an atlas.

    Attributes:
        path: the folder.
        catalog: its database.
        encoder_folder: the atlas's copy of its encoder's bundle; without the graphs if it is linked.
        manifest: of this encoder.
    """

    def __init__(self, path: Path) -> None:
        """Open a folder.

        Raises:
            BadInput: the folder is not an atlas, or a newer histoseek wrote it.
            Damaged: the catalog names another encoder than the bundle in the folder.
        """
        self.path, self.catalog = path, Catalog(path)
        meta = self.catalog.meta()
        self.encoder_folder = path / meta.get(ENCODER_FOLDER, ENCODER)
        expected = meta["encoder_sha256"]
        self.manifest: Manifest = read_manifest(self.encoder_folder, check_graph=False)
        if self.manifest.sha256 != expected:
            raise Damaged(
                f"{self.encoder_folder} contains encoder {self.manifest.sha256[:12]}…, but the atlas was "
                f"created with encoder {expected[:12]}…; restore that bundle"
            )

    @property
    def encoder_link(self) -> Path | None:
        """The bundle that a linked atlas refers to; None if the atlas has a copy."""
        link = self.catalog.meta().get(ENCODER_LINK)
        return Path(link) if link else None

    @property
    def encoder_bundle(self) -> Path:
        """The folder with the encoder's graphs: the atlas's copy, or the bundle that it refers to.

        Raises:
            Damaged: the atlas refers to a bundle that is gone, or is another one now.
        """
        link = self.encoder_link
        if link is None:
            return self.encoder_folder
        try:
            found = read_manifest(link, check_graph=False).sha256
            state = f"contains encoder {found[:12]}…"
        except BadInput:
            found, state = "", "is not there"
        if found != self.manifest.sha256:
            raise Damaged(
                f"{self.path} refers to the bundle of its encoder {self.manifest.name!r} "
                f"(sha256 {self.manifest.sha256[:12]}…), but {link} {state}; give its place: "
                f"`histoseek index relocate {self.path} --encoder FOLDER`"
            )
        return link

    @property
    def identity(self) -> str:
        """The atlas's unique id, assigned when it was created."""
        return self.catalog.meta()[ATLAS_ID]

    @property
    def bound_from(self) -> str:
        """Name of the encoder whose features were imported before the atlas was bound; "" if never."""
        return self.catalog.meta().get(BOUND_FROM, "")

    @property
    def imported_sha256(self) -> str:
        """The encoder's sha256 in imported features: features keep it when the atlas is bound."""
        bound = self.bound_from
        return external_sha256(bound, self.manifest.dim) if bound else self.manifest.sha256

    def check(self, item: Features, path: Path) -> None:
        """Check that features belong into this atlas.

        Raises:
            BadInput: features are not finite.
            Mismatch: the features have another encoder or length.
        """
        own, imported = self.manifest.sha256, self.imported_sha256
        expected = imported if item.encoder_sha256 == imported else own
        check_features(item, self.manifest.name, expected, self.manifest.dim, path)

    @property
    def mixed_scales(self) -> bool:
        """Whether tiles of different scales (µm per pixel) are allowed."""
        return MIXED in self.catalog.meta()

    def vectors_of(self, slide: Mapping[str, Any]) -> NDArray[np.float32]:
        """Return the vectors (N, D) of a slide, given its row in the catalog, from its feature file.

        Raises:
            Damaged: the file is missing, cannot be read, or has changed since it was added.
        """
        path = self.path / slide["features_file"]
        blob, state = b"", "has changed since it was added"
        try:
            blob = path.read_bytes()
        except FileNotFoundError:
            state = "is missing"
        except OSError as error:
            state = f"cannot be read ({error.strerror})"
        if hashlib.sha256(blob).hexdigest() != slide["features_sha256"]:
            raise Damaged(f"{path} of slide {slide['name']!r} {state}; {RESTORE}")
        return parse_features(blob, path).features

    def tile_ranges(self) -> list[dict[str, Any]]:
        """Return the rows of all slides with the id of each one's first tile, sorted by slide id."""
        rows = self.catalog.rows(
            "SELECT s.*, t.first_tile FROM slides AS s JOIN slide_tiles AS t ON t.slide_id = s.id "
            "ORDER BY s.id"
        )
        return [dict(row) for row in rows]

    def slides(self) -> list[dict[str, Any]]:
        """Return all slides and tile sets with counts, labels, metadata and provenance, sorted by name."""
        rows = self.catalog.rows("SELECT * FROM slides ORDER BY name")
        slides = [
            dict(row)
            | {
                "metadata": json.loads(row["metadata"]),
                "source": source_now(self.path, row["source"]),
            }
            for row in rows
        ]
        return [{k: v for k, v in slide.items() if k != SEAL} for slide in slides]

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return tile ids (N,) ascending and vectors (N, D); see :meth:`vectors_of`."""
        return self.retry_if_changed(self._vectors)

    def _vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        ids = [np.zeros(0, dtype=np.int64)]
        parts = [np.zeros((0, self.manifest.dim), dtype=np.float32)]
        for slide in self.tile_ranges():
            parts.append(self.vectors_of(slide))
            ids.append(np.arange(slide["first_tile"], slide["first_tile"] + slide["tiles"]))
        return np.concatenate(ids).astype(np.int64), np.concatenate(parts)

    def retry_if_changed(self, read: Callable[[], T]) -> T:
        """Call ``read``, and call it again if it failed because a writer replaced files meanwhile.

        Raises:
            Damaged: ``read`` raised it although the atlas did not change.
        """
        for _ in range(RETRIES):
            revision = self.catalog.revision()
            try:
                return read()
            except Damaged:
                if self.catalog.revision() == revision:
                    raise
        return read()


def copy_bundle(bundle: Path, folder: Path, link: bool) -> dict[str, str]:
    """Copy a bundle into an atlas; return properties for the catalog.

    Args:
        bundle: the folder to copy.
        folder: where to, inside the atlas.
        link: leave out the graphs; the atlas then refers to ``bundle``.
    """
    unwanted = ("__pycache__", *(GRAPHS if link else ()))
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns(*unwanted), dirs_exist_ok=True)
    return {ENCODER_LINK: str(bundle.resolve())} if link else {}


def fill(folder: Path, manifest: Manifest, properties: Mapping[str, str] | None = None) -> None:
    """Create the features folder and the catalog of a new atlas; ``properties`` go into the catalog."""
    (folder / FEATURES).mkdir()
    Catalog(folder).create(
        {
            "encoder_name": manifest.name,
            "encoder_sha256": manifest.sha256,
            "dim": str(manifest.dim),
            "metric": manifest.metric,
            "created_at": now(),
        }
        | dict(properties or {})
    )
