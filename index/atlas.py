"""The atlas: embeddings of slides with their provenance, to search and to cluster.

An atlas is a folder. Its source data are ``atlas.db`` (the catalog), ``encoder/`` (a copy of the bundle)
and ``features/`` (the vectors). ``index-<generation>.faiss`` and ``clusters-<name>.npz`` are derived. One
process writes at a time and any number read. Each reader sees one committed state: its
:class:`~histoseek.index.view.View`. This module is the public interface of the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import stopping
from ..artifacts.files import publish_folder, write_atomic, write_json
from ..artifacts.manifest import MANIFEST, external_manifest, read_manifest
from ..console import Progress, no_progress
from ..errors import BadInput, Mismatch, StorageFailed, unknown_name, whole
from .care import snapshots, verify
from .care.audit import audit
from .clusters import fitting, report
from .clusters.clustering import METHODS
from .opened import OpenAtlas
from .search import layout
from .search.layout import Layout
from .search.places import Places, places_of
from .search.query import LeaveOut, Query
from .store.catalog import set_meta
from .store.metadata import AddedSlides, Metadata, slides_meant
from .store.relocation import Relocated, relocate
from .store.rows import Hit, Relabelled, plain_name
from .store.store import ENCODER, ENCODER_LINK, copy_bundle, fill
from .vectors import tuning
from .view import View

NAME_LIMIT = 64
P = ParamSpec("P")
R = TypeVar("R")


def _of_view(method: Callable[Concatenate[View, P], R]) -> Callable[Concatenate[Atlas, P], R]:
    """Make a method of the atlas that calls a method of its newest view."""

    @wraps(method)
    def ask(self: Atlas, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.ask(method, *args, **kwargs)

    return ask


class Atlas(OpenAtlas):
    """An atlas. Its query methods are those of a view of the newest committed state.

    These methods of :class:`~histoseek.index.view.View` can be called on the atlas itself: ``vectors_of``,
    ``tiles``, ``scores_in``, ``usual_nearness``, ``out_of_distribution_share``, ``similar``,
    ``clusterings``, ``clustering``, ``assign``, ``assigned``, ``clusters``, ``cluster_names``, ``drift``,
    ``layout`` and ``stats``. ``search`` takes the fields of a query as arguments.
    """

    @classmethod
    def create(cls, path: str | Path, bundle: str | Path, link_encoder: bool = False) -> Atlas:
        """Create an empty atlas bound to an encoder, with a copy of its bundle.

        Args:
            path: folder to create.
            bundle: the encoder's bundle.
            link_encoder: do not copy the encoder's graphs but refer to ``bundle`` by path and sha256.

        Raises:
            BadInput: ``path`` exists, or ``bundle`` is not a bundle.
            Damaged: the bundle's graph does not match its manifest.
        """
        manifest = read_manifest(Path(bundle))
        with publish_folder(Path(path)) as folder:
            fill(folder, manifest, copy_bundle(Path(bundle), folder / ENCODER, link_encoder))
        return cls(path)

    @classmethod
    def create_external(
        cls,
        path: str | Path,
        encoder: str,
        dim: int,
        metric: str = "cosine",
        mpp: float | None = None,
    ) -> Atlas:
        """Create an empty atlas for features of another tool, bound to the name of their encoder.

        Raises:
            BadInput: ``path`` exists, or the name, length or metric is invalid.
        """
        manifest = external_manifest(encoder, dim, metric, mpp)
        with publish_folder(Path(path)) as folder:
            write_json(folder / ENCODER / MANIFEST, manifest.model_dump())
            fill(folder, manifest)
        return cls(path)

    # -- changing -------------------------------------------------------------------------------

    def add(
        self,
        files: str | Path | Sequence[str | Path],
        metadata: Metadata | None = None,
        replace: bool = False,
        progress: Progress = no_progress,
        mixed_scales: bool = False,
    ) -> AddedSlides:
        """Add feature files, each completely or not at all; features already in the atlas are skipped.

        Args:
            files: HDF5 feature files, or one.
            metadata: label, patient and any other column, by slide. A slide is given by its name in the
                atlas, its file name, or the end of its path (see ``slide_names``). Metadata of slides
                already in the atlas is updated too.
            replace: replace the features of a slide already in the atlas if they differ (upsert).
            progress: called after each file.
            mixed_scales: from now on, allow tiles of different µm per pixel in the atlas.

        Returns:
            The result for each file; a file that fails is reported here and raises nothing.

        Raises:
            BadInput: a metadata row matches two slides, or two rows match one slide.
            Busy: another process is writing.
            StorageFailed: no space; files added before stay.
        """
        with self.writing() as writer:
            if mixed_scales:
                writer.allow_mixed_scales()
            given = [files] if isinstance(files, str | Path) else files
            return writer.add([Path(file) for file in given], metadata or {}, replace, progress)

    def remove(self, names: str | Sequence[str]) -> int:
        """Remove slides or tile sets by name, all or none; the ids of their tiles are never reused.

        Returns:
            The number of tiles removed.

        Raises:
            BadInput: the atlas has no slide with one of the names.
            Busy: another process is writing.
        """
        with self.writing() as writer:
            return writer.remove([names] if isinstance(names, str) else names)

    def relabel(self, rows: Iterable[dict[str, str]]) -> Relabelled:
        """Set labels, patients and other columns of slides, or of tiles of a tile set; all or none.

        Args:
            rows: dictionaries with ``slide`` (as for :meth:`add`) and the columns to set. A row with
                ``file`` sets those of one tile. An empty value removes the old one.

        Returns:
            The number of slides changed; its ``notes`` say what was deleted or has no effect.

        Raises:
            BadInput: a slide or tile is not in the atlas.
            Busy: another process is writing.
        """
        with self.writing() as writer:
            return writer.relabel(rows)

    def slides_without_row(self, names: Iterable[str]) -> list[str]:
        """Return the slides that none of the names (of a table's rows) matches, sorted."""
        slides = self.store.slides()
        matched = slides_meant(set(names), slides).values()
        return sorted({slide["name"] for slide in slides} - set(matched))

    def relocate(
        self, old: str | None, new: Path | None, folders: Sequence[Path]
    ) -> list[Relocated]:
        """Find slides at their new paths by their content, and store these paths.

        A slide is recognised by the content mark in its feature file (size, first and last mebibyte). A
        tile set in a folder is recognised by the names of its tiles.

        Args:
            old: former folder of the slides; only slides below it are checked.
            new: the folder that replaces ``old``.
            folders: instead of ``old`` and ``new``: folders to search by file name, then by content.

        Returns:
            One entry for each slide that was checked, sorted by name.

        Raises:
            BadInput: a folder does not exist, or no slide is below ``old``.
            Busy: another process is writing.
        """
        with self.writing():
            return relocate(self.path, self.catalog, old, new, folders)

    def relocate_encoder(self, bundle: str | Path) -> None:
        """Store where the bundle is now that the atlas refers to (see ``link_encoder``).

        Raises:
            BadInput: the atlas has a copy of its encoder, or ``bundle`` is not a bundle.
            Damaged: the bundle is damaged.
            Mismatch: the bundle is of another encoder.
            Busy: another process is writing.
        """
        if self.store.encoder_link is None:
            raise BadInput(
                f"{self.path} has its own copy of its encoder and refers to no other folder; there is "
                "nothing to relocate"
            )
        found = read_manifest(Path(bundle))
        if found.sha256 != self.manifest.sha256:
            raise Mismatch(
                f"{bundle} holds encoder {found.name!r} ({found.sha256[:12]}…), but the atlas was made "
                f"with {self.manifest.name!r} ({self.manifest.sha256[:12]}…); give the folder of that one"
            )
        with self.writing(), self.catalog.write() as db:
            set_meta(db, ENCODER_LINK, str(Path(bundle).resolve()))

    # -- queries --------------------------------------------------------------------------------

    def search(
        self,
        vectors: NDArray[np.float32] | None = None,
        k: int = 10,
        where: str | None = None,
        *,
        tiles: Sequence[int] = (),
        least: float | None = None,
        per_slide: bool = False,
        exact: bool = False,
        leave_out: LeaveOut = "tile",
    ) -> list[list[Hit]]:
        """Return the k most similar tiles of each vector, then of each tile; best first.

        The arguments are those of :class:`~histoseek.index.search.query.Query`; for errors see
        :meth:`View.search <histoseek.index.view.View.search>`. To combine examples, or to run several
        searches on one state, use a :meth:`view`.
        """
        query = Query(
            vectors=vectors, tiles=tuple(tiles), k=k, where=where, least=least, per_slide=per_slide,
            exact=exact, leave_out=leave_out,
        )  # fmt: skip
        return self.ask(View.search, query)

    vectors_of = _of_view(View.vectors_of)
    tiles = _of_view(View.tiles)
    scores_in = _of_view(View.scores_in)
    usual_nearness = _of_view(View.usual_nearness)
    out_of_distribution_share = _of_view(View.out_of_distribution_share)
    similar = _of_view(View.similar)
    clusterings = _of_view(View.clusterings)
    clustering = _of_view(View.clustering)
    assign = _of_view(View.assign)
    assigned = _of_view(View.assigned)
    clusters = _of_view(View.clusters)
    cluster_names = _of_view(View.cluster_names)
    drift = _of_view(View.drift)
    layout = _of_view(View.layout)
    stats = _of_view(View.stats)

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return tile ids (N,) ascending and vectors (N, D), from the feature files.

        Raises:
            Damaged: a feature file is missing or has changed since it was added.
        """
        return self.store.vectors()

    def slides(self) -> list[dict[str, Any]]:
        """Return all slides and tile sets with counts, labels, metadata and provenance."""
        return self.store.slides()

    @property
    def mixed_scales(self) -> bool:
        """Whether tiles of different scales (µm per pixel) are allowed."""
        return self.store.mixed_scales

    # -- the index ------------------------------------------------------------------------------

    def tune(
        self,
        recall: float | None = None,
        memory_mb: float | None = None,
        exact_up_to: int | None = None,
        k: int | None = None,
    ) -> dict[str, Any]:
        """Rebuild the index with new options, which also apply later; None takes the default.

        Args:
            recall: share of the true neighbours that a search must find; 1 for exact search.
            memory_mb: memory budget of the index in MB; with shorter codes, candidates are ranked again by
                the exact vectors.
            exact_up_to: up to this many tiles, search is always exact.
            k: number of neighbours on which recall is measured.

        Returns:
            The chosen plan and the measurements.

        Raises:
            BadInput: an option is out of range or cannot be met; the message says what is possible.
            Busy: another process is writing.
        """
        given = {"recall": recall, "memory_mb": memory_mb, "exact_up_to": exact_up_to, "k": k}
        options = tuning.IndexOptions(**{key: v for key, v in given.items() if v is not None})  # type: ignore[arg-type]
        with self.writing() as writer:
            writer.tidy()
            self.view().state.require_tiles()
            return self.generations.write(options, store_options=True)

    def audit(
        self, queries: int = 500, k: int = 10, seed: int = 1, where: str | None = None
    ) -> dict[str, Any]:
        """Measure recall against exact search, latency and size of the current index.

        Args:
            queries: number of query tiles from the atlas; a tile does not count as its own neighbour.
            k: number of neighbours.
            seed: of the choice of queries.
            where: metadata filter for the measured searches.

        Raises:
            BadInput: a number is out of range, or no tile passes the filter.
        """
        return audit(self, queries, k, seed, where)

    # -- clusters -------------------------------------------------------------------------------

    def fit(
        self,
        method: str,
        k: int | None = None,
        name: str | None = None,
        min_cluster_size: int | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Fit clusters on all tiles and store them under a name, replacing an earlier clustering.

        Args:
            method: kmeans, hdbscan, or encoder for the clusters that the encoder was trained with.
            k: number of clusters of k-means; None chooses by silhouette.
            name: of the clustering; None for the method's name.
            min_cluster_size: of HDBSCAN.
            seed: of all random choices, including the sample that is fitted above 200,000 tiles.

        Returns:
            A description of the fit, with the size of every cluster.

        Raises:
            BadInput: the method is unknown, there are too few tiles, or the name is too long or not a safe
                file name.
            Busy: another process is writing.
        """
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
        k = None if k is None else whole(k, "k")
        if k is not None and method != "kmeans":
            raise BadInput(f"k is only for kmeans, and the method is {method}; leave it out")
        if k is not None and k < 1:
            raise BadInput(f"k is {k}; expected 1 or more, or None to choose it")
        if min_cluster_size is not None:
            min_cluster_size = whole(min_cluster_size, "min_cluster_size")
            if method != "hdbscan":
                raise BadInput(
                    f"min_cluster_size is only for hdbscan, and the method is {method}; leave it out"
                )
        seed = whole(seed, "seed")
        name = name or method
        if plain_name(name) != name or len(name) > NAME_LIMIT:
            raise BadInput(
                f"the name {name!r} of a clustering is not valid; expected at most {NAME_LIMIT} letters, "
                "digits, '-', '_' and '.'"
            )
        with self.writing() as writer:
            writer.tidy()
            return fitting.fit(self.view().state, method, name, k, min_cluster_size, seed)

    def name_cluster(
        self, cluster: int, text: str, description: str = "", clustering: str | None = None
    ) -> None:
        """Give a cluster a name and a description; "" removes the name.

        Raises:
            BadInput: no such clustering or cluster, or a text is too long.
            Busy: another process is writing.
        """
        with self.writing():
            name, fitted = self.view().clustering(clustering)
            report.rename(self.catalog, name, fitted, cluster, text, description)

    # -- the map --------------------------------------------------------------------------------

    def make_layout(self, seed: int = 0) -> Layout:
        """Compute the map of the atlas, and store it if the folder can be written.

        Raises:
            BadInput: the atlas is empty.
            MissingPart: openTSNE is not installed.
        """

        def landmarks(view: View) -> tuple[NDArray[np.float32], int]:
            return layout.landmarks_of(view.state, seed), len(view.index)

        vectors, tiles = self.ask(landmarks)
        metric, identity = self.manifest.metric, self.store.identity
        new_map = stopping.aside(lambda: layout.make(identity, tiles, vectors, metric, seed))
        with suppress(StorageFailed):  # a read-only folder: the caller still gets the map
            write_atomic(self.path / layout.FILE, new_map.to_bytes())
            new_map = replace(new_map, stored=True)
        return new_map

    def map_places(self, layout: Layout, progress: Callable[[int, int], None]) -> Places:
        """Return the places of all tiles on a map; those of former slides are kept in a file.

        Args:
            layout: of this atlas.
            progress: called with the number of tiles placed and in all.

        Raises:
            Damaged: a feature file is missing or has changed since it was added.
        """
        return self.store.retry_if_changed(lambda: places_of(self.store, layout, progress))

    # -- care -----------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Check the hash of every file and all counts; return the problems, [] if there are none."""
        while True:
            revision = self.catalog.revision()
            problems = [problem.text for problem in verify.problems(self)]
            if not problems or self.catalog.revision() == revision:
                return problems  # else a writer changed it during the check

    def repair(self) -> list[str]:
        """Rebuild missing or damaged derived data; the source data is never changed.

        Returns:
            The repairs that were done.

        Raises:
            Busy: another process is writing.
        """
        with self.writing() as writer:
            return verify.repair(self, writer)

    def snapshot(self, out: str | Path, with_uploads: bool = True) -> dict[str, Any]:
        """Copy one committed state of the atlas into a new folder, which is then an atlas itself.

        ``out`` may be a URL: the copy is made and checked beside the atlas, and then uploaded. Reading is
        possible meanwhile; writers get Busy. An atlas that can only be read is copied too.

        Args:
            out: the new folder.
            with_uploads: also copy the files of slides that were uploaded to a server.

        Raises:
            BadInput: ``out`` exists.
            Busy: another process is writing.
            Damaged: the atlas is incomplete or damaged; nothing is written.
            StorageFailed: no space.
        """
        return snapshots.take(self, out, with_uploads)
