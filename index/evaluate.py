"""Does the search find what it should? Leave-one-patient-out retrieval over a labelled atlas.

Every tile is asked of the tiles of all OTHER patients (a slide of the same patient is no independent
evidence), and what comes back is compared with its label. Definitions, with ties of a vote going to the
nearest: ``top1`` the nearest tile has the label; ``mmv3``, ``mmv5`` the majority of the nearest 3 or 5
has it (Kalra et al. 2020); ``map5`` the mean of AP@5 = sum over ranks r <= 5 of precision@r where rank r
has the label, divided by min(5, tiles that could be found). Intervals are percentiles of a bootstrap over
patients.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, unknown_name
from . import cases
from .search import Mask

if TYPE_CHECKING:
    from .atlas import Atlas
    from .generations import View

Unit = Literal["tile", "slide"]
RANKS = 5
VOTES = (1, 3, 5)
LATENCY_RUNS = 30
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """What is evaluated, and how.

    Attributes:
        label: column whose value is to be found again.
        leave_out: column whose own value is left out: patient, slide, or one of the metadata.
        without_patients: go on where tiles have no patient, leaving out their slide instead.
        unit: ``tile``, or ``slide`` by the median of minimum distances of the mosaics.
        queries: at most as many tiles are asked, drawn by ``seed``; all are searched.
        bootstrap: draws for the intervals.
        seed: of everything random.
    """

    label: str = "label"
    leave_out: str = "patient"
    without_patients: bool = False
    unit: Unit = "tile"
    queries: int = 20_000
    bootstrap: int = 1_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.unit not in {"tile", "slide"}:
            raise unknown_name("unit", self.unit, ("tile", "slide"))
        if self.queries < 1 or self.bootstrap < 1:
            raise BadInput("queries and bootstrap are at least 1")


@dataclass(frozen=True)
class Asked:
    """Queries and what came back.

    Attributes:
        label: (Q,) class numbers of the queries.
        owner: (Q,) patients of the queries.
        found: (Q, 5) class numbers of what was found, best first; -1 where there was no more.
        reachable: (Q,) how many of the query's class could be found.
        candidates: (Q, C) how many of each class could be found.
    """

    label: Ints
    owner: Ints
    found: Ints
    reachable: Ints
    candidates: Ints


def evaluate(
    atlas: Atlas,
    options: Options,
    encode: Callable[[], NDArray[np.float32]] | None = None,
) -> dict[str, Any]:
    """Evaluate the search of an atlas.

    Args:
        atlas: with labels and patients.
        options: what is asked.
        encode: embeds one tile, (1, D), for the latency from picture to answer; None leaves it out.

    Returns:
        The report, JSON-ready: metrics with intervals beside baselines, per class, latency, warnings.

    Raises:
        BadInput: no such column, fewer than two classes or patients, or tiles without a patient.
    """
    view = atlas.view()
    label = _column(view, options.label)
    owner, how = _owners(view, options)
    alive = np.repeat([bool(s["name"]) for s in view.columns.slides], np.diff(view.columns.starts))
    known = alive & (label.codes >= 0)
    warnings = [how] if how else []
    _check(options, known, label.codes, owner, label.names)
    if options.unit == "tile":
        asked = _ask_tiles(atlas, view, known, label.codes, owner, options)
        total = int(known.sum())
        if len(asked.label) < total:
            warnings.append(
                f"{len(asked.label)} of {total} labelled tiles were asked, drawn at random"
            )
    else:
        asked = _ask_slides(atlas, view, known, label.codes, owner)
    manifest = atlas.manifest
    return {
        "atlas": str(atlas.path),
        "encoder": {"name": manifest.name, "sha256": manifest.sha256, "dim": manifest.dim},
        "revision": view.revision,
        "index": view.index.plan.as_dict(),
        "unit": options.unit,
        "label": options.label,
        "leave_out": options.leave_out,
        "queries": len(asked.label),
        "owners": len(np.unique(asked.owner)),
        "classes": {name: int((asked.label == n).sum()) for n, name in enumerate(label.names)},
        "warnings": warnings,
        **_scores(asked, label.names, options),
        "latency": _latency(atlas, encode),
    }


def _column(view: View, name: str) -> Any:
    if name not in view.columns.names():
        raise unknown_name("column", name, view.columns.names())
    return view.columns.coded(name)


def _owners(view: View, options: Options) -> tuple[Ints, str]:
    """Return whose each position is (N,), and a warning if some of it is a guess."""
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
            f"{share}: tiles of one patient in both parts would make every number too good; give "
            f"{options.leave_out}s with `index relabel --metadata`, or pass --without-patients to leave "
            "out the slide instead (the report says so)"
        )
    slide = view.columns.slide_of(np.arange(len(owner)))
    warning = (
        f"{share}; their slide was left out instead. If a patient has several slides, the numbers are too "
        "good"
    )
    return np.where(owner >= 0, owner, owner.max() + 1 + slide), warning


def _check(options: Options, known: Mask, labels: Any, owner: Ints, names: list[str]) -> None:
    classes = len(np.unique(labels[known]))
    if classes < 2:
        raise BadInput(
            f"column {options.label!r} has {classes} value(s) ({', '.join(names[:3])}); retrieval needs 2"
        )
    if len(np.unique(owner[known])) < 2:
        raise BadInput(f"all labelled tiles are of one {options.leave_out}; at least 2 are needed")


def _ask_tiles(
    atlas: Atlas, view: View, known: Mask, labels: Any, owner: Ints, options: Options
) -> Asked:
    positions = np.flatnonzero(known)
    if len(positions) > options.queries:
        rng = np.random.default_rng(options.seed)
        positions = np.sort(rng.choice(positions, options.queries, replace=False))
    vectors = atlas.vectors_of(view.columns.ids(positions).tolist())
    found = np.full((len(positions), RANKS), -1, dtype=np.int64)
    candidates = np.zeros((len(positions), int(labels.max()) + 1), dtype=np.int64)
    for own in np.unique(owner[positions]):
        rows = np.flatnonzero(owner[positions] == own)
        mask = known & (owner != own)
        _, at = view.index.search(vectors[rows], RANKS, mask)
        found[rows[:, None], np.arange(at.shape[1])] = np.where(at >= 0, labels[at], -1)
        candidates[rows] = np.bincount(labels[mask], minlength=candidates.shape[1])
    asked = labels[positions].astype(np.int64)
    reachable = candidates[np.arange(len(asked)), asked]
    return Asked(asked, owner[positions], found, reachable, candidates)


def _ask_slides(atlas: Atlas, view: View, known: Mask, labels: Any, owner: Ints) -> Asked:
    """Ask with every slide whose tiles have one label and one owner."""
    columns = view.columns
    usable: list[tuple[int, int, int]] = []
    for number, slide in enumerate(columns.slides):
        part = slice(int(columns.starts[number]), int(columns.starts[number + 1]))
        of_one = len(set(labels[part].tolist())) == 1 == len(set(owner[part].tolist()))
        if slide["name"] and slide["tiles"] and known[part].all() and of_one:
            usable.append((number, int(labels[part][0]), int(owner[part][0])))
    if len({own for _, _, own in usable}) < 2:
        raise BadInput("fewer than 2 slides have one label and one patient; use --unit tile")
    names = [columns.slides[n]["name"] for n, _, _ in usable]
    metric = atlas.manifest.metric
    all_ = cases.mosaics_of(view, atlas.generations.mosaic_of, names)
    of_slide = {name: n for n, name in enumerate(names)}
    label = np.array([code for _, code, _ in usable])
    own = np.array([who for _, _, who in usable])
    found = np.full((len(usable), RANKS), -1, dtype=np.int64)
    candidates = np.zeros((len(usable), int(labels.max()) + 1), dtype=np.int64)
    others = {who: known & (owner != who) for who in np.unique(own)}
    for row, (number, _, who) in enumerate(usable):
        asked = all_.vectors[all_.slide == number]
        nothing = np.full(len(asked), -1, dtype=np.int64)
        ranked = cases.similar(view, asked, nothing, all_, metric, RANKS, passing=others[who])
        for rank, similar in enumerate(ranked):
            found[row, rank] = label[of_slide[similar.name]]
        candidates[row] = np.bincount(label[own != who], minlength=candidates.shape[1])
    reachable = candidates[np.arange(len(label)), label]
    return Asked(label, own, found, reachable, candidates)


def votes(found: Ints, k: int) -> Ints:
    """Return the majority of the first k (Q,); a tie goes to the class that came first; -1 for none."""
    best = np.full(len(found), -1, dtype=np.int64)
    most = np.zeros(len(found))
    for rank in range(min(k, found.shape[1])):
        own = found[:, rank]
        count = (found[:, :k] == own[:, None]).sum(axis=1) - 0.01 * rank
        better = (own >= 0) & (count > most)
        best, most = np.where(better, own, best), np.where(better, count, most)
    return best


def average_precision(found: Ints, label: Ints, reachable: Ints) -> NDArray[np.float64]:
    """Return AP@5 of each query (Q,)."""
    right = found == label[:, None]
    precision = np.cumsum(right, axis=1) / np.arange(1, right.shape[1] + 1)
    total: NDArray[np.float64] = (precision * right).sum(axis=1)
    averaged: NDArray[np.float64] = total / np.maximum(1, np.minimum(right.shape[1], reachable))
    return averaged


def _scores(asked: Asked, names: list[str], options: Options) -> dict[str, Any]:
    rng = np.random.default_rng(options.seed)
    chance = _random_answers(asked, rng)
    majority = np.array([row.argmax() for row in asked.candidates])
    weights = _bootstrap_weights(asked.owner, options.bootstrap, rng)
    metrics: dict[str, Any] = {}
    per_class: list[dict[str, Any]] = []
    for k in VOTES:
        predicted = votes(asked.found, k)
        name = "top1" if k == 1 else f"mmv{k}"
        confusion = _confusions(asked, predicted, len(names))
        by_chance = _confusions(asked, votes(chance, k), len(names))
        by_majority = _confusions(asked, majority, len(names))
        for suffix, measure in (("", _accuracy), ("_macro_f1", _macro_f1)):
            metrics[name + suffix] = {
                **_with_interval(measure, confusion, weights),
                "random": float(measure(by_chance.sum(axis=0)[None])[0]),
                "majority": float(measure(by_majority.sum(axis=0)[None])[0]),
            }
        if k == RANKS:
            per_class = _per_class(confusion.sum(axis=0), names)
    precision = average_precision(asked.found, asked.label, asked.reachable)
    by_chance_ap = average_precision(chance, asked.label, asked.reachable)
    sums = _per_owner(asked.owner, np.stack([precision, np.ones(len(precision))], axis=1))

    def mean(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = totals[:, 0] / np.maximum(totals[:, 1], 1e-12)
        return found

    metrics["map5"] = {
        **_with_interval(mean, sums, weights),
        "random": float(by_chance_ap.mean()),
        "majority": None,
    }
    return {"metrics": metrics, "per_class_mmv5": per_class}


def _random_answers(asked: Asked, rng: np.random.Generator) -> Ints:
    """Return what random tiles of other patients would have answered (Q, 5)."""
    shares = asked.candidates / np.maximum(1, asked.candidates.sum(axis=1, keepdims=True))
    edges = np.cumsum(shares, axis=1)
    drawn = rng.random((len(shares), RANKS))
    found: Ints = (drawn[:, :, None] > edges[:, None, :]).sum(axis=2)
    capped: Ints = np.minimum(found, shares.shape[1] - 1)
    return capped


def _per_owner(owner: Ints, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum values (Q, V) by owner: (P, V)."""
    _, number = np.unique(owner, return_inverse=True)
    sums = np.zeros((number.max() + 1, values.shape[1]))
    np.add.at(sums, number, values)
    return sums


