"""What the page and the API do, as plain functions over an open atlas: no widget, no request, no global."""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...artifacts.images import Rgb, decode, square
from ...errors import BadInput, Busy, HistoseekError, MissingPart, NotFound, TooLarge
from ...index.atlas import Atlas
from ...index.search.cases import How
from ...index.search.cases import Similar as SimilarSlide
from ...index.search.filters import quoted
from ...index.search.map import Layout
from ...index.store.rows import Hit
from ...index.vectors.generations import View
from ...serving.encoders.engines import cores
from ...serving.encoders.open import open_encoder
from ...serving.encoders.protocol import Encoder
from .answers import MAX_K, Clustered, Found, Points, Query, Verdict, now
from .background import Background
from .batching import Gate
from .pictures import Pictures

MAX_IMAGES = 256
"""Images that are embedded or placed at once."""
MAX_PIXELS = 32_000_000
MAP_POINTS = 200_000
LAYOUT_S = 20.0
DECODING_S = 30.0
RESULTS_KEPT = 512
RESULTS_BYTES = 256 * 2**20
"""Images that kept answers may hold."""
UNUSUAL = 0.01
"""A query is unusual if no more than this share of the atlas's own tiles are as far from the others."""


Answer = TypeVar("Answer", "Found", "Clustered")


