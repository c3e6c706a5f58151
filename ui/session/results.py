"""Earlier answers, stored for the report, the heat map and the link to a result."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TypeVar

from ...errors import NotFound
from .answers import ClusterAnswer, SearchAnswer

KEPT = 512
"""Maximum number of stored answers."""
KEPT_BYTES = 256 * 2**20
"""Maximum bytes of the images in stored answers."""
Answer = TypeVar("Answer", SearchAnswer, ClusterAnswer)


class Results:
    """The last few hundred answers by id; safe to use from several threads."""

    def __init__(self) -> None:
        """Start without answers."""
        self._kept: OrderedDict[str, SearchAnswer | ClusterAnswer] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def keep(self, answer: Answer) -> Answer:
        """Store an answer and return it; drop the oldest ones above the limits."""
        with self._lock:
            self._kept[answer.id] = answer
            self._bytes += _image_bytes(answer)
            while len(self._kept) > KEPT or self._bytes > KEPT_BYTES:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= _image_bytes(oldest)
        return answer

    def get(self, number: str) -> SearchAnswer | ClusterAnswer:
        """Return an earlier answer by its id.

        Raises:
            NotFound: there is no such answer (any more).
        """
        with self._lock:
            if number not in self._kept:
                raise NotFound(f"there is no result {number!r}, or it was dropped; search again")
            return self._kept[number]

    def drop(self, number: str) -> None:
        """Forget an answer."""
        with self._lock:
            answer = self._kept.pop(number, None)
            self._bytes -= 0 if answer is None else _image_bytes(answer)


def _image_bytes(answer: SearchAnswer | ClusterAnswer) -> int:
    """Return the bytes of an answer's images."""
    if isinstance(answer, ClusterAnswer):
        return sum(tile.nbytes for tile in answer.tiles)
    return sum(tile.nbytes for tile in (*answer.query.images, *answer.query.unlike_images))
