"""Milvus: it finds the same tiles as FAISS, and repeating an interrupted push completes it."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from atlases import DIM, features, filled, grouped, same

from histoseek.errors import BadInput, Mismatch, Unavailable
from histoseek.index.atlas import Atlas
from histoseek.index.exchange.milvus import MilvusAtlas
from histoseek.index.exchange.milvus_address import parse_url
from histoseek.index.exchange.milvus_push import push, push_changes
from histoseek.index.search.query import Query

WHERES = (
    None, "organ = 'colon'", "patient != 'P1' and organ = 'lung'", "label in ('a', 'c') or x < 2000",
    "not (slide = 'slide-2')", "patient is null", "cluster = 1", "cluster != 1 and y >= 500",
    "mpp < 1", "tile > 100", "slide like 'slide-%'", "label not in ('a')", "label = 'zzz'",
    "grade is null", "grade = 'it''s \"3\" {x}'", "x is not null and cluster is null",
)  # fmt: skip


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("milvus")
    atlas = filled(folder, slides=5, count=120)
    atlas.add([features(folder / "late.h5", 30, 60)], {"late": {"grade": 'it\'s "3" {x}'}})
    atlas.fit("kmeans", k=3)
    url = f"milvus://{folder}/lite.db"
    push(atlas, url)
    engine = MilvusAtlas(url)
    yield atlas, url, engine
    engine.close()


def ask(engine, vectors, k=10, where=None, **more):
    return engine.search(Query(vectors=vectors, k=k, where=where, **more))


@pytest.mark.parametrize("where", WHERES)
def test_results_equal_exact_faiss(pushed, where):
    atlas, _, engine = pushed
    queries = grouped(np.random.default_rng(3), 12)
    same(atlas.search(queries, 10, where, exact=True), ask(engine, queries, 10, where, exact=True))


def test_range_and_one_per_slide_are_the_same_too(pushed):
    atlas, _, engine = pushed
    queries = grouped(np.random.default_rng(4), 5)
    same(atlas.search(queries, 400, least=0.4), ask(engine, queries, 400, least=0.4))
    same(atlas.search(queries, 6, per_slide=True), ask(engine, queries, 6, per_slide=True))


def test_one_hit_per_slide_even_when_one_slide_has_all_the_nearest_tiles(tmp_path):
    """Milvus's own group_by_field returns one slide here."""
    centre = grouped(np.random.default_rng(0), 1)
    near = centre + grouped(np.random.default_rng(1), 3_000) * 0.01
    atlas = filled(tmp_path, slides=4, count=20)
    atlas.add([features(tmp_path / "near.h5", 3_000, features=near.astype(np.float32))])
    url = f"milvus://{tmp_path}/lite.db"
    push(atlas, url)
    engine = MilvusAtlas(url)
    hits = atlas.search(centre, 5, per_slide=True)
    assert hits[0][0].slide == "near" and len({hit.slide for hit in hits[0]}) == 5
    same(hits, ask(engine, centre, 5, per_slide=True))
    engine.close()


def test_file_names_are_stored_and_too_long_ones_refused(tmp_path):
    atlas = filled(tmp_path, slides=2, count=10)
    names = tuple(f"é \"{n}\" 'x'.png" for n in range(5))
    atlas.add([features(tmp_path / "set.h5", 5, 60, files=names)])
    url = f"milvus://{tmp_path}/lite.db"
    push(atlas, url)
    engine = MilvusAtlas(url)
    query = grouped(np.random.default_rng(3), 1)
    same(atlas.search(query, 25), ask(engine, query, 25))
    engine.close()
    too_long = ("é" * 30_001, *names[1:])
    atlas.add([features(tmp_path / "set.h5", 5, 60, files=too_long)], replace=True)
    with pytest.raises(
        BadInput, match="'set' has a file name of more than 60,000 bytes.*shorten it"
    ):
        push(atlas, url)


