"""The functions behind the page and the API, called directly."""

import csv
import io
import threading

import numpy as np
import pytest
from atlases import features
from PIL import Image

from histoseek.artifacts.tileset_files import open_tiles
from histoseek.errors import BadInput, NotFound, TooLarge
from histoseek.index.atlas import Atlas
from histoseek.index.federation.answers import Searched
from histoseek.index.search.cases import Pair, Similar
from histoseek.index.search.query import Query
from histoseek.index.store.rows import Hit
from histoseek.index.view import View
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder
from histoseek.ui.page import cluster_view, slide_view, view
from histoseek.ui.page.view import Home
from histoseek.ui.session import report, words
from histoseek.ui.session.answers import SearchAnswer, SimilarAnswer, Verdict
from histoseek.ui.session.session import Session, cropped


@pytest.fixture(scope="module")
def session(ui_atlas):
    opened = Session(ui_atlas)
    yield opened
    opened.close()


def image_of(session, path):
    return session.read(path, path.name)


def wait(ask, seconds=60):
    import time

    deadline = time.monotonic() + seconds
    while (found := ask()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_tile_finds_itself_and_its_picture_is_shown(session, tile_folder):
    image = image_of(session, tile_folder / "retina/05.png")
    found = session.search(Query(images=(image,), k=6))
    best = found.hits[0]
    # tiles 4 to 7 are quarter turns of one place, which the default encoder holds to be the same
    assert (best.label, best.patient) == ("retina", "retina-1") and best.score > 0.999
    assert [hit.rank for hit in found.hits] == [1, 2, 3, 4, 5, 6]
    shown = np.asarray(Image.open(io.BytesIO(session.pictures.tile(best.tile))))
    turns = [np.rot90(image, k) for k in range(4)]
    assert min(np.abs(shown.astype(int) - t).mean() for t in turns) < 4
    assert found.verdict.labels[0][0] == "retina"
    assert "retina" in words.verdict_text(found)
    cards = view.gallery(found.hits)
    assert (
        cards.count("<li") == 6
        and 'src="v1/tiles/' in cards
        and f"v1/tiles/{best.tile}.jpg" in cards
    )


def test_tiles_of_the_atlas_are_searched_by_without_finding_themselves(session):
    everything = session.atlas.slides()
    slide = next(s for s in everything if s["name"] == "case-1")
    ids, _ = session.atlas.vectors()
    known = session.atlas.tiles(ids[:40].tolist())
    first = next(t["tile"] for t in known.values() if t["slide"] == slide["name"])
    found = session.search(Query(tiles=(first,), k=5))
    assert len(found.hits) == 5 and first not in {hit.tile for hit in found.hits}
    away = session.search(Query(tiles=(first,), k=5, leave_out="patient"))
    assert {hit.patient for hit in away.hits}.isdisjoint({"P1"})
    elsewhere = session.search(Query(tiles=(first,), k=5, leave_out="slide"))
    assert "case-1" not in {hit.slide for hit in elsewhere.hits}
    several = session.search(
        Query(tiles=(first, found.hits[0].tile), unlike_tiles=(away.hits[0].tile,), k=4)
    )
    assert {first, found.hits[0].tile}.isdisjoint({hit.tile for hit in several.hits})
    assert several.verdict.placed is None
    with pytest.raises(NotFound, match="no tile 999999"):
        session.search(Query(tiles=(999999,)))


def test_filters_are_kept_to(session, tile_folder):
    image = image_of(session, tile_folder / "cat/00.png")
    colon = session.search(Query(images=(image,), k=5, where="organ = 'colon'"))
    assert {hit.slide for hit in colon.hits} == {"case-1"}
    one = session.search(Query(images=(image,), k=5, per_slide=True))
    assert len({hit.slide for hit in one.hits}) == len(one.hits) == 3
    none = session.search(Query(images=(image,), k=5, least=2.0))
    assert none.hits == [] and "No tile passes" in view.gallery(none.hits)
    with pytest.raises(BadInput, match="filter"):
        session.search(Query(images=(image,), where="organ = "))


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({}, "nothing to search for"),
        ({"tiles": (1,), "k": 0}, "k is 0"),
        ({"tiles": (1,), "k": 1001}, "k is 1001"),
        ({"tiles": tuple(range(65))}, "65 examples"),
        ({"tiles": (1,), "leave_out": "x"}, "leave_out"),
    ],
)
def test_wrong_queries_are_refused(session, wrong, says):
    with pytest.raises((BadInput, TooLarge), match=says):
        session.search(Query(**wrong))


