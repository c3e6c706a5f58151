"""Several atlases searched as one find what one atlas of all their slides finds."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from atlases import DIM, features, grouped, unit

from histoseek.errors import BadInput, Mismatch, NotFound, Unavailable
from histoseek.index.atlas import Atlas
from histoseek.index.exchange.milvus_push import push
from histoseek.index.federation.answers import Example
from histoseek.index.federation.federation import Federation
from histoseek.index.federation.shards import AtlasShard
from histoseek.index.search.query import Query
from histoseek.serving.encoders.open import DEFAULT_BUNDLE

SHARDS = {"north": (0, 1, 3), "south": (2, 4), "west": (5,)}
"""Slides of each atlas; slides 2 and 3 are of one patient, and so are 4 and 5. Slide 1 has no patient."""
METADATA = {
    f"slide-{n}": {
        "label": "ab"[n % 2], "organ": ("colon", "lung")[n % 2],
        **({"patient": f"P{n // 2}"} if n != 1 else {}), **({"grade": str(n)} if n == 5 else {}),
    }
    for n in range(6)
}  # fmt: skip
WHERES = (
    None, "organ = 'colon'", "patient != 'P1'", "patient is null", "grade = '5'", "grade != '5'",
    "not (grade > 3) and label = 'b'", "grade is null or x < 2000", "slide in ('slide-2', 'slide-5')",
    "label = 'zzz'",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One atlas of all slides, and the folder with an atlas for each of SHARDS."""
    folder = tmp_path_factory.mktemp("federation")
    files = []
    for n in range(6):
        vectors = grouped(np.random.default_rng(n), 80)
        files.append(features(folder / f"slide-{n}.h5", 80, n, features=vectors))
    big = Atlas.create(folder / "big", DEFAULT_BUNDLE)
    big.add(files, METADATA)
    for name, slides in SHARDS.items():
        shard = Atlas.create(folder / name, DEFAULT_BUNDLE)
        shard.add(
            [files[n] for n in slides], {f"slide-{n}": METADATA[f"slide-{n}"] for n in slides}
        )
    return big, folder


@pytest.fixture(scope="module")
def together(made):
    _, folder = made
    return Federation([folder / name for name in SHARDS])


QUERIES = grouped(np.random.default_rng(77), 5)


def place(hit):
    """What identifies a tile whatever the atlas."""
    return hit.slide, hit.x, hit.y


def same(answers, expected):
    """The hits of one atlas in its order; scores that rounding alone tells apart may swap places."""
    assert len(answers) == len(expected)
    for mine, theirs in zip(answers, expected, strict=True):
        assert [one.hit.rank for one in mine] == [hit.rank for hit in theirs]
        assert [one.hit.score for one in mine] == pytest.approx(
            [hit.score for hit in theirs], abs=2e-6
        )
        known = {place(hit): hit for hit in theirs}
        for one in mine:
            hit = known[place(one.hit)]
            assert one.hit.score == pytest.approx(hit.score, abs=2e-6)
            assert one.hit._replace(tile=0, score=0, rank=0) == hit._replace(
                tile=0, score=0, rank=0
            )
            number = int(hit.slide.removeprefix("slide-"))
            assert number in SHARDS[one.atlas]


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("more", [{}, {"per_slide": True}, {"least": 0.6}, {"k": 1000}])
def test_vectors_find_the_same_as_in_one_atlas(made, together, where, more):
    big, _ = made
    query = Query(vectors=QUERIES, where=where, **{"k": 12, **more})
    answer = together.search(query)
    same(answer.hits, big.view().search(query))
    assert not answer.away and not answer.shared_slides
    assert [shard.tiles for shard in answer.shards] == [240, 160, 80]


@pytest.mark.parametrize("leave_out", ["tile", "slide", "patient"])
@pytest.mark.parametrize("more", [{}, {"per_slide": True}, {"where": "grade != '5'"}])
@pytest.mark.parametrize("combined", [False, True])
def test_tiles_find_the_same_as_in_one_atlas(made, together, leave_out, more, combined):
    """Slide and patient of an example are left out in every shard."""
    big, folder = made
    examples = [("slide-3", 4), ("slide-1", 7), ("slide-5", 9)]
    in_big, in_shards = [], []
    for slide, row in examples:
        number = int(slide.removeprefix("slide-"))
        name = next(name for name, slides in SHARDS.items() if number in slides)
        for atlas, ids in ((big, in_big), (Atlas(folder / name), in_shards)):
            view = atlas.view()
            at = [s["name"] for s in view.columns.slides].index(slide)
            tile = int(view.columns.ids(view.columns.starts[at : at + 1] + row)[0])
            ids.append(tile if atlas is big else Example(name, tile))
    settings = {"leave_out": leave_out, "k": 15, "together": combined, **more}
    unlike = {"unlike_tiles": tuple(in_big[2:])} if combined else {}
    expected = big.view().search(Query(tiles=tuple(in_big[:2]), **unlike, **settings))
    answer = together.search(Query(**settings), in_shards[:2], in_shards[2:] if combined else ())
    same(answer.hits, expected)


