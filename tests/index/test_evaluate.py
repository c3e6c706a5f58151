"""Evaluation: metrics checked by hand, patients kept apart, and a report that states its limits."""

import json

import numpy as np
import pytest
from atlases import features, filled, unit
from sklearn.metrics import accuracy_score, f1_score

from histoseek.errors import BadInput
from histoseek.index.atlas import Atlas
from histoseek.index.studies.retrieval import evaluate
from histoseek.index.studies.scores import RetrievalOptions, average_precision, votes
from histoseek.serving.encoders.open import DEFAULT_BUNDLE

FOUND = np.array([[0, 1, 1, 0, 0], [2, 1, 0, 1, 2], [1, -1, -1, -1, -1], [-1] * 5, [0, 1, 2, 0, 1]])


def test_votes_with_ties_to_the_nearest():
    assert votes(FOUND, 1).tolist() == [0, 2, 1, -1, 0]
    assert votes(FOUND, 3).tolist() == [1, 2, 1, -1, 0]
    assert votes(FOUND, 5).tolist() == [0, 2, 1, -1, 0]


def test_average_precision_by_hand():
    label = np.array([0, 1, 1, 0, 2])
    found = average_precision(FOUND, label, np.array([9, 2, 1, 3, 9]))
    by_hand = [(1 + 2 / 4 + 3 / 5) / 5, (1 / 2 + 2 / 4) / 2, 1, 0, (1 / 3) / 5]
    assert found == pytest.approx(by_hand)