def test_a_part_of_a_picture_is_searched_for(session, pictures):
    whole = pictures["retina"]
    part = cropped(whole, (0.25, 0.5, 0.5, 0.25), "retina")
    high, wide = whole.shape[:2]
    rows = slice(round(high * 0.5), round(high * 0.75))
    columns = slice(round(wide * 0.25), round(wide * 0.75))
    assert np.array_equal(part, whole[rows, columns])
    for crop in ((0.5, 0, 0.6, 1), (-0.1, 0, 1, 1), (0, 0, float("nan"), 1), (0, 0, 0, 1)):
        with pytest.raises(BadInput, match="shares of the image"):
            cropped(whole, crop, "retina")
    with pytest.raises(BadInput, match="at least 8 x 8"):
        cropped(whole, (0, 0, 0.001, 0.5), "retina")


def test_how_usual_the_nearness_is_told(session, tile_folder):
    wait(
        lambda: session._background.get(
            "usual", session.atlas.catalog.revision(), session.atlas.usual_nearness
        )
    )
    image = image_of(session, tile_folder / "cat/00.png")
    near = session.search(Query(images=(image,))).verdict.nearer_than
    noise = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    far = session.search(Query(images=(noise,))).verdict
    assert near > far.nearer_than
    other = session.search(Query(images=(image,), where="label = 'retina'")).verdict
    assert other.nearer_than == near, "a filter does not make an image strange"
    assert "tile of another patient or slide is farther" in words.verdict_text(
        session.search(Query(images=(image,)))
    )
    usual = session.atlas.usual_nearness().scores
    assert (np.diff(usual) >= 0).all() and 0 < len(usual) <= 200
    assert far.unknown == (far.placed["unknown"] or far.nearer_than < 0.01)


def test_images_are_placed_and_bad_ones_are_refused_by_name(session, tile_folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"bad")
    images = [(p.name, p) for p in (tile_folder / "cat/01.png", tmp_path / "bad.png")]
    wait(session.map.layout)
    answer = session.cluster(images, "kmeans")
    assert answer.names == ["01.png"] and answer.refused[0][0] == "bad.png"
    assert answer.points.shape == (1, 2) and answer.nearest[0].score > 0.999
    table = cluster_view.placed_table(answer, {answer.placed[0]["cluster"]: [1, 2]})
    assert 'data-open="2"' in table
    assert (
        "1 image assigned to kmeans" in table and "1 refused" in table and "not an image" in table
    )
    with pytest.raises(BadInput, match="none of the 1"):
        session.cluster([("bad.png", tmp_path / "bad.png")], None)
    with pytest.raises(BadInput, match="at least one"):
        session.cluster([], None)
    with pytest.raises(TooLarge, match="at most"):
        session.cluster([("x", tmp_path / "bad.png")] * 257, None)


def atlas_of(folder, pictures):
    """An atlas of pictures; returns it and the folder where they lie, numbered."""
    tiles = folder / "tiles"
    tiles.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tiles / f"{number}.png")
    jobs = find_jobs([tiles])
    (done,) = embed_jobs(jobs, open_encoder("default"), folder, EmbedOptions(), lambda *_: None)
    atlas = Atlas.create(folder / "atlas", DEFAULT_BUNDLE)
    atlas.add([folder / done.features])
    return atlas, tiles


