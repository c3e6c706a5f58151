"""Similar slides and cases: the most similar come first, with matching regions; clusters are described."""

import numpy as np
import pytest
from atlases import DIM, features, filled, grouped, unit

from histoseek.artifacts.feature_files import read_features
from histoseek.errors import BadInput, Mismatch, NotFound
from histoseek.index.atlas import Atlas
from histoseek.index.clusters.mosaic import CLUSTERS, LEAST, SHARE, _spread, mosaic
from histoseek.index.search.query import Query
from histoseek.index.view import View
from histoseek.serving.encoders.open import DEFAULT_BUNDLE

KINDS = {
    "alpha": [[0], [1], [2]],
    "beta": [[3], [4], [5]],
    "mixed": [[0, 3], [1, 4], [2, 5]],
}
"""Directions that the tiles of a kind lie around: sums of some of six; mixed ones between the others."""


def of_kind(rng, kind, count=300):
    six = unit(np.random.default_rng(5), 6)
    centres = np.array([six[parts].sum(0) for parts in KINDS[kind]])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    vectors = centres[rng.integers(0, 3, count)] + unit(rng, count) * 0.3
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Three slides of each of three kinds of tissue; two of alpha are one patient's."""
    folder = tmp_path_factory.mktemp("kinds")
    atlas = Atlas.create(folder / "atlas", DEFAULT_BUNDLE)
    files, metadata = [], {}
    for kind in KINDS:
        for number in range(3):
            rng = np.random.default_rng([number, list(KINDS).index(kind)])
            name = f"{kind}-{number}"
            files.append(features(folder / f"{name}.h5", 300, number, features=of_kind(rng, kind)))
            same = kind == "alpha" and number < 2
            metadata[name] = {"label": kind, "patient": "PA" if same else f"P-{name}"}
    atlas.add(files, metadata)
    return atlas


@pytest.mark.parametrize("how", ["median", "votes"])
@pytest.mark.parametrize("by", ["slide", "patient"])
def test_slides_of_the_same_kind_come_first_but_never_the_same_patient(kinds, how, by):
    found = kinds.similar("beta-0" if by == "slide" else "P-beta-0", 5, by, how)
    kind = [s.label for s in found]
    assert kind[:2] == ["beta", "beta"] and [s.score for s in found] == sorted(
        (s.score for s in found), reverse=True
    )
    own = kinds.similar("alpha-0" if by == "slide" else "PA", 9, by, how)
    names = [s.name for s in own]
    assert names[0] in {"alpha-2", "P-alpha-2"}
    assert not {"alpha-0", "alpha-1", "PA"} & set(names)  # the same patient is no second opinion
    assert kinds.view().notes(None, patients=True) == []


def test_evidence_is_pairs_of_regions_that_are_alike(kinds):
    best = kinds.similar("beta-0", 1)[0]
    ids, stored = kinds.vectors()
    vector = dict(zip(ids.tolist(), stored, strict=True))
    assert len(best.pairs) == 5
    for pair in best.pairs:
        query, match = pair.query, pair.match
        tiles = kinds.tiles([query, match])
        assert tiles[query]["slide"] == "beta-0" and tiles[match]["slide"] == best.name
        assert pair.score == pytest.approx(float(vector[query] @ vector[match]), abs=1e-4)
    assert len({p.match for p in best.pairs}) == len({p.query for p in best.pairs}) == 5


def test_the_score_is_yottixels_median_of_minimum_distances(kinds):
    state = kinds.view().state
    names = [slide["name"] for slide in state.columns.slides]
    ids, stored = kinds.vectors()

    def mosaic_vectors(name):
        tiles = state.columns.ids(state.mosaic_of(names.index(name)))
        return stored[np.searchsorted(ids, tiles)]

    a = mosaic_vectors("beta-0")
    for other in kinds.similar("beta-0", 9):
        b = mosaic_vectors(other.name)
        assert other.score == pytest.approx(float(np.median((a @ b.T).max(axis=1))), abs=1e-5)


