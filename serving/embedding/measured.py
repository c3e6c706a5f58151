"""What was measured on the tiles of a slide or tile set, collected piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...artifacts.feature_files import QUALITY
from ..slides.quality import FAULTS, UNREADABLE, Measures, counted
from ..slides.stain import COLOURS, Counts, stain_of


class Measured:
    """The measures of the tiles that were read, by their numbers."""

    def __init__(self, count: int) -> None:
        """Expect at most ``count`` tiles."""
        self._quality = np.zeros((count, len(QUALITY)), dtype=np.float32)
        self._faults = np.zeros(count, dtype=np.int8)
        self._read = np.zeros(count, dtype=bool)
        self._colours = np.zeros(len(COLOURS), dtype=np.int64)

    def add(
        self,
        numbers: Sequence[int],
        quality: Measures,
        faults: NDArray[np.int8],
        colours: Counts | None = None,
    ) -> None:
        """Add tiles by their numbers (n,).

        Args:
            numbers: of the tiles.
            quality: measures (n, Q).
            faults: (n,), 0 for an embedded tile.
            colours: counts (4,) of the colours of the embedded ones, for the stain.
        """
        if colours is not None:
            self._colours += colours
        rows = np.asarray(numbers, dtype=np.int64)
        self._quality[rows], self._faults[rows], self._read[rows] = quality, faults, True

    def drawn(self) -> NDArray[np.int8]:
        """Return why each tile (N,) was not embedded, as indices into ``FAULTS``; 0 if it was."""
        return np.where(self._read, self._faults, np.int8(FAULTS.index(UNREADABLE)))

    @property
    def counts(self) -> dict[str, int]:
        """Number of left-out tiles by reason."""
        return counted(self._faults)

    @property
    def stain(self) -> str | None:
        """The stain, from the colours of the embedded tiles; None if there are too few."""
        return stain_of(self._colours)

    def embedded(self) -> NDArray[np.int64]:
        """Return the numbers of the embedded tiles, ascending."""
        return np.flatnonzero(self._read & (self._faults == 0))

    def left_out(self) -> NDArray[np.int64]:
        """Return the numbers of the tiles that were left out, ascending."""
        return np.flatnonzero(self._faults)

    def quality(self, numbers: NDArray[np.int64]) -> Measures:
        """Return the measures (M, Q) of tiles by their numbers."""
        return self._quality[numbers]

    def codes(self, numbers: NDArray[np.int64]) -> list[int]:
        """Return the faults of tiles by their numbers."""
        codes: list[int] = self._faults[numbers].tolist()
        return codes
