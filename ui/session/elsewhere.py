"""Further atlases that a server searches together with its own: their tiles, images and columns."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ...errors import BadInput, NotFound, Unavailable
from ...index.atlas import Atlas
from ...index.exchange.milvus_address import parse_url
from ...index.federation.answers import Example
from ...index.federation.federation import Federation
from ...index.federation.shards import MilvusShard
from ...index.search.columns import Columns
from .pictures import Pictures


class Elsewhere:
    """The server's own atlas and further ones, searched as one; safe to use from several threads.

    Attributes:
        federation: all of them; the server's own is the first.
        names: their names.
    """

    def __init__(self, own: Atlas, others: Sequence[str]) -> None:
        """Open the atlases that can be opened.

        Raises:
            BadInput: an atlas was given twice.
            Mismatch: an atlas has another encoder; one that gets another one later is away.
        """
        self.federation = Federation([own, *others])
        self.federation.status()
        self.federation.strict = False
        self.names = [shard.name for shard in self.federation.shards]
        self._pictures: dict[str, Pictures] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the slides that were opened to show images, and connections."""
        for pictures in self._pictures.values():
            pictures.close()
        self.federation.close()

    @property
    def own(self) -> str:
        """Name of the server's own atlas."""
        return self.names[0]

    def name_of(self, number: int) -> str:
        """Return the name of an atlas by its number; 0 is the server's own.

        Raises:
            NotFound: there are fewer atlases.
        """
        if not 0 <= number < len(self.names):
            raise NotFound(
                f"there is no atlas {number}; this server has {len(self.names)}, numbered from 0"
            )
        return self.names[number]

    def pictures(self, name: str) -> Pictures:
        """Return the reader of an atlas's images.

        Raises:
            NotFound: there is no such atlas, or it is a Milvus collection, which has no images.
            Unavailable: it cannot be opened.
        """
        atlas = self.federation.atlas(name)
        with self._lock:
            if name not in self._pictures:
                self._pictures[name] = Pictures(atlas)
            return self._pictures[name]

    def columns(self) -> Iterator[Columns]:
        """Yield the columns of the further atlases that are on disk and can be read now."""
        for name in self.names[1:]:
            with suppress(NotFound, Unavailable):
                yield self.federation.atlas(name).view().columns

    def hide(self, text: str) -> str:
        """Return a text with the names of the further atlases instead of their folders and addresses."""
        for shard in self.federation.shards[1:]:
            if isinstance(shard, MilvusShard):
                uri = str(parse_url(shard.address).uri)
                ways = {shard.address, uri, uri.partition("://")[2] or uri}
            else:  # a relative address says nothing of the server, and may be as short as "."
                ways = {str(Path(shard.address).resolve()), str(Path(shard.address).absolute())}
            for way in sorted(ways, key=len, reverse=True):
                text = text.replace(way, shard.name)
        return text

    def example(self, key: str) -> Example:
        """Return the tile that the page calls ``number of the atlas:id``.

        Raises:
            BadInput: the text has another form.
            NotFound: there is no such atlas.
        """
        number, colon, tile = key.partition(":")
        if not (colon and number.isdigit() and tile.isdigit()):
            raise BadInput(
                f"{key!r} is no tile; expected the number of an atlas, a colon and an id"
            )
        return Example(self.name_of(int(number)), int(tile))
