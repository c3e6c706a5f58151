"""Kills, full disks, flipped bytes and locked folders: committed work is kept, and damage is reported."""

import json
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from atlases import features, filled, grouped, unit
from schedule import DEEP, rounds

from histoseek.artifacts.feature_files import read_features
from histoseek.errors import BadInput, Busy, Damaged
from histoseek.index.atlas import Atlas
from histoseek.index.care.snapshots import restore
from histoseek.index.care.verify import Kind, problems

KILLING = Path(__file__).with_name("killing.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def killing(folder, *words):
    command = [sys.executable, KILLING, folder, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("add", "upsert", "remove", "relabel"), ("fit", "name", "tune", "codes")]
)
def test_killed_at_every_write_point_nothing_is_lost_or_half(tmp_path, names):
    """add, upsert, remove, relabel, fit, name, tune: the state is the one before or the one after."""
    report = killing(tmp_path, "points", *names)
    assert set(report) == set(names)
    for name, seen in report.items():
        assert seen["points"] >= 4, (name, seen)
        assert 0 < seen["before"] <= seen["points"]


@pytest.mark.deep
def test_killed_at_random_moments_what_was_acknowledged_is_there(tmp_path):
    kills = rounds(40, 200)
    report = killing(tmp_path, "random", kills)
    assert report["killed"] == kills
    assert set(report["finished"]) == {"add", "upsert", "remove", "fit", "tune", "relabel"}
    assert sum(report["finished"].values()) > kills, report  # on a busy machine too
    if DEEP:
        assert min(report["finished"].values()) > 20, report


@pytest.fixture(scope="session")
def whole(made_once):
    """An atlas with two fits, a name, codes and a tail, and the files it was made of; tests copy it."""

    def make(folder):
        made = filled(folder, slides=4, count=400)
        made.fit("kmeans", k=3)
        made.fit("hdbscan", min_cluster_size=20)
        made.name_cluster(1, "stroma", clustering="kmeans")
        made.tune(exact_up_to=0, memory_mb=0.25)
        made.add([features(folder / "late.h5", 30, 40)])
        checkpoint(made)

    return made_once("durable", make)


