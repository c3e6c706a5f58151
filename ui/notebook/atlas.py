"""The atlas in Python: the functions of the command line, for notebooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...artifacts.manifest import check_bundle_graph
from ...errors import BadInput, HistoseekError
from ...index import atlas as index
from ...index.inputs import find_feature_files, read_metadata, rows_of
from ...index.search.cases import How, Similar
from ...index.search.query import LeaveOut, Query
from ...index.store.metadata import AddedSlides
from ...index.store.rows import Hit
from ...index.view import View
from ...serving.encoders.open import DEFAULT, bundle_path, open_encoder
from ...serving.encoders.protocol import Encoder, check_identity
from ...serving.encoders.stain_normalisation import embed_images, not_normalised
from ...serving.encoders.text import TextEncoder
from ..session.pictures import Pictures
from .embed import Features
from .images import Image, is_one, read_images
from .show import figure_html, table_html

TILES_SHOWN = 24
Example = Image | int


class Assignment(NamedTuple):
    """The cluster of one image.

    Attributes:
        cluster: the cluster's number; -1 for noise.
        name: the cluster's name, if users gave it one.
        distance: distance to the cluster.
        strength: strength of the membership, 0 to 1.
        unknown: whether the image belongs to no cluster.
    """

    cluster: int
    name: str
    distance: float
    strength: float
    unknown: bool


class Hits(list[Hit]):
    """Similar tiles, best first; Jupyter shows their images. A copy has no images."""

    def __init__(self, hits: Iterable[Hit], pictures: Pictures | None = None) -> None:
        """Store hits, and the reader of their pixels."""
        super().__init__(hits)
        self._pictures = pictures

    def __reduce__(self) -> tuple[type[Hits], tuple[list[Hit]]]:
        """Copy or pickle the hits only."""
        return type(self), (list(self),)

    def _repr_html_(self) -> str:
        return "".join(
            _figure(
                partial(self._pictures.tile, hit.tile) if self._pictures else None,
                (f"{hit.rank}. {hit.score:.3f}", hit.slide, hit.label or "", hit.file or ""),
            )
            for hit in self[:TILES_SHOWN]
        )


class Cases(list[Similar]):
    """Similar slides or cases, best first."""

    def _repr_html_(self) -> str:
        rows = [(rank, s.name, s.score, s.label) for rank, s in enumerate(self, 1)]
        return table_html(("rank", "name", "score", "label"), rows)


class Atlas:
    """An atlas in Python: paths may be str; an image a path, bytes, an array or a PIL image.

    Attributes:
        index: the underlying atlas with all methods; see :class:`histoseek.index.atlas.Atlas`.
    """

    def __init__(self, path: str | Path, encoder: Encoder | None = None) -> None:
        """Open an atlas.

        Args:
            path: folder of the atlas.
            encoder: encoder for images; opened from the atlas's copy at first use when None.

        Raises:
            BadInput: the folder is not an atlas, or a newer histoseek wrote it.
            Mismatch: ``encoder`` is not the atlas's encoder.
        """
        self.index = index.Atlas(Path(path).absolute())  # os.chdir must not lead to another atlas
        self._encoder, self._opened_encoder = encoder, False
        self._text: TextEncoder | None = None
        if encoder is not None:
            check_identity(encoder.manifest, self.index.manifest)
        self._pictures = Pictures(self.index)

    @classmethod
    def create(
        cls,
        path: str | Path,
        encoder: Encoder | str | Path = DEFAULT,
        link_encoder: bool = False,
    ) -> Atlas:
        """Create an empty atlas for one encoder, with a copy of the encoder's bundle.

        Args:
            path: folder to create.
            encoder: an open encoder, or a bundle's folder.
            link_encoder: refer to the bundle by path and sha256 instead of copying its graphs.

        Raises:
            BadInput: ``path`` exists, or the encoder runs on a server: pass its bundle's folder instead.
        """
        if isinstance(encoder, str | Path):
            index.Atlas.create(path, bundle_path(str(encoder)), link_encoder)
            return cls(path)
        bundle = getattr(encoder, "bundle", None)
        if bundle is None:
            raise BadInput("this encoder runs on a server; pass the folder of its bundle instead")
        index.Atlas.create(path, bundle, link_encoder)
        return cls(path, encoder)

    @property
    def path(self) -> Path:
        """The folder of the atlas."""
        return self.index.path

    @property
    def encoder(self) -> Encoder:
        """The encoder of the atlas.

        Raises:
            BadInput: the atlas holds features of another tool, and its encoder is not available.
        """
        if self._encoder is None:
            manifest = self.index.manifest
            check_bundle_graph(self.index.encoder_bundle, manifest)
            self._encoder = open_encoder(self.index.encoder_bundle, expect=manifest)
            self._opened_encoder = True
        return self._encoder

    def close(self) -> None:
        """Close the slides that were opened to show images, and the encoder if the atlas opened it."""
        self._pictures.close()
        if self._opened_encoder and self._encoder is not None:
            self._encoder.close()
            self._encoder = None

    def __repr__(self) -> str:
        """Return the folder."""
        return f"Atlas({str(self.path)!r})"

    def __enter__(self) -> Atlas:
        """Close the atlas at the end of a ``with`` block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the atlas."""
        self.close()

    # -- filling --------------------------------------------------------------------------------

    def add(
        self,
        features: Features | str | Path | Sequence[str | Path],
        metadata: str | Path | Mapping[str, dict[str, str]] | None = None,
        replace: bool = False,
        mixed_scales: bool = False,
    ) -> AddedSlides:
        """Add feature files, each completely or not at all; files already in the atlas are skipped.

        Args:
            features: the result of :func:`histoseek.embed`, or feature files and folders of them.
            metadata: a CSV with a column ``slide``, or rows by slide: label, patient and any other column.
            replace: replace a slide's features if they differ.
            mixed_scales: allow tiles of different µm per pixel in the atlas, from now on.

        Returns:
            The result of each file, which rows of the metadata were used, and what was left out.

        Raises:
            BadInput: a file does not exist, or a row of the metadata matches two slides.
            Busy: another process is writing.
        """
        if isinstance(features, Features):
            inputs = features.files
        else:
            given = [features] if isinstance(features, str | Path) else features
            inputs = [Path(path) for path in given]
        files, left_out = find_feature_files(inputs)
        if not (metadata is None or isinstance(metadata, str | Path | Mapping)):
            raise BadInput(
                f"metadata is of type {type(metadata).__name__}; expected a CSV file, or a dictionary with "
                "a dictionary for each slide"
            )
        table = read_metadata(Path(metadata)) if isinstance(metadata, str | Path) else None
        rows = rows_of(table) if isinstance(metadata, str | Path) else dict(metadata or {})
        added = self.index.add(files, rows, replace, mixed_scales=mixed_scales)
        added.left_out = left_out
        added.notes[:0] = table.notes if table else ()
        return added

    def remove(self, names: str | Sequence[str]) -> int:
        """Remove slides or tile sets by name, all or none; return the number of tiles removed."""
        return self.index.remove([names] if isinstance(names, str) else names)

    # -- asking ---------------------------------------------------------------------------------

    def search(
        self,
        images: Image | Sequence[Image] | None = None,
        k: int = 10,
        where: str | None = None,
        *,
        like: Example | Sequence[Example] = (),
        unlike: Example | Sequence[Example] = (),
        text: str | Sequence[str] = (),
        unlike_text: str | Sequence[str] = (),
        least: float | None = None,
        per_slide: bool = False,
        exact: bool = False,
        leave_out: LeaveOut = "tile",
    ) -> Any:
        """Return the tiles most similar to each image, or to several examples together.

        Args:
            images: images to search for, each as a separate query.
            k: hits per query.
            where: metadata filter such as ``organ = 'colon' and patient != 'P7'``.
            like: examples of one combined query: images, or ids of tiles of the atlas.
            unlike: examples that hits should not resemble.
            text: words that the hits should show, part of the combined query; for an encoder with a text
                network. Scores rank tiles; they do not prove that a tile shows the words.
            unlike_text: words that the hits should not show.
            least: minimum score of a hit.
            per_slide: return at most one hit per slide.
            exact: compare with every tile instead of using the index.
            leave_out: leave out each tile in ``like`` itself (``tile``), its ``slide``, or its ``patient``.

        Returns:
            :class:`Hits` for one image, or for ``like`` and ``text``; a list of them for several images.

        Raises:
            BadInput: the query is empty, an image or the filter cannot be read, or ``leave_out`` is given
                without a tile.
            NotFound: a tile does not exist.
        """
        like_images, tiles = _examples(like)
        unlike_images, unlike_tiles = _examples(unlike)
        texts = (text,) if isinstance(text, str) else tuple(text)
        unlike_texts = (unlike_text,) if isinstance(unlike_text, str) else tuple(unlike_text)
        combined = bool(
            like_images or tiles or unlike_images or unlike_tiles or texts or unlike_texts
        )
        if leave_out != "tile" and not tiles:
            raise BadInput(
                f"leave_out={leave_out!r} is for tiles in like, and none is given; use where, such as "
                "\"patient != 'P7'\""
            )
        single = combined or (images is not None and is_one(images))
        separate = [] if images is None else read_images(images, self._size)
        query = Query(
            images=(*separate, *read_images(like_images, self._size)), tiles=tiles,
            unlike_images=tuple(read_images(unlike_images, self._size)), unlike_tiles=unlike_tiles,
            together=combined, k=k, where=where, least=least, per_slide=per_slide, exact=exact,
            leave_out=leave_out, texts=texts, unlike_texts=unlike_texts,
        )  # fmt: skip
        embedded = query.embedded(self._embed, self._embed_text)
        answers = self.index.ask(View.search, embedded)
        for note in self.index.ask(View.notes, where, leave_out == "patient"):
            warnings.warn(note, stacklevel=2)
        results = [Hits(hits, self._pictures) for hits in answers]
        return results[0] if single else results

    def _embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed images (N, S, S, 3), and warn of those whose stain could not be normalised."""
        vectors, reasons = embed_images(self.encoder, tiles)
        for note in not_normalised([f"image {n}" for n in range(1, len(tiles) + 1)], reasons):
            warnings.warn(note, stacklevel=3)
        return vectors

    def _embed_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if self._text is None:
            self._text = TextEncoder(self.index.encoder_bundle, self.index.manifest)
        return self._text.embed(texts)

    def similar(
        self,
        query: str | NDArray[np.float32],
        k: int = 10,
        by: Literal["slide", "patient"] = "slide",
        how: How = "median",
        where: str | None = None,
    ) -> Cases:
        """Return the slides or cases most similar to a named one of the atlas, or to new vectors (Q, D).

        See :meth:`histoseek.index.view.View.similar`.
        """
        cases = Cases(self.index.similar(query, k, by, how, where))
        for note in self.index.ask(View.notes, where, isinstance(query, str)):
            warnings.warn(note, stacklevel=2)
        return cases

    def assign(
        self, images: Image | Sequence[Image], clustering: str | None = None
    ) -> list[Assignment]:
        """Return the cluster of each image, in the newest clustering or a named one.

        Raises:
            BadInput: there is no clustering yet, or an image cannot be read.
        """
        tiles = read_images(images, self._size)
        if not tiles:
            raise BadInput("no image was given; expected at least one")
        rows = self.index.assign(self._embed(np.stack(tiles)), clustering)
        return [Assignment(**{key: row[key] for key in Assignment._fields}) for row in rows]

    def fit(self, method: str = "kmeans", **options: Any) -> dict[str, Any]:
        """Fit clusters on all tiles; see :meth:`histoseek.index.atlas.Atlas.fit`."""
        return self.index.fit(method, **options)

    def slides(self) -> Slides:
        """Return every slide and tile set; Jupyter shows an image of each."""
        return Slides(self.index.slides(), self._pictures)

    def stats(self) -> dict[str, Any]:
        """Return counts, encoder, index and clusterings."""
        return self.index.stats()

    def verify(self) -> list[str]:
        """Check every file and count; return the problems, [] if there are none."""
        return self.index.verify()

    @property
    def _size(self) -> int:
        return self.index.manifest.size_px


