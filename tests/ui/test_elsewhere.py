"""A server that searches further atlases together with its own."""

import csv
import io
import json
import shutil

import pytest
from PIL import Image
from triton_server import free_ports

from histoseek.errors import BadInput, Mismatch
from histoseek.index.atlas import Atlas
from histoseek.index.federation.answers import Searched
from histoseek.index.federation.shards import NO_MOSAICS
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder
from histoseek.ui.page.widgets import error_html
from histoseek.ui.server import Running, ServeOptions
from histoseek.ui.session.session import Session
from histoseek.ui.session.words import not_searched


@pytest.fixture(scope="module")
def south(tmp_path_factory, make_slide):
    """An atlas of one further slide, with a column that the server's own atlas lacks."""
    folder = tmp_path_factory.mktemp("south")
    jobs = find_jobs([make_slide(folder / "case-9.tiff", side=1400, seed=9)])
    (done,) = embed_jobs(
        jobs, open_encoder("default"), folder / "features", EmbedOptions(), lambda *_: None
    )
    atlas = Atlas.create(folder / "south", DEFAULT_BUNDLE)
    row = {"slide": "case-9", "patient": "P1", "label": "tumour", "grade": "3"}
    atlas.add([folder / done.features], {"case-9": row})
    return folder / "south"


@pytest.fixture
def several(serve, own_atlas, south, tmp_path):
    return serve(own_atlas, others=[south, tmp_path / "gone"])


def test_the_atlases_are_listed(several, served):
    found = several.client.get("/v1/atlases").json()
    assert [(a["atlas"], bool(a["away"])) for a in found["atlases"]] == [
        ("atlas", False), ("south", False), ("gone", True),
    ]  # fmt: skip
    assert "/" not in found["atlases"][2]["away"], "where atlases lie is nobody's business"
    (alone,) = served.client.get("/v1/atlases").json()["atlases"]
    assert alone["atlas"] == "atlas" and alone["tiles"] > 0


def test_the_start_says_which_atlases_are_away(own_atlas, south, tmp_path):
    others = (str(south), str(tmp_path / "gone"))
    (port,) = free_ports(1)
    running = Running(own_atlas, ServeOptions(port=port, page=False, others=others))
    try:
        (note,) = [note for note in running.notes if note.startswith("atlas ")]
        assert note.startswith(f"atlas gone ({tmp_path / 'gone'}) cannot be searched now: ")
    finally:
        running.close()


def test_a_search_of_several_atlases(several, south, tile_folder):
    """It finds what each atlas finds, merged by score; and names what is away."""
    client = several.client
    tile = Atlas(several.session.atlas.path).vectors()[0][0].item()
    ids = Atlas(south).vectors()[0].tolist()
    body = {"like_elsewhere": [{"atlas": "south", "tile": ids[3]}], "k": 20}
    everywhere = ["atlas", "south", "gone"]
    found = client.post("/v1/search", json={**body, "atlases": everywhere}).json()
    assert {hit["atlas"] for hit in found["hits"]} == {"atlas", "south"}
    scores = [hit["score"] for hit in found["hits"]]
    assert scores == sorted(scores, reverse=True) and [h["rank"] for h in found["hits"]] == [
        *range(1, 21)
    ]
    assert ids[3] not in {h["tile"] for h in found["hits"] if h["atlas"] == "south"}
    assert [a["away"] != "" for a in found["atlases"]] == [False, False, True]
    assert "Not searched, because they did not answer: gone." in found["verdict"]["text"]
    assert found["provenance"]["not_searched"].keys() == {"gone"}
    assert found["provenance"]["examples"]["tiles_elsewhere"] == body["like_elsewhere"]

    # The patient of the example is left out in the server's own atlas too: P1 has case-1 there.
    apart = client.post(
        "/v1/search", json={**body, "atlases": everywhere, "leave_out": "patient"}
    ).json()
    assert {hit["patient"] for hit in apart["hits"]} & {"P1"} == set() and apart["hits"]

    # A column of one atlas is empty in the other.
    graded = {**body, "atlases": everywhere, "where": "grade = 3"}
    assert {h["atlas"] for h in client.post("/v1/search", json=graded).json()["hits"]} == {"south"}
    refused = client.post("/v1/search", json={**graded, "where": "cluster = 1"})
    assert refused.status_code == 422 and "something else in each atlas" in refused.text

    not_compared = {**body, "atlases": ["south"], "where": "label > 3 or grade = 3"}
    (note,) = client.post("/v1/search", json=not_compared).json()["notes"]
    assert note.startswith("south: no numbers, so not compared with one: 1 of 1 different values")

    # An example of another atlas also searches the server's own alone, and the other way round.
    own = client.post("/v1/search", json=body).json()
    assert {hit["atlas"] for hit in own["hits"]} == {"atlas"}
    other = client.post("/v1/search", json={"like": [tile], "atlases": ["south"], "k": 3}).json()
    assert {hit["atlas"] for hit in other["hits"]} == {"south"}
    plain = client.post("/v1/search", json={"like": [tile], "k": 3}).json()
    assert {hit["atlas"] for hit in plain["hits"]} == {None} and plain["atlases"] == []

    noted = [line for line in several.lines() if line["action"] == "search"][0]
    assert noted["atlases"] == ["atlas", "south"]
    assert noted["like_elsewhere"] == body["like_elsewhere"]

    rows = list(csv.DictReader(io.StringIO(client.get(f"/v1/results/{found['result']}/csv").text)))
    assert [row["atlas"] for row in rows] == [hit["atlas"] for hit in found["hits"]]
    html = client.get(f"/v1/results/{found['result']}/html").text
    assert "atlas south" in html and "of the atlas south" in html
    stored = client.get(f"/v1/results/{found['result']}/json").json()
    assert stored["hits"] == found["hits"]


