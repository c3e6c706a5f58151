"""Kill processes that write to an atlas, at every write point or at random times; check what remains.

test_durability.py runs it in a separate process with one thread, so that it can fork. Prints JSON.
"""

import builtins
import contextlib
import json
import os
import random
import signal
import sqlite3
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import numpy as np
import scipy.spatial.distance  # noqa: F401 - before the fork: each child would import it anew
import sklearn.decomposition
import sklearn.metrics  # noqa: F401
from atlases import features, filled, grouped
from schedule import rounds

from histoseek.index.atlas import Atlas
from histoseek.index.vectors import build, files

AFTERWARDS = rounds(3, 1)
"""After every how many kills the operation is done again."""
NAMES = [f"slide-{n}" for n in range(4)] + ["late-0", "late-1"]


def state(atlas):
    """Everything that must be as before an operation or as after it."""
    ids, stored = atlas.vectors()
    slides = {s["name"]: (s["content_sha256"], s["label"], s["patient"]) for s in atlas.slides()}
    fits = {c["name"]: c["about"] for c in atlas.stats()["clusterings"]}
    named = {n: [c["name"] for c in atlas.clusters(n, 1)] for n in fits}
    plan = atlas.view().state.about.get("options", {})
    return json.dumps([slides, len(ids), float(stored.sum()), fits, named, plan.get("recall")])


def check(path):
    """The atlas opens, is whole, and its search works; returns its state."""
    atlas = Atlas(path)
    problems = atlas.verify()
    assert problems == [], problems
    hits = atlas.search(grouped(np.random.default_rng(0), 2), 3)
    assert all(len(answer) == 3 for answer in hits)
    return state(atlas)


def operations(folder, path):
    late = features(folder / "late-0.h5", 60, 31)
    (folder / "new").mkdir()
    other = features(folder / "new/slide-1.h5", 70, 32)
    csv = [
        {"slide": "slide-2", "label": "z"},
        {"slide": "slide-0", "patient": "P8", "organ": "skin"},
    ]
    return {
        "add": lambda: Atlas(path).add([late]),
        "upsert": lambda: Atlas(path).add([other], replace=True),
        "remove": lambda: Atlas(path).remove(["slide-3"]),
        "relabel": lambda: Atlas(path).relabel(csv),
        "fit": lambda: Atlas(path).fit("kmeans", k=3),
        "name": lambda: Atlas(path).name_cluster(0, "stroma", "pink"),
        "tune": lambda: Atlas(path).tune(recall=0.9, exact_up_to=0),
        "codes": lambda: Atlas(path).tune(recall=0.95, memory_mb=0.25),
    }


def die_at(count):
    """Kill this process at the n-th place where something is about to be written."""
    left = [count]

    def point(*_):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(real):
        def call(*args, **kwargs):
            point()
            return real(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "unlink", "rename", "chmod"):
        setattr(os, name, before(getattr(os, name)))
    Path.write_bytes = before(Path.write_bytes)
    files.write_main = before(files.write_main)
    build.write_main = before(build.write_main)
    connect = sqlite3.connect

    def traced(*args, **kwargs):
        db = connect(*args, **kwargs)
        words = ("INSERT", "DELETE", "UPDATE", "COMMIT", "BEGIN IMMEDIATE")
        db.set_trace_callback(lambda statement: statement.startswith(words) and point())
        return db

    sqlite3.connect = traced


def fork(run):
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            run()
            os._exit(0)
        os._exit(3)
    return child