@pytest.mark.shared
def test_what_is_no_stained_tissue_is_said_to_be_that(shared, tmp_path, serve):
    source = open_tiles(shared / "lc25000.tar")
    atlas, tiles = atlas_of(tmp_path, [source.read(number * 70) for number in range(40)])
    atlas.fit("kmeans", k=4)
    green = np.zeros((224, 224, 3), np.uint8)
    green[:, :, 1] = np.random.default_rng(0).integers(120, 250, (224, 224))
    Image.fromarray(green).save(tmp_path / "green.png")
    strange, known = tmp_path / "green.png", tiles / "7.png"
    says = "unlike the stained tissue that the encoder knows"
    one = serve(atlas.path)
    opened = one.session

    found = opened.search(Query(images=(green,)))
    assert found.verdict.foreign and found.verdict.unknown and report.verdict(found)["foreign"]
    assert says in words.verdict_text(found)
    found = opened.search(Query(images=(image_of(opened, known),)))
    assert not found.verdict.foreign and says not in words.verdict_text(found)
    placed = opened.cluster([(path.name, path) for path in (strange, known)])
    assert [row["foreign"] for row in report.placed_rows(placed)] == [True, False]
    assert cluster_view.placed_table(placed, {}).count(f"unknown: {says}") == 1
    assert says in report.write(opened, placed, "html").decode()
    first, second = csv.DictReader(io.StringIO(report.write(opened, placed, "csv").decode()))
    assert (first["foreign"], second["foreign"]) == ("True", "False")

    files = [("images", (path.name, path.read_bytes())) for path in (strange, known)]
    verdict = one.client.post("/v1/search", files=files[:1]).json()["verdict"]
    assert verdict["foreign"] and verdict["unknown"] and says in verdict["text"]
    images = one.client.post("/v1/assign", files=files).json()["images"]
    assert [image["foreign"] for image in images] == [True, False]


def test_an_atlas_of_what_is_no_tissue_ignores_the_gate(tmp_path, serve, cli):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (12, 224, 224, 1), np.uint8).repeat(3, axis=3)
    atlas, tiles = atlas_of(tmp_path, pictures)
    assert atlas.out_of_distribution_share() == 1
    opened = serve(atlas.path).session
    asked = Query(images=(image_of(opened, tiles / "7.png"),))
    wait(lambda: None if opened.search(asked).verdict.foreign else True)
    text = cli("index", "fit", atlas.path, "--k", 2, check=True).stdout
    assert "12 tiles, more than half, do not look like stained tissue" in " ".join(text.split())
    assert not opened.search(asked).verdict.foreign


def test_the_map_shows_every_tile_and_places_the_same_image_there(session, tile_folder):
    points = wait(session.map.points)
    stats = session.atlas.stats()
    assert len(points.ids) == len(points.places) == stats["tiles"]
    names, codes = session.map.colours(points, "label")
    assert sorted(names) == ["cat", "retina", "tissue"]
    known = session.atlas.tiles(points.ids.tolist())
    for tile, code in zip(points.ids.tolist(), codes.tolist(), strict=True):
        assert (names[code] if code >= 0 else None) == known[tile]["label"]
    names, codes = session.map.colours(points, "cluster.kmeans")
    assert len(names) == 4 and codes.max() == 3
    with pytest.raises(NotFound, match="no column 'nothing'"):
        session.map.colours(points, "nothing")
    answer = session.cluster([("a", tile_folder / "cat/01.png")])
    (row,) = np.flatnonzero(points.ids == answer.nearest[0].tile)
    assert np.abs(answer.points[0] - (points.places[row] / 65535 * 2 - 1)).max() < 0.05