def test_slides_of_an_l2_atlas_are_compared_by_distance(tmp_path):
    """Far from the origin, where a squared distance from products would be lost in rounding."""
    atlas = Atlas.create_external(tmp_path / "atlas", "uni", 16, "l2")
    rng = np.random.default_rng(3)
    files = [
        features(
            tmp_path / f"{n}.h5", 120, n, encoder="uni", encoder_sha256=atlas.manifest.sha256,
            features=(rng.normal(size=(120, 16)) + 300 + n).astype(np.float32),
        )
        for n in range(4)
    ]  # fmt: skip
    atlas.add(files)
    state = atlas.view().state
    names = [slide["name"] for slide in state.columns.slides]
    mosaics = {name: state.vectors_at(state.mosaic_of(n)) for n, name in enumerate(names)}
    found = atlas.similar("0", 3)
    assert [similar.name for similar in found] == ["1", "2", "3"]
    for similar in found:
        gaps = mosaics["0"][:, None].astype(float) - mosaics[similar.name]
        nearest = np.linalg.norm(gaps, axis=2).min(axis=1)
        assert similar.score == pytest.approx(-np.median(nearest), abs=1e-3)
        assert similar.pairs[0].score == pytest.approx(-nearest.min(), abs=1e-3)


def test_the_usual_nearness_names_the_tiles_it_is_of(kinds, tmp_path):
    """An atlas of one patient has no tiles of others: its own must not be called that."""
    assert kinds.usual_nearness().others == "patient"
    one = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    files = [features(tmp_path / f"{n}.h5", 100, n) for n in range(2)]
    one.add(files[:1])
    near = one.usual_nearness()
    assert near.others == "tile" and len(near.scores) == 100
    one.add(files[1:])
    assert one.usual_nearness().others == "patient", "another slide without a patient"
    one.add([features(tmp_path / "bare.h5", 0)])
    with pytest.raises(NotFound, match="slide 'bare' has no tiles, so nothing can be compared"):
        one.similar("bare")


def test_a_comparison_reads_no_feature_file(kinds, monkeypatch):
    """Reading all of them takes long in a large atlas."""
    from histoseek.index.store.store import Store

    monkeypatch.setattr(Store, "vectors_of", None)
    opened = Atlas(kinds.path)
    assert [s.label for s in opened.similar("beta-0", 2)] == ["beta", "beta"]
    assert [s.label for s in opened.similar("P-beta-0", 2, by="patient")] == ["beta", "beta"]
    assert len(opened.similar("beta-0", 2, how="votes")) == 2
    assert len(opened.usual_nearness().scores) == 200
    assert opened.out_of_distribution_share() < 0.5
    assert len(opened.search(tiles=[1, 2], k=3)[0]) == 3
    together = Query(tiles=(1, 2), unlike_tiles=(400,), k=3)
    assert len(opened.ask(View.search, together)[0]) == 3
    assert opened.scores_in("mixed-1", opened.view().index.at(np.array([7]))[0]).shape == (300,)


def test_new_tiles_are_compared_like_a_slide_and_filters_count(kinds):
    new = of_kind(np.random.default_rng(77), "beta", 40)
    assert [s.label for s in kinds.similar(new, 3)] == ["beta"] * 3
    only = kinds.similar(new, 9, where="label != 'beta'")
    assert {s.label for s in only} == {"alpha", "mixed"} and only[0].label == "mixed"
    with pytest.raises(BadInput, match="unknown slide 'none'"):
        kinds.similar("none")
    with pytest.raises(BadInput, match="median, votes"):
        kinds.similar(new, how="mean")
    with pytest.raises(BadInput, match="patient, slide"):
        kinds.similar(new, by="hospital")
    with pytest.raises(Mismatch):
        kinds.similar(new[:, :5])
    with pytest.raises(BadInput, match="no other slide"):
        kinds.similar("beta-0", where="slide = 'beta-0'")