def test_names_of_one_atlas_are_refused(together):
    for where in ("cluster = 1", "tile < 5", "organ = 'colon' and cluster.kmeans = 2"):
        with pytest.raises(BadInput, match="something else in each atlas"):
            together.search(Query(vectors=QUERIES, where=where))
    with pytest.raises(NotFound, match=r"unknown field 'stage'.*grade.*organ"):
        together.search(Query(vectors=QUERIES, where="stage = 2"))
    with pytest.raises(BadInput, match="cannot be read at character"):
        together.search(Query(vectors=QUERIES, where="label ="))
    with pytest.raises(BadInput, match="the filter is empty"):
        together.search(Query(vectors=QUERIES, where=" "))
    with pytest.raises(BadInput, match="need the name of their atlas"):
        together.search(Query(tiles=(3,)))
    with pytest.raises(BadInput, match="no example"):
        together.search(Query())
    with pytest.raises(NotFound, match="unknown atlas 'east'; choose one of: north, south, west"):
        together.search(Query(), [Example("east", 1)])
    with pytest.raises(NotFound, match="has no tile 999"):
        together.search(Query(), [Example("north", 999)])
    with pytest.raises(Mismatch, match="shape"):
        together.search(Query(vectors=np.ones((1, 3), dtype=np.float32)))


def test_shards_are_named_and_given_once(made, tmp_path):
    _, folder = made
    other = tmp_path / "north"
    Atlas.create(other, DEFAULT_BUNDLE).add([features(tmp_path / "more.h5", 30, 9)])
    both = Federation([folder / "north", other, folder / "south"])
    assert [shard.name for shard in both.shards] == [
        f"{folder.name}/north", f"{tmp_path.name}/north", "south",
    ]  # fmt: skip
    with pytest.raises(BadInput, match="given twice"):
        Federation([folder / "north", folder / "south" / ".." / "north"])
    with pytest.raises(BadInput, match="no atlas was given"):
        Federation([])


def test_another_encoder_is_refused(made, tmp_path):
    _, folder = made
    Atlas.create_external(tmp_path / "uni", "uni", DIM)
    with pytest.raises(Mismatch, match=r"uni has the encoder 'uni'.*north has"):
        Federation([folder / "north", tmp_path / "uni"]).search(Query(vectors=QUERIES))


def test_a_slide_of_two_atlases_is_one_slide(made, tmp_path):
    big, folder = made
    copy = tmp_path / "copy"
    Atlas.create(copy, DEFAULT_BUNDLE).add(
        [folder / "slide-2.h5"], {"slide-2": METADATA["slide-2"]}
    )
    doubled = Federation([*(folder / name for name in SHARDS), copy])
    query = Query(vectors=QUERIES, k=6, per_slide=True)
    answer = doubled.search(query)
    assert answer.shared_slides == {"slide-2": ["south", "copy"]}
    same(answer.hits, big.view().search(query))


def test_an_empty_atlas_is_searched(made, tmp_path):
    big, folder = made
    Atlas.create(tmp_path / "new", DEFAULT_BUNDLE)
    query = Query(vectors=QUERIES, where="grade != '5'")
    answer = Federation([*(folder / name for name in SHARDS), tmp_path / "new"]).search(query)
    same(answer.hits, big.view().search(query))
    assert answer.shards[-1].tiles == 0


