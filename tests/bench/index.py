"""Benchmark of the index against other libraries, of the whole search against FAISS, and of large atlases.

All comparisons run in one process (opening an atlas: in a new one), with as many threads as there are
cores. Absolute times depend on the machine; only the ratios are claimed. Options: ``--quick`` for a tenth
of the sizes, ``--json FILE`` for the numbers.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
from atlases import EMBEDDED, clustered, make_atlas, repeated, write_slide

from histoseek.index.clusters import hdbscan as density
from histoseek.index.search.tiles import allowed
from histoseek.index.vectors import tuning
from histoseek.index.vectors.files import new_main

QUERIES, K = 2_000, 10
RESULTS = {}


def say(name, **facts):
    """Print a line and keep it."""
    RESULTS[name] = facts
    text = ", ".join(
        f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()
    )
    print(f"{name:<44} {text}", flush=True)


def seconds(run, times=3):
    """Median time of a call."""
    took = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def recall(found, truth):
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, truth, strict=True)]))


def peers(name, vectors, queries, truth, ours, search):
    """hnswlib and usearch on the same vectors: time to build, queries per second at our recall."""
    import hnswlib
    from usearch.index import Index

    # In random order: given as the slides hold them, sorted, hnswlib's graph falls apart on some runs.
    order = np.random.default_rng(0).permutation(len(vectors))
    shuffled = vectors[order]
    started = time.perf_counter()
    graph = hnswlib.Index("ip", vectors.shape[1])
    graph.init_index(len(vectors), M=16, ef_construction=200, random_seed=0)
    graph.add_items(shuffled, order)
    build = time.perf_counter() - started
    for ef in (10, 15, 20, 30, 40, 60, 80, 120, 160, 240, 320, 640, 1280):
        graph.set_ef(ef)
        reached = recall(graph.knn_query(queries, K)[0].tolist(), truth)
        if reached >= ours["recall"] - 0.001:
            break
    mine, theirs = [], []
    for _ in range(9):  # in turn, so that both see the same machine
        mine.append(seconds(search, 1))
        theirs.append(seconds(lambda: graph.knn_query(queries, K), 1))
    rate = QUERIES / statistics.median(theirs)
    say(f"{name}: hnswlib M 16 efc 200 ef {ef}", build_s=build, recall=reached, qps=rate)
    say(
        f"{name}: ours / hnswlib",
        qps=statistics.median(theirs) / statistics.median(mine),
        build=build / ours["build_s"],
        build_with_tuning=build / ours["build_and_tune_s"],
    )
    started = time.perf_counter()
    other = Index(ndim=vectors.shape[1], metric="ip", dtype="f32")
    other.add(order, shuffled)
    build = time.perf_counter() - started
    matches = other.search(queries, K)
    reached = recall(matches.keys.tolist(), truth)
    rate = QUERIES / seconds(lambda: other.search(queries, K))
    say(f"{name}: usearch as it comes", build_s=build, recall=reached, qps=rate)
    say(
        f"{name}: ours / usearch",
        build=build / ours["build_s"],
        build_with_tuning=build / ours["build_and_tune_s"],
    )


def exact_numbers(vectors, queries):
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    return flat.search(queries, K)[1].tolist(), flat


def searching(name, vectors, queries, folder, with_peers):
    """One atlas: build, recall, speed, the whole search beside raw FAISS, and filters."""
    vectors = vectors[np.argsort(vectors[:, 0])]  # slides differ in looks, for the filter by looks
    atlas = make_atlas(folder, vectors)
    view = atlas.view()
    measured = build_times(atlas)
    truth, flat = exact_numbers(vectors, queries)
    found = view.index.search(queries, K)[1]
    order = view.columns.ids(np.arange(len(vectors))) - 1  # the tile ids count the vectors from 1
    ours = {
        "recall": recall(order[found].tolist(), truth),
        "qps": QUERIES / seconds(lambda: view.index.search(queries, K)),
        **measured,
    }
    say(f"{name}: ours {view.index.plan.cells} cells, {view.index.plan.probes} probes", **ours)
    say(f"{name}: exact (FAISS flat)", qps=QUERIES / seconds(lambda: flat.search(queries, K)))
    if with_peers:
        peers(name, vectors, queries, truth, ours, lambda: view.index.search(queries, K))
    few = queries[:100]
    main = view.index._refined
    plan = view.index.plan
    cells = faiss.SearchParametersIVF(nprobe=plan.probes)  # type: ignore[call-arg]
    parameters = faiss.IndexRefineSearchParameters(  # type: ignore[call-arg]
        k_factor=plan.widen, base_index_params=cells
    )
    raw, whole = [], []
    for _ in range(31):  # in turn, so that both see the same machine
        raw.append(seconds(lambda: main.search(few, K, params=parameters), 1))
        whole.append(seconds(lambda: atlas.search(few, K), 1))
    say(
        f"{name}: Atlas.search of 100 queries x 10 hits",
        raw_faiss_ms=1000 * statistics.median(raw),
        whole_ms=1000 * statistics.median(whole),
        over_ms=1000 * (statistics.median(whole) - statistics.median(raw)),
    )
    filters(name, atlas, vectors, queries[:500])


def build_times(atlas):
    options = tuning.IndexOptions()
    vectors = atlas.vectors()[1]
    started = time.perf_counter()
    plan = tuning.plan_for(len(vectors), vectors.shape[1], options)
    sample, held_out = tuning.draw([vectors], len(vectors), vectors.shape[1], plan, 0)
    index = new_main(vectors.shape[1], "cosine", plan, sample, 0)
    index.add(vectors)
    raw = faiss.IndexFlatIP(vectors.shape[1])
    raw.add(vectors)
    built = time.perf_counter() - started
    tuning.tune(index, raw, plan, [vectors], held_out, "cosine", options)
    return {"build_s": built, "build_and_tune_s": time.perf_counter() - started}


def filters(name, atlas, vectors, queries):
    """Filters that pass a share of all tiles at random, and one that goes with what tiles look like."""
    view = atlas.view()
    columns = view.columns
    total = len(vectors)
    plain = seconds(lambda: atlas.search(queries, K))
    for where, title in (
        ("percent = '0'", "1 %"),
        ("percent in ('0','1','2','3','4','5','6','7','8','9')", "10 %"),
        ("half = 'a'", "50 %"),
        ("look = '3'", "a tenth, by looks"),
        ("patient != 'P7'", "all but one patient"),
    ):
        rows = np.flatnonzero(allowed(view, where))
        part = faiss.IndexFlatIP(vectors.shape[1])
        ordered = vectors[columns.ids(rows) - 1]
        part.add(ordered)
        truth = columns.ids(rows)[part.search(queries, K)[1]].tolist()
        hits = atlas.search(queries, K, where=where)
        found = [[hit.tile for hit in hit_list] for hit_list in hits]
        say(
            f"{name}: filter {title}",
            passing=len(rows) / total,
            recall=recall(found, truth),
            cost=seconds(lambda where=where: atlas.search(queries, K, where=where)) / plain,
        )


OPEN = """
import sys, time
from pathlib import Path
def memory():
    lines = open("/proc/self/status").read().splitlines()
    found = {l.split(":")[0]: l.split()[1] for l in lines if l.startswith(("VmRSS", "RssAnon"))}
    return int(found["VmRSS"]) / 1024, int(found["RssAnon"]) / 1024