def test_words_of_a_form_and_images_of_known_scale(several, tmp_path, make_slide):
    source = make_slide(tmp_path / "asked.tiff", side=1400, seed=9)
    with Image.open(source) as slide:
        slide.convert("RGB").crop((300, 300, 1200, 1200)).save(tmp_path / "asked.png")
    files = [("images", ("asked.png", (tmp_path / "asked.png").read_bytes(), "image/png"))]
    fields = {"mpp": "0.5", "k": "6", "atlases": ["atlas", "south"]}
    found = several.client.post("/v1/search", files=files, data=fields)
    assert found.status_code == 200, found.text
    assert len(found.json()["matches"]) == len(found.json()["hits"]) == 6
    assert {hit["atlas"] for hit in found.json()["hits"]} >= {"south"}
    fields = {"k": "2", "like_elsewhere": json.dumps({"atlas": "south", "tile": 1})}
    found = several.client.post("/v1/search", files=files, data=fields)
    assert found.status_code == 200, found.text


def test_tiles_of_further_atlases_are_shown(several, served, south):
    tile = Atlas(south).vectors()[0][0].item()
    client = several.client
    for kind in ("", "/field", "/place"):
        answer = client.get(f"/v1/atlases/1/tiles/{tile}{kind}.jpg")
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/jpeg"
    assert client.get(f"/v1/atlases/1/tiles/{tile}").json()["slide"] == "case-9"
    own = Atlas(several.session.atlas.path).vectors()[0][0].item()
    mine = client.get(f"/v1/atlases/0/tiles/{own}.jpg").content
    assert mine == client.get(f"/v1/tiles/{own}.jpg").content
    assert served.client.get(f"/v1/atlases/0/tiles/{own}.jpg").status_code == 200
    for path, status, said in (
        ("/v1/atlases/1/tiles/99999", 404, "no tile 99999"),
        ("/v1/atlases/7/tiles/1.jpg", 404, "there is no atlas 7"),
        ("/v1/atlases/2/tiles/1.jpg", 503, "gone cannot be read"),
    ):
        answer = client.get(path)
        assert answer.status_code == status and said in answer.text, answer.text
    answer = served.client.get("/v1/atlases/1/tiles/1.jpg")
    assert answer.status_code == 404 and "has one, number 0" in answer.text


def test_many_at_once(several, south):
    """A shard that is busy with another question is not away."""
    from concurrent.futures import ThreadPoolExecutor

    ids = Atlas(south).vectors()[0].tolist()
    body = {"like_elsewhere": [{"atlas": "south", "tile": ids[0]}], "atlases": ["atlas", "south"]}

    def ask(number):
        if number % 2:
            return several.client.get(f"/v1/atlases/1/tiles/{ids[number % len(ids)]}.jpg")
        return several.client.post("/v1/search", json=body)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))
    assert {answer.status_code for answer in answers} == {200}
    assert all(not a["away"] for one in answers[::2] for a in one.json()["atlases"])


def test_an_example_of_the_own_atlas_counts_wherever_it_is_named(several, served):
    for client, own in ((several.client, "atlas"), (served.client, "atlas")):
        both = client.post("/v1/search", json={"like": [2, 1], "k": 5}).json()
        named = {"like": [2], "like_elsewhere": [{"atlas": own, "tile": 1}], "k": 5}
        assert client.post("/v1/search", json=named).json()["hits"] == both["hits"]
        unlike = client.post("/v1/search", json={"like": [2], "unlike": [9], "k": 5}).json()
        named = {"like": [2], "unlike_elsewhere": [{"atlas": own, "tile": 9}], "k": 5}
        assert client.post("/v1/search", json=named).json()["hits"] == unlike["hits"]


