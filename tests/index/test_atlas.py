"""The atlas: it keeps what was added, refuses features that do not fit, and reports damaged files."""

import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from atlases import DIM, features, unit
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule import rounds

from histoseek.artifacts.feature_files import read_features
from histoseek.errors import BadInput, Busy, Damaged, Mismatch
from histoseek.index.atlas import Atlas
from histoseek.serving.encoders.open import DEFAULT_BUNDLE


@pytest.fixture
def atlas(tmp_path):
    made = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    for number in range(3):
        features(tmp_path / f"slide-{number}.h5", seed=number, count=30 + number)
    made.add([tmp_path / f"slide-{n}.h5" for n in range(3)])
    return made


def test_what_is_added_is_found(atlas, tmp_path):
    item = read_features(tmp_path / "slide-1.h5")
    hits = atlas.search(item.features[[4, 9]], k=5)
    for row, found in zip([4, 9], hits, strict=True):
        best = found[0]
        assert (best.rank, best.slide) == (1, "slide-1") and best.score == pytest.approx(
            1, abs=1e-5
        )
        assert (best.x, best.y) == tuple(item.coords[row])
        assert best.size_px_level0 == 448 and best.mpp == 0.25 and best.cluster is None
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@pytest.mark.deep
@settings(max_examples=rounds(15, 200), deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 12), st.lists(st.integers(1, 20), min_size=1, max_size=4)
)
def test_search_equals_brute_force(tmp_path_factory, seed, k, counts):
    folder = tmp_path_factory.mktemp("brute")
    atlas = Atlas.create(folder / "atlas", DEFAULT_BUNDLE)
    files = [
        features(folder / f"s{n}.h5", count=count, seed=seed + n) for n, count in enumerate(counts)
    ]
    atlas.add(files)
    ids, vectors = atlas.vectors()
    queries = unit(np.random.default_rng(seed + 99), 3)
    scores = queries @ vectors.T
    for row, found in enumerate(atlas.search(queries, k)):
        expected = np.argsort(-scores[row], kind="stable")[:k]
        assert [h.tile for h in found] == ids[expected].tolist()
        assert np.allclose([h.score for h in found], scores[row][expected], atol=1e-5)


def test_adding_again_changes_nothing(atlas, tmp_path):
    before = atlas.stats()
    results = atlas.add([tmp_path / "slide-0.h5"])
    assert results[0].state == "unchanged" and atlas.stats() == before


def test_other_features_under_a_known_name_are_refused(atlas, tmp_path):
    (tmp_path / "new").mkdir()
    (result,) = atlas.add([features(tmp_path / "new/slide-0.h5", seed=77)])
    assert result.state == "failed" and "other features" in result.reason
    assert atlas.verify() == []


