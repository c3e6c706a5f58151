"""The page's functions without the page."""

import numpy as np
import pytest
from PIL import Image

from histoseek.errors import BadInput
from histoseek.index.atlas import Atlas
from histoseek.serving.encoder import DEFAULT_BUNDLE, open_encoder
from histoseek.serving.jobs import find_jobs
from histoseek.serving.pipeline import embed_jobs
from histoseek.serving.results import EmbedOptions
from histoseek.ui import view
from histoseek.ui.app import _credentials
from histoseek.ui.handlers import Session


@pytest.fixture(scope="module")
def atlas_path(tmp_path_factory, make_slide, tile_folder):
    folder = tmp_path_factory.mktemp("page")
    slide = make_slide(folder / "case-1.tiff", side=1400)
    encoder = open_encoder("default")
    jobs = find_jobs([slide, tile_folder])
    results = embed_jobs(jobs, encoder, folder / "features", EmbedOptions(), lambda *_: None)
    atlas = Atlas.create(folder / "atlas", DEFAULT_BUNDLE)
    atlas.add([folder / r.features for r in results])
    atlas.fit("kmeans", k=4)
    return folder / "atlas"


@pytest.fixture(scope="module")
def session(atlas_path):
    return Session(atlas_path)


def test_a_tile_finds_itself_and_its_picture_is_shown(session, tile_folder):
    path = tile_folder / "retina/05.png"
    answer = session.find_similar(path, 6)
    best = answer.hits[0]
    # tiles 4 to 7 are quarter turns of one place, which the default encoder holds to be the same
    assert (best.label, best.patient) == ("retina", "retina-1") and best.score > 0.999
    turns = [np.rot90(answer.query, k) for k in range(4)]
    assert len(answer.pictures) == 6
    assert min(np.abs(answer.pictures[0].astype(int) - t).mean() for t in turns) < 2
    html = view.gallery(answer)
    assert html.count("<figure") == 6 and "retina" in html and "cluster" in html
    assert "**retina (" in view.verdict(answer)


def test_a_slides_tile_is_read_from_the_slide(session, atlas_path):
    ids, vectors = session.atlas.vectors()
    hits = session.atlas.search(vectors[:60], 1)
    on_slide = next(h[0] for h in hits if h[0].slide == "case-1")
    picture = session.pictures.read(on_slide)
    assert picture.shape == (224, 224, 3) and picture.std() > 5


def test_a_source_that_is_gone_is_said_on_the_card(session, tile_folder, tmp_path, atlas_path):
    gone = Session(atlas_path)
    gone.pictures._source = lambda slide: (_ for _ in ()).throw(BadInput("/x/y.svs does not exist"))
    answer = gone.find_similar(tile_folder / "cat/00.png", 2)
    assert "does not exist" in answer.pictures[0] and "does not exist" in view.gallery(answer)


def test_names_cannot_inject_markup(session):
    from histoseek.index.records import Hit
    from histoseek.ui.handlers import Similar

    evil = "<script>alert(1)</script>"
    hit = Hit(1, 0.5, 1, evil, 0, 0, 224, 0.5, evil, evil, 0, f'"><img src=x onerror=1>{evil}')
    html = view.gallery(Similar(np.zeros((4, 4, 3), np.uint8), [hit], [evil], None))
    html += view.gallery(
        Similar(np.zeros((4, 4, 3), np.uint8), [hit], [np.zeros((4, 4, 3), np.uint8)], None)
    )
    assert "<script" not in html and "<img src=x" not in html
    tracker = "![](https://example.org/p.gif)"
    spy = Hit(1, 0.5, 1, tracker, 0, 0, 224, 0.5, tracker, None, 0, None)
    said = view.verdict(Similar(np.zeros((4, 4, 3), np.uint8), [spy], [tracker], None))
    stats = {**session.atlas.stats(), "labels": {tracker: 1}}
    assert "![" not in said + view.about(stats, f"# card {tracker} <img src=x>")


def test_images_are_placed_and_bad_ones_are_refused_by_name(session, tile_folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"bad")
    images = [(p.name, p) for p in (tile_folder / "cat/01.png", tmp_path / "bad.png")]
    answer = session.cluster(images, "kmeans")
    assert answer.names == ["01.png"] and answer.refused[0][0] == "bad.png"
    assert answer.points.shape == (1, 2)
    rows = view.placed_rows(answer)
    assert rows[0][1].startswith("cluster") and rows[1][4].startswith("refused")
    figure = view.map_figure(session.map("kmeans"), answer, "kmeans")
    assert figure.data[-1].name == "new images (1)"
    assert sum(len(trace.x) for trace in figure.data[:-1]) == session.atlas.stats()["tiles"]
    with pytest.raises(BadInput, match="none of the 1"):
        session.cluster([("bad.png", tmp_path / "bad.png")], None)
    with pytest.raises(BadInput, match="at least one"):
        session.cluster([], None)
    with pytest.raises(BadInput, match="at most"):
        session.cluster([("x", tmp_path / "bad.png")] * 201, None)


def test_a_new_point_lies_where_the_atlas_has_the_same_vector(session):
    ids, vectors = session.atlas.vectors()
    atlas_map = session.map("kmeans")
    assert np.allclose(atlas_map.place(vectors), atlas_map.points, atol=1e-5)


def test_unknown_images_are_called_so(session, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    answer = session.find_similar(tmp_path / "noise.png", 3)
    assert answer.placed["unknown"] == ("no cluster" in view.verdict(answer))


def test_other_hosts_need_a_password(monkeypatch):
    monkeypatch.delenv("HISTOSEEK_UI_AUTH", raising=False)
    assert _credentials("127.0.0.1") is None and _credentials("localhost") is None
    for host in ("0.0.0.0", "192.0.2.7", "myhost", "::"):
        with pytest.raises(BadInput, match="HISTOSEEK_UI_AUTH"):
            _credentials(host)
    monkeypatch.setenv("HISTOSEEK_UI_AUTH", "only-a-password")
    with pytest.raises(BadInput, match="user:password"):
        _credentials("127.0.0.1")
    monkeypatch.setenv("HISTOSEEK_UI_AUTH", "ann:secret")
    assert _credentials("0.0.0.0") == ("ann", "secret")


def test_about_names_the_encoder(session):
    text = view.about(session.atlas.stats(), "card")
    assert session.atlas.manifest.sha256 in text and "Research use only" in text
