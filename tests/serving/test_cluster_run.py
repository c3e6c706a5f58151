"""Embedding on a real Ray cluster of several nodes on this machine, of which nodes and actors fail."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from triton_server import free_ports

from histoseek.artifacts.feature_files import read_features
from histoseek.artifacts.manifest import read_manifest
from histoseek.errors import BadInput, Mismatch, Unavailable
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.meter import ClusterMeter, Meter
from histoseek.serving.embedding.ray import run_on_ray
from histoseek.serving.embedding.ray_worker import Worker, packed
from histoseek.serving.embedding.results import EmbedOptions, EncoderChoice, RayOptions
from histoseek.serving.embedding.run import run_here

CLUSTER = """
import json, os, signal, sys, threading, time
from pathlib import Path
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray.cluster_utils import Cluster
from histoseek.serving.embedding import ray as on_ray
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.results import EmbedOptions, EncoderChoice, RayOptions

slides, bundle, *places = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)

def run(out, lose=lambda: None, **options):
    ended, losing = [], []

    def progress(tiles, total, text):
        if ended and not losing:
            losing.append(threading.Thread(target=lose))
            losing[0].start()

    ran = on_ray.run_on_ray(
        find_jobs([Path(slides)]), EncoderChoice(bundle, engine="onnxruntime"), out,
        EmbedOptions(overlap_px=80), RayOptions(cluster.address, **options), progress, results=ended,
    )
    for thread in losing:
        thread.join()
    return {"states": {r.name: r.state for r in ran.results}, "features": [r.features for r in ran.results],
            "notes": [note for r in ran.results for note in r.notes], "about": ran.encoder,
            "speed": ran.speed}
"""
LOSE = """
def lose_a_node(out):
    lost = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    found = run(out, lambda: cluster.remove_node(lost, allow_graceful=False))
    end = time.monotonic() + 90
    while (alive := sum(node["Alive"] for node in ray.nodes())) > 2 and time.monotonic() < end:
        time.sleep(0.5)
    return found | {"alive": alive}

def lose_an_actor(out):
    started = on_ray._Pool._started
    processes = []

    def noting(pool, reference):
        processes.append(ray.get(reference)["process"])
        started(pool, reference)

    on_ray._Pool._started = noting
    try:
        return run(out, lambda: os.kill(processes[-1], signal.SIGKILL))
    finally:
        on_ray._Pool._started = started

