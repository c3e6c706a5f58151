"""What all protocols share: options, tiles, and one run folder per cell of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...artifacts.files import read_json, write_json
from ...artifacts.tilesets import Tile, TileSet
from ...console import Progress
from ...errors import BadInput
from ...metrics import Floats, Ints
from .. import data
from ..checkpoint import load_encoder, load_tensors
from ..data import LabelledTiles, load
from ..evaluate import to_input
from ..models import AutoEncoder, Encoder
from ..recipes import find_recipe
from ..run import RECORD, WEIGHTS
from ..study_options import StudyOptions
from . import figures
from .report import Report
from .sharing import ENDING, AllAsked, Elsewhere, locked, wait_for_any

RECORDS = "records.json"
"""Records of finished trainings in the folder of a report: with this file, another machine can continue."""


class Study:
    """One execution of a protocol on a tile set.

    Attributes:
        options: options of the protocol.
        out: folder of the report and its runs.
        parts: optional parts of the protocol that the user requested.
        whole: the labelled tiles of the set.
        tiles: those that are used, at most ``limit``.
        test_tiles: number of tiles of the set's test part that were left out.
        cells: number of trainings of the whole protocol, less those that were finished before, for the
            progress.
        elsewhere: number of trainings of which only the record is here.
        seconds: duration of each training, by the name of its cell; None if its record does not say.
        trained: names of the cells that this process trained.
        shared: with ``train_only``: names of the cells that other processes train.
    """

    def __init__(self, options: StudyOptions, tiles: TileSet, progress: Progress) -> None:
        """Draw the tiles; nothing is trained yet."""
        self.options, self.out = options, options.out
        self.parts = set(filter(None, options.parts.split(",")))
        labelled = [n for n, tile in enumerate(tiles.tiles) if tile.label is not None]
        self.unlabelled = len(tiles) - len(labelled)
        self.whole = tiles.take(labelled) if self.unlabelled else tiles
        self.tiles = draw(self.whole, options.limit)
        self.test_tiles = 0
        self.cells = 0
        self.done = 0
        self.elsewhere = 0
        self.seconds: dict[str, float | None] = {}
        self.trained: list[str] = []
        self.shared: list[str] = []
        self._progress = progress

    def __call__(
        self,
        cell: str,
        recipe: str,
        tiles: TileSet | None = None,
        record_only: bool = False,
        before: Callable[[], Any] | None = None,
        builds_on: dict[str, Any] | None = None,
        score: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Train one cell of the table unless it is finished already; returns its record.

        If another process trains it, waits for that; with ``train_only``, returns an empty record instead.

        Args:
            cell: name of the cell and of its folder.
            recipe: name of the recipe.
            tiles: tiles, if not all of the study's.
            record_only: the weights are not needed: take the record from :data:`RECORDS` if it is there,
                else store it there (its metrics, and the epochs whose clusters were measured).
            before: called before a training, such as one whose weights this one starts with.
            builds_on: what else the record depends on, such as the settings of that earlier training; a
                record with others is not taken.
            score: called with the record of the trained run; what it returns is stored as the record's
                ``scores``. With ``record_only`` only.
            **options: options of the recipe.
        """
        with locked(
            self.lock(cell), None if self.options.train_only else self._waits(cell)
        ) as mine:
            if mine:
                return self._train(
                    cell, recipe, tiles, record_only, before, builds_on, score, options
                )
        self.shared.append(cell)
        self.cells -= 1
        return Elsewhere()

    def _train(
        self,
        cell: str,
        recipe: str,
        tiles: TileSet | None,
        record_only: bool,
        before: Callable[[], Any] | None,
        builds_on: dict[str, Any] | None,
        score: Callable[[dict[str, Any]], dict[str, Any]] | None,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """Train a cell whose lock this process holds; see :meth:`__call__`."""
        chosen = find_recipe(recipe)
        device = {"accelerator": self.options.accelerator, "precision": self.options.precision}
        given = self.tiles if tiles is None else tiles
        selection = {"sources": [given.source], "exclude": [], "label_from": ["label"]}

        trained = False

        def report(done: int, total: int, text: str) -> None:
            nonlocal trained
            trained = True
            self._show(done / total if total else 0.0, f"{cell}: {text}")

        filled = chosen.options(**{**device, **options})
        identity = {"recipe": recipe, "options": asdict(filled), "data": given.identity()}
        identity |= {"builds_on": builds_on} if builds_on else {}
        if record_only:
            known: dict[str, Any] | None = self._records().get(cell)
            if known and known["identity"] == identity:
                self.cells -= 1
                self.elsewhere += not self.has_weights(cell)
                self.seconds[cell] = known.get("seconds")
                return known
        if before is not None:
            counts = self.done, self.cells
            earlier = before()
            self.done, self.cells = counts  # it is counted by its own call
            if isinstance(earlier, Elsewhere):
                self.cells -= 1
                return earlier
        record = chosen.fit(filled, given, self.folder(cell), report, selection)
        self.seconds[cell] = record.get("seconds")
        if trained:
            self.done += 1
            self.trained.append(cell)
        else:
            self.cells -= 1
        if record_only:
            judged = [row for row in record["epochs"] if "accuracy" in row]
            kept = {"identity": identity, "metrics": record["metrics"], "epochs": judged}
            kept["seconds"] = record.get("seconds")
            if score is not None:
                kept["scores"] = record["scores"] = score(record)
            with locked(self.out / f"{RECORDS}{ENDING}", lambda: None):
                write_json(self.out / RECORDS, {**self._records(), cell: kept})
        return record

    def all_asked(self) -> None:
        """Say that the protocol has asked for all its trainings: with ``train_only`` it ends here.

        Raises:
            AllAsked: with ``train_only``.
        """
        if self.options.train_only:
            raise AllAsked

    def wait_for_others(self) -> None:
        """Wait until one of the trainings that other processes run ends."""
        shared = list(dict.fromkeys(self.shared))
        self._show(0.0, f"waiting, because other processes train {', '.join(shared)}")
        wait_for_any([self.lock(cell) for cell in shared])

    def _waits(self, cell: str) -> Callable[[], None]:
        return lambda: self._show(0.0, f"{cell}: waiting, because another process trains it")

    def _show(self, share: float, text: str) -> None:
        """Report progress; ``share`` is that of the training that runs."""
        total = 1000 * max(self.cells, self.done + 1)
        self._progress(round(1000 * (self.done + share)), total, text)

    def after(self, text: str) -> None:
        """Report what is computed with trained weights: after a training, or after all of them.

        Raises:
            Stopped: the command was asked to stop.
        """
        total = 1000 * max(self.cells, self.done, 1)
        self._progress(total if self.done >= self.cells else 1000 * self.done, total, text)

    def took(self) -> str:
        """Return how long the trainings took, as text."""
        known = [seconds for seconds in self.seconds.values() if seconds is not None]
        text = f"{sum(known) / 60:.1f} min in {len(known)} trainings"
        missing = len(self.seconds) - len(known)
        return f"{text}; {missing} more have no recorded duration" if missing else text

    def _records(self) -> dict[str, Any]:
        path = self.out / RECORDS
        records: dict[str, Any] = read_json(path) if path.is_file() else {}
        return records

    @property
    def data_name(self) -> str:
        """Name of the data set, by which published numbers are found: mnist for mnist_full too."""
        return self.whole.name.removesuffix("_full")

    def leave_out_test_part(self) -> None:
        """Use only the training part of a set that has a test part.

        Raises:
            BadInput: nothing else is there.
        """
        train = [n for n, tile in enumerate(self.whole.tiles) if not _is_test(tile)]
        self.test_tiles = len(self.whole) - len(train)
        if not self.test_tiles:
            return
        if not train:
            raise BadInput(
                f"all {self.test_tiles} tiles are of the test part; add the training part"
            )
        self.whole = self.whole.take(train)
        one = len({tile.group for tile in self.whole.tiles}) == 1  # the part, not a source of tiles
        self.tiles = draw(self.whole, self.options.limit, whole_groups=not one)

    def pick(self, normal: int, quick: int, option: int = 0) -> int:
        """Return ``option`` if it is set, else the protocol's normal number, or its number for --quick."""
        return option or (quick if self.options.quick else normal)

    def fold_count(self, paper: int) -> int:
        """Return the number of folds: ``--folds``, else ``paper``.

        Raises:
            BadInput: ``--folds`` is 1 or 2.
        """
        count = self.options.folds or paper
        if count < 3:
            raise BadInput(f"--folds is {count}; expected at least 3, or 0 for the paper's {paper}")
        return count

    def folds(self, paper: int, quick: int) -> int:
        """Return how many folds to run: ``--seeds``, else all, or ``quick`` for --quick.

        Raises:
            BadInput: ``--seeds`` is larger than the number of folds, or ``--folds`` is 1 or 2.
        """
        count = self.fold_count(paper)
        run = self.pick(count, quick, self.options.seeds)
        if run > count:
            raise BadInput(f"--seeds is {run}; the protocol has {count} folds")
        return run

    def load(self, size_px: int, tiles: TileSet | None = None) -> LabelledTiles:
        """Decode all tiles into memory.

        Raises:
            BadInput: the tiles do not fit into memory.
        """
        self.check_fits(size_px, tiles)
        given = self.tiles if tiles is None else tiles
        return load(
            given, size_px, lambda done, of, _: self.after(f"reading tiles: {done} of {of}")
        )

    def check_fits(self, size_px: int, tiles: TileSet | None = None) -> None:
        """Check that :meth:`load` will have room; called before the trainings, which need less.

        Raises:
            BadInput: the tiles do not fit into memory.
        """
        count = len(self.tiles if tiles is None else tiles)
        if count * size_px * size_px * 3 > data.MAX_BYTES:
            raise BadInput(f"{count} tiles of {size_px} px do not fit into memory; pass --limit")

    def lock(self, cell: str) -> Path:
        """Return the lock of a cell's training."""
        return self.out / "runs" / f"{cell}{ENDING}"

    def has_weights(self, cell: str) -> bool:
        """Return whether the finished run that a cell's record is of is here, not only the record."""
        folder = self.folder(cell)
        if not ((folder / WEIGHTS).is_file() and (folder / RECORD).is_file()):
            return False
        of_record = dict(self._records()[cell]["identity"])
        of_record.pop("builds_on", None)
        return bool(read_json(folder / RECORD)["identity"] == of_record)

    def folder(self, cell: str) -> Path:
        """Return the folder of a cell's run."""
        return self.out / "runs" / cell

    def encoder(self, cell: str) -> Encoder:
        """Return the trained encoder of a cell."""
        self.after(f"{cell}: embedding")
        gpu = torch.cuda.is_available() and self.options.accelerator in {"auto", "cuda", "gpu"}
        return load_encoder(self.folder(cell)).to("cuda" if gpu else "cpu")

    def autoencoder(self, cell: str) -> AutoEncoder:
        """Return the trained autoencoder of a cell."""
        encoder = self.encoder(cell)
        assert isinstance(encoder, AutoEncoder)
        return encoder

    def record(self, cell: str) -> dict[str, Any]:
        """Return the record of a cell's run."""
        record: dict[str, Any] = read_json(self.folder(cell) / RECORD)
        return record

    def tensor(self, cell: str, name: str) -> NDArray[np.float32]:
        """Return a tensor that a cell's run stores with its weights."""
        tensor: NDArray[np.float32] = load_tensors(self.folder(cell) / WEIGHTS)[0][name].numpy()
        return tensor

    def tsne(
        self, file: str, vectors: Floats, data: LabelledTiles, numbers: Ints, title: str
    ) -> str:
        """Draw a t-SNE map of the vectors of tiles ``numbers`` by label; returns the file's name."""
        self.after(f"drawing {file}")
        labels = data.labels[numbers]
        return figures.tsne(self.out / file, vectors, labels, data.label_names, title)

    def report(self, title: str, paper: str, **about: Any) -> Report:
        """Begin the report with a description of data and split; ``about`` may have another split."""
        options = self.options
        used = f"{len(self.tiles)} tiles of {self.whole.name}"
        if len(self.tiles) < len(self.whole):
            used += f" (drawn from {len(self.whole)}, whole groups)"
        grouped = any(tile.group for tile in self.tiles.tiles)
        split = "by group" if grouped else "by tile (the data names no groups)"
        if options.split == "tile" and grouped:
            split = "by tile ACROSS groups, as in the paper: LEAKY, groups are in both parts"
        report = Report(title, paper, options.command, {"data": used, "split": split, **about})
        if self.test_tiles:
            report.notes.append(f"The {self.test_tiles} tiles of the test part were left out.")
        if self.unlabelled:
            report.notes.append(f"{self.unlabelled} tiles without a label were left out.")
        if options.quick:
            report.notes.append("`--quick` shows that the protocol runs; it measures nothing.")
        return report


def draw(tiles: TileSet, limit: int, seed: int = 0, whole_groups: bool = True) -> TileSet:
    """Return at most ``limit`` tiles, drawn at random as whole groups or one by one; 0 returns all."""
    if not limit or limit >= len(tiles):
        return tiles
    members: dict[str, list[int]] = {}
    for number, tile in enumerate(tiles.tiles):
        name = tile.group if whole_groups else None
        members.setdefault(name or f"\0{number}", []).append(number)
    names = sorted(members)
    chosen: list[int] = []
    for at in np.random.default_rng(seed).permutation(len(names)):
        if len(chosen) + len(members[names[at]]) <= limit:
            chosen += members[names[at]]
    return tiles.take(sorted(chosen))


def _is_test(tile: Tile) -> bool:
    """Whether a tile is of a set's test part, as far as its row says."""
    return (
        tile.column("part") == "test"
        or tile.column("is_test").casefold() in {"true", "1", "1.0", "yes"}
        or (tile.group or "").rpartition("/")[2] == "test"  # joined sets: name/group
    )


def first_classes(tiles: TileSet, count: int) -> TileSet:
    """Return the tiles of the first ``count`` classes in sorted order."""
    names = sorted({tile.label for tile in tiles.tiles if tile.label is not None})[:count]
    return tiles.take([n for n, tile in enumerate(tiles.tiles) if tile.label in names])


def values(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return metric values by name; undefined ones are nan."""
    return {row["name"]: float("nan") if row["value"] is None else row["value"] for row in rows}


@torch.inference_mode()
def reconstruct(encoder: AutoEncoder, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return reconstructions (N, H, W, 3), in 0..1, of uint8 tiles (N, S, S, 3)."""
    encoder.eval()
    _, images, _ = encoder.reconstruct(to_input(encoder, tiles))
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def spread(numbers: Ints, count: int) -> Ints:
    """Return ``count`` of ``numbers``, evenly spaced."""
    chosen: Ints = numbers[np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int)]
    return chosen
