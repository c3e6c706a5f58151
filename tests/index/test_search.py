"""Search: equal to brute force for every index and filter, also after tiles were added or removed."""

import shutil

import numpy as np
import pytest
from atlases import DIM, features, filled, grouped, unit
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from schedule import rounds

from histoseek.artifacts.feature_files import read_features
from histoseek.errors import BadInput, Damaged, NotFound
from histoseek.index.atlas import Atlas
from histoseek.index.search.query import Query
from histoseek.index.search.tiles import combined_vector
from histoseek.index.vectors import index as vectors
from histoseek.index.vectors import tuning
from histoseek.index.view import View
from histoseek.serving.encoders.open import DEFAULT_BUNDLE


def brute(atlas, queries, k, keep=lambda hit: True):
    """The k best tiles of each query by plain NumPy: ids and scores."""
    ids, stored = atlas.vectors()
    known = atlas.tiles(ids.tolist())
    rows = np.array([n for n, i in enumerate(ids.tolist()) if keep(known[i])], dtype=int)
    scores = queries @ stored[rows].T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids[rows][order].tolist(), np.take_along_axis(scores, order, 1)


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """An atlas of 6,000 tiles with inverted lists, and one slide more than its index file has."""
    folder = tmp_path_factory.mktemp("lists")
    atlas = filled(folder, slides=12, count=500)
    atlas.tune(exact_up_to=0)
    late = features(folder / "late.h5", 100, 77, features=grouped(np.random.default_rng(77), 100))
    atlas.add([late], {"late": {"label": "c", "patient": "P9"}})
    return atlas


def test_lists_reach_the_recall_they_were_tuned_for(lists):
    plan = lists.view().index.plan
    assert (plan.kind, plan.coding) == ("ivf", "sq8") and 1 <= plan.probes <= plan.cells
    about = lists.view().state.about
    assert about["measured"]["reached"] and about["measured"]["recall"] >= 0.99
    assert lists.view().index.recent_rows == 100
    report = lists.audit(queries=300)
    assert report["recall"] >= 0.985 and report["tiles_since_the_index_was_written"] == 100
    queries = grouped(np.random.default_rng(5), 50)
    truth, _ = brute(lists, queries, 10)
    found = [[hit.tile for hit in hits] for hits in lists.search(queries, 10)]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)]) >= 0.97
    exact = [[hit.tile for hit in hits] for hits in lists.search(queries, 10, exact=True)]
    assert exact == truth


@pytest.mark.parametrize("budget", [None, 1.1, 0.3])
def test_codes_are_ranked_again_by_the_vectors(tmp_path, budget):
    """6,000 vectors of 128 take 3.1 MB: their codes take less, and they are found all the same."""
    atlas = filled(tmp_path, slides=12, count=500)
    report = atlas.tune(memory_mb=budget, exact_up_to=0)
    plan = atlas.view().index.plan
    assert plan.coding == {None: "sq8", 1.1: "sq8", 0.3: "pq"}[budget]
    files = list(atlas.path.glob("index-*.faiss"))
    assert len(files) == 1 and files[0].stat().st_size < 1e6 * (budget or 1.0)
    assert report["measured"]["reached"], report
    queries = grouped(np.random.default_rng(5), 40)
    truth, scores = brute(atlas, queries, 10)
    hits = atlas.search(queries, 10)
    found = [[hit.tile for hit in answer] for answer in hits]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)]) >= 0.96
    best = [answer[0].score for answer in hits]
    assert np.allclose(best, scores[:, 0], atol=1e-5)  # exact, not those of the codes
    assert Atlas(atlas.path).verify() == []
    again = atlas.tune()  # without a budget the codes go
    assert again["plan"]["kind"] == "flat" and not list(atlas.path.glob("vectors-*.faiss"))


def test_what_cannot_be_reached_is_refused_with_what_could(lists):
    with pytest.raises(
        BadInput, match=r"do not fit into 0.01 MB; the smallest index takes about 0.2\d* MB"
    ):
        lists.tune(memory_mb=0.01)
    with pytest.raises(BadInput, match="recall"):
        lists.tune(recall=1.5)
    assert lists.verify() == []


