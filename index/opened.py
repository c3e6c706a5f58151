"""An open atlas: its store, its index and its states, without the methods that people call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from ..artifacts.files import exclusive
from .clusters.clustering import Clustering
from .search.opening import States
from .store.store import LOCK, Store
from .vectors.generations import Generations
from .view import View
from .writer import Writer

P = ParamSpec("P")
R = TypeVar("R")


class OpenAtlas:
    """What reads and writes an atlas. Reading needs no lock; who writes takes the writer's.

    Attributes:
        path: the folder.
        store: its catalog and feature files.
        catalog: of the store.
        manifest: of the encoder that the atlas is bound to.
        generations: its index files.
    """

    def __init__(self, path: str | Path) -> None:
        """Open an atlas.

        Raises:
            BadInput: not an atlas, or of a newer histoseek.
            Damaged: its own parts do not agree.
        """
        self.path = Path(path)
        self.store = Store(self.path)
        self.catalog, self.manifest = self.store.catalog, self.store.manifest
        self.generations = Generations(self.store)
        self._states = States(self.store, self.generations)
        self._writer = Writer(self.store, self.generations)
        self._clusterings: dict[str, Clustering] = {}

    @property
    def encoder_bundle(self) -> Path:
        """The folder of the atlas's copy of its encoder."""
        return self.store.encoder_bundle

    def view(self) -> View:
        """Return the newest committed state, to ask from as long as it is held.

        Raises:
            Damaged: a feature file is missing or changed whose vectors no index file holds.
        """
        return View(self._states.newest(), self._clusterings)

    def ask(
        self, question: Callable[Concatenate[View, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Ask a view of the newest state; all of the answer comes from that one state.

        A writer may delete files of the state meanwhile: then the newest state is asked anew.

        Args:
            question: takes a view, such as ``View.search``; may be called more than once.
            args: what it takes beside the view.
            kwargs: likewise.

        Raises:
            Damaged: a file is missing or changed, and no writer did it.
        """
        return self.store.retry_if_changed(lambda: question(self.view(), *args, **kwargs))

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Hold the writer's lock.

        Raises:
            Busy: another process is writing.
            StorageFailed: the folder cannot be written.
        """
        with exclusive(self.path / LOCK, f"atlas {self.path}"):
            yield self._writer