def every_point(folder, names):
    """Each operation, killed at its 1st, 2nd, … write point until it gets through."""
    import shutil

    filled(folder, slides=4, count=300)
    path, fresh = folder / "atlas", folder / "fresh"
    Atlas(path).fit("kmeans", k=2)
    path.rename(fresh)
    report = {}
    for name, run in operations(folder, path).items():
        if name not in names:
            continue
        points = 0
        while True:
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(fresh, path)
            if not points:
                before = check(path)

            def dying(run=run, points=points):
                die_at(points + 1)
                run()

            _, status = os.waitpid(fork(dying), 0)
            after = check(path)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0, f"{name} failed by itself"
                done = after
                break
            assert after == before or points, name
            seen = report.setdefault(name, {"points": 0, "before": 0, "states": []})
            seen["points"] += 1
            seen["before"] += after == before
            seen["states"].append(after)
            if after == before and points % AFTERWARDS == 0:
                run()  # it can be done afterwards
                check(path)
            points += 1
        assert done != before, name
        assert set(report[name].pop("states")) <= {before, done}, name
    return report


def random_moments(folder, rounds):
    """One atlas, killed at random moments of random operations; what was acknowledged is there."""
    filled(folder, slides=3, count=40)
    path = folder / "atlas"
    rng = random.Random(4)
    model = {s["name"]: s["content_sha256"] for s in Atlas(path).slides()}
    killed, kinds = 0, {}
    while killed < rounds:
        seed = rng.randrange(10**6)
        reading, writing = os.pipe()

        def work(seed=seed, writing=writing):
            own = random.Random(seed)
            atlas = Atlas(path)
            for step in builtins.range(10**6):
                kind = own.choice(["add", "upsert", "remove", "fit", "tune", "relabel"])
                name = own.choice(NAMES)
                file = folder / f"made-{os.getpid()}" / f"{name}.h5"
                file.parent.mkdir(exist_ok=True)
                os.write(writing, f"start {step} {kind} {name}\n".encode())
                outcome = act(atlas, kind, name, file, own.randrange(6))
                os.write(writing, f"done {step} {kind} {name} {outcome}\n".encode())

        child = fork(work)
        os.close(writing)
        said, wanted = b"", rng.randrange(8)  # by what it did, not by a clock: machines differ
        while said.count(b"\n") < wanted and (more := os.read(reading, 4096)):
            said += more
        time.sleep(rng.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as rest:
            lines = (said + rest.read()).decode().splitlines()
        assert os.WIFSIGNALED(status), f"the writer ended by itself: {lines[-2:]}"
        killed += 1
        pending = None
        for line in lines:
            word, _, kind, name, *outcome = line.split()
            if word == "start":
                pending = kind, name
            else:
                pending = None
                kinds[kind] = kinds.get(kind, 0) + 1
                apply(model, kind, name, outcome[0])
        atlas = Atlas(path)
        problems = atlas.verify()
        assert problems == [], (problems, pending)
        found = {s["name"]: s["content_sha256"] for s in atlas.slides()}
        if found != model:  # only the operation that was cut off may have come through
            assert pending is not None, (found, model)
            kind, name = pending
            others = {n: c for n, c in model.items() if n != name}
            assert {n: c for n, c in found.items() if n != name} == others, (pending, found, model)
            assert kind in {"add", "upsert", "remove"}, pending
            model = found
    return {"killed": killed, "finished": kinds}


def act(atlas, kind, name, file, seed):
    """Do one thing; says what the content of the slide is afterwards."""
    there = {s["name"]: s["content_sha256"] for s in atlas.slides()}
    if kind in {"add", "upsert"}:
        features(file, 20 + seed, seed)
        atlas.add([file], replace=kind == "upsert")
    elif kind == "remove" and name in there and len(there) > 2:
        atlas.remove([name])
    elif kind == "relabel" and name in there:
        atlas.relabel([{"slide": name, "label": str(seed)}])
    elif kind == "fit":
        atlas.fit("kmeans", k=2)
    elif kind == "tune":
        atlas.tune()
    after = {s["name"]: s["content_sha256"] for s in atlas.slides()}
    return after.get(name, "-")


def apply(model, kind, name, content):
    if content == "-":
        model.pop(name, None)
    else:
        model[name] = content


if __name__ == "__main__":
    where = Path(sys.argv[1])
    result = (
        every_point(where, sys.argv[3:])
        if sys.argv[2] == "points"
        else random_moments(where, int(sys.argv[3]))
    )
    print(json.dumps(result))
