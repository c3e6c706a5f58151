"""What programs hand over: numpy's numbers, open files, wrong types, pickles, another working folder."""

import copy
import io
import os
import pickle
import shutil

import numpy as np
import pytest

import histoseek as hs
from histoseek.errors import BadInput, HistoseekError
from histoseek.index.federation.federation import Federation
from histoseek.index.search.query import Query
from histoseek.index.view import View


@pytest.fixture(scope="module")
def opened(ui_atlas):
    with hs.Atlas(ui_atlas) as atlas:
        yield atlas


@pytest.fixture
def own(own_atlas):
    with hs.Atlas(own_atlas) as atlas:
        yield atlas


def test_numbers_of_numpy_are_numbers(opened, own):
    three = np.int64(3)
    assert opened.search(like=three, k=np.int32(2)) == opened.search(like=3, k=2)
    assert [s.name for s in opened.similar("case-1", k=np.uint8(1))] == [
        s.name for s in opened.similar("case-1", k=1)
    ]
    query = opened.index.vectors_of([3])
    assert len(opened.index.search(query, k=np.int64(2))[0]) == 2
    assert len(Federation([opened.path]).search(Query(vectors=query, k=np.int64(2))).hits[0]) == 2
    fitted = own.fit("kmeans", k=np.int64(3), seed=np.int64(1), name="n")
    assert fitted["clusters"] == 3 and own.fit("hdbscan", min_cluster_size=np.int16(5))["clusters"]
    for cluster in np.unique(own.index.assigned("n")[1].cluster):
        own.index.name_cluster(cluster, np.str_(f"kind {cluster}"), np.str_("seen"), "n")
    assert own.index.cluster_names("n") == {0: "kind 0", 1: "kind 1", 2: "kind 2"}
    assert own.verify() == []


def test_one_name_is_one_slide(own):
    assert own.index.remove("case-1") > 0
    assert "case-1" not in {slide["name"] for slide in own.slides()}
    assert "case-2" in {slide["name"] for slide in own.slides()}


def test_another_working_folder_leads_to_no_other_atlas(own, ui_atlas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    atlas = hs.Atlas("atlas")
    count, several = len(atlas.search(like=[3], k=500)), Federation(["atlas"])
    (tmp_path / "elsewhere/atlas").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(atlas.search(like=[3], k=500)) == count
    (found,) = several.search(Query(vectors=own.index.vectors_of([3]), k=500)).hits
    assert len(found) == count + 1  # and the tile itself
    atlas.index.relabel([{"slide": "case-1", "label": "moved"}])
    assert own.slides()[0]["label"] == "moved" and not os.listdir("atlas")


def test_hits_and_slides_can_be_pickled_and_copied(opened):
    hits, slides = opened.search(like=3, k=3), opened.slides()
    for one in (hits, slides):
        for made in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one), copy.copy(one)):
            assert made == one and type(made) is type(one)
            assert "<" in made._repr_html_()  # without images


def test_an_open_file_is_an_image(opened, tile_folder):
    path = tile_folder / "cat/01.png"
    expected = opened.search(path, k=2)
    assert opened.search(io.BytesIO(path.read_bytes()), k=2) == expected
    with path.open("rb") as stream:
        assert opened.search([stream], k=2) == [expected]


@pytest.mark.parametrize("leave_out", ["slide", "patient"])
def test_leaving_out_needs_a_tile(opened, client, tile_folder, leave_out):
    path = tile_folder / "cat/01.png"
    for images in ({"images": path}, {"like": path}):
        with pytest.raises(BadInput, match="for tiles in like, and none is given"):
            opened.search(**images, leave_out=leave_out)
    assert opened.search(like=[3, path], leave_out=leave_out)
    image = {"images": ("a.png", path.read_bytes(), "image/png")}
    refused = client.post("/v1/search", files=image, data={"leave_out": leave_out})
    assert (
        refused.status_code == 422
        and "for tiles in like, and none is given" in refused.json()["error"]["message"]
    )
    found = client.post("/v1/search", json={"like": [3], "leave_out": leave_out})
    assert found.json()["hits"]


WRONG = {
    "an image": (lambda a: a.search(5), "an image is of type int"),
    "a text": (lambda a: a.search(io.StringIO("a.png")), "open it with mode 'rb'"),
    "no tile": (lambda a: a.search(like=True), "the id of a tile is True"),
    "a mask": (lambda a: a.search(like=np.array([True, False])), "the id of a tile is True"),
    "one number": (lambda a: a.similar(np.array(3.0)), "or vectors"),
    "a true score": (lambda a: a.search(like=3, least=True), "lowest score is True"),
    "tiles": (lambda a: a.index.ask(View.search, Query(tiles=3)), "tiles is 3"),
    "a method": (lambda a: a.fit("kmean", k=3), "unknown method 'kmean'"),
    "a size": (lambda a: a.fit("encoder", min_cluster_size=30), "only for hdbscan"),
    "a row of text": (lambda a: a.add([], metadata={"a": "skin"}), "expected a dictionary of columns"),
    "k as text": (lambda a: a.search(like=3, k="3"), "k is '3'; expected a whole number"),
    "half a hit": (lambda a: a.search(like=3, k=2.0), "k is 2.0"),
    "k": (lambda a: a.search(like=3, k=True), "k is True"),
    "a filter": (lambda a: a.search(like=3, where={"label": "skin"}), "where is {'label'"),
    "a score": (lambda a: a.search(like=3, least=".5"), "lowest score is '.5'"),
    "an id": (lambda a: a.search(like=[10**30]), "too large for the id of a tile"),
    "a path": (lambda a: a.similar(a.path), "expected the name of a slide or case"),
    "a number": (lambda a: a.similar(3), "expected the name of a slide or case"),
    "no vectors": (lambda a: a.similar(np.zeros((0, 3))), "or vectors"),
    "a table": (lambda a: a.add([], metadata=[1]), "metadata is of type list"),
    "a row": (lambda a: a.index.relabel({"slide": "case-1"}), "a row of the metadata is 'slide'"),
    "bytes": (lambda a: a.index.relabel([{"slide": "case-1", "x": b"1"}]), "has b'1'; expected text"),
    "half a cluster": (lambda a: a.fit(k=3.7), "k is 3.7"),
    "no cluster": (lambda a: a.fit(k=0), "k is 0; expected 1 or more"),
    "Auto": (lambda a: a.fit(k="Auto"), "k is 'Auto'"),
    "k of hdbscan": (lambda a: a.fit("hdbscan", k=7), "k is only for kmeans"),
    "a size of kmeans": (lambda a: a.fit("kmeans", min_cluster_size=30), "only for hdbscan"),
    "between clusters": (lambda a: a.index.name_cluster(0.5, "a"), "number of a cluster is 0.5"),
    "no text": (lambda a: a.index.name_cluster(0, "a", b"x"), "is b'x'; expected text"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_are_refused_in_words(own, name):
    call, says = WRONG[name]
    before = own.slides(), own.index.cluster_names()
    with pytest.raises(HistoseekError) as caught:
        call(own)
    assert says in str(caught.value)
    assert before == (own.slides(), own.index.cluster_names()) and own.verify() == []


def test_writing_to_a_deleted_atlas_does_not_bring_its_folder_back(own, tmp_path):
    shutil.rmtree(own.path)
    for write in (own.fit, lambda: own.add([]), lambda: own.remove("case-1")):
        with pytest.raises(BadInput, match="does not exist|is not an atlas"):
            write()
    assert not own.path.exists()


def test_an_atlas_shows_its_folder(opened):
    assert repr(opened) == f"Atlas({str(opened.path)!r})"
