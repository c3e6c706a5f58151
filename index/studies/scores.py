"""Retrieval scores with intervals over patients: accuracy, majority votes, precision, F1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput, unknown_name

Unit = Literal["tile", "slide"]
RANKS = 5
VOTES = (1, 3, 5)
RANDOM_DRAWS = 20
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RetrievalOptions:
    """What to evaluate, and how.

    Attributes:
        label: column with the class that the hits should share with the query.
        leave_out: patient, slide, or a metadata column; hits with the query's value in it are excluded.
        without_patients: accept tiles without a patient, and exclude their slide instead.
        unit: ``tile``, or ``slide`` by the median of minimum distances of the mosaics.
        queries: maximum number of query tiles, drawn by ``seed``; all tiles are searched.
        bootstrap: number of draws for the intervals.
        seed: of all random choices.
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
                f"queries is {self.queries}, bootstrap {self.bootstrap}, seed {self.seed}; expected at "
                "least 1, 1 and 0"
            )


@dataclass(frozen=True)
class QueryResults:
    """The classes and owners of the queries, and the classes of their hits.

    Attributes:
        label: (Q,) class numbers of the queries.
        owner: (Q,) owners (such as patients) of the queries.
        hits: (Q, 5) class numbers of the hits, best first; -1 for missing hits.
        reachable: (Q,) number of possible hits of the query's class.
        candidates: (Q, C) number of possible hits of each class.
    """

    label: Ints
    owner: Ints
    hits: Ints
    reachable: Ints
    candidates: Ints


def votes(hits: Ints, k: int) -> Ints:
    """Return the majority class of the first k hits (Q,), -1 without hits; the first class wins a tie."""
    best = np.full(len(hits), -1, dtype=np.int64)
    most = np.zeros(len(hits))
    for rank in range(min(k, hits.shape[1])):
        label = hits[:, rank]
        count = (hits[:, :k] == label[:, None]).sum(axis=1) - 0.01 * rank
        better = (label >= 0) & (count > most)
        best, most = np.where(better, label, best), np.where(better, count, most)
    return best


def average_precision(hits: Ints, label: Ints, reachable: Ints) -> NDArray[np.float64]:
    """Return AP@5 of each query (Q,)."""
    correct = hits == label[:, None]
    precision = np.cumsum(correct, axis=1) / np.arange(1, correct.shape[1] + 1)
    total: NDArray[np.float64] = (precision * correct).sum(axis=1)
    averaged: NDArray[np.float64] = total / np.maximum(1, np.minimum(correct.shape[1], reachable))
    return averaged


def scores_of(results: QueryResults, names: list[str], options: RetrievalOptions) -> dict[str, Any]:
    """Return each metric with interval and baselines, and the results per class; JSON-ready."""
    rng = np.random.default_rng(options.seed)
    majority = np.full(len(results.label), np.bincount(results.label).argmax())
    weights = bootstrap_weights(results.owner, options.bootstrap, rng)
    classes = len(names)
    chance = [_random_answers(results, rng) for _ in range(RANDOM_DRAWS)]
    by_majority = _Counts.of(results, majority, classes)
    metrics: dict[str, Any] = {}
    per_class: list[dict[str, Any]] = []
    for k in VOTES:
        counts = _Counts.of(results, votes(results.hits, k), classes)
        name = "top1" if k == 1 else f"mmv{k}"
        for suffix, measure in (("", _accuracy), ("_macro_f1", _macro_f1)):
            random = [
                measure(_Counts.of(results, votes(draw, k), classes).total()) for draw in chance
            ]
            metrics[name + suffix] = {
                "value": float(measure(counts.total())[0]),
                "interval_95": _interval(measure(counts.weighted(weights))),
                "random": float(np.mean(random)),
                "majority": float(measure(by_majority.total())[0]),
            }
        if k == RANKS:
            per_class = _per_class(counts, weights, names)
    precision = average_precision(results.hits, results.label, results.reachable)
    by_chance = [
        average_precision(draw, results.label, results.reachable).mean() for draw in chance
    ]
    _, owner = np.unique(results.owner, return_inverse=True)
    drawn = (
        weights @ np.bincount(owner, precision) / np.maximum(weights @ np.bincount(owner), 1e-12)
    )
    metrics["map5"] = {
        "value": float(precision.mean()),
        "interval_95": _interval(drawn),
        "random": float(np.mean(by_chance)),
        "majority": None,
    }
    return {"metrics": metrics, "per_class_mmv5": per_class}