def test_results_are_kept_and_written(session, tile_folder):
    import json

    image = image_of(session, tile_folder / "cat/02.png")
    found = session.search(Query(images=(image,), k=3, where="label != 'retina'"))
    assert session.results.get(found.id) is found
    document = json.loads(report.write(session, found, "json"))
    assert [h["tile"] for h in document["hits"]] == [h.tile for h in found.hits]
    about = document["provenance"]
    assert about["encoder_sha256"] == session.atlas.manifest.sha256
    assert about["filter"] == "label != 'retina'" and about["index_generation"] == found.generation
    rows = list(csv.DictReader(io.StringIO(report.write(session, found, "csv").decode())))
    assert [int(r["tile"]) for r in rows] == [h.tile for h in found.hits]
    page = report.write(session, found, "html").decode()
    assert page.count("data:image/jpeg;base64,") == 4 and "no diagnosis" in page
    assert session.atlas.manifest.sha256 in page and "<script" not in page
    placed = session.cluster([("a.png", tile_folder / "cat/01.png"), ("b", b"")])
    rows = list(csv.DictReader(io.StringIO(report.write(session, placed, "csv").decode())))
    assert rows[0]["image"] == "a.png" and "empty" in rows[1]["refused"]
    assert "data:image/jpeg" in report.write(session, placed, "html").decode()
    with pytest.raises(NotFound, match="search again"):
        session.results.get("gone")


def test_kept_answers_take_bounded_memory(session, tile_folder, monkeypatch):
    monkeypatch.setattr("histoseek.ui.session.results.KEPT_BYTES", 1_000_000)
    image = image_of(session, tile_folder / "cat/02.png")
    found = [session.search(Query(images=(image,) * 2, k=1)) for _ in range(6)]
    assert session.results.get(found[-1].id) is found[-1]
    with pytest.raises(NotFound):
        session.results.get(found[0].id)
    assert session.results._bytes <= 1_000_000


def test_formulas_in_names_stay_text(session, tile_folder):
    placed = session.cluster([("=HYPERLINK(1)", tile_folder / "cat/01.png")])
    assert "\n'=HYPERLINK(1)," in report.write(session, placed, "csv").decode()


def test_names_cannot_inject_markup(session):
    evil = '"><img src=x onerror=1><script>alert(1)</script>'
    hit = Hit(1, 0.5, 1, evil, 0, 0, 224, 0.5, evil, evil, 0, evil)
    verdict = Verdict([(evil, 1)], [(evil, 1)], {"cluster": 0, "name": evil, "distance": 1.0,
                      "strength": 0.1, "unknown": True}, None, True)  # fmt: skip
    found = SearchAnswer(
        "r", "now", Query(tiles=(1,)), np.zeros(4, np.float32), [hit], verdict, 1, 1, {"a": 1.0}
    )
    cluster = {"cluster": 0, "name": evil, "description": evil, "tiles": 1, "slides": 1, "unknown": 0,
               "labels": {evil: 1}, "examples": [hit._asdict()]}  # fmt: skip
    row = {"name": evil, "kind": "slide", "label": evil, "patient": evil, "tiles": 1, "mpp": 1,
           "width": 1, "height": 1, "added_at": "", "metadata": {evil: evil}, "reason": evil}  # fmt: skip
    alike = SimilarAnswer(
        [Similar(evil, 0.5, [Pair(0.5, 1, 0, 1)], evil)],
        (evil,),
        (Searched(evil, evil, None, None, None, evil),),
    )
    homes = [Home(1, evil)]
    stats = {**session.atlas.stats(), "labels": {evil: 1}}
    html = "".join(
        [
            view.gallery([hit], {0: evil}), view.verdict(found), view.problem(evil),
            cluster_view.cluster_cards([cluster], evil), slide_view.slide_cards([row], 2, evil),
            slide_view.slide_detail(row, "clusters", evil, evil, {0: evil}, {0: 1}, alike, homes, "slide"),
            view.about(stats, evil, {evil: evil}), view.header(stats, evil),
            report._html(session, found, {evil: evil}),
        ]
    )  # fmt: skip
    assert "<script" not in html and "<img src=x" not in html