def test_what_is_away_is_named_and_not_waited_for(made, tmp_path, monkeypatch):
    big, folder = made
    query = Query(vectors=QUERIES, where="slide != 'slide-5'")
    gone = tmp_path / "gone"
    answer = Federation([folder / "north", gone, folder / "south"]).search(query)
    same(answer.hits, big.view().search(query))
    (away,) = answer.away
    assert away.atlas == "gone" and "is not an atlas" in away.away and away.revision is None
    with pytest.raises(Unavailable, match=r"the atlas cannot be searched: gone: .*gone"):
        Federation([gone]).search(query)

    hung, release = threading.Event(), threading.Event()
    find = AtlasShard.find

    def slow(self, *asked):
        if self.name == "west":
            hung.set()
            release.wait(60)
        return find(self, *asked)

    monkeypatch.setattr(AtlasShard, "find", slow)
    patient = Federation([folder / name for name in SHARDS], timeout_s=0.5)
    began = time.monotonic()
    answer = patient.search(query)
    assert hung.is_set() and time.monotonic() - began < 5
    same(answer.hits, big.view().search(query))
    assert [(one.atlas, one.away) for one in answer.away] == [("west", "no answer within 0.5 s")]
    began = time.monotonic()  # it is not asked again while its thread hangs
    answer = patient.search(query)
    assert time.monotonic() - began < 0.4
    assert answer.away[0].away == "no answer within 0.5 s to an earlier question"
    with pytest.raises(Unavailable, match="west of an example cannot be searched"):
        patient.search(query, [Example("west", 1)])
    release.set()
    for _ in range(100):
        if not (answer := patient.search(query)).away:
            break
        time.sleep(0.05)
    assert not answer.away


def test_a_damaged_shard_is_away(made, tmp_path):
    big, folder = made
    damaged = tmp_path / "damaged"
    Atlas(folder / "west").snapshot(damaged)
    (damaged / "atlas.db").write_bytes(b"no database" * 1000)
    answer = Federation([folder / "north", folder / "south", damaged]).search(
        Query(vectors=QUERIES, k=5)
    )
    assert [one.atlas for one in answer.away] == ["damaged"] and len(answer.hits) == 5


def test_collections_of_milvus_are_shards(made, tmp_path):
    """The same hits from two collections and an atlas on disk, also with a column that one lacks."""
    big, folder = made
    urls = [f"milvus://{tmp_path}/{name}.db?collection={name}" for name in ("south", "west")]
    for url in urls:
        push(Atlas(folder / url.rpartition("=")[2]), url)
    mixed = Federation([folder / "north", *urls])
    try:
        for where in (None, "organ = 'colon'", "grade != '5'", "grade = '5' or label = 'a'"):
            for more in ({}, {"per_slide": True}, {"least": 0.6}):
                query = Query(vectors=QUERIES, k=12, where=where, **more)
                answer = mixed.search(query)
                expected = big.view().search(query)
                for mine, theirs in zip(answer.hits, expected, strict=True):
                    assert [place(one.hit) for one in mine] == [place(hit) for hit in theirs]
                    assert [one.hit.score for one in mine] == pytest.approx(
                        [hit.score for hit in theirs], abs=2e-6
                    )
        assert [shard.atlas for shard in answer.shards] == ["north", "south", "west"]
        with pytest.raises(BadInput, match="south is a Milvus collection"):
            mixed.search(Query(), [Example("south", 1)])
        assert mixed.an_atlas().path.name == "north"
        with pytest.raises(Unavailable, match="all are in Milvus"):
            Federation(urls[:1]).an_atlas()
    finally:
        mixed.close()


def test_scores_of_ties_keep_the_order_of_the_atlases(tmp_path):
    vector = unit(np.random.default_rng(3), 1)
    for name in ("one", "two"):
        file = features(tmp_path / f"{name}.h5", 3, 1, features=np.repeat(vector, 3, axis=0))
        Atlas.create(tmp_path / name / "atlas", DEFAULT_BUNDLE).add([file])
    answer = Federation([tmp_path / "two" / "atlas", tmp_path / "one" / "atlas"]).search(
        Query(vectors=vector, k=4)
    )
    assert [one.hit.slide for one in answer.hits[0]] == ["two", "two", "two", "one"]