folder, url, again, one = places
print(json.dumps([lose_a_node(folder), lose_a_node(url), lose_an_actor(again), run(one, actors=1)]))
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def slides(make_slide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for number in range(8):
        make_slide(folder / f"case-{number}.tiff", side=1200, seed=number)
    return folder


def test_a_lost_node_or_actor_costs_no_slide(slides, other_bundle, tmp_path):
    """Four runs on one cluster: two lose a node (into a folder, to a URL), one an actor, one nothing."""
    outs = [tmp_path / name for name in ("folder", "url", "actor", "one")]
    places = [str(outs[0]), outs[1].as_uri(), str(outs[2]), str(outs[3])]
    command = [sys.executable, "-c", CLUSTER + LOSE, slides, other_bundle, *places]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    (told,) = [line for line in done.stdout.splitlines() if line.startswith('[{"states"')]
    told = json.loads(told)
    ran = run_here(
        find_jobs([slides]), EncoderChoice(str(other_bundle), engine="onnxruntime"),
        tmp_path / "here", EmbedOptions(overlap_px=80), lambda *_: None,
    )  # fmt: skip
    for found, place, out in zip(told, places, outs, strict=True):
        check(found, place, out, ran)
    assert [found.get("alive") for found in told] == [2, 2, None, None]
    by_node, to_url, by_actor, one = (found["about"] for found in told)
    assert by_node["actors_lost"] + to_url["actors_lost"] >= 1 and by_actor["actors_lost"] == 1
    assert sum(by_actor["actors"].values()) == 3  # two, and one in the place of the lost one
    assert any("actor was lost" in note for note in told[2]["notes"])
    assert sum(one["actors"].values()) == 1 and one["actors_lost"] == 0
    assert told[3]["speed"]["tiles_done"] == ran.speed["tiles_done"]


def check(found, place, out, ran):
    # a slide whose actor was lost after it was written is found done when it is tried again
    assert set(found["states"].values()) <= {"done", "skipped"} and len(found["states"]) == 8
    files = {p.stem: p for p in out.rglob("*.h5")}
    assert set(files) == {f"case-{n}" for n in range(8)}
    assert all(f.startswith(place) for f in found["features"])
    for result in ran.results:
        one, two = read_features(Path(result.features)), read_features(files[result.name])
        assert np.array_equal(one.features, two.features) and np.array_equal(one.coords, two.coords)
    assert not [p for p in out.rglob("*") if p.suffix in {".part", ".histoseek-tmp"}]


def test_one_bad_slide_is_recorded_and_a_second_run_skips(slides, cli_process, tmp_path):
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


WITHOUT_ROOM = """
on_ray.NOTICE_S, on_ray.PATIENCE_S = 1.0, 4.0
from histoseek.errors import Unavailable
try:
    run(places[0], gpus_per_actor=1)
except Unavailable as error:
    print("ROOM", error)
on_ray.PATIENCE_S = 120.0
from histoseek.serving.embedding import ray_worker
def cannot(self):
    raise Unavailable("no encoder here")
ray_worker.Worker.open = cannot
ray.cloudpickle.register_pickle_by_value(ray_worker)
try:
    run(places[0])
except Unavailable as error:
    print("BROKEN", error)
"""


def test_a_cluster_that_cannot_run_an_actor_is_named(slides, other_bundle, tmp_path):
    """No machine has a GPU; then no actor can open its encoder."""
    command = [sys.executable, "-c", CLUSTER + WITHOUT_ROOM, slides, other_bundle, tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    said = done.stdout + done.stderr
    assert "ROOM no machine of the cluster has room for an actor of 1 CPU and 1 GPU" in said, said[
        -3000:
    ]
    assert "the cluster has 2 CPU and 0 GPU" in said and "waiting up to" in said
    assert "BROKEN 8 actors failed to start" in said and "no encoder here" in said, said[-3000:]


def test_an_actor_with_another_encoder_does_not_start(other_bundle, tmp_path):
    choice, other = EncoderChoice(engine="onnxruntime"), read_manifest(other_bundle)
    worker = Worker(choice, None, None, other, str(tmp_path), EmbedOptions())
    with pytest.raises(Mismatch, match="is not other"):
        worker.open()
    shipped = Worker(choice, packed(other_bundle), None, other, str(tmp_path), EmbedOptions())
    assert shipped.open()["encoder"]["engine"] == "onnxruntime"
    worker.clean()
    shipped.clean()


def test_counters_of_a_cluster_add_up():
    meter, here = ClusterMeter(3), Meter()
    here.jobs = 1
    here.slide_opened(10)
    with here.stage("encode", 4):
        time.sleep(0.01)
    here.tiles_ended(4)
    meter.running({0: here.read(), 1: here.read()})
    now = meter.read()
    assert (now["jobs"], now["opened"], now["tiles_known"], now["tiles_done"]) == (3, 2, 20, 8)
    assert now["stages"]["encode"]["items"] == 8 and now["encoder_busy"] > 0.9
    told = []
    meter.report(lambda *given: told.append(given), "2 actors")
    assert told[0][:2] == (8, 30)  # the third slide counts with the mean of the others
    here.tiles_ended(6)
    here.slide_ended("done", opened=True)
    meter.ended(0, here.read())
    now = meter.read()
    assert (now["tiles_done"], now["states"], set(now)) == (
        14,
        {"done": 1},
        {*here.read(), "slide_s"},
    )


def test_no_cluster_at_the_address_is_named(slides, tmp_path):
    jobs, choice = find_jobs([slides]), EncoderChoice("default")
    for cluster, error, says in (
        (RayOptions("127.0.0.1:9"), Unavailable, r"127\.0\.0\.1:9"),
        (RayOptions(), BadInput, "no Ray cluster"),
    ):
        with pytest.raises(error, match=says):
            run_on_ray(jobs, choice, str(tmp_path), EmbedOptions(), cluster, lambda *_: None)


def test_a_dead_cluster_that_auto_would_join_is_named(slides, tmp_path, monkeypatch):
    """Ray keeps the address of a cluster that was killed, and would wait for it."""
    (tmp_path / "ray").mkdir()
    (port,) = free_ports(1)
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(Unavailable, match=f"answers at '127.0.0.1:{port}'.*or use --ray local"):
        run_on_ray(
            find_jobs([slides]), EncoderChoice(), str(tmp_path / "out"), EmbedOptions(),
            RayOptions(address="auto"), lambda *_: None,
        )  # fmt: skip
