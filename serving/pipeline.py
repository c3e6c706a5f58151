"""Embedding: every job becomes one feature file; what failed is recorded and never stops the rest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..console import Report
from ..errors import BadInput, Busy, Damaged, HistoseekError, Mismatch, StorageFailed
from ..feature_files import Features, magnification, read_about, write_features
from ..files import read_json, remove_leftovers, write_json
from ..images import Rgb, square
from ..tilesets import open_tiles
from .batches import embed_rows
from .encoder import Encoder
from .jobs import Job, content_mark, distinct_name
from .results import EmbedOptions, Result, State
from .slides import Slide, open_slide

MAX_UNREADABLE = 0.1
"""A slide or tile set with a larger share of unreadable tiles counts as failed, not as partial."""


def embed_jobs(
    jobs: Sequence[Job],
    encoder: Encoder,
    out: Path,
    options: EmbedOptions,
    progress: Report,
) -> list[Result]:
    """Embed every job and write its features under ``out``.

    Feature files appear whole or not at all, so a run that was killed is finished by repeating it:
    what is done is skipped. The state of every job is in ``out/status/<name>.json``.

    Args:
        jobs: from :func:`find_jobs`.
        encoder: any encoder.
        out: the folder of features.
        options: how to cut tiles.
        progress: called with tiles done, tiles known so far, and the current slide.

    Raises:
        StorageFailed: the disk is full or ``out`` cannot be written; earlier results stay.
    """
    if options.overlap_px >= encoder.manifest.size_px:
        raise BadInput(
            f"--overlap is {options.overlap_px}; expected less than the tile's "
            f"{encoder.manifest.size_px} pixels"
        )
    remove_leftovers([out, out / "status", *out.glob("*/features_*")])
    results: list[Result] = []
    done = _Counter(progress)
    for job in jobs:
        started = time.monotonic()
        try:
            result = _embed_job(job, encoder, out, options, done)
        except (StorageFailed, Busy):
            raise
        except HistoseekError as error:
            result = Result(job.name, str(job.source), "failed", str(error))
        except Exception as error:  # one foreign file must not stop the others
            reason = f"{job.source}: unexpected {type(error).__name__}: {error}"
            result = Result(job.name, str(job.source), "failed", reason)
        result = Result(**{**asdict(result), "seconds": round(time.monotonic() - started, 3)})
        results.append(result)
        status = out / "status" / f"{result.name}.json"
        if result.state != "skipped" or not _says_done(status):
            write_json(status, asdict(result))
    return results


def _says_done(status: Path) -> bool:
    """Whether a status file is there and tells of success; a kill may have left it behind."""
    try:
        return read_json(status)["state"] in {"done", "empty", "skipped"}
    except (HistoseekError, KeyError, TypeError):
        return False


class _Counter:
    """Tiles done and known so far, over all jobs."""

    def __init__(self, progress: Report) -> None:
        self.done = self.known = 0
        self._progress = progress

    def expect(self, count: int) -> None:
        self.known += count

    def add(self, text: str, count: int) -> None:
        self.done += count
        self._progress(self.done, self.known, text)


def _embed_job(
    job: Job, encoder: Encoder, out: Path, options: EmbedOptions, done: _Counter
) -> Result:
    if job.kind == "tiles":
        return _embed_tiles(job, encoder, out, options, done)
    mpp = options.mpp or encoder.manifest.mpp
    if mpp is None:
        raise Mismatch(
            f"encoder {encoder.manifest.name} names no mpp to read slides at; pass --mpp"
        )
    with open_slide(job.source, _assumed_mpp(job, options)) as slide:
        return _embed_slide(job, slide, mpp, encoder, out, options, done)


def _assumed_mpp(job: Job, options: EmbedOptions) -> float | None:
    stated = job.row.get("mpp", "")
    if not stated:
        return options.assume_mpp
    try:
        value = float(stated)
    except ValueError:
        value = float("nan")
    if not 0.01 <= value <= 100:
        raise BadInput(f"the manifest gives {job.source.name} mpp {stated!r}; expected 0.01 to 100")
    return value


def _place(
    out: Path, folder: str, job: Job, encoder: Encoder, key: dict[str, Any]
) -> tuple[Path, str, bool]:
    """Return the feature file, the name, and whether it is there already, made the same way."""
    parent = out / folder / f"features_{encoder.manifest.name}"
    names = dict.fromkeys((job.name, distinct_name(job)))
    plain = read_about(parent / f"{job.stem}.h5")
    if plain is not None and plain.get("source") == str(job.source.resolve()):
        names = {job.stem: None, **names}  # it was embedded before another slide of its name came
    for name in names:
        path = parent / f"{name}.h5"
        about = read_about(path)
        if about is None:
            return path, name, False
        if about.get("key") == key:
            return path, name, not about.get("unreadable")
        if about.get("key", {}).get("content") == key["content"]:
            return path, name, False
        if about.get("source") == str(job.source.resolve()):
            return path, name, False
    return path, name, False


def _done_before(job: Job, name: str, path: Path) -> Result:
    about = read_about(path) or {}
    reason = about.get("reason") or "done before"
    return Result(
        name, str(job.source), "skipped", reason, about.get("tiles", 0), features=str(path)
    )


def _embed_slide(
    job: Job,
    slide: Slide,
    target_mpp: float,
    encoder: Encoder,
    out: Path,
    options: EmbedOptions,
    done: _Counter,
) -> Result:
    manifest = encoder.manifest
    folder = f"{magnification(target_mpp)}x_{manifest.size_px}px_{options.overlap_px}px_overlap"
    key = {
        "content": content_mark(job.source),
        "encoder": manifest.sha256,
        "mpp": slide.require_mpp(),
        "target_mpp": target_mpp,
        "min_tissue": options.min_tissue,
        "row": {k: v for k, v in job.row.items() if k != "file"},
    }
    path, name, ready = _place(out, folder, job, encoder, key)
    if ready:
        return _done_before(job, name, path)
    grid = slide.grid(manifest.size_px, target_mpp, options.overlap_px, options.min_tissue)
    done.expect(len(grid.coords))

    def read(row: int) -> Rgb:
        x, y = (int(v) for v in grid.coords[row])
        return slide.read_tile(x, y, grid.size_px_level0, grid.size_px)

    features, kept, unreadable = embed_rows(
        len(grid.coords), read, encoder, options.batch, partial(done.add, name)
    )
    _refuse_if_broken(job, len(grid.coords), unreadable)
    reason = ""
    if not len(grid.coords):
        reason = (
            f"no tile: {slide.width} x {slide.height} pixels are smaller than one tile of "
            f"{grid.size_px_level0}"
            if not grid.candidates
            else f"no tissue: none of {grid.candidates} tiles reaches {options.min_tissue:.0%} tissue"
        )
    about = {
        "key": key,
        "source": str(job.source.resolve()),
        "reason": reason,
        "unreadable": unreadable,
        "tiles": len(kept),
        "tissue_share": round(grid.tissue, 4),
        "mpp_from": slide.mpp_from,
        "row": key["row"],
    }
    write_features(
        path,
        Features(
            name=name,
            encoder=manifest.name,
            encoder_sha256=manifest.sha256,
            features=features,
            coords=grid.coords[kept],
            source=str(job.source.resolve()),
            size_px=grid.size_px,
            size_px_level0=grid.size_px_level0,
            overlap_px=grid.overlap_px,
            mpp=grid.mpp,
            target_mpp=target_mpp,
            width=slide.width,
            height=slide.height,
            about=about,
        ),
    )
    state: State = "partial" if unreadable else "done" if len(kept) else "empty"
    reason = reason or (f"{len(unreadable)} tiles unreadable" if unreadable else "")
    return Result(name, str(job.source), state, reason, len(kept), unreadable, features=str(path))


def _embed_tiles(
    job: Job, encoder: Encoder, out: Path, options: EmbedOptions, done: _Counter
) -> Result:
    manifest = encoder.manifest
    tileset = open_tiles(job.source, options.manifest)
    key = {"content": tileset.fingerprint, "encoder": manifest.sha256}
    path, name, ready = _place(out, f"tiles_{manifest.size_px}px", job, encoder, key)
    if ready:
        return _done_before(job, name, path)
    done.expect(len(tileset))

    def read(row: int) -> Rgb:
        return square(tileset.read(row), manifest.size_px)

    features, kept, unreadable = embed_rows(
        len(tileset), read, encoder, options.batch, partial(done.add, name)
    )
    _refuse_if_broken(job, len(tileset), unreadable)
    tiles = [tileset.tiles[row] for row in kept]
    about = {
        "key": key,
        "source": str(job.source.resolve()),
        "unreadable": unreadable,
        "tiles": len(kept),
        "reason": "",
    }
    write_features(
        path,
        Features(
            name=name,
            encoder=manifest.name,
            encoder_sha256=manifest.sha256,
            features=features,
            coords=np.zeros((len(kept), 2), dtype=np.int64),
            files=tuple(t.file for t in tiles),
            kind="tiles",
            source=str(job.source.resolve()),
            size_px=manifest.size_px,
            labels=tuple(t.label or "" for t in tiles),
            groups=tuple(t.group or "" for t in tiles),
            about=about,
        ),
    )
    state: State = "partial" if unreadable else "done"
    reason = f"{len(unreadable)} tiles unreadable" if unreadable else ""
    return Result(name, str(job.source), state, reason, len(kept), unreadable, features=str(path))


def _refuse_if_broken(job: Job, count: int, unreadable: list[str]) -> None:
    if count and len(unreadable) > MAX_UNREADABLE * count:
        raise Damaged(
            f"{job.source}: {len(unreadable)} of {count} tiles are unreadable, first: {unreadable[0]}"
        )