def test_only_what_changed_is_pushed_again(tmp_path):
    atlas = filled(tmp_path, slides=4, count=40)
    url = f"milvus://{tmp_path}/lite.db"
    assert push(atlas, url)["slides_pushed"] == 4
    assert push(atlas, url)["slides_pushed"] == 0
    atlas.relabel([{"slide": "slide-1", "label": "new"}])
    atlas.remove(["slide-2"])
    (tmp_path / "new").mkdir()
    atlas.add([features(tmp_path / "new/slide-3.h5", 25, 70)], replace=True)
    report = push(atlas, url)
    assert (report["slides_pushed"], report["slides_removed"]) == (2, 2)
    engine = MilvusAtlas(url)
    queries = grouped(np.random.default_rng(3), 6)
    same(atlas.search(queries, 200), ask(engine, queries, 200))
    same(atlas.search(queries, 5, "label = 'new'"), ask(engine, queries, 5, "label = 'new'"))
    engine.close()
    atlas.fit("kmeans", k=2)
    assert push(atlas, url)["slides_pushed"] == 3  # hits show the newest clusters


def test_a_push_that_is_killed_is_refused_until_it_is_repeated(tmp_path):
    atlas = filled(tmp_path, slides=5, count=60)
    url = f"milvus://{tmp_path}/lite.db"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from histoseek.index.atlas import Atlas\n"
        "from histoseek.index.exchange.milvus_push import push\n"
        "def report(done, total, text):\n"
        "    if done == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "push(Atlas(Path(sys.argv[1])), sys.argv[2], progress=report)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, atlas.path, url], start_new_session=True
    )
    assert process.wait() == -signal.SIGKILL
    for line in subprocess.run(
        ["ps", "-eo", "pid,args"], capture_output=True, text=True
    ).stdout.splitlines():
        if (
            str(tmp_path) in line and "milvus" in line
        ):  # the server that the dead process had started
            os.kill(int(line.split()[0]), signal.SIGKILL)
    engine = MilvusAtlas(url)
    with pytest.raises(BadInput, match="did not finish"):
        ask(engine, grouped(np.random.default_rng(0), 1))
    engine.close()
    push(atlas, url)
    engine = MilvusAtlas(url)
    queries = grouped(np.random.default_rng(3), 6)
    same(atlas.search(queries, 300), ask(engine, queries, 300))
    engine.close()


def test_a_push_that_fails_between_its_deletes_loses_no_track_of_them(tmp_path, monkeypatch):
    atlas = filled(tmp_path, slides=4, count=40)
    url = f"milvus://{tmp_path}/lite.db"
    push(atlas, url)
    atlas.remove(["slide-1"])
    atlas.add([features(tmp_path / "slide-1.h5", 25, 70)])
    engine = MilvusAtlas(url)

    def fail(*args, **kwargs):
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(engine.client, "delete", fail)
        with pytest.raises(Unavailable, match="TimeoutError.*same command again"):
            push_changes(engine, atlas)
    engine.close()
    push(atlas, url)
    engine = MilvusAtlas(url)
    queries = grouped(np.random.default_rng(3), 4)
    same(atlas.search(queries, 400), ask(engine, queries, 400))
    engine.close()


