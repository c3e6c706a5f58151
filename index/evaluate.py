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
RANDOM_DRAWS = 20
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
        if self.queries < 1 or self.bootstrap < 1 or self.seed < 0:
            raise BadInput(
                f"queries {self.queries}, bootstrap {self.bootstrap}, seed {self.seed}: expected at least "
                "1, 1 and 0"
            )


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
    if not len(view.index):
        raise BadInput(f"{atlas.path} holds no tiles yet; add features first")
    label = _column(view, options.label)
    owner, how = _owners(view, options)
    slide_ms: float | None = None
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
        asked, more, slide_ms = _ask_slides(atlas, view, known, label.codes, owner)
        warnings += more
    warnings += _unanswerable(asked, label.names)
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
        "latency": {**_latency(atlas, encode), "slide_search_ms": slide_ms},
    }


def _unanswerable(asked: Asked, names: list[str]) -> list[str]:
    """Name the classes that only one owner has: no answer to them can be right."""
    lost = asked.reachable == 0
    if not lost.any():
        return []
    classes = sorted({names[code] for code in asked.label[lost].tolist()})
    return [
        f"{int(lost.sum())} queries cannot be answered, since no other owner has their class "
        f"({', '.join(classes[:5])}); they count as wrong"
    ]


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
    return _joined(owner, slide), warning


def _joined(owner: Ints, slide: Ints) -> Ints:
    """Return owners (N,) that share neither an owner nor a slide with another."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    slides, owners = int(slide.max()) + 1, int(owner.max()) + 1
    known = owner >= 0
    size = slides + owners
    links = (np.ones(int(known.sum())), (slide[known], slides + owner[known]))
    _, group = connected_components(coo_matrix(links, shape=(size, size)), directed=False)
    found: Ints = group[slide].astype(np.int64)
    return found


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


def _ask_slides(
    atlas: Atlas, view: View, known: Mask, labels: Any, owner: Ints
) -> tuple[Asked, list[str], float]:
    """Ask with every slide whose tiles have one label and one owner.

    Returns:
        What came back, warnings, and milliseconds per slide.
    """
    columns = view.columns
    usable: list[tuple[int, int, int]] = []
    labelled = 0
    for number, slide in enumerate(columns.slides):
        part = slice(int(columns.starts[number]), int(columns.starts[number + 1]))
        if not slide["name"] or not known[part].any():
            continue
        labelled += 1
        of_one = len(set(labels[part].tolist())) == 1 == len(set(owner[part].tolist()))
        if known[part].all() and of_one:
            usable.append((number, int(labels[part][0]), int(owner[part][0])))
    if len({own for _, _, own in usable}) < 2:
        raise BadInput("fewer than 2 slides have one label and one patient; use --unit tile")
    warnings = []
    if len(usable) < labelled:
        lost = labelled - len(usable)
        warnings.append(
            f"{lost} of {labelled} slides hold several labels or patients, and were left out"
        )
    all_ = cases.mosaics_of(view, atlas.generations.mosaic_of, [n for n, _, _ in usable])
    row_of = {number: row for row, (number, _, _) in enumerate(usable)}
    slide_row = np.array([row_of[n] for n in columns.slide_of(all_.positions).tolist()])
    label = np.array([code for _, code, _ in usable])
    own = np.array([who for _, _, who in usable])
    found = np.full((len(usable), RANKS), -1, dtype=np.int64)
    candidates = np.zeros((len(usable), int(labels.max()) + 1), dtype=np.int64)
    started = time.perf_counter()
    for row, who in enumerate(own.tolist()):
        others = np.flatnonzero(own[slide_row] != who)
        asked = all_.part(np.flatnonzero(slide_row == row))
        ranked, _ = cases.rank(asked, all_.part(others), slide_row[others], atlas.manifest.metric)
        best = label[ranked[:RANKS]]
        found[row, : len(best)] = best
        candidates[row] = np.bincount(label[own != who], minlength=candidates.shape[1])
    took = 1000 * (time.perf_counter() - started) / len(usable)
    reachable = candidates[np.arange(len(label)), label]
    return Asked(label, own, found, reachable, candidates), warnings, took


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
    majority = np.full(len(asked.label), np.bincount(asked.label).argmax())
    weights = _bootstrap_weights(asked.owner, options.bootstrap, rng)
    classes = len(names)
    chance = [_random_answers(asked, rng) for _ in range(RANDOM_DRAWS)]
    by_majority = _Counts.of(asked, majority, classes)
    metrics: dict[str, Any] = {}
    per_class: list[dict[str, Any]] = []
    for k in VOTES:
        counts = _Counts.of(asked, votes(asked.found, k), classes)
        name = "top1" if k == 1 else f"mmv{k}"
        for suffix, measure in (("", _accuracy), ("_macro_f1", _macro_f1)):
            random = [
                measure(_Counts.of(asked, votes(drawn, k), classes).total()) for drawn in chance
            ]
            metrics[name + suffix] = {
                "value": float(measure(counts.total())[0]),
                "interval_95": _interval(measure(counts.weighted(weights))),
                "random": float(np.mean(random)),
                "majority": float(measure(by_majority.total())[0]),
            }
        if k == RANKS:
            per_class = _per_class(counts, weights, names)
    precision = average_precision(asked.found, asked.label, asked.reachable)
    by_chance = [average_precision(drawn, asked.label, asked.reachable).mean() for drawn in chance]
    sums = _per_owner(asked.owner, np.stack([precision, np.ones(len(precision))], axis=1))
    drawn_sums = weights @ sums
    metrics["map5"] = {
        "value": float(precision.mean()),
        "interval_95": _interval(drawn_sums[:, 0] / np.maximum(drawn_sums[:, 1], 1e-12)),
        "random": float(np.mean(by_chance)),
        "majority": None,
    }
    return {"metrics": metrics, "per_class_mmv5": per_class}


def _random_answers(asked: Asked, rng: np.random.Generator) -> Ints:
    """Return what five different random tiles of other patients would have answered (Q, 5)."""
    found = np.full((len(asked.label), RANKS), -1, dtype=np.int64)
    for own in np.unique(asked.owner):
        rows = np.flatnonzero(asked.owner == own)
        there = asked.candidates[rows[0]]
        count = min(RANKS, int(there.sum()))
        if count:
            drawn = rng.multivariate_hypergeometric(
                there, count, size=len(rows), method="marginals"
            )
            classes = np.repeat(np.tile(np.arange(len(there)), len(rows)), drawn.ravel()).reshape(
                len(rows), count
            )
            found[rows, :count] = rng.permuted(classes, axis=1)
    return found


def _per_owner(owner: Ints, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum values (Q, V) by owner: (P, V)."""
    _, number = np.unique(owner, return_inverse=True)
    sums = np.zeros((number.max() + 1, values.shape[1]))
    np.add.at(sums, number, values)
    return sums


