"""Embedding on a Ray cluster of made nodes on this machine, beside one process with as many workers.

Every node has one core as Ray counts them; more nodes than cores share the cores. Both sides embed the same
slides (a region of a real slide, repeated). ``steady`` is tiles/s from the first to the last report of
progress, without starting the cluster's actors; ``efficiency`` is the ratio of the two sides' steady rates.
Options: ``--slides``, ``--json FILE``.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from made import large_pyramid
from ray.cluster_utils import Cluster

from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.ray import run_on_ray
from histoseek.serving.embedding.results import EmbedOptions, EncoderChoice, RayOptions
from histoseek.serving.embedding.run import run_here


class Watch:
    """Notes the progress of a run."""

    def __init__(self):
        self.began = time.perf_counter()
        self.seen = []

    def __call__(self, tiles, total, text):
        self.seen.append((time.perf_counter(), tiles))

    def told(self, ran):
        (first, before), (last, after) = next(s for s in self.seen if s[1]), self.seen[-1]
        return {
            "tiles": ran.speed["tiles_done"],
            "seconds": last - self.began,
            "steady": (after - before) / (last - first),
            "states": ran.speed["states"],
        }


def here(slides, out, workers):
    watch = Watch()
    choice = EncoderChoice(engine="onnxruntime", batch=4, streams=workers)
    return watch.told(run_here(find_jobs([slides]), choice, out, options(workers), watch))


def options(workers=None):
    return EmbedOptions(mpp=0.5, jobs=workers, overlays=False)


def on_cluster(slides, out, nodes):
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        watch, choice = Watch(), EncoderChoice(engine="onnxruntime", batch=4)
        ran = run_on_ray(
            find_jobs([slides]), choice, str(out), options(), RayOptions(cluster.address), watch
        )
        return {**watch.told(ran), "actors": sum(ran.encoder["actors"].values())}
    finally:
        ray.shutdown()
        cluster.shutdown()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=16)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as temp:
        slides = Path(temp) / "slides"
        slides.mkdir()
        large_pyramid(slides / "case-0.tif", across=4, down=3)
        for number in range(1, given.slides):
            shutil.copy(slides / "case-0.tif", slides / f"case-{number}.tif")
            with open(slides / f"case-{number}.tif", "ab") as stream:
                stream.write(bytes([number]))  # another file; readers ignore what follows the TIFF
        for nodes in (2, 4):
            alone = here(slides, Path(temp) / f"here-{nodes}", nodes)
            many = on_cluster(slides, Path(temp) / f"cluster-{nodes}", nodes)
            rows[nodes] = {
                "one process": alone, "cluster": many, "efficiency": many["steady"] / alone["steady"],
                "with start": alone["seconds"] / many["seconds"],
            }  # fmt: skip
            print(f"{nodes} nodes: {json.dumps(rows[nodes])}", flush=True)
    facts = {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "ray": ray.__version__,
        "slides": given.slides,
        "nodes": rows,
    }
    if given.json:
        given.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