def test_the_tail_folds_into_the_index_when_it_has_grown(tmp_path):
    atlas = filled(tmp_path, slides=4, count=100)
    first = atlas.view().generation
    late = [features(tmp_path / f"late-{n}.h5", 30, 50 + n) for n in range(5)]
    atlas.add(late[:2])
    assert atlas.view().generation == first and atlas.view().index.recent_rows == 60
    atlas.add(late[2:])
    assert atlas.view().generation > first and atlas.view().index.recent_rows == 0
    atlas.remove(["slide-0"])
    assert len(atlas.view().index) == 450 and atlas.verify() == []


@pytest.mark.parametrize("few", [False, True])
def test_filters_hold_on_lists_and_find_what_brute_force_does(lists, monkeypatch, few):
    if not few:  # as if what passes were too many to compare with all of it
        monkeypatch.setattr(vectors, "FILTER_EXACT", 0)
    lists._states._newest = None
    queries = grouped(np.random.default_rng(6), 40)
    for where, keep in (
        ("label = 'a'", lambda t: t["label"] == "a"),
        (
            "patient != 'P1' and organ = 'colon'",
            lambda t: t["patient"] != "P1" and t["label"] == "a",
        ),
        ("slide = 'late'", lambda t: t["slide"] == "late"),
        ("slide = 'slide-3' or patient = 'P9'", lambda t: t["slide"] in {"slide-3", "late"}),
    ):
        truth, _ = brute(lists, queries, 10, keep)
        hits = lists.search(queries, 10, where=where)
        assert all(keep(hit._asdict()) for answer in hits for hit in answer)
        found = [[hit.tile for hit in answer] for answer in hits]
        same = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)])
        assert same >= (0.999 if few else 0.95), where
        exact = lists.search(queries, 10, where=where, exact=True)
        assert [[hit.tile for hit in answer] for answer in exact] == truth
    assert lists.search(queries[:1], 5, where="label = 'none such'") == [[]]


def test_a_range_search_finds_all_and_only_what_is_near(lists):
    queries = grouped(np.random.default_rng(7), 5)
    ids, stored = lists.vectors()
    for query, hits in zip(queries, lists.search(queries, 100_000, least=0.5), strict=True):
        scores = stored @ query
        assert {h.tile for h in hits} == set(ids[scores >= 0.5].tolist()) and len(hits) > 100
        assert [h.rank for h in hits] == list(range(1, len(hits) + 1))
    assert len(lists.search(queries, 7, least=0.5)[0]) == 7
    assert lists.search(queries, 7, least=1.01) == [[]] * 5


def test_one_hit_per_slide_even_when_one_slide_holds_all_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr("histoseek.index.search.tiles.SLIDE_STEP", 32)
    rng = np.random.default_rng(0)
    centre = unit(rng, 1)
    near = centre + unit(rng, 300) * 0.1
    atlas = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    files = [features(tmp_path / "near.h5", 300, features=near.astype(np.float32))]
    files += [features(tmp_path / f"far-{n}.h5", 20, 5 + n) for n in range(4)]
    atlas.add(files)
    hits = atlas.search(centre.astype(np.float32), 5, per_slide=True)[0]
    assert hits[0].slide == "near" and len({h.slide for h in hits}) == 5
    _, stored = atlas.vectors()
    for hit in hits:
        own = read_features(tmp_path / f"{hit.slide}.h5").features
        assert hit.score == pytest.approx(float((own @ centre[0]).max() / np.linalg.norm(
            own[(own @ centre[0]).argmax()])), abs=1e-5)  # fmt: skip
    assert len(atlas.search(centre.astype(np.float32), 50, per_slide=True)[0]) == 5 < len(stored)


@pytest.mark.parametrize("without", ["tile", "slide", "patient"])
def test_a_tile_of_the_atlas_is_asked_without_its_own(lists, without):
    ids, stored = lists.vectors()
    asked = ids[[3, 700, 701, 6050]].tolist()
    known = lists.tiles(ids.tolist())
    for tile, hits in zip(
        asked, lists.search(tiles=asked, k=8, leave_out=without, exact=True), strict=True
    ):
        own = known[tile]
        key = {"tile": "tile", "slide": "slide", "patient": "patient"}[without]
        keep = [n for n, i in enumerate(ids.tolist()) if known[i][key] != own[key]]
        scores = stored[keep] @ stored[ids.tolist().index(tile)]
        best = ids[keep][np.argsort(-scores, kind="stable")[:8]].tolist()
        assert [h.tile for h in hits] == best
    with pytest.raises(BadInput, match="no tile 999999"):
        lists.search(tiles=[999_999])
    with pytest.raises(BadInput, match="tile, slide, patient"):
        lists.search(tiles=asked, leave_out="hospital")