class Session:
    """An open atlas with its encoder; safe to use from several threads."""

    def __init__(self, path: Path, encoder: str | None = None) -> None:
        """Open the atlas and its encoder, and load the index.

        An atlas of another tool's features has no encoder here: its own tiles can be searched by, new
        images cannot.

        Args:
            path: the atlas.
            encoder: where its encoder runs, such as ``triton://…``; in this process when None.

        Raises:
            HistoseekError: whatever is wrong with either.
        """
        self.atlas = Atlas(path)
        self.spec = encoder or str(self.atlas.encoder_bundle)
        self.encoder: Encoder | None = None
        self.gate: Gate | None = None
        if encoder or not self.atlas.manifest.external:
            self.encoder = open_encoder(self.spec, expect=self.atlas.manifest)
            self.gate = Gate(self.encoder)
        self.pictures = Pictures(self.atlas)
        self._results: OrderedDict[str, Found | Clustered] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()
        self._decoders = threading.BoundedSemaphore(2 * cores())
        self._background = Background()
        self._points: Points | None = None
        self.atlas.index()

    def close(self) -> None:
        """Turn away who waits and free what is held."""
        if self.gate is not None:
            self.gate.close()
        self._background.close()
        if self.encoder is not None:
            self.encoder.close()
        self.pictures.close()

    # -- images ---------------------------------------------------------------------------------

    def read(
        self,
        image: Path | bytes,
        name: str,
        crop: tuple[float, float, float, float] | None = None,
    ) -> Rgb:
        """Return an image as the encoder sees it (S, S, 3).

        Args:
            image: a file or its bytes.
            name: to call it by in messages.
            crop: left, top, width and height as shares of the upright picture; all of it when None.

        Raises:
            BadInput: no readable picture, or a crop that leaves nothing.
        """
        with self._decoding():
            pixels = decode(image, name=name, max_pixels=MAX_PIXELS)
            if crop is not None:
                pixels = cropped(pixels, crop, name)
            return square(pixels, self.atlas.manifest.size_px)

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Hold one of the few places to decode: large pictures take much memory while they are decoded."""
        if not self._decoders.acquire(timeout=DECODING_S):
            raise Busy("too many pictures are being decoded; ask again in a moment")
        try:
            yield
        finally:
            self._decoders.release()

    def embed(self, tiles: Sequence[Rgb]) -> NDArray[np.float32]:
        """Embed tiles (S, S, 3) -> (N, D), in turn with everyone else.

        Raises:
            BadInput: none, or an atlas without an encoder here.
            TooLarge: too many.
            Busy: too many wait already.
        """
        if self.gate is None:
            raise BadInput(
                f"this atlas holds features of {self.atlas.manifest.name}, which is not here, so images "
                "cannot be embedded; search by tiles of the atlas"
            )
        if not tiles:
            raise BadInput("no image was given; expected at least one")
        if len(tiles) > MAX_IMAGES:
            raise TooLarge(f"{len(tiles)} images at once; at most {MAX_IMAGES} are embedded")
        return self.gate.embed(np.stack(tiles))

    # -- searching ------------------------------------------------------------------------------

    def search(self, query: Query) -> Found:
        """Search for similar tiles.

        Raises:
            BadInput: a filter that cannot be read, an empty atlas, or no encoder for images.
            NotFound: a tile that is not there.
            Busy: too many wait for the encoder.
        """
        started = time.perf_counter()
        images = [*query.images, *query.unlike_images]
        none = np.zeros((0, self.atlas.manifest.dim), dtype=np.float32)
        seen = self.embed(images) if images else none
        milliseconds = {"embed": round(1000 * (time.perf_counter() - started), 2)}
        return self._keep(
            self.atlas.ask(lambda view: self._answer(query, seen, milliseconds, view))
        )

    def _answer(
        self,
        query: Query,
        seen: NDArray[np.float32],
        milliseconds: dict[str, float],
        view: View,
    ) -> Found:
        """Answer a query whose images are embedded (I, D), all from one state of the atlas."""
        started = time.perf_counter()
        like, unlike = self._vectors(query, seen, view)
        single = len(like) == 1 and not len(unlike)
        where = self._where(query, view)
        own = set(query.like)
        if single and not query.per_slide:
            asked = self.atlas.search(like, query.k + len(own), where, query.least, view=view)[0]
            vector = like[0]
        else:
            if own:
                where = both(where, f"tile not in ({', '.join(map(str, sorted(own)))})")
            vector = self.atlas.combined(like, unlike)
            asked = self.atlas.search(
                vector[None], query.k, where, query.least, query.per_slide, view=view
            )[0]
        rest = [hit for hit in asked if hit.tile not in own][: query.k]
        hits = [hit._replace(rank=rank) for rank, hit in enumerate(rest, 1)]
        searched = round(1000 * (time.perf_counter() - started), 2)
        return Found(
            id=secrets.token_urlsafe(12),
            at=now(),
            query=query,
            vector=vector,
            hits=hits,
            verdict=self._verdict(query, hits, vector if single else None, where, view),
            generation=view.generation,
            revision=view.revision,
            milliseconds={**milliseconds, "search": searched},
        )

    def _vectors(
        self, query: Query, seen: NDArray[np.float32], view: View
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the vectors to be like (P, D) and to be unlike (M, D); ``seen`` (I, D) are the images'."""
        tiles = [*query.like, *query.unlike]
        none = np.zeros((0, self.atlas.manifest.dim), dtype=np.float32)
        known = self.atlas.vectors_of(tiles, view) if tiles else none
        like = np.concatenate([seen[: len(query.images)], known[: len(query.like)]])
        unlike = np.concatenate([seen[len(query.images) :], known[len(query.like) :]])
        return like, unlike

    def _where(self, query: Query, view: View) -> str | None:
        """Return the query's filter with what is to be left out of its own."""
        where = query.where.strip() if query.where else None
        where = where or None
        if not query.leave_out or not query.like:
            return where
        for tile in self.atlas.tiles(query.like, view).values():
            where = both(where, f"slide != {quoted(tile['slide'])}")
            if query.leave_out == "patient" and tile["patient"]:
                where = both(where, f"patient != {quoted(tile['patient'])}")
        return where

    def _verdict(
        self,
        query: Query,
        hits: list[Hit],
        vector: NDArray[np.float32] | None,
        where: str | None,
        view: View,
    ) -> Verdict:
        placed = nearer = None
        if vector is not None and view.clusterings:
            placed = self.atlas.assign(vector[None], query.clustering, view)[0]
        usual = self._background.get("usual", self._state(), self.atlas.usual_nearness)
        if vector is not None and usual is not None and len(usual):
            best = hits
            if where or query.least is not None:  # near or far is meant of the whole atlas
                own = set(query.like)
                near = self.atlas.search(vector[None], 1 + len(own), view=view)[0]
                best = [h for h in near if h.tile not in own]
            if best:
                nearer = float(np.searchsorted(usual, best[0].score, side="left") / len(usual))
        foreign = vector is not None and bool(self.atlas.manifest.foreign(vector[None])[0])
        if foreign and placed is not None:
            foreign = placed["unknown"]  # clusters may ignore the gate
        elif foreign:  # an atlas of other pictures ignores it, too
            share = self._background.get("foreign", self._state(), self.atlas.foreign_share)
            foreign = share is None or share <= 0.5
        return Verdict(
            labels=Counter(hit.label for hit in hits).most_common(),
            slides=Counter(hit.slide for hit in hits).most_common(),
            placed=placed,
            nearer_than=nearer,
            unknown=foreign
            or bool(placed and placed["unknown"])
            or (nearer is not None and nearer < UNUSUAL),
            foreign=foreign,
        )

    def hide(self, text: str) -> str:
        """Return a text without the folders that nobody outside needs to know."""
        for folder in {str(self.atlas.path.resolve()), str(self.atlas.path), tempfile.gettempdir()}:
            if len(folder) > 1:
                text = text.replace(folder + "/", "").replace(folder, self.atlas.path.name)
        return text

    def warm(self) -> None:
        """Begin to make what the first answers are better with: the batch, and what nearness is usual."""
        self._background.get("usual", self._state(), self.atlas.usual_nearness)
        self._background.get("foreign", self._state(), self.atlas.foreign_share)
        if self.gate is not None:
            self._background.get("batch", 0, self.gate.measure)
        with suppress(MissingPart):
            self.layout()

    def _state(self) -> int:
        return self.atlas.catalog.revision()

    # -- clusters -------------------------------------------------------------------------------

    def clusterings(self) -> list[str]:
        """Return the names of the fitted clusterings, newest first."""
        rows = self.atlas.catalog.rows("SELECT name FROM clusterings ORDER BY id DESC")
        return [row["name"] for row in rows]

    def cluster(
        self, images: Sequence[tuple[str, Path | bytes]], name: str | None = None
    ) -> Clustered:
        """Place images in the clusters of a clustering; a bad one is refused by name.

        Raises:
            BadInput: no image, none readable, or no such clustering.
            TooLarge: too many.
        """
        if not images:
            raise BadInput("no image was given; expected at least one")
        if len(images) > MAX_IMAGES:
            raise TooLarge(f"{len(images)} images at once; at most {MAX_IMAGES} are placed")
        chosen, _ = self.atlas.clustering(name)
        tiles: list[Rgb] = []
        names: list[str] = []
        refused: list[tuple[str, str]] = []
        for label, image in images:
            try:
                tiles.append(self.read(image, label))
                names.append(label)
            except BadInput as error:
                refused.append((label, str(error)))
        if not tiles:
            raise BadInput(f"none of the {len(images)} images could be read: {refused[0][1]}")
        vectors = self.embed(tiles)
        layout = None
        with suppress(MissingPart):  # without the map's package images are placed all the same
            layout = self.layout()
        points = None if layout is None else layout.place(vectors)

        def answer(view: View) -> Clustered:
            placed = self.atlas.assign(vectors, chosen, view)
            for row, foreign in zip(placed, self.atlas.manifest.foreign(vectors), strict=True):
                row["foreign"] = bool(foreign) and row["unknown"]  # clusters may ignore the gate
            return Clustered(
                id=secrets.token_urlsafe(12),
                at=now(),
                clustering=chosen,
                names=names,
                tiles=tiles,
                placed=placed,
                nearest=[found[0] for found in self.atlas.search(vectors, 1, view=view)],
                points=points,
                refused=refused,
                generation=view.generation,
                revision=view.revision,
            )

        return self._keep(self.atlas.ask(answer))

    # -- slides and cases -----------------------------------------------------------------------

    def similar_slides(
        self, name: str, k: int = 6, by: Literal["slide", "patient"] = "slide", how: How = "median"
    ) -> list[SimilarSlide]:
        """Return the slides or cases most like one, with the regions that are alike.

        Raises:
            NotFound: no such slide or patient.
        """
        if not 1 <= k <= MAX_K:
            raise BadInput(f"k is {k}; expected 1 to {MAX_K}")
        return self.atlas.similar_slides(name, k, by, how)

    # -- the map --------------------------------------------------------------------------------

    def layout(self) -> Layout | None:
        """Return the map; None while it is being made in the background.

        Raises:
            MissingPart: openTSNE is not installed.
        """

        def find() -> Layout:
            try:
                found = self.atlas.layout()
            except HistoseekError:  # damaged: it is made anew
                found = None
            return found or self.atlas.make_layout()

        tiles = len(self.atlas.index())
        return self._background.get("layout", tiles.bit_length(), find)

    def wait_for_layout(self, patience_s: float = LAYOUT_S) -> None:
        """Wait until there is a map, at most so long."""
        deadline = time.monotonic() + patience_s
        with suppress(MissingPart):
            self._wait_for_layout(deadline)

    def _wait_for_layout(self, deadline: float) -> None:
        while self.layout() is None and time.monotonic() < deadline:
            time.sleep(0.1)

    def points(self) -> Points | None:
        """Return where the tiles of the atlas lie on the map; None while it is being made."""
        layout = self.layout()
        if layout is None:
            return None
        kept = self._points
        if kept is not None and kept.revision == self._state() and kept.layout is layout:
            return kept
        found = self._background.get("points", self._state(), lambda: self._place_all(layout))
        self._points = found or self._points
        return found

    def _place_all(self, layout: Layout) -> Points:
        revision = self._state()  # before what it is of: a commit meanwhile makes it old, not wrong
        ids, vectors = self.atlas.vectors()
        rows = np.arange(len(ids))
        if len(rows) > MAP_POINTS:
            rows = np.sort(np.random.default_rng(0).choice(rows, MAP_POINTS, replace=False))
        places = layout.place(vectors[rows])
        return Points(ids[rows], places, len(ids), layout, revision)

    def colours(self, points: Points, by: str) -> tuple[list[str], NDArray[np.int32]]:
        """Return names and numbers (M,) of what colours the points: -1 for none.

        Args:
            points: on the map.
            by: ``cluster``, ``cluster.NAME``, ``label``, ``slide``, ``patient`` or a metadata column.
        """
        columns = self.atlas.view().columns
        at = columns.positions(points.ids)
        if by == "cluster" or by.startswith("cluster."):
            name = by.partition(".")[2] or next(iter(self.clusterings()), None)
            placed = columns.clusters(name)
            if placed is None:
                raise NotFound(f"the atlas has no clustering {name!r}")
            codes = np.where(at >= 0, np.maximum(placed[at], -1), -1).astype(np.int32)
            given = self.cluster_names(name)
            count = int(codes.max(initial=-1)) + 1
            return [given.get(c) or f"cluster {c}" for c in range(count)], codes
        if by not in columns.names():
            raise NotFound(f"the atlas has no column {by!r}; it has {', '.join(columns.names())}")
        coded = columns.coded(by)
        found: NDArray[np.int32] = np.where(at >= 0, coded.codes[at], -1).astype(np.int32)
        return coded.names, found

    def cluster_names(self, clustering: str | None) -> dict[int, str]:
        """Return the names that people gave to clusters."""
        return self.atlas.cluster_names(clustering)

    # -- results --------------------------------------------------------------------------------

    def _keep(self, result: Answer) -> Answer:
        with self._lock:
            self._results[result.id] = result
            self._held += _image_bytes(result)
            while len(self._results) > RESULTS_KEPT or self._held > RESULTS_BYTES:
                _, oldest = self._results.popitem(last=False)
                self._held -= _image_bytes(oldest)
        return result

    def result(self, number: str) -> Found | Clustered:
        """Return an earlier answer by its id; the last few hundred are kept.

        Raises:
            NotFound: no such answer (any more).
        """
        with self._lock:
            if number not in self._results:
                raise NotFound(f"there is no result {number!r} (any more); search again")
            return self._results[number]

    def ready(self) -> str:
        """Return why the server is not ready to answer; "" if it is.

        The encoder is asked for one tile, ahead of which whatever waits is answered.
        """
        try:
            self.atlas.view()
            if self.gate is not None:
                size = self.atlas.manifest.size_px
                self.gate.embed(np.zeros((1, size, size, 3), dtype=np.uint8), patience_s=5)
        except HistoseekError as error:
            return str(error)
        return ""


