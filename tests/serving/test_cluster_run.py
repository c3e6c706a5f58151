"""Embedding on a real Ray cluster of several nodes on this machine; one node fails during the run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from histoseek.artifacts.feature_files import read_features
from histoseek.errors import Unavailable
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.ray import run_on_ray
from histoseek.serving.embedding.results import EmbedOptions, EncoderChoice
from histoseek.serving.embedding.run import run_here

LOSE_A_NODE = """
import json, os, sys, threading, time
from pathlib import Path
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray.cluster_utils import Cluster
from histoseek.serving.embedding.ray import run_on_ray
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.embedding.results import EncoderChoice

slides, bundle, *places = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)

def run(out):
    lost = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    done, losing = [], []

    def progress(tiles, total, text):
        done.append(text)
        if not losing:
            losing.append(threading.Thread(target=lose))
            losing[0].start()

    def lose():
        cluster.remove_node(lost, allow_graceful=False)
        losing.append(len(done))  # slides that were through when the node was gone

    ran = run_on_ray(
        find_jobs([Path(slides)]), EncoderChoice(bundle, engine="onnxruntime"), out,
        EmbedOptions(overlap_px=80), cluster.address, progress,
    )
    losing[0].join()
    end = time.monotonic() + 90
    while (alive := sum(node["Alive"] for node in ray.nodes())) > 2 and time.monotonic() < end:
        time.sleep(0.5)
    return {"states": {r.name: r.state for r in ran.results}, "alive": alive, "through": losing[1],
            "tiles": ran.speed["tiles_done"], "features": [r.features for r in ran.results]}

ray.init(address=cluster.address, log_to_driver=False)
print(json.dumps([run(place) for place in places]))
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def slides(make_slide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for number in range(8):
        make_slide(folder / f"case-{number}.tiff", side=1200, seed=number)
    return folder


def test_a_lost_node_costs_no_slide(slides, other_bundle, tmp_path):
    """In two runs on one cluster, into a folder and to a URL; each loses a node."""
    outs = tmp_path / "folder", tmp_path / "url"
    places = str(outs[0]), outs[1].as_uri()
    command = [sys.executable, "-c", LOSE_A_NODE, slides, other_bundle, *places]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (told,) = [line for line in done.stdout.splitlines() if line.startswith('[{"states"')]
    ran = run_here(
        find_jobs([slides]), EncoderChoice(str(other_bundle), engine="onnxruntime"),
        tmp_path / "here", EmbedOptions(overlap_px=80), lambda *_: None,
    )  # fmt: skip
    for found, place, out in zip(json.loads(told), places, outs, strict=True):
        check_lost(found, place, out, ran)


def check_lost(found, place, out, ran):
    assert found["alive"] == 2 and found["through"] < 8  # a node of three, and in mid-run
    # a slide whose node was lost after it was written is found done when it is tried again
    assert set(found["states"].values()) <= {"done", "skipped"} and len(found["states"]) == 8
    files = {p.stem: p for p in out.rglob("*.h5")}
    assert set(files) == {f"case-{n}" for n in range(8)}
    assert all(f.startswith(place) for f in found["features"])
    for result in ran.results:
        one, two = read_features(Path(result.features)), read_features(files[result.name])
        assert np.array_equal(one.features, two.features) and np.array_equal(one.coords, two.coords)
    assert not [p for p in out.rglob("*") if p.suffix in {".part", ".histoseek-tmp"}]


def test_one_bad_slide_is_recorded_and_a_second_run_skips(slides, cli_process, tmp_path):
    import shutil

    folder = tmp_path / "slides"
    folder.mkdir()
    for number in (0, 1):
        shutil.copy(slides / f"case-{number}.tiff", folder)
    (folder / "bad.svs").write_bytes(b"no slide")
    out = (tmp_path / "out").as_uri()
    words = ["embed", folder, "--out", out, "--ray", "local", "--json"]
    for states in ({"done": 2, "failed": 1}, {"skipped": 2, "failed": 1}):
        done = cli_process(*words)
        report = json.loads(done.stdout)
        assert done.returncode == 1 and report["states"] == states, done.stderr
        assert json.loads((tmp_path / "out/run.json").read_text()) == report
    assert json.loads((tmp_path / "out/status/bad.json").read_text())["state"] == "failed"


def test_a_url_without_ray_is_refused(slides, cli_process, tmp_path):
    done = cli_process("embed", slides, "--out", "s3://bucket/features")
    assert done.returncode == 1 and "--ray" in done.stderr


def test_no_cluster_at_the_address_is_named(slides, tmp_path):
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
        run_on_ray(
            find_jobs([slides]), EncoderChoice("default"), str(tmp_path), EmbedOptions(),
            "127.0.0.1:9", lambda *_: None,
        )  # fmt: skip