def combined(atlas, k, like, unlike=None):
    query = Query(vectors=like, unlike_vectors=unlike, together=True, k=k)
    return atlas.ask(View.search, query)[0]


def test_more_like_these_unlike_those(lists):
    rng = np.random.default_rng(3)
    a, b = unit(rng, 2)
    plain = combined(lists, 5, np.stack([a, b]))
    middle = (a + b) / np.linalg.norm(a + b)
    assert [h.tile for h in plain] == [h.tile for h in lists.search(middle[None], 5)[0]]
    stored = dict(zip(*(x.tolist() for x in lists.vectors()), strict=True))
    away = combined(lists, 20, a[None], b[None])
    near = lists.search(a[None], 20)[0]
    assert np.mean([np.dot(stored[h.tile], b) for h in away]) < np.mean(
        [np.dot(stored[h.tile], b) for h in near]
    )
    with pytest.raises(BadInput, match="at least one"):
        combined(lists, 10, np.zeros((0, DIM), np.float32))


def test_a_view_stays_as_it_was_while_the_atlas_changes(tmp_path):
    """But it has no coordinates of a removed slide: it says so, and the atlas asks anew."""
    atlas = filled(tmp_path, slides=3, count=50)
    reader = Atlas(atlas.path)
    view, shown = reader.view(), reader.view()
    query, kept = (read_features(tmp_path / f"slide-{n}.h5").features[:1] for n in (1, 0))
    before = view.search(Query(vectors=kept, k=5, where="slide = 'slide-0'"))
    atlas.remove(["slide-1"])
    atlas.relabel([{"slide": "slide-0", "label": "other"}])
    assert len(view.index) == 150
    assert view.search(Query(vectors=kept, k=5, where="slide = 'slide-0'")) == before
    assert before[0][0].label == "a"
    with pytest.raises(Damaged, match="slide 2 of the state that is searched was removed"):
        shown.search(Query(vectors=query, k=5))
    assert reader.search(query, 1)[0][0].slide != "slide-1" and len(reader.view().index) == 100
    asked = []

    def drifted(view):
        asked.append(view.revision)
        if len(asked) == 1:
            atlas.relabel([{"slide": "slide-0", "label": "another"}])
        return view.drift()

    atlas.fit("kmeans", k=2)
    with (
        pytest.raises(Damaged, match=f"changed since revision {view.revision}"),
        view.state.reading(),
    ):
        pass
    assert reader.ask(drifted)["fitted"]["tiles"] == 100 and len(asked) == 2


def test_images_that_were_not_embedded_are_refused(lists):
    image = np.zeros((4, 4, 3), np.uint8)
    for more in ({"tiles": (1,)}, {"unlike_images": (image,)}):
        with pytest.raises(BadInput, match="not embedded"):
            lists.ask(View.search, Query(images=(image,), **more))


def test_one_tile_as_a_query_keeps_the_length_of_its_vector(tmp_path):
    """Clusters are fitted on vectors of any length; the index has them with length 1."""
    atlas = Atlas.create_external(tmp_path / "atlas", "uni", 16, "cosine")
    data = (np.random.default_rng(1).normal(size=(40, 16)) * 3).astype(np.float32)
    sha256 = atlas.manifest.sha256
    atlas.add(
        [features(tmp_path / "s.h5", 40, encoder="uni", encoder_sha256=sha256, features=data)]
    )
    (first,) = atlas.view().columns.ids(np.array([0])).tolist()
    vector = combined_vector(atlas.view().state, Query(tiles=(first,)))
    assert vector == pytest.approx(data[0], abs=1e-6)
    assert np.linalg.norm(vector) > 2


def test_an_l2_atlas_scores_by_distance(tmp_path):
    atlas = Atlas.create_external(tmp_path / "atlas", "uni", 16, "l2")
    rng = np.random.default_rng(1)
    data = (rng.normal(size=(1500, 16)) * 3).astype(np.float32)
    file = features(
        tmp_path / "s.h5", 1500, encoder="uni", encoder_sha256=atlas.manifest.sha256, features=data
    )
    atlas.add([file])
    for tuned in (False, True):
        if tuned:
            atlas.tune(exact_up_to=0, recall=0.999)
        hits = atlas.search(data[:3] + 0.01, 4)
        gap = np.linalg.norm(data[None] - (data[:3] + 0.01)[:, None], axis=2)
        for row, found in enumerate(hits):
            assert [h.score for h in found] == pytest.approx(
                (-np.sort(gap[row])[:4]).tolist(), abs=1e-3
            )
    assert atlas.search(data[:1], 2000, least=-1.0)[0][0].score == pytest.approx(0, abs=1e-3)
    atlas.remove(["s"])
    with pytest.raises(BadInput, match="no tiles"):
        atlas.search(data[:1])