class Slides(list[dict[str, Any]]):
    """Slides and tile sets of an atlas; Jupyter shows an image of each. A copy has no images."""

    def __init__(self, slides: Iterable[dict[str, Any]], pictures: Pictures | None = None) -> None:
        """Store rows, and the reader of their pixels."""
        super().__init__(slides)
        self._pictures = pictures

    def __reduce__(self) -> tuple[type[Slides], tuple[list[dict[str, Any]]]]:
        """Copy or pickle the rows only."""
        return type(self), (list(self),)

    def _repr_html_(self) -> str:
        return "".join(
            _figure(
                partial(self._pictures.thumbnail, slide["name"]) if self._pictures else None,
                (slide["name"], f"{slide['tiles']} tiles", slide["label"] or ""),
            )
            for slide in self[:TILES_SHOWN]
        )


def _figure(read: Callable[[], bytes] | None, lines: Sequence[str]) -> str:
    """Return an image with lines of text as HTML; a grey square if the image cannot be read."""
    jpeg = None
    if read is not None:
        with suppress(HistoseekError):  # the slide is missing
            jpeg = read()
    return figure_html(jpeg, lines)


def _examples(given: Example | Sequence[Example]) -> tuple[list[Image], tuple[Any, ...]]:
    """Separate examples into images and tile ids, which the query checks."""
    if isinstance(given, int | np.integer):
        return [], (given,)
    if isinstance(given, np.ndarray) and given.dtype != np.uint8:
        given = given.ravel().tolist()  # ids
    several: Any = [given] if is_one(given) else given  # type: ignore[arg-type]
    tiles = tuple(one for one in several if isinstance(one, int | np.integer))
    return [one for one in several if not isinstance(one, int | np.integer)], tiles