def _confusions(asked: Asked, predicted: Ints, classes: int) -> NDArray[np.float64]:
    """Return a table true x predicted per owner (P, C, C + 1); the last column is no answer."""
    cell = asked.label * (classes + 1) + np.where(predicted < 0, classes, predicted)
    _, number = np.unique(asked.owner, return_inverse=True)
    size = classes * (classes + 1)
    flat = np.bincount(number * size + cell, minlength=(number.max() + 1) * size)
    return flat.reshape(-1, classes, classes + 1).astype(np.float64)


def _accuracy(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    right = np.trace(tables[:, :, :-1], axis1=1, axis2=2)
    found: NDArray[np.float64] = right / np.maximum(tables.sum(axis=(1, 2)), 1e-12)
    return found


def _macro_f1(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean F1 over the classes that are there."""
    right = np.diagonal(tables[:, :, :-1], axis1=1, axis2=2)
    true, predicted = tables.sum(axis=2), tables[:, :, :-1].sum(axis=1)
    score = 2 * right / np.maximum(true + predicted, 1e-12)
    there = true > 0
    found: NDArray[np.float64] = (score * there).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    return found


def _bootstrap_weights(owner: Ints, draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return how often each owner is drawn (B, P)."""
    count = len(np.unique(owner))
    return rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def _with_interval(
    measure: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    per_owner: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> dict[str, Any]:
    flat = per_owner.reshape(len(per_owner), -1)
    drawn = (weights @ flat).reshape(len(weights), *per_owner.shape[1:])
    low, high = np.quantile(measure(drawn), [0.025, 0.975])
    value = measure(per_owner.sum(axis=0)[None])[0]
    return {"value": float(value), "interval_95": [float(low), float(high)]}


def _per_class(table: NDArray[np.float64], names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for n, name in enumerate(names):
        right, true, said = table[n, n], table[n].sum(), table[:, n].sum()
        if true:
            rows.append(
                {
                    "class": name,
                    "queries": int(true),
                    "recall": float(right / true),
                    "precision": float(right / said) if said else None,
                    "f1": float(2 * right / (true + said)),
                }
            )
    return rows


def _latency(
    atlas: Atlas, encode: Callable[[], NDArray[np.float32]] | None
) -> dict[str, float | None]:
    """Median milliseconds of one query: encoding one tile, searching 10 hits, and both."""
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