def test_patients_of_a_tile_set_are_cases_and_never_their_own_evidence(tmp_path):
    atlas = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    files = []
    for n, name in enumerate(("train", "test")):
        groups = tuple(f"P{i // 4}" for i in range(40))
        files.append(
            features(tmp_path / f"{name}.h5", 40, n, kind="tiles", files=tuple(map(str, range(40))),
                     coords=np.zeros((40, 2), int), groups=groups)
        )  # fmt: skip
    files.append(features(tmp_path / "P3.h5", 30, 7))  # a slide without patient, named like one
    atlas.add(files)
    found = atlas.similar("P3", 20, by="patient")
    assert "P3" in {s.name for s in found}  # the slide of that name is another case
    (note,) = atlas.view().notes(None, patients=True)
    assert note.startswith("the patient of tiles in 1 of 3 slides is unknown: ")
    known = atlas.tiles(atlas.vectors()[0].tolist())
    for case in found:
        for pair in case.pairs:
            assert known[pair.query]["patient"] == "P3" != known[pair.match]["patient"]
    with pytest.raises(BadInput, match="no other slide"):
        atlas.similar("train", where="slide = 'test' and patient is not null")


def test_a_mosaic_is_few_tiles_of_every_kind_that_lie_apart():
    rng = np.random.default_rng(0)
    vectors = grouped(rng, 4000, groups=6, spread=0.2)
    places = rng.integers(0, 100_000, (4000, 2))
    rows = mosaic(vectors, places)
    assert CLUSTERS * LEAST <= len(rows) <= SHARE * 4000 + CLUSTERS * LEAST
    assert len(set(rows.tolist())) == len(rows) and (np.diff(rows) > 0).all()
    nearest = (vectors @ vectors[rows].T).max(axis=1)
    assert nearest.min() > 0.5  # nothing is left out
    kept = places[_spread(places.astype(float), 30, 0)]
    random = places[rng.choice(4000, 30, replace=False)]
    assert nearest_gap(kept) > 1.5 * nearest_gap(random)


def nearest_gap(places):
    """Median distance of each place to the nearest other one."""
    gaps = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(gaps, np.inf)
    return np.median(gaps.min(axis=1))


def test_mosaics_of_few_and_of_identical_tiles():
    assert mosaic(unit(np.random.default_rng(0), 5), np.zeros((5, 2))).tolist() == [0, 1, 2, 3, 4]
    assert mosaic(np.zeros((0, DIM), np.float32), np.zeros((0, 2))).tolist() == []
    assert len(mosaic(np.ones((500, DIM), np.float32), np.zeros((500, 2)))) == 18
    same_place = mosaic(grouped(np.random.default_rng(1), 900), np.zeros((900, 2)))
    assert 18 <= len(same_place) <= 70


def test_clusters_are_described_named_and_kept(kinds):
    kinds.fit("kmeans", k=6, name="six")
    kinds.name_cluster(2, "stroma", "pink fibres", "six")
    report = kinds.clusters("six")
    assert [c["cluster"] for c in report] == list(range(6))
    assert sum(c["tiles"] for c in report) == 2700
    third = report[2]
    assert (third["name"], third["description"]) == ("stroma", "pink fibres")
    assert sum(third["labels"].values()) == third["tiles"]
    assert len({t["slide"] for t in third["examples"]}) == 3  # of several slides
    example = kinds.vectors_of([third["examples"][0]["tile"]])
    (placed,) = kinds.assign(example, "six")
    assert (placed["cluster"], placed["name"]) == (2, "stroma")
    kinds.name_cluster(2, "", clustering="six")
    assert kinds.clusters("six")[2]["name"] == ""
    with pytest.raises(BadInput, match="no cluster 6.*0 to 5"):
        kinds.name_cluster(6, "x", clustering="six")
    with pytest.raises(BadInput, match="longer than"):
        kinds.name_cluster(1, "x" * 3000, clustering="six")


def test_drift_is_told_by_slide_and_only_when_it_is_sure(tmp_path):
    atlas = filled(tmp_path, slides=6, count=300)
    atlas.fit("kmeans", k=12)
    assert atlas.drift()["later"]["tiles"] == 0 and not atlas.drift()["drifted"]
    usual = features(
        tmp_path / "usual.h5", 300, 50, features=grouped(np.random.default_rng(50), 300)
    )
    atlas.add([usual])
    report = atlas.drift()
    assert report["later"]["tiles"] == 300 and not report["drifted"], report
    atlas.add(
        [features(tmp_path / "strange.h5", 300, 51)]
    )  # noise: of no direction that was fitted
    report = atlas.drift()
    assert report["drifted"] and report["slides"][0]["slide"] == "strange"
    low, high = report["later"]["interval_95"]
    assert low < report["later"]["share"] < high
    assert read_features(usual).name == "usual"