def test_facts_that_were_cut_off_while_they_were_written_are_written_again(tmp_path, monkeypatch):
    import histoseek.index.exchange.milvus as milvus

    monkeypatch.setattr(milvus, "TEXT", 200)  # many pieces
    atlas = filled(tmp_path, slides=3, count=30)
    url = f"milvus://{tmp_path}/lite.db"
    push(atlas, url)
    engine = MilvusAtlas(url)
    reader = MilvusAtlas(url)  # open while it is pushed anew
    atlas.relabel([{"slide": "slide-0", "label": "new"}])
    real, left = engine.client.upsert, [2]

    def some(name, rows):
        left[0] -= name.endswith("_about")
        if left[0] < 0:
            raise TimeoutError
        return real(name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(engine.client, "upsert", some)
        with pytest.raises(Unavailable):
            push_changes(engine, atlas)
    queries = grouped(np.random.default_rng(3), 4)
    with pytest.raises(BadInput, match="did not finish"):
        ask(reader, queries, 3)
    engine.close()
    push(atlas, url)
    same(atlas.search(queries, 100), ask(reader, queries, 100))  # the reader looks again
    reader.close()


def test_another_atlas_of_the_same_encoder_is_refused(pushed, tmp_path):
    _, url, _ = pushed
    with pytest.raises(Mismatch, match="another atlas of the same encoder"):
        push(filled(tmp_path, slides=2, count=10), url)


def test_new_images_are_assigned_there_as_here(pushed):
    atlas, _, engine = pushed
    queries = grouped(np.random.default_rng(8), 20)
    assert engine.assign(queries) == atlas.assign(queries)
    assert engine.assign(queries, "kmeans") == atlas.assign(queries, "kmeans")
    with pytest.raises(BadInput, match="unknown clustering in Milvus 'other'.*kmeans"):
        engine.assign(queries, "other")


def test_addresses():
    place = parse_url("milvus://db.example:1234/cases")
    assert (place.uri, place.collection) == ("http://db.example:1234", "cases")
    assert parse_url("milvus+https://db.example").uri == "https://db.example:19530"
    assert parse_url("milvus:///data/a.db?collection=b2").collection == "b2"
    for wrong in (
        "http://x",
        "milvus://",
        "milvus:///folder",
        "milvus://h/a-b",
        "milvus://u:p@h/a",
    ):
        with pytest.raises(BadInput, match="milvus://host|letters"):
            parse_url(wrong)


def test_what_does_not_fit_is_refused(pushed, tmp_path, other_bundle):
    atlas, url, engine = pushed
    with pytest.raises(BadInput, match="contains no atlas.*push"):
        MilvusAtlas(f"milvus://{tmp_path}/other.db")
    other = Atlas.create(tmp_path / "other", other_bundle)
    with pytest.raises(Mismatch, match="choose another"):
        push(other, url)
    with pytest.raises(Mismatch, match=f"length {DIM}"):
        ask(engine, np.ones((1, 5), np.float32))
    with pytest.raises(BadInput, match="16384"):
        ask(engine, np.ones((1, DIM), np.float32), 20_000)
    with pytest.raises(BadInput, match="unknown field of the Milvus collection 'nope'"):
        ask(engine, np.ones((1, DIM), np.float32), 3, "nope = 'a'")
    with pytest.raises(BadInput, match="file"):
        ask(engine, np.ones((1, DIM), np.float32), 3, "file = 'a.png'")
    assert atlas.verify() == []


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(Unavailable, match="milvus://127.0.0.1:9/none.*same command again"):
        MilvusAtlas("milvus://127.0.0.1:9/none")


def test_from_the_command_line(pushed, tmp_path, cli_process, tissue):
    from PIL import Image

    atlas, open_here, _ = pushed
    Image.fromarray(tissue[:224, :224]).save(tmp_path / "q.png")
    url = f"milvus://{tmp_path}/cli.db"
    done = cli_process("index", "push", atlas.path, url, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["slides_pushed"] == 6, done.stderr
    taken = cli_process(
        "index", "push", atlas.path, open_here
    )  # one process at a time has a Lite file open
    assert taken.returncode == 1 and "Traceback" not in taken.stderr, taken.stderr
    words = ("index", "search", atlas.path, tmp_path / "q.png", "-k", 4, "--json")
    here = json.loads(cli_process(*words).stdout)["answers"]
    there = cli_process(*words, "--engine", url)
    assert there.returncode == 0, there.stderr
    found = json.loads(there.stdout)["answers"]
    assert [h["tile"] for h in found[0]] == [h["tile"] for h in here[0]]