def _image_bytes(result: Found | Clustered) -> int:
    """Return how much memory the images of an answer take."""
    if isinstance(result, Clustered):
        return sum(tile.nbytes for tile in result.tiles)
    return sum(tile.nbytes for tile in (*result.query.images, *result.query.unlike_images))


def both(where: str | None, other: str) -> str:
    """Return a filter that lets through what passes both."""
    return f"({where}) and {other}" if where else other


def cropped(pixels: Rgb, crop: tuple[float, float, float, float], name: str) -> Rgb:
    """Return part of a picture (H, W, 3), given as shares: left, top, width, height.

    Raises:
        BadInput: it lies outside, or holds less than 8 x 8 pixels.
    """
    left, top, width, height = crop
    fits = all(np.isfinite(crop)) and left >= 0 and top >= 0 and width > 0 and height > 0
    if not fits or left + width > 1 + 1e-6 or top + height > 1 + 1e-6:
        raise BadInput(
            f"crop is {left:g}, {top:g}, {width:g}, {height:g}; expected left, top, width and height as "
            "shares of the picture, from 0 to 1"
        )
    high, wide = pixels.shape[:2]
    x0, y0 = round(left * wide), round(top * high)
    x1, y1 = round((left + width) * wide), round((top + height) * high)
    if x1 - x0 < 8 or y1 - y0 < 8:
        raise BadInput(
            f"the crop of {name} is {x1 - x0} x {y1 - y0} pixels; expected at least 8 x 8"
        )
    return np.ascontiguousarray(pixels[y0:y1, x0:x1])