@pytest.mark.parametrize("plan", [{}, {"exact_up_to": 0}])
def test_the_index_gives_back_the_vectors_of_the_files(tmp_path, plan):
    """Of the index file, exact or of codes, of the recent tiles, and between removed ones."""
    atlas = filled(tmp_path, slides=20, count=200)
    atlas.tune(**plan)
    atlas.remove(["slide-1"])
    rng = np.random.default_rng(50)
    atlas.add([features(tmp_path / "late.h5", 90, 9, features=3 * grouped(rng, 90))])
    state = atlas.view().state
    assert state.index.recent_rows == 90 and state.index.positions == 4090
    present = state.columns.present()
    assert len(present) == 3890
    rng.shuffle(present)
    expected = vectors.prepared(state.vectors_at(present), "cosine")
    assert np.array_equal(state.index.at(present), expected)
    assert state.index.at(present[:0]).shape == (0, DIM)
    query = grouped(rng, 1)[0]
    for name in ("slide-12", "late"):  # the scores of a slide are those of its own tiles
        row = next(slide for slide in state.columns.slides if slide["name"] == name)
        stored = vectors.prepared(state.store.vectors_of(row), "cosine")
        assert atlas.scores_in(name, query) == pytest.approx(stored @ query, abs=1e-5)
    with pytest.raises(NotFound, match="no slide 'slide-1'"):
        atlas.scores_in("slide-1", query)


def test_recall_is_measured_without_the_tile_itself():
    """Tiles that are asked find themselves first; counting that would flatter the index."""
    data = unit(np.random.default_rng(0), 200)
    asked = tuning.HeldOut(np.array([5, 9]), data[[5, 9]])
    truth = tuning.neighbours([data[:120], data[120:]], asked, 3, "cosine")
    scores = data[[5, 9]] @ data.T
    scores[0, 5] = scores[1, 9] = -2
    assert truth == pytest.approx(-np.sort(-scores, axis=1)[:, :3], abs=1e-6)
    index = vectors.VectorIndex(DIM, "cosine", data)
    assert tuning.recall_of(index, asked, truth, 3) == 1
    assert tuning.recall_of(index, asked, truth + 0.5, 3) == 0
    worse = vectors.VectorIndex(DIM, "cosine", data[190:])
    assert tuning.recall_of(worse, asked, truth, 3) < 1


def test_copies_of_one_picture_do_not_spoil_the_measurement(tmp_path):
    """Of 400 white tiles any ten are the nearest of each other."""
    atlas = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    data = grouped(np.random.default_rng(1), 3000)
    data[:400] = data[0]
    atlas.add([features(tmp_path / "s.h5", 3000, features=data)])
    report = atlas.tune(exact_up_to=0)
    assert report["measured"]["reached"] and report["plan"]["probes"] < report["plan"]["cells"]


def test_more_hits_than_the_usual_lists_hold(lists):
    queries = grouped(np.random.default_rng(8), 4)
    for k, where in ((1000, None), (10_000, None), (2_500, "organ = 'colon'")):
        hits = lists.search(queries, k, where)
        exact = lists.search(queries, k, where, exact=True)
        assert [len(answer) for answer in hits] == [len(answer) for answer in exact]
    slides = [{h.slide for h in answer} for answer in lists.search(queries, 13, per_slide=True)]
    assert [len(found) for found in slides] == [13] * 4