def test_the_command_searches_several_atlases(made, cli, cli_json, tmp_path, tile_folder):
    big, folder = made
    north, south, west = (folder / name for name in SHARDS)
    found = cli_json(
        "index", "search", north, south, west, "--tile", "north:1", "--tile", "west:3", "-k", 4,
        "--leave-out", "slide", "--where", "grade != '5'",
    )  # fmt: skip
    assert [(a["atlas"], a["tiles"], a["away"]) for a in found["atlases"]] == [
        ("north", 240, ""), ("south", 160, ""), ("west", 80, ""),
    ]  # fmt: skip
    first, second = found["answers"]
    assert len(first) == len(second) == 4
    assert "slide-0" not in {hit["slide"] for hit in first}
    for hit in first + second:
        assert int(hit["slide"][-1]) in SHARDS[hit["atlas"]]

    image = tile_folder / "tissue/00.png"
    words = (
        "index",
        "search",
        north,
        south,
        tmp_path / "gone",
        image,
        "--unlike",
        "south:5",
        "-k",
        3,
    )
    away = cli(*words, "--json")
    assert away.returncode == 1
    document = json.loads(away.stdout)
    assert "is not an atlas" in document["atlases"][2]["away"] and len(document["answers"][0]) == 3
    human = cli(*words)
    assert human.returncode == 1 and "gone was not searched: " in human.stdout
    assert "searched 2 of 3 atlases, 400 tiles" in human.stdout

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    unread = cli("index", "search", north, south, broken, "--json")
    assert unread.returncode == 1
    document = json.loads(unread.stdout)
    assert document["answers"][0]["error"] and len(document["atlases"]) == 2

    for words, said in (
        ((north, south, "--tile", "5"), "write ATLAS:ID, such as north:12"),
        ((north, "--tile", "north:5"), "expected the id of a tile"),
        ((north, south, "--tile", "east:5"), "unknown atlas 'east'"),
        ((north, south, image, "--engine", "milvus://h/c"), "further atlases instead"),
        ((north, north, image), "given twice"),
        ((tmp_path / "a", tmp_path / "b", image), "no atlas is a folder that can be opened (a: "),
    ):
        refused = cli("index", "search", *words)
        assert refused.returncode != 0 and said in refused.stderr, refused.stderr


def test_questions_of_several_threads_are_all_answered(made, together):
    big, _ = made
    query = Query(vectors=QUERIES, k=8)
    expected = big.view().search(query)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: together.search(query), range(60)))
    assert not any(answer.away for answer in answers)
    for answer in answers[::10]:
        same(answer.hits, expected)


def test_each_atlas_has_the_whole_timeout(made, monkeypatch):
    """Many slow atlases together take longer than the timeout of one; none of them is away."""
    _, folder = made
    find = AtlasShard.find

    def slow(self, *asked):
        time.sleep(0.4)
        return find(self, *asked)

    monkeypatch.setattr(AtlasShard, "find", slow)
    answer = Federation([folder / name for name in SHARDS], timeout_s=0.7).search(
        Query(vectors=QUERIES)
    )
    assert not answer.away
    for timeout in (0, -1, float("nan"), 1e9):
        with pytest.raises(BadInput, match="the timeout is"):
            Federation([folder / "north"], timeout)


def test_only_the_chosen_atlases_are_asked(made, tmp_path, monkeypatch):
    _, folder = made
    Atlas.create_external(tmp_path / "uni", "uni", DIM)
    asked = []
    facts = AtlasShard.facts
    monkeypatch.setattr(AtlasShard, "facts", lambda self: asked.append(self.name) or facts(self))
    mixed = Federation([folder / "north", folder / "south", tmp_path / "uni"])
    answer = mixed.search_near(QUERIES[0], Query(k=3), only=["south"])
    assert set(asked) == {"south"} and [shard.atlas for shard in answer.shards] == ["south"]
    assert mixed.an_atlas().path.name == "north" and set(asked) == {"south", "north"}
    with pytest.raises(Mismatch, match="uni has the encoder 'uni'"):
        mixed.search_near(QUERIES[0], Query(k=3))
    mixed.strict = False
    answer = mixed.search_near(QUERIES[0], Query(k=3))
    assert [shard.atlas for shard in answer.away] == ["uni"]
    assert "only atlases of the same encoder" in answer.away[0].away


def test_tiles_of_other_scales_are_named(made, tmp_path):
    _, folder = made
    coarse = Atlas.create(tmp_path / "coarse", DEFAULT_BUNDLE)
    coarse.add([features(tmp_path / "coarse.h5", 20, 3, target_mpp=2.0)])
    query = Query(vectors=QUERIES, k=3)
    answer = Federation([folder / "north", coarse]).search(query)
    assert answer.mixed_scales and [s.scales for s in answer.shards] == [(0.5, 0.5), (2.0, 2.0)]
    assert not Federation([folder / "north", folder / "south"]).search(query).mixed_scales


