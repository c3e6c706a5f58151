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
                f"queries {self.queries}, bootstrap {self.bootstrap}, seed {self.seed}: expected at least "
                "1, 1 and 0"
            )


@dataclass(frozen=True)
class Asked:
    """Queries and their hits.

    Attributes:
        label: (Q,) class numbers of the queries.
        owner: (Q,) owners (such as patients) of the queries.
        found: (Q, 5) class numbers of the hits, best first; -1 for missing hits.
        reachable: (Q,) number of possible hits of the query's class.
        candidates: (Q, C) number of possible hits of each class.
    """

    label: Ints
    owner: Ints
    found: Ints
    reachable: Ints
    candidates: Ints


def votes(found: Ints, k: int) -> Ints:
    """Return the majority class of the first k hits (Q,), -1 without hits; the first class wins a tie."""
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


def _scores(asked: Asked, names: list[str], options: RetrievalOptions) -> dict[str, Any]:
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
    """Return the classes (Q, 5) of five distinct random tiles of other patients, as a baseline."""
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
    """Per owner and class (P, C): numbers of queries, of answers, and of correct answers."""

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
        """Return the sums over owners, weighted by the number of draws (B, P): (B, C)."""
        return _Counts(weights @ self.true, weights @ self.said, weights @ self.right)

    def total(self) -> _Counts:
        """Return the sums over all owners: (1, C)."""
        return self.weighted(np.ones((1, len(self.true))))


def _accuracy(counts: _Counts) -> NDArray[np.float64]:
    found: NDArray[np.float64] = counts.right.sum(1) / np.maximum(counts.true.sum(1), 1e-12)
    return found


def _macro_f1(counts: _Counts) -> NDArray[np.float64]:
    """Return the mean F1 over the classes that occur."""
    score = 2 * counts.right / np.maximum(counts.true + counts.said, 1e-12)
    there = counts.true > 0
    found: NDArray[np.float64] = (score * there).sum(1) / np.maximum(there.sum(1), 1)
    return found


def _bootstrap_weights(owner: Ints, draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
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