def _random_answers(results: QueryResults, rng: np.random.Generator) -> Ints:
    """Return the classes (Q, 5) of five distinct random tiles of other patients, as a baseline."""
    hits = np.full((len(results.label), RANKS), -1, dtype=np.int64)
    for owner in np.unique(results.owner):
        rows = np.flatnonzero(results.owner == owner)
        pool = results.candidates[rows[0]]
        count = min(RANKS, int(pool.sum()))
        if count:
            drawn = rng.multivariate_hypergeometric(pool, count, len(rows), method="marginals")
            classes = np.repeat(np.tile(np.arange(len(pool)), len(rows)), drawn.ravel())
            hits[rows, :count] = rng.permuted(classes.reshape(len(rows), count), axis=1)
    return hits


@dataclass(frozen=True)
class _Counts:
    """Per owner and class (P, C): numbers of queries, of answers, and of correct answers."""

    true: NDArray[np.float64]
    predicted: NDArray[np.float64]
    correct: NDArray[np.float64]

    @classmethod
    def of(cls, results: QueryResults, predicted: Ints, classes: int) -> _Counts:
        _, owner = np.unique(results.owner, return_inverse=True)
        size = int(owner.max()) + 1

        def table(rows: NDArray[np.bool_], code: Ints) -> NDArray[np.float64]:
            flat = np.bincount(owner[rows] * classes + code[rows], minlength=size * classes)
            return flat.reshape(size, classes).astype(np.float64)

        answered = predicted >= 0
        correct = answered & (predicted == results.label)
        everything = np.ones(len(owner), dtype=bool)
        return cls(
            table(everything, results.label),
            table(answered, predicted),
            table(correct, results.label),
        )

    def weighted(self, weights: NDArray[np.float64]) -> _Counts:
        """Return the sums over owners, weighted by the number of draws (B, P): (B, C)."""
        return _Counts(weights @ self.true, weights @ self.predicted, weights @ self.correct)

    def total(self) -> _Counts:
        """Return the sums over all owners: (1, C)."""
        return self.weighted(np.ones((1, len(self.true))))


def _accuracy(counts: _Counts) -> NDArray[np.float64]:
    share: NDArray[np.float64] = counts.correct.sum(1) / np.maximum(counts.true.sum(1), 1e-12)
    return share


def _macro_f1(counts: _Counts) -> NDArray[np.float64]:
    """Return the mean F1 over the classes that occur."""
    score = 2 * counts.correct / np.maximum(counts.true + counts.predicted, 1e-12)
    occurs = counts.true > 0
    mean: NDArray[np.float64] = (score * occurs).sum(1) / np.maximum(occurs.sum(1), 1)
    return mean


def bootstrap_weights(owner: Ints, draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the number of times each owner is drawn (B, P)."""
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
        correct, true, predicted = whole.correct[0, n], whole.true[0, n], whole.predicted[0, n]
        if not true:
            continue
        occurs = drawn.true[:, n] > 0
        recalls = drawn.correct[occurs, n] / drawn.true[occurs, n]
        rows.append(
            {
                "class": name,
                "queries": int(true),
                "recall": float(correct / true),
                "recall_interval_95": _interval(recalls),
                "precision": float(correct / predicted) if predicted else None,
                "f1": float(2 * correct / (true + predicted)),
            }
        )
    return rows