def test_what_milvus_cannot_filter_by_is_refused(made, tmp_path):
    """Its tiles have files, so they must not count as tiles without."""
    _, folder = made
    url = f"milvus://{tmp_path}/west.db?collection=west"
    push(Atlas(folder / "west"), url)
    mixed = Federation([folder / "north", url])
    for where in (
        "file like '%.png'", "label = 'a' or annotation.label is null", "sharpness > .1",
    ):  # fmt: skip
        with pytest.raises(BadInput, match="by which west, a Milvus collection, cannot filter"):
            mixed.search(Query(vectors=QUERIES, where=where))
    mixed.close()
    with pytest.raises(BadInput, match="given twice"):
        Federation([f"milvus://{tmp_path}/a.db", f"milvus://{tmp_path}/a.db?collection=histoseek"])


def test_a_column_of_an_atlas_that_is_away(made, tmp_path):
    _, folder = made
    with pytest.raises(NotFound, match=r"unknown field 'grade'.*not asked: gone: "):
        Federation([folder / "north", tmp_path / "gone"]).search(
            Query(vectors=QUERIES, where="grade = 5")
        )


def test_a_long_filter_and_many_left_out_names(made, together):
    """What is left out is no part of the filter's text, whose length is limited."""
    _, folder = made
    where = "label in (" + ", ".join(f"'{n:09d}'" for n in range(760)) + ", 'a')"
    assert len(where) > 9_000
    examples = [Example("north", 1), Example("south", 1)]
    query = Query(where=where, leave_out="patient", k=5, together=True)
    assert {one.hit.label for one in together.search(query, examples).hits[0]} == {"a"}


def test_what_the_command_says_of_mistakes(made, cli, tmp_path):
    _, folder = made
    (tmp_path / "images").mkdir()
    for words, said in (
        ((folder / "north", tmp_path / "images"), "taken for atlases: "),
        ((folder / "north", "--tile", "\u00b2"), "expected the id of a tile"),
        ((folder / "north", "--tile", "9" * 40), "expected the id of a tile"),
        ((folder / "north", folder / "south", "--tile", "north:\u00b2"), "names no atlas"),
        (
            (folder / "north", folder / "south", "--tile", "north:1", "--timeout", "0"),
            "the timeout is",
        ),
    ):
        refused = cli("index", "search", *words)
        assert refused.returncode == 1 and said in " ".join(refused.stderr.split()), refused.stderr
        assert "Traceback" not in refused.stderr


def the_case(one):
    return one.case.name, one.case.label, pytest.approx(one.case.score, abs=2e-6)


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("query", ["slide-0", "slide-1", "slide-3", "slide-4", "vectors"])
def test_similar_slides_are_those_of_one_atlas(made, together, query, where):
    big, _ = made
    asked = QUERIES if query == "vectors" else query
    try:
        expected = big.view().similar(asked, 3, "slide", "median", where)
    except BadInput as error:
        with pytest.raises(BadInput, match=str(error)[:30]):
            together.similar(asked, 3, "slide", where)
        return
    found = together.similar(asked, 3, "slide", where)
    assert [the_case(one) for one in found.cases] == [(c.name, c.label, c.score) for c in expected]
    homes = {f"slide-{n}": name for name, slides in SHARDS.items() for n in slides}
    assert found.atlas == homes.get(query) and not found.searched.away
    for one, theirs in zip(found.cases, expected, strict=True):
        assert one.atlas == homes[one.case.name]
        for pair, same in zip(one.case.pairs, theirs.pairs, strict=True):
            assert pair.score == pytest.approx(same.score, abs=2e-6)
            at = one.tiles[pair.match]
            there = big.view().tiles([same.match])[same.match]
            assert (at["slide"], at["x"], at["y"]) == (there["slide"], there["x"], there["y"])
            if query == "vectors":
                assert pair.query is None
            else:
                there = big.view().tiles([same.query])[same.query]
                own = one.query_tiles[pair.query]
                assert (own["slide"], own["x"], own["y"]) == (query, there["x"], there["y"])


def test_a_patient_of_two_atlases_is_left_out_of_both_and_is_a_case_of_each(made, together):
    found = together.similar("P0", 10, "patient")
    assert found.atlas == "north"
    assert {(one.atlas, one.case.name) for one in found.cases} == {
        ("north", "slide-1"), ("north", "P1"), ("south", "P1"), ("south", "P2"), ("west", "P2"),
    }  # fmt: skip
    scores = [one.case.score for one in found.cases]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(BadInput, match="north and south have a patient 'P1'; name its atlas"):
        together.similar("P1", 10, "patient")
    others = together.similar("P1", 10, "patient", atlas="south")
    assert others.atlas == "south" and "P1" not in {one.case.name for one in others.cases}


