"""Measures retrieval: leave-one-patient-out search over a labelled atlas.

Every tile is a query against the tiles of all OTHER patients (a slide of the same patient is no independent
evidence), and the labels of the hits are compared with its label. Definitions (a tied vote goes to the
nearest): ``top1``: the nearest tile has the label. ``mmv3``, ``mmv5``: the majority of the nearest 3 or 5
tiles has it (Kalra et al. 2020). ``map5``: the mean of AP@5 = sum of precision@r over the ranks r <= 5
whose tile has the label, divided by min(5, tiles with the label that could be found). Intervals are
percentiles of a bootstrap over patients.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...console import counted
from ...errors import BadInput, unknown_name
from ..atlas import Atlas
from ..search import cases
from ..search.tiles import Mask
from ..store.annotation import FIELDS as ANNOTATION_FIELDS
from ..view import View
from .scores import RANKS, Ints, QueryResults, RetrievalOptions, scores_of

LATENCY_RUNS = 30


def evaluate(
    atlas: Atlas, options: RetrievalOptions, encode: Callable[[], NDArray[np.float32]] | None = None
) -> dict[str, Any]:
    """Evaluate the search of an atlas.

    Args:
        atlas: with labels and patients.
        options: what to evaluate.
        encode: embeds one tile, (1, D), to measure the latency from image to answer; None leaves it out.

    Returns:
        The report, JSON-ready: metrics with intervals, baselines, results per class, latency, warnings.

    Raises:
        BadInput: there is no such column, there are fewer than two classes or patients, or tiles have no
            patient.
    """
    view = atlas.view()
    view.state.require_tiles()
    label = _column(view, options.label)
    owner, note = _owners(view, options)
    slide_ms: float | None = None
    alive = view.columns.alive()
    labelled = alive & (label.codes >= 0)
    warnings = [note] if note else []
    if lost := int((alive & ~labelled).sum()):
        warnings.append(
            f"left out: {lost} of {int(alive.sum())} tiles, which have no value of {options.label!r}"
        )
    _check(options, labelled, label.codes, owner, label.names)
    if options.unit == "tile":
        results = _query_tiles(view, labelled, label.codes, owner, options)
        used, total = len(results.label), int(labelled.sum())
        if used < total:
            warnings.append(
                f"{used} of {total} labelled tiles were used as queries, drawn at random"
            )
    else:
        results, notes, slide_ms = _query_slides(view, labelled, label.codes, owner)
        warnings += notes
    warnings += _unanswerable(results, label.names, options.leave_out)
    manifest = atlas.manifest
    return {
        "atlas": str(atlas.path),
        "encoder": {"name": manifest.name, "sha256": manifest.sha256, "dim": manifest.dim},
        "revision": view.revision,
        "index": asdict(view.index.plan),
        "unit": options.unit,
        "label": options.label,
        "leave_out": options.leave_out,
        "queries": len(results.label),
        "owners": len(np.unique(results.owner)),
        "classes": {name: int((results.label == n).sum()) for n, name in enumerate(label.names)},
        "warnings": warnings,
        **scores_of(results, label.names, options),
        "latency": {**_latency(atlas, encode), "slide_search_ms": slide_ms},
    }


def _unanswerable(results: QueryResults, names: list[str], owner: str) -> list[str]:
    """Return a warning if only one owner has a class: its queries cannot be answered correctly."""
    lost = results.reachable == 0
    if not lost.any():
        return []
    classes = sorted({names[code] for code in results.label[lost].tolist()})
    return [
        f"{counted(int(lost.sum()), 'query', 'queries')} cannot be answered, because no other {owner} has "
        f"the class ({', '.join(classes[:5])}); this counts as wrong"
    ]


def _column(view: View, name: str) -> Any:
    known = [*view.columns.names(), *ANNOTATION_FIELDS]
    if name not in known:
        raise unknown_name("column", name, known)
    return view.columns.coded(name)


def _owners(view: View, options: RetrievalOptions) -> tuple[Ints, str]:
    """Return the owner of each position (N,), and a warning if some owners are guessed."""
    owner = _column(view, options.leave_out).codes.astype(np.int64)
    label = _column(view, options.label).codes
    lost = (owner < 0) & (label >= 0)
    if not lost.any():
        return owner, ""
    share = (
        f"{int(lost.sum())} of {int((label >= 0).sum())} labelled tiles have no {options.leave_out}"
    )
    if not options.without_patients:
        raise BadInput(
            f"{share}; if a tile could find tiles of its own patient, all results would be too good. "
            f"Add the {options.leave_out} with `index relabel --metadata`, or pass --without-patients to "
            "leave out the tile's slide instead (the report then has a warning)"
        )
    slide = view.columns.slide_of(np.arange(len(owner)))
    warning = (
        f"{share}; their slide was left out instead. If a patient has several slides, the results are too "
        "good"
    )
    return _joined(owner, slide), warning


def _joined(owner: Ints, slide: Ints) -> Ints:
    """Merge owners that share a slide; return the merged owner of each position (N,)."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    slides, owners = int(slide.max()) + 1, int(owner.max()) + 1
    named = owner >= 0
    size = slides + owners
    links = (np.ones(int(named.sum())), (slide[named], slides + owner[named]))
    _, group = connected_components(coo_matrix(links, shape=(size, size)), directed=False)
    merged: Ints = group[slide].astype(np.int64)
    return merged


