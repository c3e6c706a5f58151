"""The functions of the page and the API on an open atlas, free of widgets, requests and globals."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...artifacts.images import Rgb, decode, square
from ...console import counted
from ...errors import (
    BadInput,
    Busy,
    HistoseekError,
    MissingPart,
    NotFound,
    TooLarge,
    unknown_name,
)
from ...index.atlas import Atlas
from ...index.federation.answers import Answer, Example
from ...index.search.cases import How, check_how
from ...index.search.query import Query
from ...index.store.rows import Hit
from ...index.view import View
from ...serving.encoders.engines import cores
from ...serving.encoders.open import open_encoder
from ...serving.encoders.protocol import Encoder
from ...serving.encoders.stain_normalisation import embed_images, graph_of, not_normalised
from ...serving.encoders.text import TextEncoder
from .answers import (
    ALONE,
    MAX_EXAMPLES,
    MAX_IMAGES,
    MAX_K,
    MAX_PIXELS,
    Among,
    ClusterAnswer,
    SearchAnswer,
    SimilarAnswer,
    check_limits,
    cropped,
    new_id,
    now,
)
from .background import Background
from .batching import Batcher
from .elsewhere import Elsewhere
from .map import AtlasMap
from .pictures import Pictures
from .regions import Region
from .results import Results
from .scaled import ScaledImage, cut_for, matches_of, mean_of
from .verdict import Usual, verdict_of
from .viewer import Viewer

Cutting = tuple[ScaledImage, NDArray[np.uint8]]
"""An image of known scale, and its tiles (N, S, S, 3)."""
MAX_WORDS = 64
"""Maximum number of words to name clusters with: each takes the text network some 0.1 s on all cores."""
DECODING_S = 30.0
"""Timeout (s) of an image that waits to be decoded, and of a text that waits for others."""


class Session:
    """An open atlas with its encoder; safe to use from several threads.

    Attributes:
        atlas: the atlas.
        encoder: the atlas's encoder; None if it is not available.
        batching: embeds images of several callers in one batch; None without an encoder.
        pictures: reads the images of tiles and slides.
        viewer: reads slides for a viewer, and regions of them.
        results: earlier answers.
        map: the tiles' coordinates on the atlas's map.
        elsewhere: this atlas and further ones that are searched with it; None without further ones.
    """

    def __init__(self, path: Path, encoder: str | None = None, others: Sequence[str] = ()) -> None:
        """Open the atlas and its encoder, and load the index.

        An atlas with features of another tool has no encoder: its tiles can be used as queries, new
        images cannot.

        Args:
            path: folder of the atlas.
            encoder: where its encoder runs, such as ``triton://…``; in this process when None.
            others: further atlases of the same encoder, which are searched too: folders, or addresses of
                Milvus. One that cannot be opened is named in each answer.

        Raises:
            HistoseekError: the atlas or the encoder cannot be opened, or a further atlas has another
                encoder.
        """
        self.atlas = Atlas(path)
        self.elsewhere = Elsewhere(self.atlas, others) if others else None
        self.spec = encoder or str(self.atlas.encoder_bundle)
        self.encoder: Encoder | None = None
        self.batching: Batcher | None = None
        if encoder or not self.atlas.manifest.external:
            self.encoder = open_encoder(self.spec, expect=self.atlas.manifest)
            self.batching = Batcher(graph_of(self.encoder))
        self._text: TextEncoder | None = None
        self._text_lock = threading.Lock()
        self.pictures = Pictures(self.atlas)
        self.viewer = Viewer(self.atlas, self.pictures)
        self.results = Results()
        self._decoders = threading.BoundedSemaphore(2 * cores())
        self._background = Background()
        self._usual = Usual(self.atlas, self._background)
        self.map = AtlasMap(self.atlas, self._background)
        self.atlas.view()

    def close(self) -> None:
        """Cancel waiting requests and free all resources."""
        if self.batching is not None:
            self.batching.close()
        self._background.close()
        if self.encoder is not None:
            self.encoder.close()
        self.pictures.close()
        if self.elsewhere is not None:
            self.elsewhere.close()

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
            name: the image's name in messages.
            crop: left, top, width and height as shares of the upright image; the whole image when None.

        Raises:
            BadInput: the image cannot be read, or the crop is too small.
        """
        with self._decoding():
            pixels = decode(image, name=name, max_pixels=MAX_PIXELS)
            if crop is not None:
                pixels = cropped(pixels, crop, name)
            return square(pixels, self.atlas.manifest.size_px)

    def cut(
        self,
        image: Path | bytes,
        name: str,
        mpp: float,
        crop: tuple[float, float, float, float] | None = None,
    ) -> Cutting:
        """Return an image of known scale, in µm per pixel, as tiles of the atlas's scale.

        Raises:
            BadInput: the image cannot be read or is smaller than a tile, or the atlas's scale is unknown.
        """
        with self._decoding():
            pixels = decode(image, name=name, max_pixels=MAX_PIXELS)
            if crop is not None:
                cropped(pixels, crop, name)  # checks it
            return cut_for(self.atlas, pixels, name, mpp, crop)

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Limit the number of images decoded at once: decoding large images needs much memory."""
        if not self._decoders.acquire(timeout=DECODING_S):
            raise Busy("too many images are being decoded; try again in a moment")
        try:
            yield
        finally:
            self._decoders.release()

    def embed(
        self,
        tiles: Sequence[Rgb] | NDArray[np.uint8],
        notes: list[str],
        names: Sequence[str] = (),
        of: str = "",
    ) -> NDArray[np.float32]:
        """Embed tiles, each (S, S, 3), -> (N, D) through the batching queue.

        Args:
            tiles: the tiles.
            notes: gets a sentence about each image whose stain the atlas's encoder could not normalise.
            names: of the tiles, in these; numbered when empty.
            of: name of the image of which all tiles are parts; "" if each is an image of its own.

        Raises:
            BadInput: there are no tiles, or the atlas has no encoder.
            TooLarge: there are too many tiles.
            Busy: too many images are waiting.
        """
        if self.batching is None or self.encoder is None:
            raise BadInput(
                f"this atlas has features of {self.atlas.manifest.name}, which is not installed here, so "
                "images cannot be embedded; search by tiles of the atlas"
            )
        _check_count(tiles)
        vectors, reasons = embed_images(
            self.encoder, np.stack(list(tiles)), self.batching.embed, one_image=bool(of)
        )
        if of:
            names, reasons = [of], reasons[:1]
        notes += not_normalised(names or [f"image {n}" for n, _ in enumerate(tiles, 1)], reasons)
        return vectors

    @property
    def takes_text(self) -> bool:
        """Whether the atlas's encoder has a text network."""
        return self.atlas.manifest.text is not None

    def embed_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts -> (N, D) with the text network of the atlas's encoder.

        Raises:
            BadInput: the encoder has no text network, or a text is empty or too long.
            MissingPart: the package tokenizers is not installed.
            Busy: other texts took too long.
        """
        if not self._text_lock.acquire(timeout=DECODING_S):  # one text takes all cores
            raise Busy("too many texts are waiting; try again in a moment")
        try:
            if self._text is None:
                self._text = TextEncoder(self.atlas.encoder_bundle, self.atlas.manifest)
            return self._text.embed(texts)
        finally:
            self._text_lock.release()

    # -- searching ------------------------------------------------------------------------------

    def search(
        self,
        query: Query,
        clustering: str | None = None,
        regions: Sequence[Region] = (),
        scaled: Sequence[Cutting] = (),
        among: Among = ALONE,
    ) -> SearchAnswer:
        """Search for the tiles that resemble all examples of a query.

        Args:
            query: the query; its examples are combined.
            clustering: clustering to assign the query to; the newest when None.
            regions: regions of slides that hits resemble; each is one example, the mean of its tiles.
            scaled: images of known scale that hits resemble (:meth:`cut`); likewise.
            among: further atlases to search, and examples that are tiles of them.

        Raises:
            BadInput: the filter cannot be read, the atlas is empty, or there is no encoder for images, or
                no text network for texts.
            NotFound: a tile, or a further atlas, does not exist.
            Unavailable: the atlas of an example cannot be read.
            Busy: too many images wait for the encoder.
        """
        query = replace(query, together=True, where=(query.where or "").strip() or None)
        started = time.perf_counter()
        taken = [self.viewer.tiles_in(region) for region in regions[: MAX_EXAMPLES + 1]]
        notes: list[str] = []
        parts = [self.embed(tiles, notes, of=image.name) for image, tiles in scaled]
        metric = self.atlas.manifest.metric
        of_regions = [
            mean_of(self.embed(tiles, notes, of=f"the region of {cut.region.slide}"), metric)
            for cut, tiles in taken
        ]
        if means := [*of_regions, *(mean_of(vectors, metric) for vectors in parts)]:
            query = replace(query, vectors=np.stack(means))
        query, among = self._with_own(query, among)
        together = self._together(among)
        if together is not None:
            none = np.zeros((0, self.atlas.manifest.dim), np.float32)
            like, unlike = (
                together.federation.examples(tiles) if tiles else none
                for tiles in (among.like, among.unlike)
            )
            query = query.with_vectors(like, unlike)
        check_limits(query)
        names = [f"image {n}" for n, _ in enumerate(query.images, 1)]
        names += [f"unlike image {n}" for n, _ in enumerate(query.unlike_images, 1)]
        embedded = query.embedded(partial(self.embed, notes=notes, names=names), self.embed_text)
        milliseconds = {"embed": round(1000 * (time.perf_counter() - started), 2)}
        answer = self.atlas.ask(
            self._answer, embedded, clustering, query.by_text, parts, together, among
        )
        milliseconds |= answer.milliseconds
        notes += answer.notes
        # keep the query's images, because the report shows them
        shown = replace(
            query, images=(*query.images, *(image.whole for image, _ in scaled)),
            vectors=np.stack(of_regions) if of_regions else None, unlike_vectors=None,
        )  # fmt: skip
        answer = replace(
            answer, query=shown, milliseconds=milliseconds,
            regions=tuple(region for region, _ in taken), scaled=tuple(image for image, _ in scaled),
            notes=tuple(notes),
        )  # fmt: skip
        return self.results.keep(answer)

    def _answer(
        self,
        view: View,
        /,
        query: Query,
        clustering: str | None,
        by_text: bool,
        parts: Sequence[NDArray[np.float32]] = (),
        together: Elsewhere | None = None,
        among: Among = ALONE,
    ) -> SearchAnswer:
        """Answer a query with embedded images from one state of the atlas.

        Args:
            view: the state.
            query: the query.
            clustering: as for :meth:`search`.
            by_text: whether the query has texts.
            parts: the embeddings of the tiles of each image of known scale.
            together: the atlases, if others than this one are searched.
            among: which of them.
        """
        started = time.perf_counter()
        vector = view.vector_of(query)
        by_patient = query.leave_out == "patient" and bool(query.tiles)
        found = None
        if together is None:
            hits = view.search_near(vector, query)
        else:
            own = [Example(together.own, tile) for tile in query.tiles]
            only = among.atlases or [together.own]
            found = together.federation.search_near(vector, query, [*own, *among.like], only)
            hits = [one.hit for one in found.hits[0]]
        searched = round(1000 * (time.perf_counter() - started), 2)
        return SearchAnswer(
            id=new_id(),
            at=now(),
            query=query,
            vector=vector,
            hits=hits,
            verdict=verdict_of(
                self._usual, view, query, clustering, vector, hits, by_text, alone=found is None
            ),
            generation=view.generation,
            revision=view.revision,
            milliseconds={"search": searched},
            matches=(
                matches_of(self._vectors_of(view, hits, found), view.state.metric, parts)
                if sum(map(len, parts)) > 1
                else ()
            ),
            atlases=() if found is None else tuple(one.atlas for one in found.hits[0]),
            searched=() if found is None else tuple(found.shards),
            shared_slides=0 if found is None else len(found.shared_slides),
            among=among,
            notes=tuple(view.notes(query.where, by_patient) if found is None else found.notes),
        )

    def _with_own(self, query: Query, among: Among) -> tuple[Query, Among]:
        """Return the query with those examples of ``among`` that are tiles of the server's own atlas."""
        own = self.atlas.path.name if self.elsewhere is None else self.elsewhere.own

        def parted(tiles: Sequence[Example]) -> tuple[tuple[int, ...], tuple[Example, ...]]:
            mine = tuple(tile.tile for tile in tiles if tile.atlas == own)
            return mine, tuple(tile for tile in tiles if tile.atlas != own)

        (like, like_others), (unlike, unlike_others) = parted(among.like), parted(among.unlike)
        query = replace(
            query, tiles=tuple(dict.fromkeys((*query.tiles, *like))),
            unlike_tiles=tuple(dict.fromkeys((*query.unlike_tiles, *unlike))),
        )  # fmt: skip
        return query, Among(among.atlases, like_others, unlike_others)

    def _together(self, among: Among) -> Elsewhere | None:
        """Return all atlases if a search needs others than this one.

        Raises:
            NotFound: there is no atlas of a name.
        """
        names = [*among.atlases, *(tile.atlas for tile in (*among.like, *among.unlike))]
        if self.elsewhere is None:
            if other := set(names) - {self.atlas.path.name}:
                raise unknown_name("atlas", min(other), [self.atlas.path.name])
            return None
        self.elsewhere.federation.check(names)
        return self.elsewhere if set(names) - {self.elsewhere.own} else None

    def _vectors_of(
        self, view: View, hits: Sequence[Hit], found: Answer | None
    ) -> NDArray[np.float32] | None:
        """Return the vectors (H, D) of hits; None if one of them is in Milvus."""
        if found is None or self.elsewhere is None:
            return view.index.at(view.state.positions([hit.tile for hit in hits]))
        try:
            return self.elsewhere.federation.examples(
                [Example(one.atlas, one.hit.tile) for one in found.hits[0]]
            )
        except BadInput:
            return None

    def pictures_of(self, atlas: str) -> Pictures:
        """Return the reader of an atlas's images; "" is the server's own.

        Raises:
            NotFound: there is no such atlas, or it has no images.
            Unavailable: it cannot be read.
        """
        if self.elsewhere is None or atlas in {"", self.elsewhere.own}:
            return self.pictures
        return self.elsewhere.pictures(atlas)

    def result(self, number: str) -> SearchAnswer | ClusterAnswer:
        """Return an earlier answer by its id.

        Raises:
            NotFound: there is no such answer (any more), or it has tiles of a slide that was removed since.
        """
        answer = self.results.get(number)
        if isinstance(answer, SearchAnswer):
            own = None if self.elsewhere is None else self.elsewhere.own
            homes = answer.atlases or [own] * len(answer.hits)
            hits = [hit for hit, home in zip(answer.hits, homes, strict=True) if home == own]
        else:
            hits = answer.nearest
        with self.atlas.catalog.read() as db:
            present = {row["name"] for row in db.execute("SELECT name FROM slides")}
        regions = answer.regions if isinstance(answer, SearchAnswer) else ()
        shown = {*(hit.slide for hit in hits), *(cut.region.slide for cut in regions)}
        if gone := shown - present:
            self.results.drop(number)
            raise NotFound(
                f"the result {number!r} shows {counted(len(gone), 'slide')} removed since, so it "
                "was dropped; search again"
            )
        return answer

    def hide(self, text: str) -> str:
        """Return a text without the server's folders."""
        if self.elsewhere is not None:
            text = self.elsewhere.hide(text)
        folders = {str(self.atlas.path.resolve()), str(self.atlas.path), tempfile.gettempdir()}
        for folder in sorted(folders, key=len, reverse=True):  # a relative path may end another one
            if len(folder) > 1:
                text = text.replace(folder + "/", "").replace(folder, self.atlas.path.name)
        return text

    def warm(self) -> None:
        """Start the computations for the first answers: batch size, usual nearness, map."""
        revision = self.atlas.catalog.revision()
        self._usual.nearness(revision)
        self._usual.out_of_distribution(revision)
        if self.batching is not None:
            self._background.get("batch", 0, self.batching.measure)
        with suppress(MissingPart):
            self.map.layout()

    # -- clusters -------------------------------------------------------------------------------

    def cluster(
        self,
        images: Sequence[tuple[str, Path | bytes]],
        name: str | None = None,
        examples: int = 0,
    ) -> ClusterAnswer:
        """Assign images to the clusters of a clustering; the answer lists unreadable images by name.

        Args:
            images: a name and a file, or its bytes, of each.
            name: of the clustering; the newest when None.
            examples: tiles of each cluster to return with the answer; 0 for no description of clusters.

        Raises:
            BadInput: there is no image, no readable image, or no such clustering.
            TooLarge: there are too many images.
        """
        _check_count(images)
        self.atlas.clustering(name)
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
        notes: list[str] = []
        vectors = self.embed(tiles, notes, names)
        layout = None
        with suppress(MissingPart):  # without the map's package, images are still assigned
            layout = self.map.layout()

        def answer(view: View) -> ClusterAnswer:
            assigned = view.assign(vectors, name)
            foreign = self.atlas.manifest.out_of_distribution(vectors)
            for row, outside in zip(assigned, foreign, strict=True):
                row["foreign"] = (
                    bool(outside) and row["unknown"]
                )  # clusters override the tissue gate
            return ClusterAnswer(
                id=new_id(),
                at=now(),
                clustering=view.clustering(name)[0],
                names=names,
                tiles=tiles,
                placed=assigned,
                nearest=[hits[0] for hits in view.search(Query(vectors=vectors, k=1))],
                points=None if layout is None else layout.place(vectors),
                refused=refused,
                notes=tuple(notes),
                generation=view.generation,
                revision=view.revision,
                clusters=view.clusters(name, examples) if examples else [],
            )

        return self.results.keep(self.atlas.ask(answer))

    def suggest_names(self, words: Sequence[str], clustering: str | None) -> list[dict[str, Any]]:
        """Propose names for clusters: of each, the words that fit it best; at most :data:`MAX_WORDS`.

        Raises:
            BadInput: the encoder has no text network, there are too few or too many words, or no such
                clustering.
        """
        given = list(dict.fromkeys(filter(None, (" ".join(word.split()) for word in words))))
        if not 2 <= len(given) <= MAX_WORDS:
            raise BadInput(
                f"{len(given)} different words were given; expected 2 to {MAX_WORDS}, one per line"
            )
        vectors = self.embed_text(given)
        return self.atlas.ask(View.suggest_names, given, vectors, clustering)

    # -- slides and cases -----------------------------------------------------------------------

    def similar_slides(
        self,
        name: str,
        k: int = 6,
        by: Literal["slide", "patient"] = "slide",
        how: How = "median",
        atlases: Sequence[str] = (),
    ) -> SimilarAnswer:
        """Return the slides or cases most similar to one of the server's own, with their similar regions.

        Args:
            name: of the slide or patient.
            k: number of slides or cases.
            by: what is ranked.
            how: ``median`` or, in the server's own atlas alone, ``votes``.
            atlases: names of the atlases to compare with; only the server's own if empty.

        Raises:
            BadInput: ``how`` is votes with further atlases, or there is nothing to compare with.
            NotFound: there is no such slide or patient, or no atlas of a name.
            Unavailable: none of the atlases can be read.
        """
        if not 1 <= k <= MAX_K:
            raise BadInput(f"k is {k}; expected 1 to {MAX_K}")
        together = self._together(Among(tuple(atlases)))
        if together is None:

            def ask(view: View) -> SimilarAnswer:
                found = view.similar(name, k, by, how)
                return SimilarAnswer(found, notes=tuple(view.notes(None, True)))

            return self.atlas.ask(ask)
        check_how(how)
        if how != "median":
            raise BadInput(
                f"how is {how}; slides of several atlases are compared by the median only"
            )
        found = together.federation.similar(name, k, by, atlas=together.own, only=atlases)
        return SimilarAnswer(
            [one.case for one in found.cases],
            tuple(one.atlas for one in found.cases),
            tuple(found.searched.shards),
            len(found.searched.shared_slides),
            tuple(found.searched.notes),
        )

    def ready(self) -> str:
        """Return why the server is not ready; "" if it is.

        Embeds one tile through the batching queue, after the images that are already waiting.
        """
        try:
            self.atlas.view()
            if self.batching is not None:
                size = self.atlas.manifest.size_px
                self.batching.embed(np.zeros((1, size, size, 3), dtype=np.uint8), patience_s=5)
        except HistoseekError as error:
            return str(error)
        return ""


def _check_count(images: Sized) -> None:
    if not len(images):
        raise BadInput("no image was given; expected at least one")
    if len(images) > MAX_IMAGES:
        raise TooLarge(f"{len(images)} images were given; expected at most {MAX_IMAGES} at once")