def brute(atlas, owner_key, k=5):
    """Leave-one-owner-out by plain NumPy: labels of the nearest k of other owners."""
    ids, stored = atlas.vectors()
    known = list(atlas.tiles(ids.tolist()).values())
    owner = np.array([t[owner_key] for t in known])
    label = np.array([t["label"] for t in known])
    scores = stored @ stored.T
    scores[owner[:, None] == owner[None, :]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return label, label[order]


@pytest.mark.parametrize("lists", [False, True])
def test_numbers_equal_brute_force_with_whole_patients_left_out(tmp_path, lists):
    atlas = filled(tmp_path, slides=8, count=150)
    if lists:
        atlas.tune(exact_up_to=0)
    report = evaluate(atlas, RetrievalOptions(bootstrap=50))
    label, found = brute(atlas, "patient")
    names = sorted(set(label))
    code = np.vectorize(names.index)
    top1, mmv5 = found[:, 0], np.array(names)[votes(code(found), 5)]
    values = {k: m["value"] for k, m in report["metrics"].items()}
    assert values["top1"] == pytest.approx(accuracy_score(label, top1))
    assert values["mmv5"] == pytest.approx(accuracy_score(label, mmv5))
    assert values["mmv5_macro_f1"] == pytest.approx(f1_score(label, mmv5, average="macro"))
    assert values["map5"] == pytest.approx(
        average_precision(code(found), code(label), np.full(len(label), 99)).mean()
    )
    assert report["owners"] == 4 and report["queries"] == 1200 and report["warnings"] == []
    assert sum(c["queries"] for c in report["per_class_mmv5"]) == 1200


def test_a_label_that_goes_with_the_patient_alone_is_at_chance(tmp_path):
    """Each patient has a direction of his own; a search that sees his other tiles would shine."""
    atlas = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    own = unit(np.random.default_rng(1), 20)
    files, metadata = [], {}
    for n in range(20):
        rng = np.random.default_rng(n)
        vectors = own[n] + unit(rng, 40) * 0.2
        files.append(features(tmp_path / f"s{n}.h5", 40, n, features=vectors.astype(np.float32)))
        metadata[f"s{n}"] = {"label": "xy"[n % 2], "patient": f"P{n}"}
    atlas.add(files, metadata)
    report = evaluate(atlas, RetrievalOptions(bootstrap=200))
    low, high = report["metrics"]["top1"]["interval_95"]
    assert low < 0.5 < high
    assert high - low > 0.2  # 20 patients, not 800 tiles
    leaky = evaluate(atlas, RetrievalOptions(leave_out="slide", bootstrap=50))
    one = leaky["metrics"]["top1"]["value"]
    assert one == report["metrics"]["top1"]["value"]  # one slide each: the same here
    metadata = [{"slide": f"s{n}", "patient": f"Q{n // 2}"} for n in range(20)]
    atlas.relabel(metadata)
    assert evaluate(atlas, RetrievalOptions(bootstrap=20))["owners"] == 10


def test_baselines_are_what_they_say(tmp_path):
    labels = {f"slide-{n}": {"label": "a" if n < 5 else "b", "patient": f"P{n}"} for n in range(6)}
    report = evaluate(
        filled(tmp_path, slides=6, count=100, metadata=labels), RetrievalOptions(bootstrap=20)
    )
    top1 = report["metrics"]["top1"]
    # For tiles of the one slide of b nothing of b is left; for those of a: 4 slides of a, one of b.
    assert top1["random"] == pytest.approx(5 / 6 * 4 / 5, abs=0.05)
    assert top1["majority"] == pytest.approx(5 / 6)


def test_without_patients_it_refuses_unless_told_and_then_says_so(tmp_path):
    labels = {f"slide-{n}": {"label": "ab"[n % 2]} for n in range(4)}
    labels["slide-0"]["patient"] = "P0"
    atlas = filled(tmp_path, slides=4, count=60, metadata=labels)
    with pytest.raises(
        BadInput, match="180 of 240 labelled tiles have no patient.*--without-patients"
    ):
        evaluate(atlas, RetrievalOptions())
    report = evaluate(atlas, RetrievalOptions(without_patients=True, bootstrap=20))
    assert "180 of 240" in report["warnings"][0] and "too good" in report["warnings"][0]
    assert report["owners"] == 4
    with pytest.raises(BadInput, match="unknown column 'grade'"):
        evaluate(atlas, RetrievalOptions(label="grade"))
    with pytest.raises(BadInput, match="unknown unit"):
        RetrievalOptions(unit="case")
    one = filled(
        tmp_path / "one", slides=2, count=20, metadata={"slide-0": {"label": "a", "patient": "P"}}
    )
    with pytest.raises(BadInput, match=r"1 value\(s\)"):
        evaluate(one, RetrievalOptions())


def test_a_slide_in_which_some_tiles_have_no_patient_is_left_out_whole(tmp_path):
    """Every tile has a copy on its own slide; half the copies have lost their patient."""
    atlas = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    files = []
    for n in range(4):
        half = unit(np.random.default_rng(n), 20)
        files.append(
            features(
                tmp_path / f"s{n}.h5", 40, n, features=np.concatenate([half, half]), kind="tiles",
                files=tuple(map(str, range(40))), labels=tuple("ab" * 10 + "ab" * 10),
                groups=tuple([f"P{n}"] * 20 + [""] * 20),
            )
        )  # fmt: skip
    atlas.add(files)
    report = evaluate(atlas, RetrievalOptions(without_patients=True, bootstrap=20))
    assert report["owners"] == 4 and report["metrics"]["top1"]["value"] < 0.75


def test_classes_that_nobody_else_has_are_named(tmp_path):
    labels = {f"slide-{n}": {"label": "ab"[n % 2], "patient": f"P{n}"} for n in range(5)}
    labels["slide-4"]["label"] = "rare"
    report = evaluate(
        filled(tmp_path, slides=5, count=30, metadata=labels), RetrievalOptions(bootstrap=20)
    )
    assert (
        "30 queries cannot be answered" in report["warnings"][0] and "rare" in report["warnings"][0]
    )
    rare = next(row for row in report["per_class_mmv5"] if row["class"] == "rare")
    assert rare["recall"] == 0 and rare["recall_interval_95"] == [0, 0]
    assert all(0 <= m["random"] <= 1 for m in report["metrics"].values())


def test_slides_are_evaluated_by_their_mosaics(tmp_path):
    atlas = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    centres = unit(np.random.default_rng(2), 2)
    files, metadata = [], {}
    for n in range(8):
        vectors = (centres[n % 2] + unit(np.random.default_rng(n), 60) * 0.4).astype(np.float32)
        files.append(features(tmp_path / f"s{n}.h5", 60, n, features=vectors))
        metadata[f"s{n}"] = {"label": "ab"[n % 2], "patient": f"P{n}"}
    atlas.add(files, metadata)
    report = evaluate(atlas, RetrievalOptions(unit="slide", bootstrap=50))
    assert report["queries"] == 8 and report["metrics"]["top1"]["value"] == 1
    assert report["metrics"]["mmv5"]["value"] == 1


def test_queries_are_sampled_and_it_is_said(tmp_path):
    report = evaluate(
        filled(tmp_path, slides=4, count=60), RetrievalOptions(queries=50, bootstrap=20)
    )
    assert report["queries"] == 50 and "50 of 240" in report["warnings"][0]


@pytest.mark.shared
def test_the_command_on_real_tiles_with_their_groups_as_patients(tmp_path, shared, cli, cli_json):
    """250 tiles of lc25000: embedded, indexed and evaluated from the command line, with latency."""
    import tarfile

    import pandas

    folder = tmp_path / "tiles"
    with tarfile.open(shared / "lc25000.tar") as pack:
        pack.extractall(folder, filter="data")
    (manifest,) = folder.rglob("manifest.csv")
    table = pandas.read_csv(manifest)
    few = table.sample(250, random_state=0)
    for row in set(table["file"]) - set(few["file"]):
        (manifest.parent / row).unlink()
    few.to_csv(manifest, index=False)
    cli("embed", manifest.parent, "--out", tmp_path / "features", check=True)
    cli("index", "create", tmp_path / "atlas", check=True)
    cli("index", "add", tmp_path / "atlas", tmp_path / "features", check=True)
    report = cli_json("index", "evaluate", tmp_path / "atlas", "--bootstrap", 100)
    assert report["queries"] == 250 and report["leave_out"] == "patient"
    top1 = report["metrics"]["top1"]
    assert top1["interval_95"][0] > top1["majority"] and top1["value"] > 0.7
    assert 0 < report["latency"]["encode_ms"] < report["latency"]["end_to_end_ms"]
    text = cli("index", "evaluate", tmp_path / "atlas", "--bootstrap", 20).stdout
    assert "majority of 5" in text and "embed and search" in text
    assert "NaN" not in json.dumps(report)


def test_tiles_without_a_label_are_counted(tmp_path):
    labels = {f"slide-{n}": {"label": "ab"[n % 2], "patient": f"P{n}"} for n in range(4)}
    labels["slide-3"]["label"] = ""
    atlas = filled(tmp_path, slides=4, count=60, metadata=labels)
    report = evaluate(atlas, RetrievalOptions(bootstrap=20))
    assert report["queries"] == 180
    assert "left out: 60 of 240 tiles, which have no value of 'label'" in report["warnings"]
