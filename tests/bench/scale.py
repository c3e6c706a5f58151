"""Benchmark of several atlases searched as one: latency, recall and memory, beside one of them alone.

Absolute times depend on the machine; claimed are the ratios of one run. Options: ``--shards``, ``--tiles``
of each, ``--quick`` for a tenth of the tiles, ``--json FILE`` for the numbers.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from atlases import DIM, clustered, make_atlas

K, ASKED = 10, 200
RESULTS = {}
OPENED = """
import json, sys, time
import numpy as np
from histoseek.index.federation.answers import Example
from histoseek.index.federation.federation import Federation
from histoseek.index.atlas import Atlas
from histoseek.index.search.query import Query
import faiss, pyparsing


def memory():
    lines = open("/proc/self/status").read().splitlines()
    found = {l.split(":")[0]: l.split()[1] for l in lines if l.startswith(("VmRSS", "RssAnon"))}
    return int(found["RssAnon"]) * 1024, int(found["VmRSS"]) * 1024


def milliseconds(ask, queries):
    took = []
    for vector in queries:
        started = time.perf_counter()
        ask(vector[None])
        took.append(1000 * (time.perf_counter() - started))
    return {"median": float(np.median(took)), "p95": float(np.percentile(took, 95))}


queries = np.load(sys.argv[1])
paths = sys.argv[2:]
before = memory()
started = time.perf_counter()
together = Federation(paths)
together.status()
found = {"open_s": time.perf_counter() - started}
opened = memory()
hits = together.search(Query(vectors=queries, k=10)).hits
found["first_answers_s"] = time.perf_counter() - started
after = memory()
alone = Atlas(paths[0])
alone.search(queries, 10)
known = together.facts()[0]
found["ms"] = {
    "one atlas": milliseconds(lambda v: alone.search(v, 10), queries),
    "together": milliseconds(lambda v: together.search(Query(vectors=v, k=10)), queries),
    "one after another": milliseconds(
        lambda v: [s.find(Query(vectors=v, k=10)) for s in together.shards if s.name in known], queries
    ),
    "together, half = 'a'": milliseconds(
        lambda v: together.search(Query(vectors=v, k=10, where="half = 'a'")), queries
    ),
    "together, one hit per slide": milliseconds(
        lambda v: together.search(Query(vectors=v, k=10, per_slide=True)), queries
    ),
    "together, by a tile, without its patient": milliseconds(
        lambda v: together.search(Query(k=10, leave_out="patient"), [Example(together.shards[0].name, 5)]),
        queries[:50],
    ),
}
tiles = sum(facts.tiles for facts in known.values())
found["tiles"] = tiles
found["own_bytes_a_tile_opened"] = (opened[0] - before[0]) / tiles
found["own_bytes_a_tile_after"] = (after[0] - before[0]) / tiles
found["resident_bytes_a_tile_after"] = (after[1] - before[1]) / tiles
found["hits"] = [[(one.atlas, one.hit.tile) for one in row] for row in hits]
print(json.dumps(found))
"""


def say(name, **facts):
    """Print a line and keep it."""
    RESULTS[name] = facts
    text = ", ".join(
        f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()
    )
    print(f"{name:<44} {text}", flush=True)


def federation(folder, shards, tiles):
    queries = clustered(ASKED, seed=500)
    np.save(folder / "queries.npy", queries)
    paths, took = [], []
    scored = [[] for _ in queries]
    for number in range(shards):
        vectors = clustered(tiles, seed=600 + number)
        started = time.perf_counter()
        atlas = make_atlas(folder / f"shard-{number}", vectors, f"s{number}")
        took.append(time.perf_counter() - started)
        renamed = folder / f"atlas-{number}"
        atlas.path.rename(renamed)
        paths.append(str(renamed))
        for start in range(0, tiles, 100_000):
            scores = queries @ vectors[start : start + 100_000].T
            top = np.argpartition(-scores, K, axis=1)[:, :K]
            for row, at in enumerate(top):
                scored[row] += [
                    (float(scores[row, n]), renamed.name, start + int(n) + 1) for n in at
                ]
                scored[row] = sorted(scored[row], reverse=True)[:K]
        del vectors
    truth = [{(name, tile) for _, name, tile in row} for row in scored]
    say(f"{shards} atlases of {tiles:,} tiles", dim=DIM, make_one_s=statistics.median(took))
    for away in (0, 1):
        named = [*paths[: shards - away], *(f"{path}-away" for path in paths[shards - away :])]
        done = subprocess.run(
            [sys.executable, "-c", OPENED, str(folder / "queries.npy"), *named],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout)
        title = f"searched as one, {away} away"
        ms = found.pop("ms")
        hits = found.pop("hits")
        if not away:
            found["recall"] = float(
                np.mean(
                    [
                        len(set(map(tuple, mine)) & its) / K
                        for mine, its in zip(hits, truth, strict=True)
                    ]
                )
            )
        say(title, **found)
        one = ms["one atlas"]["median"]
        for kind, values in ms.items():
            say(
                f"{title}: {kind}", median_ms=values["median"], p95_ms=values["p95"],
                of_one_atlas=values["median"] / one,
            )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--tiles", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tiles = given.tiles // (10 if given.quick else 1)
    say("machine", cores=os.cpu_count(), kind=platform.machine(), date=time.strftime("%Y-%m-%d"))
    with tempfile.TemporaryDirectory() as temp:
        federation(Path(temp), given.shards, tiles)
    if given.json:
        given.json.write_text(json.dumps(RESULTS, indent=2) + "\n")


if __name__ == "__main__":
    main()