def test_foreign_features_are_refused_and_nothing_changes(atlas, tmp_path):
    rng = np.random.default_rng(5)
    bad = unit(rng, 5)
    bad[2, 3] = np.nan
    wrong = [
        features(tmp_path / "other-encoder.h5", encoder="uni", encoder_sha256="a" * 64),
        features(tmp_path / "wrong-dim.h5", features=unit(rng, 4, 7), coords=np.zeros((4, 2), int)),
        features(tmp_path / "nan.h5", features=bad, coords=np.zeros((5, 2), int)),
        tmp_path / "absent.h5",
    ]
    (tmp_path / "text.h5").write_text("no HDF5")
    blob = (tmp_path / "slide-0.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(blob[: len(blob) // 2])
    before = atlas.stats()
    results = atlas.add([*wrong, tmp_path / "text.h5", tmp_path / "cut.h5"])
    said = {Path(r.file).stem: r.reason for r in results}
    assert {r.state for r in results} == {"failed"} and atlas.stats() == before
    assert "'uni'" in said["other-encoder"] and atlas.manifest.name in said["other-encoder"]
    assert "7-dimensional" in said["wrong-dim"] and str(DIM) in said["wrong-dim"]
    assert "NaN" in said["nan"] and "row 2" in said["nan"]
    assert "does not exist" in said["absent"]
    assert "embed its slide again" in said["text"] and "embed its slide again" in said["cut"]
    assert atlas.verify() == []


def test_replaced_features_take_the_place_of_the_old_and_ids_are_new(atlas, tmp_path):
    atlas.fit("kmeans", k=2)
    (tmp_path / "new").mkdir()
    new = features(tmp_path / "new/slide-0.h5", seed=77, count=12)
    old = set(atlas.vectors()[0].tolist())
    assert atlas.add([new], replace=True)[0].state == "replaced" and atlas.verify() == []
    assert atlas.stats()["tiles"] == 12 + 31 + 32
    hit = atlas.search(read_features(new).features[:1], 1)[0][0]
    assert hit.slide == "slide-0" and hit.tile not in old and hit.cluster in {0, 1}


def test_the_same_features_in_another_folder_are_the_same(atlas, tmp_path):
    (tmp_path / "moved").mkdir()
    again = features(tmp_path / "moved/slide-1.h5", seed=1, count=31, about={"note": "another run"})
    assert atlas.add([again])[0].state == "unchanged"


def test_a_label_given_later_is_taken_over(atlas, tmp_path):
    (result,) = atlas.add(
        [tmp_path / "slide-2.h5"], {"slide-2": {"label": "benign", "patient": "P1"}}
    )
    assert result.state == "relabelled"
    query = read_features(tmp_path / "slide-2.h5").features[:1]
    assert atlas.search(query, 1)[0][0].label == "benign"


def test_tiles_added_after_a_fit_get_a_cluster(atlas, tmp_path):
    atlas.fit("kmeans", k=2)
    late = features(tmp_path / "late.h5", seed=12)
    atlas.add([late])
    hits = atlas.search(read_features(late).features, 1)
    placed = atlas.assign(read_features(late).features)
    assert [h[0].cluster for h in hits] == [p["cluster"] for p in placed]


def test_one_clustering_never_deletes_anothers_file(atlas):
    atlas.fit("kmeans", k=2, name="v.1")
    atlas.fit("kmeans", k=3, name="v")
    assert atlas.clustering("v.1")[1].clusters == 2 and atlas.verify() == []


def test_hostile_feature_files_are_refused_and_stop_no_other(atlas, tmp_path):
    import h5py

    def hostile(name, change):
        path = features(tmp_path / f"{name}.h5", seed=60)
        with h5py.File(path, "r+") as stored:
            change(stored)
        return path

    def claim(stored):
        for key, width in (("features", 8192), ("coords", 2)):
            del stored[key]
            kind = "f4" if width > 2 else "i8"
            stored.create_dataset(key, (19_000_000, width), kind, chunks=(512, width))

    def number_files(stored):
        stored["files"] = np.arange(30)

    bad = [
        hostile("array-attribute", lambda s: s["coords"].attrs.update({"mpp": [1, 2]})),
        hostile("infinite", lambda s: s["coords"].attrs.update({"patch_size": np.inf})),
        hostile("number-files", number_files),
        hostile("about-list", lambda s: s.attrs.update({"about": "[]"})),
        hostile("bomb", claim),
    ]
    good = features(tmp_path / "fine.h5", seed=61)
    states = [r.state for r in atlas.add([*bad, good])]
    assert states == ["failed"] * 5 + ["added"] and atlas.verify() == []


def test_a_good_file_after_a_bad_one_is_still_added(atlas, tmp_path):
    bad = features(tmp_path / "bad.h5", encoder_sha256="b" * 64)
    good = features(tmp_path / "good.h5", seed=50)
    assert [r.state for r in atlas.add([bad, good])] == ["failed", "added"]


def test_a_slide_without_tiles_is_kept_with_its_reason(atlas, tmp_path):
    empty = features(
        tmp_path / "glass.h5", features=np.zeros((0, DIM), np.float32),
        coords=np.zeros((0, 2), np.int64), about={"reason": "no tissue"},
    )  # fmt: skip
    (result,) = atlas.add([empty])
    assert result.state == "added" and result.reason == "no tissue"
    assert next(s for s in atlas.slides() if s["name"] == "glass")["reason"] == "no tissue"
    assert atlas.verify() == [] and atlas.stats()["slides_without_tiles"] == 1


def test_queries_that_do_not_fit_are_refused(atlas, tmp_path):
    with pytest.raises(Mismatch, match=str(DIM)):
        atlas.search(np.ones((1, DIM + 1), np.float32))
    with pytest.raises(BadInput, match="NaN"):
        atlas.search(np.full((1, DIM), np.nan, np.float32))
    with pytest.raises(BadInput, match="k is 0"):
        atlas.search(np.ones((1, DIM), np.float32), k=0)
    with pytest.raises(BadInput, match="no clusters"):
        atlas.assign(np.ones((1, DIM), np.float32))
    empty = Atlas.create(tmp_path / "empty", DEFAULT_BUNDLE)
    with pytest.raises(BadInput, match="no tiles"):
        empty.search(np.ones((1, DIM), np.float32))


def test_two_writers_one_waits_outside(atlas, tmp_path):
    new = features(tmp_path / "new.h5", seed=9)
    with FileLock(atlas.path / ".lock"):
        code = (
            "import sys; from pathlib import Path; from histoseek.index.atlas import Atlas\n"
            "try: Atlas(Path(sys.argv[1])).add([Path(sys.argv[2])])\n"
            "except Exception as error: print(type(error).__name__, error)\n"
        )
        command = [sys.executable, "-c", code, atlas.path, new]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.startswith("Busy atlas") and "try again" in done.stdout
        with pytest.raises(Busy):
            atlas.fit("kmeans", k=2)
        assert len(atlas.search(np.ones((1, DIM), np.float32))[0]) == 10  # reading goes on
    assert atlas.add([new])[0].state == "added"


def test_a_full_disk_while_adding_loses_nothing(atlas, tmp_path, cli_process):
    big = features(tmp_path / "big.h5", count=4000, seed=3)
    before = atlas.stats()
    limit = 300_000
    done = cli_process(
        "index", "add", atlas.path, big,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1 and "nothing already stored was changed" in done.stderr
    reopened = Atlas(atlas.path)
    assert reopened.stats() == before and reopened.verify() == []
    assert reopened.add([big])[0].state == "added" and reopened.verify() == []


def test_clusters_are_stored_assigned_and_replaced(atlas):
    fitted = atlas.fit("kmeans", k=3)
    assert sum(fitted["sizes"].values()) == atlas.stats()["tiles"]
    ids, vectors = atlas.vectors()
    assert {hit.cluster for hit in atlas.search(vectors[:1], k=90)[0]} == {0, 1, 2}
    (placed,) = atlas.assign(vectors[:1])
    assert set(placed) == {"cluster", "name", "distance", "strength", "unknown"}
    assert placed["cluster"] == atlas.search(vectors[:1], k=1)[0][0].cluster
    with pytest.raises(BadInput, match="found no clusters among the 93 tiles"):
        atlas.fit("hdbscan")
    assert atlas.clustering()[0] == "kmeans", "what finds nothing does not become the newest"
    atlas.fit("kmeans", k=2, name="dense")
    atlas.name_cluster(0, "stroma", clustering="kmeans")
    assert atlas.fit("kmeans", k=4)["names_dropped"] == 1
    assert atlas.fit("kmeans", k=4)["names_dropped"] == 0
    names = [c["name"] for c in atlas.stats()["clusterings"]]
    assert sorted(names) == ["dense", "kmeans"] and atlas.clustering()[1].clusters == 4
    assert len(list(atlas.path.glob("clusters-*.npz"))) == 2 and atlas.verify() == []
    with pytest.raises(BadInput, match="dense, kmeans"):
        atlas.assign(vectors[:1], "none such")
    with pytest.raises(BadInput, match="letters"):
        atlas.fit("kmeans", k=2, name="../out")


def test_metadata_gives_labels_and_patients(atlas, tmp_path):
    file = features(tmp_path / "labelled.h5", seed=21)
    atlas.add([file], {"labelled": {"label": "tumour", "patient": "P9"}})
    best = atlas.search(read_features(file).features[:1], 1)[0][0]
    assert (best.label, best.patient) == ("tumour", "P9")


def test_readers_see_what_a_writer_committed(atlas, tmp_path):
    reader = Atlas(atlas.path)
    reader.view()
    item = features(tmp_path / "late.h5", seed=31)
    atlas.add([item])
    assert reader.search(read_features(item).features[:1], 1)[0][0].slide == "late"


@pytest.mark.parametrize("what", ["index", "features", "clusters", "encoder", "database"])
def test_a_flipped_byte_is_found_and_named(atlas, what):
    atlas.fit("kmeans", k=2)
    path = {
        "index": next(atlas.path.glob("index-*.faiss")),
        "features": next(atlas.path.glob("features/*.h5")),
        "clusters": next(atlas.path.glob("clusters-*.npz")),
        "encoder": atlas.path / "encoder/encoder.onnx",
        "database": atlas.path / "atlas.db",
    }[what]
    with sqlite3.connect(atlas.path / "atlas.db") as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    blob = bytearray(path.read_bytes())
    place = 4096 if what == "database" else len(blob) // 2
    blob[place] ^= 0xFF
    path.write_bytes(blob)
    try:
        found = Atlas(atlas.path).verify()
    except Damaged as error:  # a database too damaged to ask is named at once
        found = [str(error)]
    assert found and any(path.name in line for line in found)


def test_a_damaged_index_is_rebuilt_and_damaged_features_are_not_searched(atlas, tmp_path):
    query = read_features(tmp_path / "slide-0.h5").features[:1]
    before = atlas.search(query)
    next(atlas.path.glob("index-*.faiss")).write_bytes(b"rubbish")
    assert Atlas(atlas.path).search(query) == before
    next(atlas.path.glob("index-*.faiss")).unlink()
    file = next(atlas.path.glob("features/slide-1-*.h5"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(Damaged, match="slide-1"):
        Atlas(atlas.path).search(query)


def test_vectors_changed_behind_the_atlas_are_not_searched(atlas):
    """The file is still whole HDF5 of the right shape; only its hash tells."""
    next(atlas.path.glob("index-*.faiss")).unlink()
    file = next(atlas.path.glob("features/slide-1-*.h5"))
    row = read_features(file).features[3].tobytes()
    blob = file.read_bytes()
    assert blob.count(row) == 1
    file.write_bytes(blob.replace(row, row[::-1]))
    with pytest.raises(Damaged, match="slide-1.*has changed"):
        Atlas(atlas.path).vectors()


def test_what_is_no_atlas_or_a_newer_one_is_refused(atlas, tmp_path):
    with pytest.raises(BadInput, match="not an atlas"):
        Atlas(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="exists already"):
        Atlas.create(atlas.path, DEFAULT_BUNDLE)
    db = sqlite3.connect(atlas.path / "atlas.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(BadInput, match="upgrade"):
        Atlas(atlas.path)


def test_the_atlas_keeps_its_own_encoder(atlas, tmp_path, other_bundle):
    assert (atlas.encoder_bundle / "encoder.onnx").read_bytes() == (
        DEFAULT_BUNDLE / "encoder.onnx"
    ).read_bytes()
    shutil.rmtree(atlas.encoder_bundle)
    shutil.copytree(other_bundle, atlas.encoder_bundle)
    with pytest.raises(Damaged, match="was created with encoder"):
        Atlas(atlas.path)


@pytest.mark.deep
def test_killed_at_random_moments_no_slide_is_missing_double_or_half(tmp_path):
    """SIGKILL during `index add`; each time the atlas opens clean, and a re-run completes."""
    files = [features(tmp_path / f"s{n:02d}.h5", count=400, seed=n) for n in range(30)]
    sizes = {f.stem: 400 for f in files}
    path = tmp_path / "atlas"
    Atlas.create(path, DEFAULT_BUNDLE)
    command = [sys.executable, "-m", "histoseek", "index", "add", str(path), *map(str, files)]
    rng, killed, seen = random.Random(2), 0, set()
    while killed < rounds(5, 24) or len(seen) <= 3:
        before = len(list(path.glob("features/*.h5")))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60  # until it works: then at a random moment
        while len(list(path.glob("features/*.h5"))) == before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.random() * 0.25)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
            assert killed <= 24, seen
        process.wait()
        opened = Atlas(path)
        there = {s["name"]: s["tiles"] for s in opened.slides()}
        assert all(sizes[name] == count for name, count in there.items())
        problems = [
            p for p in opened.verify() if "vectors, the atlas" not in p
        ]  # a stale index is derived
        assert problems == []
        seen.add(len(there))
        if len(there) == len(files):
            shutil.rmtree(path)
            Atlas.create(path, DEFAULT_BUNDLE)
    subprocess.run(command, check=True, capture_output=True)
    done = Atlas(path)
    assert {s["name"]: s["tiles"] for s in done.slides()} == sizes and done.verify() == []
    assert len(done.view().index) == 30 * 400 and len(seen) > 3, seen
    assert not list(path.rglob("*.histoseek-tmp"))