def test_a_source_that_is_gone_is_said(own_atlas, tile_folder, tmp_path):
    from histoseek.index.atlas import Atlas
    from histoseek.index.store.catalog import update

    atlas = Atlas(own_atlas)
    with atlas.catalog.write() as db:
        row = db.execute("SELECT id FROM slides WHERE name = 'case-1'").fetchone()
        update(db, "slides", {"id": row["id"]}, {"source": str(tmp_path / "secret/y.svs")})
    session = Session(own_atlas)
    tile = next(
        t for t in atlas.tiles(atlas.vectors()[0].tolist()).values() if t["slide"] == "case-1"
    )
    with pytest.raises(NotFound, match="y.svs does not exist") as error:
        session.pictures.tile(tile["tile"])
    assert "secret" not in str(error.value), "where files lie is nobody's business"
    with atlas.catalog.write() as db:
        update(db, "slides", {"id": row["id"]}, {"source": "s3://secret/y.svs"})
    with pytest.raises(
        NotFound, match="y.svs was embedded from a URL.*relocate ATLAS --slides"
    ) as error:
        session.pictures.tile(tile["tile"])
    assert "secret" not in str(error.value)
    session.close()


def test_pictures_of_slides_are_drawn(session):
    import io

    def pixels(blob):
        return np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")).astype(int)

    ids = session.atlas.vectors()[0]
    known = session.atlas.tiles(ids.tolist())
    tile = next(t for t in known.values() if t["slide"] == "case-1" and t["x"] > 0)
    plain = pixels(session.pictures.thumbnail("case-1", 1024))
    boxed = pixels(session.pictures.place(tile["tile"]))
    assert plain.shape == boxed.shape
    changed = np.argwhere(np.abs(plain - boxed).sum(axis=2) > 150)
    down = 1400 / plain.shape[1]
    assert abs(changed[:, 1].min() * down - tile["x"]) < 12
    assert abs(changed[:, 0].min() * down - tile["y"]) < 12
    assert pixels(session.pictures.field(tile["tile"])).shape == (640, 640, 3)
    painted = pixels(session.pictures.clusters("case-1", "kmeans"))
    assert np.abs(painted - plain).mean() > 5
    heat, low, high = session.pictures.heat("case-1", session.atlas.vectors_of([tile["tile"]])[0])
    assert (low, high) == (0.0, 1.0) and np.abs(pixels(heat) - plain).mean() > 5
    contact = pixels(session.pictures.thumbnail("kinds"))
    assert contact.shape[0] == contact.shape[1]
    with pytest.raises(NotFound, match="ready tiles"):
        session.pictures.clusters("kinds", "kmeans")
    for ask in (lambda: session.pictures.thumbnail("x"), lambda: session.pictures.tile(10**9)):
        with pytest.raises(NotFound):
            ask()


def test_many_threads_read_many_sources(session, monkeypatch):
    """Sources are closed and opened again while others read them."""
    monkeypatch.setattr("histoseek.ui.session.pictures.OPEN_SOURCES", 1)
    monkeypatch.setattr("histoseek.ui.session.pictures.KEPT_BYTES", 0)
    ids = session.atlas.vectors()[0]
    failed = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for tile in rng.choice(ids, 12):
                session.pictures.tile(int(tile))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failed == []


def test_an_atlas_of_other_features_is_searched_by_its_own_tiles(tmp_path):
    from atlases import features

    from histoseek.index.atlas import Atlas

    atlas = Atlas.create_external(tmp_path / "uni", "uni_v2", 16)
    own = {"encoder": "uni_v2", "encoder_sha256": atlas.manifest.sha256}
    vectors = np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)
    atlas.add([features(tmp_path / "a.h5", features=vectors, **own)])
    session = Session(tmp_path / "uni")
    found = session.search(Query(tiles=(3,), k=4))
    assert len(found.hits) == 4
    with pytest.raises(BadInput, match="uni_v2, which is not installed here"):
        session.embed([np.zeros((224, 224, 3), np.uint8)], [])
    session.close()


