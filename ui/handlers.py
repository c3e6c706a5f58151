"""What the page does, as plain functions over an open atlas: no widget, no global."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, HistoseekError
from ..images import Rgb, decode, square
from ..index.atlas import Atlas
from ..index.records import Hit
from ..serving.encoder import Encoder, open_encoder
from ..serving.slides import Slide, open_slide
from ..tilesets import TileSet, open_tiles

MAX_UPLOADS = 200
MAP_POINTS = 5000
OPEN_SOURCES = 8


@dataclass(frozen=True)
class Similar:
    """The answer to one query image.

    Attributes:
        query: the image as the encoder saw it.
        hits: the similar tiles, best first.
        pictures: the pixels of each hit, or the reason why they cannot be shown.
        placed: cluster, distance, strength and unknown of the query; None without a clustering.
    """

    query: Rgb
    hits: list[Hit]
    pictures: list[Rgb | str]
    placed: dict[str, Any] | None


@dataclass(frozen=True)
class Clustered:
    """The answer to several images.

    Attributes:
        clustering: its name.
        names: of the images that could be placed.
        placed: cluster, distance, strength and unknown of each.
        points: (N, 2) their places on the map.
        refused: names of images that could not be read, with the reason.
    """

    clustering: str
    names: list[str]
    placed: list[dict[str, Any]]
    points: NDArray[np.float64]
    refused: list[tuple[str, str]]


@dataclass(frozen=True)
class Map:
    """The atlas in two dimensions: its first two principal components.

    Attributes:
        points: (M, 2) of a sample of the tiles.
        clusters: (M,) their clusters, -1 for none.
        shown: M.
        total: tiles in the atlas.
        explained: share of the variance that the two axes hold.
        mean: (D,) of all tiles.
        axes: (2, D).
    """

    points: NDArray[np.float64]
    clusters: NDArray[np.int64]
    shown: int
    total: int
    explained: float
    mean: NDArray[np.float64] = field(repr=False)
    axes: NDArray[np.float64] = field(repr=False)

    def place(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the places (N, 2) of new vectors (N, D) without moving the others."""
        placed: NDArray[np.float64] = (vectors.astype(np.float64) - self.mean) @ self.axes.T
        return placed


class TilePictures:
    """Reads the pixels of tiles from where they came; keeps a few slides open."""

    def __init__(self, atlas: Atlas) -> None:
        """Read nothing yet."""
        self._atlas = atlas
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Slide | tuple[TileSet, dict[str, int]]] = OrderedDict()

    def read(self, hit: Hit) -> Rgb | str:
        """Return the tile as the encoder saw it (S, S, 3), or why it cannot be shown."""
        size = self._atlas.manifest.size_px
        with self._lock:
            try:
                source = self._source(hit.slide)
                if isinstance(source, Slide):
                    return source.read_tile(hit.x, hit.y, hit.size_px_level0, size)
                tiles, rows = source
                if hit.file not in rows:
                    raise BadInput(f"{tiles.source} no longer holds {hit.file}")
                return square(tiles.read(rows[hit.file]), size)
            except (HistoseekError, OSError) as error:
                return f"the tile cannot be shown: {error}"

    def _source(self, slide: str) -> Slide | tuple[TileSet, dict[str, int]]:
        if slide in self._open:
            self._open.move_to_end(slide)
            return self._open[slide]
        row = next(s for s in self._atlas.slides() if s["name"] == slide)
        path = Path(row["source"])
        opened: Slide | tuple[TileSet, dict[str, int]]
        if row["kind"] == "slide":
            opened = open_slide(path, row["mpp"])
        else:
            tiles = open_tiles(path)
            opened = tiles, {tile.file: number for number, tile in enumerate(tiles.tiles)}
        self._open[slide] = opened
        if len(self._open) > OPEN_SOURCES:
            _, oldest = self._open.popitem(last=False)
            if isinstance(oldest, Slide):
                oldest.close()
        return opened