class AtlasEqualsAModel(RuleBasedStateMachine):
    """Any sequence of add, upsert, remove, relabel, tune and fit: search equals a plain dictionary."""

    def __init__(self):
        super().__init__()
        import tempfile
        from pathlib import Path

        self.folder = Path(tempfile.mkdtemp())
        self.atlas = Atlas.create(self.folder / "atlas", DEFAULT_BUNDLE)
        self.reader = Atlas(self.folder / "atlas")
        self.model = {}
        self.labels = {}
        self.seen = set()
        self.asked = 0

    def teardown(self):
        assert self.atlas.verify() == []
        shutil.rmtree(self.folder)

    @rule(name=st.sampled_from("pqrst"), count=st.integers(0, 40), seed=st.integers(0, 5))
    def add(self, name, count, seed):
        path = features(self.folder / f"{name}.h5", count, seed)
        data = read_features(path).features
        (result,) = self.atlas.add([path])
        if name not in self.model:
            assert result.state == "added"
            self.model[name] = data
        elif np.array_equal(self.model[name], data):
            assert result.state == "unchanged"
        else:
            assert result.state == "failed"

    @rule(name=st.sampled_from("pqrst"), count=st.integers(0, 40), seed=st.integers(0, 5))
    def upsert(self, name, count, seed):
        path = features(self.folder / f"{name}.h5", count, seed)
        (result,) = self.atlas.add([path], replace=True)
        data = read_features(path).features
        if name in self.model and np.array_equal(self.model[name], data):
            assert result.state == "unchanged"
        else:
            assert result.state == ("replaced" if name in self.model else "added")
        self.model[name] = data

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data):
        name = data.draw(st.sampled_from(sorted(self.model)))
        assert self.atlas.remove([name]) == len(self.model.pop(name))
        self.labels.pop(name, None)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), label=st.sampled_from(["x", "y", ""]))
    def relabel(self, data, label):
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.atlas.relabel([{"slide": name, "label": label}])
        self.labels[name] = label

    @precondition(lambda self: sum(map(len, self.model.values())) > 20)
    @rule()
    def fit(self):
        self.atlas.fit("kmeans", k=2)

    @precondition(lambda self: sum(map(len, self.model.values())) > 0)
    @rule()
    def tune(self):
        self.atlas.tune()

    @precondition(lambda self: sum(map(len, self.model.values())) > 40)
    @rule(budget=st.sampled_from([None, 0.09, 0.085]))
    def tune_lists(self, budget):
        with pytest.MonkeyPatch.context() as patch:  # lists and codes are for more tiles than these
            patch.setattr(tuning, "LEAST_FOR_LISTS", 10)
            try:
                self.atlas.tune(exact_up_to=0, memory_mb=budget)
            except BadInput as error:
                assert "do not fit" in str(error)

    @invariant()
    def search_equals_brute_force(self):
        self.asked += 1
        query = unit(np.random.default_rng(self.asked), 1)
        everything = [
            (float(vector @ query[0]), name, row)
            for name, data in self.model.items()
            for row, vector in enumerate(data)
        ]
        if not everything:
            with pytest.raises(BadInput, match="no tiles"):
                self.atlas.search(query)
            return
        everything.sort(key=lambda item: -item[0])
        for atlas in (self.atlas, self.reader):
            hits = atlas.search(query, 7, exact=True)[0]
            assert [h.score for h in hits] == pytest.approx(
                [s for s, _, _ in everything[:7]], abs=1e-5
            )
            if len(everything) == 1 or everything[0][0] > everything[1][0] + 1e-5:
                assert hits[0].slide == everything[0][1]
            assert all((h.label or "") == self.labels.get(h.slide, "") for h in hits)
        labelled = [s for s, name, _ in everything if self.labels.get(name) == "x"]
        found = self.atlas.search(query, 5, where="label = 'x'", exact=True)[0]
        assert [h.score for h in found] == pytest.approx(labelled[:5], abs=1e-5)
        ids = self.atlas.vectors()[0].tolist()
        assert len(ids) == len(everything) == len(set(ids))
        added = set(ids) - self.seen
        assert not self.seen or not added or min(added) > max(self.seen)  # never used again
        self.seen |= added


TestAtlasEqualsAModel = AtlasEqualsAModel.TestCase
TestAtlasEqualsAModel.pytestmark = [pytest.mark.deep]
TestAtlasEqualsAModel.settings = settings(
    max_examples=rounds(10, 100), stateful_step_count=12, deadline=None
)


def test_a_missing_feature_file_of_the_tail_is_named(tmp_path):
    atlas = filled(tmp_path, slides=4, count=50)
    late = features(tmp_path / "late.h5", 10, 9)
    atlas.add([late])
    next(atlas.path.glob("features/late-*.h5")).unlink()
    with pytest.raises(Damaged, match="late.*missing.*--replace"):
        Atlas(atlas.path).search(unit(np.random.default_rng(0), 1))