def test_slides_are_compared_with_those_of_several_atlases(several, served):
    client = several.client
    alone = client.get("/v1/slides/case-1/similar?k=9").json()
    assert alone["slides"] and alone["atlases"] == [] and alone["slides"][0]["atlas"] is None
    names = "atlases=atlas&atlases=south&atlases=gone"
    found = client.get(f"/v1/slides/case-1/similar?k=9&{names}").json()
    assert [(a["atlas"], bool(a["away"])) for a in found["atlases"]] == [
        ("atlas", False), ("south", False), ("gone", True),
    ]  # fmt: skip
    there = [slide for slide in found["slides"] if slide["atlas"] == "atlas"]
    assert [(s["name"], s["score"]) for s in there] == [
        (s["name"], pytest.approx(s["score"], abs=1e-5)) for s in alone["slides"]
    ]
    assert len(there) == len(found["slides"]), "case-9 is of the same patient"
    other = client.get("/v1/slides/case-2/similar?atlases=south").json()["slides"]
    assert [(slide["atlas"], slide["name"]) for slide in other] == [("south", "case-9")]
    tile = other[0]["regions"][0]["match"]
    assert client.get(f"/v1/atlases/1/tiles/{tile}").json()["slide"] == "case-9"
    for query, said in (
        ("case-1/similar?atlases=east", "unknown atlas 'east'"),
        ("case-1/similar?atlases=south&how=votes", "by the median only"),
        ("none/similar?atlases=south", "no slide 'none'"),
    ):
        answer = client.get(f"/v1/slides/{query}")
        assert answer.status_code in {400, 404, 422} and said in answer.text, answer.text


def test_addresses_stay_on_the_server(serve, own_atlas, south, tmp_path):
    lite = f"milvus://{tmp_path}/private/none.db"
    moved = tmp_path / "private" / "moved"
    moved.parent.mkdir()
    shutil.copytree(south, moved)
    one = serve(own_atlas, others=[moved, lite, "milvus://127.0.0.1:9/secret"])
    tile = Atlas(south).vectors()[0][0].item()
    body = {"like_elsewhere": [{"atlas": "moved", "tile": tile}], "atlases": ["atlas", "moved"]}
    result = one.client.post("/v1/search", json=body).json()["result"]
    moved.rename(tmp_path / "private" / "elsewhere")
    said = [
        one.client.get("/v1/atlases").text,
        one.client.post("/v1/search", json={**body, "atlases": ["moved"]}).text,
        one.client.post("/v1/search", json={"like": [1], "atlases": ["histoseek", "secret"]}).text,
        one.client.get(f"/v1/results/{result}/html").text,
        error_html(BadInput(f"{lite} and {moved} and milvus://127.0.0.1:9/secret"), one.session),
    ]
    for text in said:
        assert "private" not in text and "127.0.0.1:9" not in text, text
    assert "not an atlas" in said[0] and "moved" in said[0]


def test_a_short_address_is_no_part_of_a_message(own_atlas, south, monkeypatch):
    monkeypatch.chdir(south)
    one = Session(own_atlas, others=["."])
    try:
        assert one.hide(f"No tile. See {south}/atlas.db.") == "No tile. See south/atlas.db."
    finally:
        one.close()


def test_what_is_refused(several, served, tmp_path, own_atlas):
    nothing = "the atlas cannot be searched: gone"
    for client, body, said in (
        (several.client, {"like": [1], "atlases": ["east"]}, "unknown atlas 'east'"),
        (served.client, {"like": [1], "atlases": ["south"]}, "choose one of: atlas"),
        (several.client, {"like_elsewhere": [{"atlas": "gone", "tile": 1}]}, nothing),
        (several.client, {"like": [1], "atlases": ["gone"]}, nothing),
    ):  # fmt: skip
        answer = client.post("/v1/search", json=body)
        assert answer.status_code in {404, 503} and said in answer.text, answer.text
    Atlas.create_external(tmp_path / "uni", "uni", 128)
    with pytest.raises(Mismatch, match="uni has the encoder"):
        Session(own_atlas, others=[str(tmp_path / "uni")])


def test_why_atlases_were_not_searched():
    def shard(name, away):
        return Searched(name, name, None, None, None, away)

    shards = [shard("a", ""), shard("b", "no answer within 10 s"), shard("c", NO_MOSAICS)]
    assert not_searched(shards) == (
        "Not searched, because they did not answer: b. "
        "Not compared, because Milvus has no mosaics: c."
    )
    assert not_searched(shards[:1]) == ""