@pytest.fixture
def moving(tmp_path, tile_folder, monkeypatch):
    """A session whose atlas another writer changes in the middle of every question."""
    path = tmp_path / "atlas"
    opened = Atlas.create(path, DEFAULT_BUNDLE)
    encoder = open_encoder("default")
    options = EmbedOptions()
    results = embed_jobs(
        find_jobs([tile_folder]), encoder, tmp_path / "f", options, lambda *_: None
    )
    opened.add([tmp_path / "f" / results[0].features])
    opened.fit("kmeans", k=3)
    tiles = opened.tiles(opened.vectors()[0].tolist()).values()
    slide, files = opened.slides()[0]["name"], [tile["file"] for tile in tiles]
    session = Session(path)
    commits = []

    def commit():
        other = Atlas(path)
        number = len(commits)
        commits.append(other.catalog.revision())
        other.relabel([{"slide": slide, "file": file, "patient": f"P{number}"} for file in files])
        for cluster in range(3):
            other.name_cluster(cluster, f"name {number}")

    def between(name):
        real = getattr(View, name)

        def step(self, *args, **kwargs):
            found = real(self, *args, **kwargs)
            if self.state.store is session.atlas.store:
                commit()
            return found

        monkeypatch.setattr(View, name, step)

    yield session, between, commits
    monkeypatch.undo()
    session.close()


@pytest.mark.parametrize("step", ["search_near", "vector_of", "assign"])
def test_an_answer_names_the_state_that_was_searched(moving, step):
    """A writer commits after each step: revision, labels, clusters and names are of one state."""
    session, between, commits = moving
    tile = int(session.atlas.vectors()[0][0])
    before = session.atlas.view()
    between(step)
    found = session.search(Query(tiles=(tile,), k=3, where="tile > 0"))
    assert commits and commits[0] == before.revision, "nobody wrote in between"
    assert found.revision == before.revision and found.generation == before.generation
    assert len(found.hits) == 3
    expected = before.tiles([hit.tile for hit in found.hits])
    for hit in found.hits:
        known = expected[hit.tile]
        assert (hit.patient, hit.cluster) == (known["patient"], known["cluster"])
    assert not found.verdict.placed["name"], "a name that was given later"


def test_placed_images_name_the_state_that_placed_them(moving, tile_folder):
    session, between, commits = moving
    before = session.atlas.view()
    between("assign")
    answer = session.cluster([("one", tile_folder / "cat/00.png")])
    assert commits and answer.revision == before.revision
    assert not answer.placed[0]["name"], "a name that was given later"
    (near,) = answer.nearest
    known = before.tiles([near.tile])[near.tile]
    assert (near.patient, near.cluster) == (known["patient"], known["cluster"])


def test_a_question_whose_files_a_writer_took_is_asked_again_of_the_newest_state(moving):
    session, _, _ = moving
    asked = []

    def question(view):
        asked.append(view.revision)
        if len(asked) == 1:
            other = Atlas(session.atlas.path)
            other.fit("kmeans", k=5)  # its clusters file goes with the fit before
        return view.clustering()[1].clusters

    assert session.atlas.ask(question) == 5
    assert len(asked) == 2 and asked[1] > asked[0]


def test_vectors_of_any_length_are_compared_with_clusters_as_they_are(tmp_path):
    """Features of other tools are not of length 1, and neither are the clusters fitted on them."""
    rng = np.random.default_rng(0)
    opened = Atlas.create_external(tmp_path / "atlas", "uni", 16)
    means = 9 * rng.normal(size=(2, 16))
    for n, mean in enumerate(means):
        vectors = (mean + rng.normal(size=(200, 16))).astype(np.float32)
        file = features(
            tmp_path / f"s{n}.h5", 200, n, encoder="uni", encoder_sha256=opened.manifest.sha256,
            features=vectors,
        )  # fmt: skip
        assert opened.add([file])[0].state == "added"
    opened.fit("kmeans", k=2)
    session = Session(opened.path)
    ids, assigned = opened.assigned()
    row = int(np.flatnonzero(~assigned.unknown)[0])
    found = session.search(Query(tiles=(int(ids[row]),), k=3))
    assert found.verdict.placed["cluster"] == assigned.cluster[row]
    assert found.verdict.placed["distance"] == pytest.approx(assigned.distance[row], abs=1e-3)
    assert not found.verdict.placed["unknown"]
    session.close()