import numpy as np
from histoseek.index.atlas import Atlas
import faiss, pyparsing
before = memory()
started = time.perf_counter()
atlas = Atlas(Path(sys.argv[1]))
atlas.view()
opened = time.perf_counter() - started
fresh = memory()
queries = np.random.default_rng(5).normal(size=(100, atlas.manifest.dim)).astype(np.float32)
atlas.search(queries, 10)
first = time.perf_counter() - started
atlas.search(queries, 10, where="half = 'a'")
after = memory()
atlas.search(queries, 10, exact=True)
whole = memory()
rest = after[0] - before[0], after[1] - before[1], whole[0] - before[0]
print(opened, first, fresh[0] - before[0], *rest)
"""


def large(folder, total):
    """Open an atlas of a million in a fresh process; add a slide to it."""
    vectors = clustered(total, seed=8)
    started = time.perf_counter()
    atlas = make_atlas(folder, vectors)
    say(
        f"atlas of {total:,}: what it takes",
        add_s=time.perf_counter() - started,
        write_index_s=seconds(lambda: atlas.tune(), 1),
        features_mb=size_mb(atlas.path / "features"),
        index_mb=sum(size_mb(p) for p in atlas.path.glob("index-*.faiss")),
        raw_mb=sum(size_mb(p) for p in atlas.path.glob("vectors-*.faiss")),
        database_mb=sum(size_mb(p) for p in atlas.path.glob("atlas.db*")),
        vectors_mb=vectors.nbytes / 1e6,
    )
    for budget in (0.3, 0.1):
        report = atlas.tune(memory_mb=budget * vectors.nbytes / 1e6)
        plan = report["plan"]
        say(
            f"atlas of {total:,}: in {budget:.0%} of the vectors' memory",
            coding=plan["coding"],
            probes=plan["probes"],
            widen=plan["widen"],
            recall=report["measured"]["recall"],
            index_mb=sum(size_mb(p) for p in atlas.path.glob("index-*.faiss")),
            ms_per_100_queries=atlas.audit(200)["index_ms_per_100_queries"],
        )
    atlas.tune()
    opened = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", OPEN, str(atlas.path)],
            capture_output=True,
            text=True,
            check=True,
        )
        opened.append([float(v) for v in done.stdout.split()])
    open_s, first_s, fresh, resident, own, scanned = (
        statistics.median(column) for column in zip(*opened, strict=True)
    )
    raw = vectors.nbytes / 2**20
    say(
        f"atlas of {total:,}: opened in a fresh process",
        open_s=open_s,
        to_first_100_answers_s=first_s,
        memory_of_raw_vectors=fresh / raw,
        after_200_answers=resident / raw,
        of_it_not_the_files=own / raw,
        after_an_exact_search=scanned / raw,
    )
    generation = atlas.view().generation
    late = write_slide(folder / "late.h5", clustered(10_000, seed=9), "late")
    started = time.perf_counter()
    (added,) = atlas.add([late])
    took = time.perf_counter() - started
    assert added.state == "added" and atlas.view().generation == generation
    say(f"atlas of {total:,}: a slide of 10,000 tiles added", s=took, index_rebuilt="no")
    say(
        f"atlas of {total:,}: clusters and check",
        kmeans_8_fit_and_place_s=seconds(lambda: atlas.fit("kmeans", k=8), 1),
        verify_s=seconds(atlas.verify, 1),
    )


COMPARE = """
import sys, time
from pathlib import Path
from histoseek.index.atlas import Atlas
atlas = Atlas(Path(sys.argv[1]))
names = [slide["name"] for slide in atlas.slides() if slide["tiles"]]
def timed(run):
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
first, *later = [timed(lambda: atlas.similar(name)) for name in names[:11]]
print(first, sorted(later)[len(later) // 2], timed(atlas.vectors))
"""


def compared(folder, total):
    """Compare slides in a new process; the bound is reading the feature files, which is not needed."""
    atlas = make_atlas(folder, clustered(total, seed=8))
    runs = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", COMPARE, str(atlas.path)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        runs.append([float(value) for value in done.stdout.split()])
    first, later, reading = (statistics.median(column) for column in zip(*runs, strict=True))
    say(
        f"atlas of {total:,}: slides compared in a new process",
        first_s=first, later_s=later, reading_the_files_s=reading,
    )  # fmt: skip


def size_mb(path):
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files) / 1e6


def hdbscan_assign(quick):
    """Our assignment beside hdbscan.approximate_predict: labels and speed."""
    cases = [("20k x 16, min_samples 200", 16, 200), ("20k x 64, min_samples 15", 64, 15)]
    known, asked = (2_000, 3_000) if quick else (20_000, 30_000)
    for title, dim, least in cases:
        _assign(title, dim, least, known, asked)


def _assign(title, dim, least, known, asked):
    import hdbscan

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, dim))

    def draw(n):
        spread = 0.35 * rng.uniform(0.5, 2, (n, 1))
        return centres[rng.integers(0, 12, n)] + rng.normal(size=(n, dim)) * spread

    points, new = draw(known), draw(asked)
    arrays = density.fit_arrays(points, least)
    model = hdbscan.HDBSCAN(min_cluster_size=least, prediction_data=True).fit(points)
    took, theirs = [], []
    for _ in range(2):
        took.append(seconds(lambda: density.place(new, arrays), 1))
        theirs.append(seconds(lambda: hdbscan.approximate_predict(model, new), 1))
    labels, _ = hdbscan.approximate_predict(model, new)
    same = float(np.mean(labels == density.place(new, arrays)[0]))
    say(
        f"HDBSCAN assign {title}",
        times_as_fast=min(theirs) / min(took),
        same_labels=same,
        noise=float(np.mean(labels < 0)),
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=["clustered", "real", "large", "similar", "hdbscan"])
    options = parser.parse_args()
    scale = 10 if options.quick else 1
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        if options.only in {None, "clustered"}:
            both = clustered(500_000 // scale + QUERIES, seed=1)
            searching("clustered", both[QUERIES:], both[:QUERIES], folder / "clustered", True)
        if options.only in {None, "real"}:
            both = repeated(500_000 // scale + QUERIES, seed=2)
            say("real embeddings", **EMBEDDED)
            searching("real", both[QUERIES:], both[:QUERIES], folder / "real", True)
        if options.only in {None, "large"}:
            large(folder / "large", 1_000_000 // scale)
        if options.only in {None, "similar"}:
            compared(folder / "similar", 1_000_000 // scale)
        if options.only in {None, "hdbscan"}:
            hdbscan_assign(options.quick)
    if options.json:
        options.json.write_text(json.dumps(RESULTS, indent=2) + "\n")


if __name__ == "__main__":
    main()
