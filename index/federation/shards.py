"""One atlas of a federation: on disk, or a Milvus collection to which an atlas was pushed."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...artifacts.feature_files import QUALITY
from ...errors import BadInput, NotFound
from ..atlas import Atlas
from ..exchange.milvus import MilvusAtlas
from ..exchange.milvus_address import parse_url
from ..search import cases
from ..search.query import Query
from ..store.annotation import FIELDS as ANNOTATION_FIELDS
from ..store.rows import Hit
from ..view import View
from .answers import FoundCase

NO_MOSAICS = "a Milvus collection has no mosaics of slides; only its tiles can be searched"
OF_ONE_ATLAS = ("tile", "cluster")
"""Fields whose numbers mean something else in each atlas."""


CaseTiles = tuple[cases.Case, dict[int, dict[str, Any]]]
"""A slide or case, and its tiles by id."""

T = TypeVar("T")


class Reply(NamedTuple, Generic[T]):
    """What a shard answers to a search.

    Attributes:
        found: the hits, by vector of the query; or the similar slides or cases, best first.
        revision: of the state that was searched.
        notes: see :meth:`View.notes <histoseek.index.view.View.notes>`.
    """

    found: T
    revision: int
    notes: list[str]


@dataclass(frozen=True)
class Facts:
    """What a shard says of itself.

    Attributes:
        encoder: name of its encoder.
        sha256: of its encoder.
        dim: D.
        metric: cosine or l2.
        revision: number of its state.
        tiles: number of its tiles; None if it is not known (Milvus).
        slides: names of its slides and tile sets.
        fields: fields that a filter may have, without those of :data:`OF_ONE_ATLAS`.
        refused: fields that its tiles have, but that it cannot filter by.
        scales: smallest and largest µm per pixel of its tiles; None if it is not known.
    """

    encoder: str
    sha256: str
    dim: int
    metric: str
    revision: int
    tiles: int | None
    slides: frozenset[str]
    fields: frozenset[str]
    refused: frozenset[str] = frozenset()
    scales: tuple[float, float] | None = None


class Shard(ABC):
    """One atlas of a federation; opened at the first question, which may come from another thread.

    Attributes:
        address: as the user gave it.
        name: short name in answers, unique in the federation.
        is_server: whether another process does the work.
    """

    is_server = False

    def __init__(self, address: str, name: str) -> None:
        """Name a shard; nothing is opened yet."""
        self.address, self.name = address, name
        self._known: Facts | None = None

    @abstractmethod
    def facts(self) -> Facts:
        """Return what is known of the shard's newest state.

        Raises:
            HistoseekError: the shard cannot be opened, or does not answer.
        """

    @abstractmethod
    def find(self, query: Query, patients: bool = False) -> Reply[list[list[Hit]]]:
        """Return hits by vector of the query.

        Args:
            query: to this shard.
            patients: whether the filter leaves out patients; for the notes.
        """

    @abstractmethod
    def examples(self, ids: Sequence[int]) -> tuple[NDArray[np.float32], list[Hit]]:
        """Return the vectors (T, D) of tiles by id, and the tiles.

        Raises:
            NotFound: the shard has no tile with one of the ids.
        """

    def close(self) -> None:
        """Disconnect, if the shard is a server's."""
        return


class AtlasShard(Shard):
    """An atlas on disk."""

    def __init__(self, address: str, name: str, atlas: Atlas | None = None) -> None:
        """Name a shard; nothing is opened yet, unless the opened ``atlas`` is given."""
        super().__init__(address, name)
        self._path = Path(address).absolute()  # os.chdir must not lead to another atlas
        self._atlas = atlas

    @property
    def atlas(self) -> Atlas:
        """The atlas; opened at first use."""
        if self._atlas is None:
            self._atlas = Atlas(self._path)
        return self._atlas

    def facts(self) -> Facts:
        """See :meth:`Shard.facts`."""
        view, manifest = self.atlas.view(), self.atlas.manifest
        if self._known is not None and self._known.revision == view.revision:
            return self._known
        fields = (name for name in view.columns.fields() if name not in OF_ONE_ATLAS)
        slides = [slide for slide in view.columns.slides if slide["name"]]
        names = frozenset(slide["name"] for slide in slides)
        scales = _range(slide["target_mpp"] for slide in slides if slide["tiles"])
        self._known = Facts(
            manifest.name, manifest.sha256, manifest.dim, manifest.metric, view.revision, len(view.index),
            names, frozenset(fields), scales=scales,
        )  # fmt: skip
        return self._known

    def find(self, query: Query, patients: bool = False) -> Reply[list[list[Hit]]]:
        """See :meth:`Shard.find`."""

        def ask(view: View) -> Reply[list[list[Hit]]]:
            count = 0 if query.vectors is None else len(query.vectors)
            hits = view.search(query) if len(view.index) else [[] for _ in range(count)]
            return Reply(hits, view.revision, view.notes(query.where, patients))

        return self.atlas.ask(ask)

    def examples(self, ids: Sequence[int]) -> tuple[NDArray[np.float32], list[Hit]]:
        """See :meth:`Shard.examples`."""

        def ask(view: View) -> tuple[NDArray[np.float32], list[Hit]]:
            vectors, tiles = view.vectors_of(ids), view.tiles(ids)
            return vectors, [Hit(rank=0, score=0.0, **tiles[n]) for n in ids]

        return self.atlas.ask(ask)

    def case(self, name: str, by: str) -> CaseTiles | None:
        """Return a slide or case by name, and its tiles by id; None if the atlas has none of that name."""

        def ask(view: View) -> CaseTiles | None:
            try:
                found = cases.case_of(view.state, name, by)
            except NotFound:
                return None
            return found, view.tiles(found.tiles)

        return self.atlas.ask(ask)

    def similar(
        self, query: str | NDArray[np.float32], by: str, settings: Query
    ) -> Reply[list[FoundCase]]:
        """Return the similar slides or cases, best first.

        Args:
            query: name of a slide or case of the atlas, or vectors (Q, D).
            by: slide or patient.
            settings: k and filters; its examples are ignored.
        """

        def ask(view: View) -> Reply[list[FoundCase]]:
            found = cases.similar_slides(
                view.state, query, settings.k, by, "median", settings.where, settings  # type: ignore[arg-type]
            )  # fmt: skip
            of = []
            for case in found:
                ids = {n for pair in case.pairs for n in (pair.query, pair.match) if n is not None}
                of.append(FoundCase(self.name, case, view.tiles(sorted(ids))))
            notes = view.notes(settings.where, settings.also is not None or isinstance(query, str))
            return Reply(of, view.revision, notes)

        return self.atlas.ask(ask)