def test_a_slide_of_two_atlases_is_never_similar_to_itself(made, tmp_path):
    """Neither where both say nothing of the patient, nor where only one of them does."""
    _, folder = made
    files = [folder / f"slide-{n}.h5" for n in range(4)]
    for name, metadata in (("one", METADATA), ("two", {})):
        rows = {f"slide-{n}": metadata.get(f"slide-{n}", {}) for n in range(4)}
        Atlas.create(tmp_path / name, DEFAULT_BUNDLE).add(files, rows)
    several = Federation([tmp_path / "one", tmp_path / "two"])
    for slide in ("slide-0", "slide-1"):
        for by in ("slide", "patient"):
            for home in ("one", "two"):
                is_known = (slide, by, home) == ("slide-0", "patient", "one")
                found = several.similar("P0" if is_known else slide, 20, by, atlas=home)
                assert slide not in {one.case.name for one in found.cases}
                assert max(one.case.score for one in found.cases) < 0.999
    with pytest.raises(BadInput, match="one and two have a slide 'slide-1'.*such as one:slide-1"):
        several.similar("slide-1")


def test_patients_of_a_tile_set_of_the_same_name_stay(tmp_path):
    """``tiles`` in two atlases: by patient, only the asked patient is left out of the other one."""
    for name, seed in (("one", 1), ("two", 2)):
        file = features(
            tmp_path / name / "tiles.h5", 40, seed, kind="tiles", files=tuple(map(str, range(40))),
            coords=np.zeros((40, 2), int), groups=tuple(f"P{i // 10}" for i in range(40)),
            features=grouped(np.random.default_rng(seed), 40),
        )  # fmt: skip
        Atlas.create(tmp_path / name / "atlas", DEFAULT_BUNDLE).add([file])
    several = Federation([tmp_path / "one/atlas", tmp_path / "two/atlas"])
    found = several.similar("P0", 20, "patient", atlas="one/atlas")
    assert {(one.atlas[:3], one.case.name) for one in found.cases} == {
        (atlas, f"P{n}") for atlas in ("one", "two") for n in (1, 2, 3)
    }
    with pytest.raises(BadInput, match="there is no other slide to compare with"):
        several.similar("tiles", atlas="one/atlas")


def test_what_similar_refuses(made, together, tmp_path):
    _, folder = made
    with pytest.raises(
        NotFound, match="unknown kind of case 'case'; choose one of: patient, slide"
    ):
        together.similar("slide-0", by="case")
    with pytest.raises(Mismatch, match="expected"):
        together.similar(QUERIES[:, :5])
    with pytest.raises(NotFound, match="unknown atlas 'east'"):
        together.similar("slide-0", atlas="east")
    away = Federation([folder / "north", tmp_path / "gone"])
    with pytest.raises(Unavailable, match="the atlas gone of the query cannot be searched"):
        away.similar("slide-0", atlas="gone")
    only = together.similar("slide-0", 9, atlas="north", only=["west"])
    assert [(one.atlas, one.case.name) for one in only.cases] == [("west", "slide-5")]
    assert [shard.atlas for shard in only.searched.shards] == ["west"]


def test_similar_says_which_atlases_were_not_compared(made, tmp_path):
    _, folder = made
    Atlas.create(tmp_path / "empty", DEFAULT_BUNDLE)
    url = f"milvus://{tmp_path}/south.db?collection=south"
    push(Atlas(folder / "south"), url)
    several = Federation([folder / "north", tmp_path / "empty", tmp_path / "gone", url])
    try:
        found = several.similar("slide-0", 9)
        assert {one.case.name for one in found.cases} == {"slide-1", "slide-3"}
        away = {shard.atlas: shard.away for shard in found.searched.away}
        assert set(away) == {"gone", "south"} and "has no mosaics" in away["south"]
        with pytest.raises(NotFound, match=r"no slide 'slide-2' in north, empty; not searched: "):
            several.similar("slide-2")
        none = several.similar("slide-0", where="label = 'zzz'")
        assert none.cases == [] and [s.atlas for s in none.searched.away] == ["gone", "south"]
        with pytest.raises(BadInput, match="no other slide passes the filter"):
            several.similar("slide-0", where="label = 'zzz'", only=["north", "empty"])
        with pytest.raises(NotFound, match="unknown field 'organs'"):
            several.similar("slide-0", where="organs = 'colon'")
        with pytest.raises(Unavailable, match="has no mosaics"):
            several.similar("slide-0", only=["south"])
    finally:
        several.close()