@dataclass(frozen=True)
class _Counts:
    """Per owner and class (P, C): how many were asked, answered so, and answered so rightly."""

    true: NDArray[np.float64]
    said: NDArray[np.float64]
    right: NDArray[np.float64]

    @classmethod
    def of(cls, asked: Asked, predicted: Ints, classes: int) -> _Counts:
        _, owner = np.unique(asked.owner, return_inverse=True)
        size = int(owner.max()) + 1

        def table(rows: NDArray[np.bool_], code: Ints) -> NDArray[np.float64]:
            flat = np.bincount(owner[rows] * classes + code[rows], minlength=size * classes)
            return flat.reshape(size, classes).astype(np.float64)

        answered = predicted >= 0
        right = answered & (predicted == asked.label)
        everything = np.ones(len(owner), dtype=bool)
        return cls(
            table(everything, asked.label), table(answered, predicted), table(right, asked.label)
        )

    def weighted(self, weights: NDArray[np.float64]) -> _Counts:
        """Return the sums over owners, drawn as often as the weights (B, P) say: (B, C)."""
        return _Counts(weights @ self.true, weights @ self.said, weights @ self.right)

    def total(self) -> _Counts:
        """Return the sums over all owners: (1, C)."""
        return self.weighted(np.ones((1, len(self.true))))


def _accuracy(counts: _Counts) -> NDArray[np.float64]:
    found: NDArray[np.float64] = counts.right.sum(1) / np.maximum(counts.true.sum(1), 1e-12)
    return found


def _macro_f1(counts: _Counts) -> NDArray[np.float64]:
    """Mean F1 over the classes that are there."""
    score = 2 * counts.right / np.maximum(counts.true + counts.said, 1e-12)
    there = counts.true > 0
    found: NDArray[np.float64] = (score * there).sum(1) / np.maximum(there.sum(1), 1)
    return found


def _bootstrap_weights(owner: Ints, draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return how often each owner is drawn (B, P)."""
    count = len(np.unique(owner))
    return rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def _interval(drawn: NDArray[np.float64]) -> list[float]:
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return [float(low), float(high)]


def _per_class(
    counts: _Counts, weights: NDArray[np.float64], names: list[str]
) -> list[dict[str, Any]]:
    whole, drawn = counts.total(), counts.weighted(weights)
    rows = []
    for n, name in enumerate(names):
        right, true, said = whole.right[0, n], whole.true[0, n], whole.said[0, n]
        if not true:
            continue
        there = drawn.true[:, n] > 0
        recalls = drawn.right[there, n] / drawn.true[there, n]
        rows.append(
            {
                "class": name,
                "queries": int(true),
                "recall": float(right / true),
                "recall_interval_95": _interval(recalls),
                "precision": float(right / said) if said else None,
                "f1": float(2 * right / (true + said)),
            }
        )
    return rows


def _latency(
    atlas: Atlas, encode: Callable[[], NDArray[np.float32]] | None
) -> dict[str, float | None]:
    """Median milliseconds of one query: encoding one tile (decoded already), searching, and both."""
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