class MilvusShard(Shard):
    """A Milvus collection; its tiles cannot be used as examples."""

    is_server = True

    def __init__(self, address: str, name: str) -> None:
        """Name a shard; nothing is opened yet."""
        super().__init__(address, name)
        self._engine: MilvusAtlas | None = None
        self._lock = threading.Lock()

    def _opened(self) -> MilvusAtlas:
        with self._lock:
            if self._engine is None:
                self._engine = MilvusAtlas(self.address)
            return self._engine

    def facts(self) -> Facts:
        """See :meth:`Shard.facts`."""
        about = self._opened().newest()
        if self._known is not None and self._known.revision == about.revision:
            return self._known
        fields = {*about.columns, "x", "y", "mpp", "target_mpp"}
        names = frozenset(about.columns["slide"][code] for code in about.slides)
        scales = _range([*slide, None][4] for slide in about.slides.values())
        self._known = Facts(
            about.encoder, about.sha256, about.dim, about.metric, about.revision, None, names,
            frozenset(fields), frozenset({"file", *ANNOTATION_FIELDS} | ({*QUALITY} - fields)), scales,
        )  # fmt: skip
        return self._known

    def find(self, query: Query, patients: bool = False) -> Reply[list[list[Hit]]]:
        """See :meth:`Shard.find`; how many patients are unknown is not counted."""
        engine = self._opened()
        hits = engine.search(query)
        assert engine.about is not None
        return Reply(hits, engine.about.revision, engine.filter_notes(query.where))

    def examples(self, ids: Sequence[int]) -> tuple[NDArray[np.float32], list[Hit]]:
        """See :meth:`Shard.examples`.

        Raises:
            BadInput: always; Milvus has no exact vectors.
        """
        raise BadInput(
            f"{self.name} is a Milvus collection, whose tiles cannot be examples; name a tile of an atlas "
            "on disk, or an image"
        )

    def close(self) -> None:
        """Disconnect."""
        if self._engine is not None:
            self._engine.close()


def is_milvus(address: str) -> bool:
    """Return whether an address is of Milvus and not a folder."""
    return address.startswith(("milvus://", "milvus+https://"))


def _range(scales: Iterable[float | None]) -> tuple[float, float] | None:
    """Return the smallest and largest of the known scales; None if there are none."""
    known = [scale for scale in scales if scale is not None]
    return (min(known), max(known)) if known else None


def named(given: Sequence[str | Path | Atlas]) -> list[Shard]:
    """Return the shards at addresses, each named by as many last parts of its address as tell it apart.

    Args:
        given: folders, addresses of Milvus, or opened atlases.

    Raises:
        BadInput: an address occurs twice, or is not a valid address of Milvus.
    """
    addresses = [str(one.path if isinstance(one, Atlas) else one) for one in given]
    parts = [_parts(address) for address in addresses]
    for n, own in enumerate(parts):
        if own in parts[:n]:
            raise BadInput(f"{addresses[n]} was given twice; give each atlas once")
    shards: list[Shard] = []
    for one, address, own in zip(given, addresses, parts, strict=True):
        count = 1
        while count < len(own) and sum(other[-count:] == own[-count:] for other in parts) > 1:
            count += 1
        name = "/".join(own[-count:])
        if is_milvus(address):
            shards.append(MilvusShard(address, name))
        else:
            shards.append(AtlasShard(address, name, one if isinstance(one, Atlas) else None))
    return shards


def _parts(address: str) -> list[str]:
    """Return the parts of what an address leads to; the last is the name of the folder or collection."""
    if is_milvus(address):
        found = parse_url(address)
        return [*str(found.uri).split("/"), found.collection]
    return list(Path(address).resolve().parts[1:]) or [address]


def other_encoder(name: str, facts: Facts, first: str, known: Facts) -> str:
    """Return why two shards cannot be searched together; "" if they have the same encoder."""
    if (facts.sha256, facts.dim, facts.metric) == (known.sha256, known.dim, known.metric):
        return ""
    return (
        f"{name} has the encoder {facts.encoder!r} ({facts.sha256[:12]}…) and {first} has "
        f"{known.encoder!r} ({known.sha256[:12]}…); only atlases of the same encoder can be searched "
        "together"
    )