def test_the_command_compares_slides_of_several_atlases(made, cli, cli_json, tmp_path):
    big, folder = made
    atlases = [folder / name for name in SHARDS]
    found = cli_json("index", "similar", *atlases, "slide-0", "-k", 3)
    one = cli_json("index", "similar", big.path, "slide-0", "-k", 3)["answers"]
    assert found["query"] == {"atlas": "north", "name": "slide-0"}
    assert [(row["name"], row["label"], row["score"]) for row in found["answers"]] == [
        (row["name"], row["label"], pytest.approx(row["score"], abs=2e-6)) for row in one
    ]
    for row in found["answers"]:
        assert row["evidence"] and all(
            (pair["query"]["atlas"], pair["query"]["slide"]) == ("north", "slide-0")
            and (pair["match"]["atlas"], pair["match"]["slide"]) == (row["atlas"], row["name"])
            for pair in row["evidence"]
        )
    new = cli_json("index", "similar", *atlases, "--features", folder / "slide-5.h5", "-k", 2)
    assert new["answers"][0]["name"] == "slide-5" and new["query"]["atlas"] is None
    named = cli_json("index", "similar", *atlases, "north:slide-0", "-k", 3)
    assert named == found
    human = cli("index", "similar", *atlases, tmp_path / "gone", "slide-0")
    assert human.returncode == 1 and "searched 3 of 4 atlases" in human.stdout
    assert "slide-0 of north, by median" in human.stdout and "gone was not searched" in human.stdout
    for words, said in (
        ((*atlases, "slide-0", "--how", "votes"), "compares the slides of one atlas"),
        ((*atlases, "slide-0", "--how", "mean"), "unknown way of comparing 'mean'"),
        ((atlases[0], "slide-0", "--features", folder / "slide-5.h5"), "give either the name"),
        ((tmp_path / "a", tmp_path / "b", "slide-0"), "none of the 2 atlases can be searched"),
        ((*atlases, tmp_path / "gone"), "in north, south, west"),
    ):
        refused = cli("index", "similar", *words)
        assert refused.returncode == 1 and said in refused.stderr, refused.stderr


def test_names_with_colons():
    from histoseek.ui.cli.federated import named_case

    atlases = ["north", "north:old", "c:d"]
    assert named_case("slide", atlases) == (None, "slide")
    assert named_case("north:slide", atlases) == ("north", "slide")
    assert named_case("north:old:a:b", atlases) == ("north:old", "a:b")
    assert named_case("south:slide", atlases) == (None, "south:slide")


def test_values_that_are_no_numbers_are_named_with_their_atlas(tmp_path, cli, cli_json):
    for name, stages in (("one", ["2", "3"]), ("two", ["III", "3"])):
        atlas = Atlas.create(tmp_path / name, DEFAULT_BUNDLE)
        files = [features(tmp_path / f"{name}-{n}.h5", 40, n) for n in range(2)]
        atlas.add(files, {f"{name}-{n}": {"stage": stages[n]} for n in range(2)})
    words = (tmp_path / "one", tmp_path / "two")
    note = "two: no numbers, so not compared with one: 1 of 2 different values of 'stage', such as 'III'"
    for asked in (("search", *words, "--tile", "one:1"), ("similar", *words, "one-0")):
        given = ("index", *asked, "--where", "stage > 2")
        document = cli_json(*given)
        unknown = (
            "the patient of tiles in 2 of 2 slides is unknown: slides of the query's patient may be among "
            "the answers"
        )
        one, two = ([f"{name}: {unknown}"] * (asked[0] == "similar") for name in ("one", "two"))
        assert document["notes"] == [*one, note, *two] and document["answers"]
        assert note in " ".join(cli(*given, check=True).stdout.split())
    near = Federation(words).search_near(QUERIES[0], Query(k=3, where="stage > 2"))
    assert near.notes == [note]
    alone = Federation(words).search_near(QUERIES[0], Query(k=3, where="stage > 2"), only=["one"])
    assert alone.notes == []