class Session:
    """An open atlas with its encoder; safe to use from several threads."""

    def __init__(self, path: Path, encoder: str | None = None) -> None:
        """Open the atlas and its encoder, and load the index.

        Args:
            path: the atlas.
            encoder: where its encoder runs, such as ``triton://…``; in this process when None.

        Raises:
            HistoseekError: whatever is wrong with either.
        """
        self.atlas = Atlas(path)
        spec = encoder or str(self.atlas.encoder_bundle)
        self.encoder: Encoder = open_encoder(spec, expect=self.atlas.manifest)
        self.pictures = TilePictures(self.atlas)
        self.atlas.index()
        self._map: tuple[tuple[int, str | None], Map] | None = None

    def find_similar(self, image: Path | bytes | Rgb, k: int) -> Similar:
        """Search for the k most similar tiles.

        Raises:
            BadInput: no readable picture, or an empty atlas.
        """
        query = square(decode(image), self.atlas.manifest.size_px)
        vector = self.encoder.embed(query[None])
        hits = self.atlas.search(vector, k)[0]
        placed = self.atlas.assign(vector)[0] if self.clusterings() else None
        return Similar(query, hits, [self.pictures.read(hit) for hit in hits], placed)

    def clusterings(self) -> list[str]:
        """Return the names of the fitted clusterings, newest first."""
        return [c["name"] for c in reversed(self.atlas.stats()["clusterings"])]

    def cluster(self, images: Sequence[tuple[str, Path | bytes]], name: str | None) -> Clustered:
        """Place images in the clusters of a clustering; a bad one is refused by name.

        Raises:
            BadInput: no image, too many, none readable, or no such clustering.
        """
        if not images:
            raise BadInput("no image was given; expected at least one")
        if len(images) > MAX_UPLOADS:
            raise BadInput(f"{len(images)} images at once; at most {MAX_UPLOADS} are accepted")
        chosen, clustering = self.atlas.clustering(name)
        tiles: list[Rgb] = []
        names: list[str] = []
        refused: list[tuple[str, str]] = []
        for label, image in images:
            try:
                tiles.append(square(decode(image, name=label), self.atlas.manifest.size_px))
                names.append(label)
            except BadInput as error:
                refused.append((label, str(error)))
        if not tiles:
            raise BadInput(f"none of the {len(images)} images could be read: {refused[0][1]}")
        vectors = self.encoder.embed(np.stack(tiles))
        placed = self.atlas.assign(vectors, chosen)
        return Clustered(chosen, names, placed, self.map(chosen).place(vectors), refused)

    def map(self, clustering: str | None) -> Map:
        """Return the map of the atlas, coloured by a clustering; kept until the atlas changes."""
        revision = self.atlas.catalog.revision()
        fitted = next(
            (c["created_at"] for c in self.atlas.stats()["clusterings"] if c["name"] == clustering),
            "",
        )
        key = (revision, f"{clustering}@{fitted}")
        if self._map is None or self._map[0] != key:
            self._map = key, self._make_map(clustering)
        return self._map[1]

    def _make_map(self, clustering: str | None) -> Map:
        ids, vectors = self.atlas.vectors()
        mean = vectors.mean(axis=0, dtype=np.float64)
        centred = vectors.astype(np.float64) - mean
        values, axes = np.linalg.eigh(centred.T @ centred)
        explained = float(values[-2:].sum() / max(values.sum(), 1e-12))
        axes = axes[:, ::-1][:, :2].T
        chosen = np.arange(len(ids))
        if len(ids) > MAP_POINTS:
            picked = np.random.default_rng(0).choice(len(ids), MAP_POINTS, replace=False)
            chosen = np.sort(picked)
        columns = self.atlas.view().columns
        placed = columns.clusters(clustering)
        clusters = np.full(len(chosen), -1, dtype=np.int64)
        if placed is not None:
            clusters = np.maximum(placed[columns.positions(ids[chosen])], -1).astype(np.int64)
        points = centred[chosen] @ axes.T
        return Map(points, clusters, len(chosen), len(ids), explained, mean, axes)
