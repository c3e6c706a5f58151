"""An open atlas: its store, index, states and annotations, without the other methods of ``Atlas``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from ..artifacts.files import exclusive
from ..errors import unknown_name
from .clusters.clustering import Clustering
from .search.opening import States
from .store import annotation
from .store.annotation import Annotated, Annotation
from .store.store import LOCK, Store
from .vectors.generations import Generations
from .view import View
from .writer import Writer

P = ParamSpec("P")
R = TypeVar("R")


class OpenAtlas:
    """An atlas opened for reading and writing. Reading needs no lock; writing takes the writer's lock.

    Attributes:
        path: the folder.
        store: its catalog and feature files.
        catalog: of the store.
        manifest: of this encoder.
        generations: its index files.
    """

    def __init__(self, path: str | Path) -> None:
        """Open an atlas.

        Raises:
            BadInput: the folder is not an atlas, or a newer histoseek wrote it.
            Damaged: the catalog names another encoder than the bundle in the folder.
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
        """The folder with the encoder's graphs; see :attr:`Store.encoder_bundle`."""
        return self.store.encoder_bundle

    def view(self) -> View:
        """Return a view of the newest committed state.

        Raises:
            Damaged: the feature file of a slide that is not in the index file is missing or changed.
        """
        return View(self._states.newest(), self._clusterings)

    def ask(
        self, question: Callable[Concatenate[View, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Call ``question`` with a view of the newest state, so that the answer comes from one state.

        If a writer deletes files of that state meanwhile, the call is repeated with the newest state.

        Args:
            question: takes a view, such as ``View.search``; may be called more than once.
            args: further arguments after the view.
            kwargs: keyword arguments.

        Raises:
            Damaged: a file is missing or changed, and not because of a writer.
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

    # -- annotations --------------------------------------------------------------------------------

    def annotations(self, slide: str | None = None) -> list[Annotation]:
        """Return the annotations of a slide, or all, by slide and then oldest first.

        Raises:
            NotFound: the atlas has no such slide.
        """
        with self.catalog.read() as db:
            names = {row["name"] for row in db.execute("SELECT name FROM slides")}
            if slide is not None and slide not in names:
                raise unknown_name("slide", slide, names)
            return annotation.read(db, slide)

    def annotate(self, given: Iterable[Annotation]) -> Annotated:
        """Add annotations; one whose id is stored already is changed. All or none.

        Raises:
            BadInput: one has no area, too long a text, or the id of another slide's annotation.
            NotFound: the atlas has no such slide.
            Busy: another process is writing.
        """
        with self.writing():
            return annotation.store(self.catalog, given)

    def remove_annotations(self, ids: Sequence[str]) -> int:
        """Remove annotations by id, all or none; return their number.

        Raises:
            NotFound: the atlas has no annotation with one of the ids.
            Busy: another process is writing.
        """
        with self.writing():
            return annotation.remove(self.catalog, ids)
