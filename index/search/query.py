"""The query for similar tiles, shared by Python, the command line, the page, the API and Milvus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput, whole

if TYPE_CHECKING:
    from .filters import Filter

LeaveOut = Literal["tile", "slide", "patient"]
LEAVE_OUT: tuple[LeaveOut, ...] = ("tile", "slide", "patient")
LARGEST = 2**63 - 1
"""Largest id that a tile can have."""
Rgb = NDArray[np.uint8]
Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
EmbedText = Callable[[Sequence[str]], NDArray[np.float32]]


@dataclass(frozen=True)
class Query:
    """A search for similar tiles. Each example gets its own answer, unless ``together`` is set.

    Attributes:
        images: examples to be like, each (S, S, 3) as the encoder takes it; see :meth:`embedded`.
        texts: words to be like, for an encoder with a text network; see :meth:`embedded`.
        vectors: (Q, D) examples to be like, made by this atlas's encoder.
        tiles: ids of tiles of the atlas, as examples to be like.
        unlike_images: examples to be unlike.
        unlike_texts: words to be unlike.
        unlike_vectors: (M, D) examples to be unlike.
        unlike_tiles: ids of tiles to be unlike.
        together: give one answer for all examples; always the case if there are examples to be unlike.
        k: hits per answer; all tiles if there are fewer.
        where: metadata filter such as ``organ = 'colon' and patient != 'P7'``; see
            :mod:`~histoseek.index.search.filters`.
        least: lowest score of a hit; without ``per_slide`` a range search, which is exact.
        per_slide: at most one hit per slide.
        exact: compare with every tile, whatever the index.
        leave_out: which hits to exclude if the example is a tile of the atlas: the ``tile`` itself, its
            ``slide``, or all slides of its ``patient`` (its slide if the patient is not known).
        absent: fields of the filter that only other atlases of a federation have; here they are empty.
        also: a parsed filter that hits must pass too; see :mod:`~histoseek.index.search.filters`.
    """

    images: tuple[Rgb, ...] = field(default=(), repr=False)
    vectors: NDArray[np.float32] | None = field(default=None, repr=False)
    tiles: tuple[int, ...] = ()
    unlike_images: tuple[Rgb, ...] = field(default=(), repr=False)
    unlike_vectors: NDArray[np.float32] | None = field(default=None, repr=False)
    unlike_tiles: tuple[int, ...] = ()
    together: bool = False
    k: int = 10
    where: str | None = None
    least: float | None = None
    per_slide: bool = False
    exact: bool = False
    leave_out: LeaveOut = "tile"
    texts: tuple[str, ...] = ()
    unlike_texts: tuple[str, ...] = ()
    absent: frozenset[str] = frozenset()
    also: Filter | None = None

    def __post_init__(self) -> None:
        """Check types and ranges; numpy's numbers become Python's.

        Raises:
            BadInput: a value has another type or is out of range.
        """
        object.__setattr__(self, "k", whole(self.k, "k"))
        if self.k < 1:
            raise BadInput(f"k is {self.k}; expected 1 or more")
        for name in ("tiles", "unlike_tiles"):
            given = getattr(self, name)
            if not isinstance(given, Iterable):
                raise BadInput(f"{name} is {given!r}; expected the ids of tiles, such as (3, 17)")
            ids = tuple(whole(tile, "the id of a tile") for tile in given)
            if ids and not -LARGEST <= min(ids) <= max(ids) <= LARGEST:
                raise BadInput(f"{max(ids, key=abs)} is too large for the id of a tile")
            object.__setattr__(self, name, ids)
        if self.where is not None and not isinstance(self.where, str):
            raise BadInput(f"where is {self.where!r}; expected text such as \"label = 'skin'\"")
        if self.least is not None:
            number = isinstance(self.least, Real) and not isinstance(self.least, bool)
            if not number or self.least != self.least:
                raise BadInput(f"the lowest score is {self.least!r}; expected a number such as 0.8")
            object.__setattr__(self, "least", float(self.least))
        if self.leave_out not in LEAVE_OUT:
            choices = ", ".join(LEAVE_OUT)
            raise BadInput(f"leave_out is {self.leave_out!r}; expected one of: {choices}")

    @property
    def examples(self) -> int:
        """Number of images, texts, vectors and tiles in the query."""
        arrays = (self.vectors, self.unlike_vectors)
        lists = (
            self.images, self.tiles, self.unlike_images, self.unlike_tiles, self.texts, self.unlike_texts,
        )  # fmt: skip
        return sum(map(len, lists)) + sum(len(a) for a in arrays if a is not None)

    @property
    def combines(self) -> bool:
        """Whether all examples together get one answer."""
        unlike = self.unlike_images or self.unlike_tiles or self.unlike_texts
        vectors = self.unlike_vectors is not None and len(self.unlike_vectors) > 0
        return self.together or bool(unlike) or vectors

    @property
    def by_text(self) -> bool:
        """Whether the query has texts."""
        return bool(self.texts or self.unlike_texts)

    def embedded(self, embed: Embed, embed_text: EmbedText) -> Query:
        """Return the query with its images, then its texts, replaced by their vectors.

        Args:
            embed: turns images (N, S, S, 3) into vectors (N, D); called once.
            embed_text: turns texts into vectors (N, D); called once.
        """
        query = self
        images = [*self.images, *self.unlike_images]
        if images:
            query = query._with(embed(np.stack(images)), len(self.images))
        texts = [*self.texts, *self.unlike_texts]
        if texts:
            query = query._with(embed_text(texts), len(self.texts))
        return replace(query, images=(), unlike_images=(), texts=(), unlike_texts=())

    def _with(self, vectors: NDArray[np.float32], like: int) -> Query:
        """Return the query with further vectors, of which the first ``like`` are to be like."""
        return self.with_vectors(vectors[:like], vectors[like:])

    def with_vectors(self, like: NDArray[np.float32], unlike: NDArray[np.float32]) -> Query:
        """Return the query with further vectors (Q, D) to be like, and (M, D) to be unlike."""
        return replace(
            self, vectors=_joined(self.vectors, like),
            unlike_vectors=_joined(self.unlike_vectors, unlike),
        )  # fmt: skip


def _joined(
    first: NDArray[np.float32] | None, second: NDArray[np.float32]
) -> NDArray[np.float32] | None:
    if first is None:
        return second if len(second) else None
    return np.concatenate([first, second])