@pytest.fixture
def atlas(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return Atlas(tmp_path / "atlas")


def checkpoint(atlas):
    with sqlite3.connect(atlas.path / "atlas.db") as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def flip(path, place):
    with open(path, "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 0xFF]))


def files_of(atlas):
    return {
        "index": next(atlas.path.glob("index-*.faiss")),
        "raw vectors": next(atlas.path.glob("vectors-*.faiss")),
        "kmeans": next(atlas.path.glob("clusters-kmeans.*.npz")),
        "hdbscan": next(atlas.path.glob("clusters-hdbscan.*.npz")),
        "features": next(atlas.path.glob("features/slide-2-*.h5")),
        "late features": next(atlas.path.glob("features/late-*.h5")),
        "encoder": atlas.path / "encoder/encoder.onnx",
    }


def answers(atlas):
    queries = grouped(np.random.default_rng(1), 10)
    return [[hit[1:] for hit in hits] for hits in atlas.search(queries, 5, exact=True)]


@pytest.mark.parametrize("what", ["index", "raw vectors", "kmeans", "hdbscan"])
@pytest.mark.parametrize("how", ["flipped", "missing", "cut"])
def test_what_is_derived_is_named_and_made_again(atlas, what, how):
    before, names = answers(atlas), atlas.clusters("kmeans")
    path = files_of(atlas)[what]
    if what == "raw vectors" and how == "flipped":  # just where an answer would change
        best = atlas.search(grouped(np.random.default_rng(1), 1), 1, exact=True)[0][0].tile
        position = int(atlas.view().columns.positions(np.array([best]))[0])
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        place = 45 + 256 * position if what == "raw vectors" else path.stat().st_size // 2
        flip(path, place + 3)
    found = Atlas(atlas.path).verify()
    assert len(found) == 1 and path.name in found[0] and "can be rebuilt" in found[0]
    assert answers(Atlas(atlas.path)) == before  # never a wrong answer meanwhile
    done = Atlas(atlas.path).repair()
    assert len(done) == 1, done
    again = Atlas(atlas.path)
    assert again.verify() == [] and answers(again) == before
    assert [c["name"] for c in again.clusters("kmeans")] == [c["name"] for c in names]
    assert again.assign(grouped(np.random.default_rng(2), 3), "kmeans")


@pytest.mark.parametrize("what", ["features", "late features", "encoder"])
def test_the_truth_is_named_and_never_touched(atlas, what):
    path = files_of(atlas)[what]
    flip(path, path.stat().st_size // 2)
    blob = path.read_bytes()
    found = Atlas(atlas.path).verify()
    assert any(path.name in line for line in found)
    try:
        Atlas(atlas.path).repair()
    except Damaged as error:
        assert path.name in str(error)
    assert path.read_bytes() == blob and any(path.name in p for p in Atlas(atlas.path).verify())


@pytest.mark.parametrize("seed", [40, 41])
def test_a_damaged_slide_is_mended_by_embedding_it_again(atlas, tmp_path, seed):
    """With the very same features, or with others."""
    next(atlas.path.glob("features/late-*.h5")).unlink()
    assert Atlas(atlas.path).add([features(tmp_path / "other.h5", 9, 88)])[0].state == "added"
    assert Atlas(atlas.path).remove(["other"]) == 9  # one bad slide stops no other change
    new = features(tmp_path / "late.h5", 30, seed)
    state = Atlas(atlas.path).add([new], replace=True)[0].state
    assert state == ("unchanged" if seed == 40 else "replaced")
    assert Atlas(atlas.path).verify() == []


def test_what_people_said_stays_when_a_slide_is_added_again_or_replaced(atlas, tmp_path):
    atlas.relabel([{"slide": "slide-1", "label": "seen by a person", "stage": "II"}])
    assert atlas.add([tmp_path / "slide-1.h5"])[0].state == "unchanged"
    (tmp_path / "new").mkdir()
    new = features(tmp_path / "new/slide-1.h5", 20, 60)
    assert atlas.add([new], replace=True)[0].state == "replaced"
    slide = next(s for s in atlas.slides() if s["name"] == "slide-1")
    assert (slide["label"], slide["patient"]) == ("seen by a person", "P0")
    assert slide["metadata"] == {"organ": "lung", "stage": "II"}
    atlas.fit("kmeans", k=3, name="again")
    atlas.name_cluster(1, "stroma", clustering="again")
    atlas.fit("kmeans", k=3, name="again")
    assert atlas.clusters("again")[1]["name"] == "stroma"
    atlas.fit("kmeans", k=2, name="again")
    assert {c["name"] for c in atlas.clusters("again")} == {""}


def test_a_budget_of_another_day_stops_no_addition(tmp_path):
    atlas = filled(tmp_path, slides=4, count=400)
    atlas.tune(memory_mb=0.25, exact_up_to=0)
    big = features(tmp_path / "big.h5", 9000, 60, features=grouped(np.random.default_rng(6), 9000))
    assert atlas.add([big])[0].state == "added"
    assert atlas.view().index.recent_rows == 0 and atlas.verify() == []
    atlas.remove(["big", "slide-1", "slide-2"])
    assert len(atlas.view().index) == 800 and atlas.verify() == []


@pytest.mark.parametrize("column", ["about", "slides", "sha256"])
def test_a_damaged_row_of_a_generation_is_made_again(atlas, column):
    before = answers(atlas)
    db = sqlite3.connect(atlas.path / "atlas.db")
    db.execute(f"UPDATE generations SET {column} = substr({column}, 2)")
    db.commit()
    db.close()
    assert answers(Atlas(atlas.path)) == before and Atlas(atlas.path).verify()
    assert Atlas(atlas.path).repair() == ["the index was rebuilt"]
    assert Atlas(atlas.path).verify() == [] and answers(Atlas(atlas.path)) == before


def test_an_open_reader_sees_what_a_restore_brought_back(atlas, tmp_path):
    atlas.snapshot(tmp_path / "copy")
    x = features(tmp_path / "x.h5", 12, 70)
    atlas.add([x])
    reader = Atlas(atlas.path)
    lost = {hit.tile for hit in reader.search(read_features(x).features, 1)[0]}
    restore(tmp_path / "copy", atlas.path)
    again = Atlas(atlas.path)
    y = features(tmp_path / "y.h5", 12, 71)
    again.add([y])
    best = reader.search(read_features(y).features[:1], 1)[0][0]
    assert (best.slide, best.score) == ("y", pytest.approx(1, abs=1e-5))
    assert "x" not in {s["name"] for s in reader.slides()}
    ids = set(again.vectors()[0].tolist())
    assert not ids & lost and best.tile > max(lost)  # an id of before is never another tile


def test_a_really_full_disk_is_an_error_and_not_a_signal(atlas, tmp_path):
    """A tmpfs with little room, in a namespace of its own."""
    code = (
        "import sys, shutil; from pathlib import Path\n"
        "from histoseek.index.atlas import Atlas\n"
        "from histoseek.errors import StorageFailed\n"
        "copy = Path(sys.argv[2]) / 'atlas'\n"
        "shutil.copytree(sys.argv[1], copy)\n"
        "room = shutil.disk_usage(copy).free\n"
        "(copy.parent / 'filler').write_bytes(bytes(room - 150_000))\n"
        "try: Atlas(copy).tune(memory_mb=0.25, exact_up_to=0)\n"
        "except StorageFailed as error: print('refused', error)\n"
        "(copy.parent / 'filler').unlink()\n"
        "print(Atlas(copy).verify())\n"
    )
    mount = tmp_path / "small"
    mount.mkdir()
    script = f'mount -t tmpfs -o size=12m none {mount} && exec "$0" -c "$1" {atlas.path} {mount}'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, sys.executable, code], capture_output=True, text=True
    )
    if "ermi" in done.stderr and "unshare" in done.stderr:  # no right to mount here
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused") and done.stdout.endswith("[]\n"), done.stdout


@pytest.mark.deep
def test_any_flipped_byte_of_the_database_is_found(atlas):
    """Bytes of atlas.db, one at a time: found, or of no account (space that holds nothing)."""
    checkpoint(atlas)
    path = atlas.path / "atlas.db"
    whole = path.read_bytes()
    rng = random.Random(3)
    expected = answers(atlas), atlas.slides(), atlas.clusters("kmeans")
    found = 0
    for _ in range(200):
        flip(path, rng.randrange(len(whole)))
        try:
            opened = Atlas(atlas.path)
            problems = opened.verify()
            if problems:
                found += 1
                assert any("atlas.db" in p or "slide" in p or "index" in p for p in problems), (
                    problems
                )
            else:
                assert (answers(opened), opened.slides(), opened.clusters("kmeans")) == expected
        except (Damaged, BadInput) as error:
            found += 1
            assert "atlas" in str(error)
        path.write_bytes(whole)
        for log in atlas.path.glob("atlas.db-*"):
            log.unlink()
    assert found > 100
    assert Atlas(atlas.path).verify() == []


def test_a_damaged_placement_is_made_again(atlas):
    db = sqlite3.connect(atlas.path / "atlas.db")
    db.execute("UPDATE placements SET strength = zeroblob(8) WHERE slide_id = 2")
    db.execute("UPDATE generations SET about = about || ' '")
    db.commit()
    db.close()
    found = Atlas(atlas.path).verify()
    assert any("placements" in line for line in found) and any("generations" in p for p in found)
    before = atlas.assigned("kmeans")[1].cluster
    assert len(Atlas(atlas.path).repair()) == 2
    again = Atlas(atlas.path)
    assert again.verify() == [] and np.array_equal(again.assigned("kmeans")[1].cluster, before)


def test_a_fit_that_would_differ_is_not_put_in_the_place_of_the_lost_one(atlas):
    atlas.remove(["slide-0"])
    files_of(atlas)["kmeans"].unlink()
    (line,) = Atlas(atlas.path).repair()
    assert "cannot be rebuilt" in line
    again = Atlas(atlas.path)
    assert any("clusters-kmeans" in p for p in again.verify())
    assert again.search(unit(np.random.default_rng(0), 1), 1)[0][0].cluster is not None
    again.fit("kmeans", k=3)
    assert Atlas(atlas.path).verify() == []


@pytest.mark.parametrize("limit", [40_000, 120_000, 200_000])
def test_a_full_disk_at_any_size_loses_nothing(atlas, tmp_path, cli_process, limit):
    big = features(tmp_path / "big.h5", 700, 60, features=grouped(np.random.default_rng(6), 700))
    before = atlas.stats()["tiles"]
    verified = []
    for words in (("index", "add", atlas.path, big), ("index", "tune", atlas.path)):
        done = cli_process(
            *words,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        again = Atlas(atlas.path)
        assert again.verify() == [] and again.stats()["tiles"] in {before, before + 700}
        verified.append(done.returncode)
        if done.returncode:
            assert "free space" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert verified[1] == 1 or limit > 120_000
    assert Atlas(atlas.path).add([big])[0].state in {"added", "unchanged"}


def test_a_read_only_folder_is_searched_and_not_written(atlas, tmp_path):
    """Root may write anywhere, so a process of an ordinary user asks."""
    checkpoint(atlas)
    for log in atlas.path.glob("atlas.db-*"):
        log.unlink(missing_ok=True)
    expected = answers(atlas)
    for log in atlas.path.glob("atlas.db-*"):
        log.unlink(missing_ok=True)
    for folder in [tmp_path, *tmp_path.parents][:4]:
        folder.chmod(folder.stat().st_mode | 0o055)
    for path in [atlas.path, *atlas.path.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    code = (
        "import os, sys, json, faiss, h5py, sklearn.decomposition, scipy.spatial.distance\n"
        "from pathlib import Path\n"
        "sys.path.append(sys.argv[2])\n"
        "import numpy as np\n"
        "from atlases import grouped\n"
        "from histoseek.index.atlas import Atlas\n"
        "from histoseek.errors import StorageFailed\n"
        "from histoseek.index.care import verify\n"
        "os.setgid(65534); os.setuid(65534)\n"  # the interpreter itself may be root's alone
        "atlas = Atlas(Path(sys.argv[1]))\n"
        "hits = atlas.search(grouped(np.random.default_rng(1), 10), 5, exact=True)\n"
        "try: atlas.fit('kmeans', k=2)\n"
        "except StorageFailed as error: refused = str(error)\n"
        "print(json.dumps([[[list(h[1:]) for h in a] for a in hits], refused, atlas.verify()]))\n"
    )
    command = [sys.executable, "-c", code, atlas.path, Path(__file__).parents[1]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, refused, problems = json.loads(done.stdout)
    assert found == [[list(hit) for hit in hits] for hits in expected] and problems == []
    assert "permissions" in refused
    for path in [atlas.path, *atlas.path.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_clock_that_jumps_back_changes_no_order(atlas, tmp_path, monkeypatch):
    real = time.time_ns
    monkeypatch.setattr(time, "gmtime", lambda *a: time.struct_time((1990, 1, 1, 0, 0, 0, 0, 1, 0)))
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    monkeypatch.setattr(time, "time", lambda: 5.0)
    atlas.fit("kmeans", k=2, name="newest")
    atlas.tune(exact_up_to=0)
    atlas.add([features(tmp_path / "later.h5", 20, 70)])
    assert atlas.stats()["clusterings"][-1]["created_at"].startswith("1990") and real() > 5
    assert atlas.clustering()[0] == "newest" and atlas.view().columns.newest == "newest"
    assert Atlas(atlas.path).verify() == []


def test_two_writers_one_is_told_to_wait(atlas, tmp_path):
    files = [features(tmp_path / f"w{n}.h5", 40, 100 + n) for n in range(12)]
    code = (
        "import sys; from pathlib import Path\n"
        "from histoseek.errors import Busy\n"
        "from histoseek.index.atlas import Atlas\n"
        "done = 0\n"
        "for file in sys.argv[2:]:\n"
        "    while True:\n"
        "        try: print(Atlas(Path(sys.argv[1])).add([Path(file)])[0].state); break\n"
        "        except Busy: done += 1\n"
        "print('busy', done)\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, atlas.path, *files[part::2]],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for part in range(2)
    ]  # fmt: skip
    said = [process.communicate()[0].split() for process in running]
    assert [words.count("added") for words in said] == [6, 6]
    again = Atlas(atlas.path)
    assert again.verify() == [] and len(again.slides()) == 5 + 12


@pytest.mark.deep
def test_sixteen_readers_see_whole_states_while_a_writer_commits(tmp_path):
    """Every slide that is there is there whole: a state has all of a slide's tiles or none."""
    atlas = filled(tmp_path, slides=3, count=60)
    files = {n: features(tmp_path / f"v{n}.h5", 60, 200 + n, name="moving") for n in range(8)}
    stored = {n: read_features(path).features for n, path in files.items()}
    wrong, states, stop = [], set(), threading.Event()

    def read():
        own = Atlas(atlas.path)
        rng = np.random.default_rng(threading.get_ident() % 1000)
        while not stop.is_set():
            try:
                n = int(rng.integers(8))

                def look(view, asked=stored[n]):
                    scores, found = view.index.search(asked, 1)
                    hits = view.columns.hits(found, scores)
                    moving = sum(hit[0].slide == "moving" for hit in hits)
                    return view, int((scores[:, 0] > 0.99999).sum()), moving

                view, exact, moving = own.ask(look)
                if exact not in {0, 60} or len(view.index) not in {180, 240}:
                    wrong.append((view.revision, exact, moving, len(view.index)))
                if exact == 60 != moving:  # columns and vectors are of one state
                    wrong.append((view.revision, exact, moving))
                ids, all_ = own.vectors()
                if len(ids) != len(all_) or len(ids) not in {180, 240}:
                    wrong.append(len(ids))
                own.search(tiles=[int(view.columns.ids(np.array([0]))[0])], k=3, leave_out="slide")
                states.add(view.revision)
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=read) for _ in range(16)]
    for thread in threads:
        thread.start()
    for step in range(rounds(14, 48)):
        if step % 6 == 5:
            atlas.remove(["moving"])
        else:
            atlas.add([files[step % 8]], replace=True)
        if step % 7 == 3:
            atlas.fit("kmeans", k=2)
        if step % 8 == 4:
            atlas.tune()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert len(states) > 5 and atlas.verify() == []


def test_a_snapshot_is_an_atlas_and_comes_back(atlas, tmp_path):
    before, slides = answers(atlas), atlas.slides()
    report = atlas.snapshot(tmp_path / "copy")
    copy = Atlas(tmp_path / "copy")
    assert copy.verify() == [] and answers(copy) == before and report["bytes"] > 100_000
    assert copy.clusters("kmeans")[1]["name"] == "stroma"
    with pytest.raises(BadInput, match="exists already"):
        atlas.snapshot(tmp_path / "copy")
    with pytest.raises(BadInput, match="is inside the atlas"):
        atlas.snapshot(atlas.path / "inside")
    atlas.remove(["slide-0", "slide-1"])
    back = restore(tmp_path / "copy", atlas.path)
    again = Atlas(atlas.path)
    assert again.slides() == slides and answers(again) == before and again.verify() == []
    kept = Atlas(Path(back["kept"]))
    assert len(kept.slides()) == 3 and kept.verify() == []
    late = features(tmp_path / "after.h5", 9, 90)
    assert again.add([late])[0].state == "added"


def test_a_damaged_atlas_gives_no_snapshot_and_a_damaged_snapshot_no_atlas(atlas, tmp_path):
    atlas.snapshot(tmp_path / "copy")
    next((tmp_path / "copy").glob("features/*.h5")).unlink()
    with pytest.raises(Damaged):
        restore(tmp_path / "copy", atlas.path)
    assert Atlas(atlas.path).verify() == []
    path = files_of(atlas)["features"]
    flip(path, path.stat().st_size // 2)
    with pytest.raises(Damaged, match="verify --repair"):
        atlas.snapshot(tmp_path / "second")
    assert not (tmp_path / "second").exists()
    with pytest.raises(BadInput, match="not an atlas"):
        restore(tmp_path / "nothing", atlas.path)


def test_all_or_none_of_what_is_removed_or_relabelled(atlas):
    before = atlas.slides()
    with pytest.raises(BadInput, match="unknown slide 'nope'"):
        atlas.remove(["slide-0", "nope"])
    with pytest.raises(BadInput, match="unknown slide 'nope'"):
        atlas.relabel([{"slide": "slide-0", "label": "q"}, {"slide": "nope", "label": "q"}])
    with pytest.raises(BadInput, match=r"no tile '1.png'"):
        atlas.relabel([{"slide": "slide-0", "label": "q"}, {"slide": "slide-1", "file": "1.png"}])
    assert atlas.slides() == before
    assert atlas.remove(["slide-0"]) == 400 and len(atlas.slides()) == 4


def test_relabelling_says_what_it_deleted_and_what_has_no_effect(tmp_path):
    atlas = filled(tmp_path, slides=2, count=40, kind="tiles",
                   files=tuple(f"{n}.png" for n in range(40)), coords=np.zeros((40, 2), int))  # fmt: skip
    row = {"slide": "slide-0", "label": "", "organ": "", "mpp": "0.25", "path": "/old"}
    changed = atlas.relabel([row, {"slide": "slide-1", "label": "", "patient": "P9"}])
    assert changed == 2 and changed.notes == [
        "values deleted by empty cells: label 2, organ 1",
        "'mpp' and 'path' of the metadata are not used here: they come from the features, or from the "
        "table that `index import` is given",
    ]
    atlas.relabel([{"slide": "slide-0", "file": f"{n}.png", "label": "own"} for n in range(3)])
    (note,) = atlas.relabel([{"slide": "slide-0", "label": "all"}]).notes
    assert note.startswith("3 of 40 tiles of 'slide-0' keep a label of their own")
    labels = [tile["label"] for tile in atlas.tiles(atlas.vectors()[0].tolist()).values()]
    assert (labels.count("own"), labels.count("all")) == (3, 37)
    assert atlas.relabel([{"slide": "slide-0", "label": "all"}]) == 0
    single = {"slide": "slide-0", "file": "1.png", "label": "", "organ": "lung"}
    assert atlas.relabel([single]).notes == [
        "values deleted by empty cells: label 1",
        "a single tile has no columns of its own, so these are not used: organ",
    ]
    with pytest.raises(BadInput, match="column 'Patient'; histoseek reads 'patient'"):
        atlas.relabel([{"slide": "slide-0", "Patient": "P1"}])


def test_a_slide_is_not_replaced_twice_in_one_run(atlas, tmp_path):
    """Two sets of features of a slide: otherwise the last in the alphabet would win."""
    folder = tmp_path / "sets"
    files = []
    for number, overlap in enumerate((0, 112)):
        (folder / f"{overlap}px").mkdir(parents=True)
        files.append(features(folder / f"{overlap}px/slide-0.h5", 30 + number, 70 + number))
    for state, replace in (("replaced", True), ("unchanged", True), ("unchanged", False)):
        assert [r.state for r in atlas.add(files, replace=replace)] == [state, "failed"]
    first, second = atlas.add(files[::-1], replace=True)
    assert (first.state, second.state) == ("replaced", "failed")
    assert (
        str(files[1]) in second.reason
        and "give only the folder or the files of one set" in second.reason
    )
    assert next(s["tiles"] for s in atlas.slides() if s["name"] == "slide-0") == 31


def test_tiles_of_a_set_are_labelled_one_by_one(tmp_path):
    atlas = filled(tmp_path, slides=1, count=40, kind="tiles",
                   files=tuple(f"{n}.png" for n in range(40)), coords=np.zeros((40, 2), int))  # fmt: skip
    changed = atlas.relabel(
        [{"slide": "slide-0", "file": "3.png", "label": "odd", "patient": "PX"},
         {"slide": "slide-0", "file": "4.png", "label": ""},
         {"slide": "slide-0", "organ": "", "stage": "2"}]
    )  # fmt: skip
    assert changed == 1 and atlas.verify() == []
    by_file = {tile["file"]: tile for tile in atlas.tiles(atlas.vectors()[0].tolist()).values()}
    assert (by_file["3.png"]["label"], by_file["3.png"]["patient"]) == ("odd", "PX")
    assert by_file["5.png"]["label"] == "a" and by_file["5.png"]["patient"] == "P0"
    assert atlas.slides()[0]["metadata"] == {"stage": "2"}
    hits = atlas.search(unit(np.random.default_rng(0), 1), 50, where="patient = 'PX'")[0]
    assert [h.file for h in hits] == ["3.png"]


def test_writing_into_a_locked_atlas_says_busy(atlas):
    with atlas.writing():
        other = Atlas(atlas.path)
        for write in (
            lambda: other.remove(["slide-0"]),
            lambda: other.relabel([{"slide": "slide-0", "label": "x"}]),
            lambda: other.tune(),
            lambda: other.name_cluster(0, "x"),
            lambda: other.repair(),
            lambda: other.snapshot(atlas.path.parent / "snap"),
        ):
            with pytest.raises(Busy, match="try again"):
                write()
        assert other.search(unit(np.random.default_rng(0), 1), 3)


@pytest.mark.parametrize("folder", ["index", "generations", "vectors-1"])
def test_a_repair_does_not_depend_on_words_in_a_path(tmp_path, folder):
    """One lost clusters file, in a folder that is called like a part: the index file stays as it is."""
    atlas = filled(tmp_path / folder, slides=3, count=60)
    atlas.fit("kmeans", k=3)
    (index,) = atlas.path.glob("index-*.faiss")
    before = index.name, index.stat().st_mtime_ns
    next(atlas.path.glob("clusters-kmeans.*.npz")).unlink()
    done = Atlas(atlas.path).repair()
    assert done == ["clustering 'kmeans' was rebuilt; every tile has the same cluster as before"]
    (index,) = atlas.path.glob("index-*.faiss")
    assert (index.name, index.stat().st_mtime_ns) == before
    assert Atlas(atlas.path).verify() == []


def test_every_problem_has_its_kind(tmp_path):
    atlas = filled(tmp_path / "x", slides=3, count=60)
    atlas.fit("kmeans", k=3)
    assert problems(atlas) == []
    for pattern, kind in (
        ("clusters-*.npz", Kind.CLUSTERS),
        ("index-*.faiss", Kind.INDEX),
        ("features/slide-1-*.h5", Kind.TRUTH),
    ):
        (path,) = atlas.path.glob(pattern)
        blob = path.read_bytes()
        path.unlink()
        found = problems(Atlas(atlas.path))
        assert kind in {p.kind for p in found if path.name in p.text}
        path.write_bytes(blob)
    with atlas.catalog.write() as db:
        db.execute("DELETE FROM placements WHERE slide_id = 1")
    assert [p.kind for p in problems(Atlas(atlas.path))] == [Kind.PLACEMENT]