def _check(
    options: RetrievalOptions, labelled: Mask, labels: Any, owner: Ints, names: list[str]
) -> None:
    classes = len(np.unique(labels[labelled]))
    if classes < 2:
        raise BadInput(
            f"column {options.label!r} has {classes} value(s) ({', '.join(names[:3])}); retrieval needs at "
            "least 2"
        )
    if len(np.unique(owner[labelled])) < 2:
        raise BadInput(
            f"all labelled tiles are of one {options.leave_out}, or of one slide or tile set whose "
            f"{options.leave_out} is unknown; retrieval needs at least 2. For a tile set, give each tile "
            f"its {options.leave_out}: `index relabel --metadata` with the columns slide, file and "
            f"{options.leave_out}"
        )


def _query_tiles(
    view: View, labelled: Mask, labels: Any, owner: Ints, options: RetrievalOptions
) -> QueryResults:
    positions = np.flatnonzero(labelled)
    if len(positions) > options.queries:
        rng = np.random.default_rng(options.seed)
        positions = np.sort(rng.choice(positions, options.queries, replace=False))
    vectors = view.index.at(positions)
    hits = np.full((len(positions), RANKS), -1, dtype=np.int64)
    candidates = np.zeros((len(positions), int(labels.max()) + 1), dtype=np.int64)
    for left_out in np.unique(owner[positions]):
        rows = np.flatnonzero(owner[positions] == left_out)
        mask = labelled & (owner != left_out)
        _, at = view.index.search(vectors[rows], RANKS, mask)
        hits[rows[:, None], np.arange(at.shape[1])] = np.where(at >= 0, labels[at], -1)
        candidates[rows] = np.bincount(labels[mask], minlength=candidates.shape[1])
    label = labels[positions].astype(np.int64)
    reachable = candidates[np.arange(len(label)), label]
    return QueryResults(label, owner[positions], hits, reachable, candidates)


def _query_slides(
    view: View, labelled: Mask, labels: Any, owner: Ints
) -> tuple[QueryResults, list[str], float]:
    """Use every slide whose tiles have one label and one owner as a query.

    Returns:
        The queries with their hits, warnings, and milliseconds per slide.
    """
    columns = view.columns
    usable: list[tuple[int, int, int]] = []
    total = 0
    for number, slide in enumerate(columns.slides):
        part = slice(int(columns.starts[number]), int(columns.starts[number + 1]))
        if not slide["name"] or not labelled[part].any():
            continue
        total += 1
        of_one = len(set(labels[part].tolist())) == 1 == len(set(owner[part].tolist()))
        if labelled[part].all() and of_one:
            usable.append((number, int(labels[part][0]), int(owner[part][0])))
    if len({who for _, _, who in usable}) < 2:
        raise BadInput(
            "fewer than 2 patients have a slide with one label and one patient; use --unit tile"
        )
    warnings = []
    if lost := total - len(usable):
        warnings.append(
            f"{lost} of {total} slides have several labels or patients and were left out"
        )
    mosaics = cases.mosaics_of(view.state, [n for n, _, _ in usable])
    row_of = {number: row for row, (number, _, _) in enumerate(usable)}
    slide_row = np.array([row_of[n] for n in columns.slide_of(mosaics).tolist()])
    label = np.array([code for _, code, _ in usable])
    owners = np.array([who for _, _, who in usable])
    hits = np.full((len(usable), RANKS), -1, dtype=np.int64)
    candidates = np.zeros((len(usable), int(labels.max()) + 1), dtype=np.int64)
    started = time.perf_counter()
    for row, who in enumerate(owners.tolist()):
        others = np.flatnonzero(owners[slide_row] != who)
        query = view.index.at(mosaics[slide_row == row])
        ranked, _ = cases.rank(view.state, query, mosaics[others], slide_row[others])
        best = label[ranked[:RANKS]]
        hits[row, : len(best)] = best
        candidates[row] = np.bincount(label[owners != who], minlength=candidates.shape[1])
    took = 1000 * (time.perf_counter() - started) / len(usable)
    reachable = candidates[np.arange(len(label)), label]
    return QueryResults(label, owners, hits, reachable, candidates), warnings, took


def _latency(
    atlas: Atlas, encode: Callable[[], NDArray[np.float32]] | None
) -> dict[str, float | None]:
    """Return the median milliseconds of one query: encoding one decoded tile, searching, and both."""
    noise = np.random.default_rng(0).normal(size=(1, atlas.manifest.dim)).astype(np.float32)
    encoding, searching = [], []
    for _ in range(LATENCY_RUNS):
        started = time.perf_counter()
        query = noise if encode is None else encode()
        encoded = time.perf_counter()
        atlas.search(query, 10)
        searching.append(1000 * (time.perf_counter() - encoded))
        encoding.append(1000 * (encoded - started))
    search_ms = round(statistics.median(searching), 2)
    encode_ms = None if encode is None else round(statistics.median(encoding), 2)
    both = None if encode_ms is None else round(encode_ms + search_ms, 2)
    return {"encode_ms": encode_ms, "search_ms": search_ms, "end_to_end_ms": both}
