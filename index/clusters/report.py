"""What the clusters of an atlas are: their sizes, labels, examples, names given by people, and drift."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput
from ..store.catalog import Catalog, insert
from . import stored as clusterings
from .clustering import Assigned

if TYPE_CHECKING:
    from ..atlas import Atlas

TEXT_LIMIT = 2_000
DRIFT_FACTOR = 2.0
"""Later tiles drift when surely more than this many times as many of them are unknown."""


def placed(atlas: Atlas, name: str | None) -> tuple[NDArray[np.int64], Assigned]:
    """Return tile ids (N,) and where they belong; tiles that are not placed yet are left out."""
    chosen, _ = atlas.clustering(name)
    known = clusterings.placements(atlas.catalog, chosen)
    parts = [(s, known[s["id"]][0]) for s in atlas.generations.slides() if s["id"] in known]
    ids = [np.arange(s["first_tile"], s["first_tile"] + s["tiles"]) for s, _ in parts]
    return np.concatenate([np.zeros(0, dtype=np.int64), *ids]), _joined([p for _, p in parts])


def _joined(parts: list[Assigned]) -> Assigned:
    def column(key: str, kind: Any) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, dtype=kind), *(getattr(p, key) for p in parts)])

    return Assigned(
        column("cluster", np.int64),
        column("distance", np.float64),
        column("strength", np.float64),
        column("unknown", bool),
    )


def names(catalog: Catalog, clustering: str) -> dict[int, tuple[str, str]]:
    """Return names and descriptions that people gave to clusters."""
    rows = catalog.rows(
        "SELECT n.* FROM clusters AS n JOIN clusterings AS c ON c.id = n.clustering_id "
        "WHERE c.name = ?",
        (clustering,),
    )
    return {row["cluster"]: (row["name"], row["description"]) for row in rows}


def rename(atlas: Atlas, cluster: int, text: str, description: str, clustering: str | None) -> None:
    """Give a cluster a name and a description, in the place of earlier ones."""
    chosen, found = atlas.clustering(clustering)
    least = 0 if found.method == "kmeans" else -1
    if not least <= cluster < found.clusters:
        raise BadInput(
            f"clustering {chosen!r} has no cluster {cluster}; expected {least} to {found.clusters - 1}"
        )
    if max(len(text), len(description)) > TEXT_LIMIT:
        raise BadInput(f"a name or description is longer than {TEXT_LIMIT} characters; shorten it")
    with atlas.catalog.write() as db:
        (number,) = db.execute("SELECT id FROM clusterings WHERE name = ?", (chosen,)).fetchone()
        db.execute(
            "DELETE FROM clusters WHERE clustering_id = ? AND cluster = ?", (number, cluster)
        )
        if text or description:
            row = {"name": text, "description": description}
            insert(db, "clusters", {"clustering_id": number, "cluster": cluster, **row})


def describe(atlas: Atlas, name: str | None, examples: int) -> list[dict[str, Any]]:
    """Describe the clusters of a clustering, by number, noise first."""
    chosen, _ = atlas.clustering(name)
    ids, where = placed(atlas, chosen)
    given = names(atlas.catalog, chosen)
    view = atlas.view()
    columns = view.columns
    label = columns.coded("label")
    positions = columns.positions(ids)
    there = positions >= 0  # a writer may have removed a slide since
    ids, where, positions = ids[there], where.part(there), positions[there]
    slides = columns.slide_of(positions)
    report = []
    for cluster in np.unique(where.cluster).tolist():
        rows = np.flatnonzero(where.cluster == cluster)
        codes = label.codes[positions[rows]]
        counts = np.bincount(codes + 1, minlength=len(label.names) + 1)
        labels = dict(zip(["(none)", *label.names], counts.tolist(), strict=True))
        best = _examples(where.part(rows), slides[rows], examples)
        text, description = given.get(cluster, ("", ""))
        report.append(
            {
                "cluster": cluster,
                "name": text,
                "description": description,
                "tiles": len(rows),
                "slides": len(np.unique(slides[rows])),
                "unknown": int(where.unknown[rows].sum()),
                "labels": {k: n for k, n in sorted(labels.items(), key=lambda kv: -kv[1]) if n},
                "examples": list(atlas.tiles(ids[rows[best]].tolist(), view).values()),
            }
        )
    return report


def _examples(where: Assigned, slides: NDArray[np.int64], count: int) -> list[int]:
    """Return rows that stand for a cluster: the strongest, from as many slides as there are."""
    order = np.lexsort((where.distance, -where.strength)).tolist()
    best: list[int] = []
    seen: set[int] = set()
    for repeat in (False, True):
        for row in order:
            if len(best) >= count:
                return best
            if row not in best and (repeat or int(slides[row]) not in seen):
                best.append(row)
                seen.add(int(slides[row]))
    return best


def drift(atlas: Atlas, name: str | None) -> dict[str, Any]:
    """Compare how many tiles are unknown among those that were fitted and those that came later."""
    chosen, _ = atlas.clustering(name)
    known = clusterings.placements(atlas.catalog, chosen)
    titles = {s["id"]: s["name"] for s in atlas.generations.slides()}
    slides = []
    counts = {True: [0, 0], False: [0, 0]}
    for number, (where, fitted) in known.items():
        unknown, total = int(where.unknown.sum()), len(where.unknown)
        counts[fitted][0] += unknown
        counts[fitted][1] += total
        if not fitted and total:
            slides.append(
                {
                    "slide": titles.get(number, ""),
                    "tiles": total,
                    "unknown": unknown,
                    "share": round(unknown / total, 4),
                }
            )
    report: dict[str, Any] = {"clustering": chosen}
    for fitted, key in ((True, "fitted"), (False, "later")):
        unknown, total = counts[fitted]
        report[key] = {
            "tiles": total,
            "unknown": unknown,
            "share": round(unknown / total, 4) if total else None,
            "interval_95": None if not total else [round(v, 4) for v in wilson(unknown, total)],
        }
    limit = DRIFT_FACTOR * (report["fitted"]["interval_95"] or [0, 0])[1]
    later = report["later"]["interval_95"]
    report["usual_by_slide"] = _usual(known, len(slides))
    report["drifted"] = bool(
        later and later[0] > limit and report["later"]["share"] > (report["usual_by_slide"] or 0)
    )
    report["slides"] = sorted(slides, key=lambda s: -s["share"])
    return report


def _usual(known: dict[int, tuple[Assigned, bool]], later: int) -> float | None:
    """Return what share of unknown tiles as many fitted slides rarely pass (one in a hundred draws).

    Tiles of a slide are alike, so that tiles alone would make any difference look sure.
    """
    fitted = [
        (int(where.unknown.sum()), len(where.unknown))
        for where, was in known.values()
        if was and len(where.unknown)
    ]
    if not fitted or not later:
        return None
    counts = np.array(fitted)
    drawn = counts[np.random.default_rng(0).integers(0, len(counts), (2_000, later))].sum(axis=1)
    return round(float(np.quantile(drawn[:, 0] / drawn[:, 1], 0.99)), 4)


def wilson(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of a share (Wilson 1927)."""
    share = count / total
    middle = share + z * z / (2 * total)
    half = z * float(np.sqrt(share * (1 - share) / total + z * z / (4 * total * total)))
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
