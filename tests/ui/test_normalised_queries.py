"""Queries to an atlas whose encoder normalises stains: all are treated alike, and failures are said."""

import base64
import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histoseek.artifacts.feature_files import read_features
from histoseek.export.normalising import export_normalising
from histoseek.export.options import ExportOptions
from histoseek.index.atlas import Atlas
from histoseek.index.search.query import Query
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder
from histoseek.serving.encoders.stain_normalisation import embed_images
from histoseek.ui.notebook.atlas import Atlas as NotebookAtlas
from histoseek.ui.session.regions import Region

NOT_NORMALISED = "was not normalised: 0 of 12544 pixels have colours"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("normalising") / "macenko"
    export_normalising(DEFAULT_BUNDLE, folder, ExportOptions(stain_normalise="macenko"))
    return folder


@pytest.fixture(scope="module")
def atlas(bundle, tmp_path_factory, make_slide):
    """A slide, embedded with stain normalisation, and a clustering."""
    folder = tmp_path_factory.mktemp("atlas")
    slide = make_slide(folder / "case.tiff", side=1400, seed=1)
    options = EmbedOptions(overlays=False)
    (done,) = embed_jobs(
        find_jobs([slide]), open_encoder(bundle), folder / "features", options, lambda *_: None
    )
    made = Atlas.create(folder / "atlas", bundle)
    made.add([Path(done.features)])
    made.fit("kmeans", k=2)
    return folder / "atlas"


@pytest.fixture
def client(serve, atlas):
    return serve(atlas).client


@pytest.fixture(scope="module")
def files(tmp_path_factory, tissue):
    """A picture of tissue and one of glass, of the size of a tile."""
    folder = tmp_path_factory.mktemp("queries")
    Image.fromarray(tissue[:224, :224]).save(folder / "tissue.png")
    Image.new("RGB", (224, 224), (240, 240, 240)).save(folder / "glass.png")
    return [folder / "tissue.png", folder / "glass.png"]


@pytest.fixture(scope="module")
def wanted(bundle, files):
    tiles = np.stack([np.asarray(Image.open(file)) for file in files])
    return embed_images(open_encoder(bundle), tiles)[0]


def form(files):
    return [("images", (f.name, f.read_bytes(), "image/png")) for f in files]


def test_the_api_normalises_and_says_what_it_could_not(client, files, wanted):
    found = client.post("/v1/embeddings", files=form(files)).json()
    assert np.allclose(found["embeddings"], wanted, atol=1e-5)
    (note,) = found["notes"]
    assert note.startswith(f"the stain of glass.png {NOT_NORMALISED}")
    url = "data:image/png;base64," + base64.b64encode(files[1].read_bytes()).decode()
    openai = client.post("/v1/embeddings", json={"input": [url]}).json()
    assert np.allclose(openai["data"][0]["embedding"], wanted[1], atol=1e-5)
    assert openai["notes"][0].startswith(f"the stain of input[0] {NOT_NORMALISED}")
    assert client.post("/v1/embeddings", files=form(files[:1])).json()["notes"] == []


def test_a_search_says_it_in_every_form(client, files):
    answer = client.post("/v1/search", files=form(files)).json()
    (note,) = answer["notes"]
    assert note.startswith(f"the stain of image 2 {NOT_NORMALISED}")
    assert f"The stain of image 2 {NOT_NORMALISED}" in answer["verdict"]["text"]
    assert note[4:] in client.get(f"/v1/results/{answer['result']}/html").text
    unlike = [("unlike_images", (files[1].name, files[1].read_bytes(), "image/png"))]
    answer = client.post("/v1/search", files=[*form(files[:1]), *unlike]).json()
    assert answer["notes"][0].startswith("the stain of unlike image 1 ")
    assert client.post("/v1/search", files=form(files[:1])).json()["notes"] == []


def test_assigning_says_it(client, files):
    answer = client.post("/v1/assign", files=form(files)).json()
    assert [image["image"] for image in answer["images"]] == ["tissue.png", "glass.png"]
    assert answer["notes"][0].startswith(f"the stain of glass.png {NOT_NORMALISED}")
    assert answer["notes"][0][4:] in client.get(f"/v1/results/{answer['result']}/html").text


def mean_of_tiles(encoder, tiles):
    """The mean of the tiles of one image, and of the tiles each fitted alone."""
    means = [embed_images(encoder, tiles, one_image=one)[0].mean(0) for one in (True, False)]
    return [mean / np.linalg.norm(mean) for mean in means]


def test_a_region_of_the_atlas_is_normalised_as_one_image(serve, atlas):
    session = serve(atlas).session
    region = Region("case", ((0, 0), (900, 0), (900, 900), (0, 900)))
    answer = session.search(Query(), regions=[region])
    tiles = session.viewer.tiles_in(region)[1]
    together, alone = mean_of_tiles(session.encoder, tiles)
    assert len(tiles) > 2 and answer.hits[0].slide == "case" and answer.notes == ()
    assert answer.vector @ together > 0.99999 and alone @ together < 0.9999


@pytest.fixture(scope="module")
def large(tissue, tmp_path_factory):
    picture = Image.new("RGB", (896, 448), (240, 240, 240))
    picture.paste(Image.fromarray(tissue[:448, :448]), (0, 0))
    path = tmp_path_factory.mktemp("large") / "a.png"
    picture.save(path)
    return path


def test_an_image_of_known_scale_is_normalised_as_one_image(serve, atlas, large, cli_answers):
    one = serve(atlas)
    image, tiles = one.session.cut(large, "a.png", 0.5)
    together, alone = mean_of_tiles(one.session.encoder, tiles)
    assert len(tiles) > 2 and alone @ together < 0.9999
    wanted = Atlas(atlas).search(together[None], 3)[0]
    data = {"mpp": "0.5", "k": "3"}
    answer = one.client.post(
        "/v1/search", files={"images": ("a.png", large.read_bytes())}, data=data
    )
    assert answer.status_code == 200, answer.text
    printed = cli_answers("index", "search", atlas, large, "--mpp", "0.5", "-k", 3)[0]
    for hits in (answer.json()["hits"], printed):
        assert [hit["tile"] for hit in hits] == [hit.tile for hit in wanted]
        assert [hit["score"] for hit in hits] == pytest.approx(
            [hit.score for hit in wanted], abs=1e-4
        )
    assert answer.json()["notes"] == []
    client = one.client
    glass = io.BytesIO()
    Image.new("RGB", (896, 448), (240, 240, 240)).save(glass, "PNG")
    files = {"images": ("a.png", glass.getvalue())}
    answer = client.post("/v1/search", files=files, data=data)
    (note,) = answer.json()["notes"]
    assert note.startswith("the stain of a.png was not normalised: 0 of ")


def test_the_command_line_and_python_do_the_same(cli, atlas, files, wanted, capsys):
    expected = Atlas(atlas).search(wanted, 3)
    searched = cli("index", "search", atlas, *files, "-k", 3, "--json")
    assert searched.returncode == 0, searched.stdout + searched.stderr
    document = json.loads(searched.stdout)
    assert [[hit["tile"] for hit in hits] for hits in document["answers"]] == [
        [hit.tile for hit in hits] for hits in expected
    ]
    (note,) = document["notes"]
    assert f"the stain of {files[1]} {NOT_NORMALISED}" in note and "tissue.png" not in note
    assigned = cli("index", "assign", atlas, *files)
    assert f"the stain of {files[1]} {NOT_NORMALISED}" in assigned.stderr + assigned.stdout
    large = cli("index", "search", atlas, files[1], "--mpp", "0.5")
    assert f"the stain of {files[1]} was not normalised" in large.stderr + large.stdout
    with (
        NotebookAtlas(atlas) as notebook,
        pytest.warns(UserWarning, match=f"image 2 {NOT_NORMALISED}"),
    ):
        found = notebook.search([str(file) for file in files], k=3)
        with pytest.warns(UserWarning, match="was not normalised"):
            assigned = notebook.assign([str(file) for file in files])
    distances = [row["distance"] for row in Atlas(atlas).assign(wanted)]
    assert [row.distance for row in assigned] == pytest.approx(distances, abs=1e-5)
    assert [[hit.tile for hit in hits] for hits in found] == [
        [hit.tile for hit in hits] for hits in expected
    ]


def test_atlases_with_and_without_are_not_searched_together(cli, atlas, ui_atlas, files):
    refused = cli("index", "search", atlas, ui_atlas, files[0])
    assert refused.returncode == 1 and "only atlases of the same encoder" in refused.stderr


def test_slides_added_on_the_page_are_normalised(serve, atlas, tmp_path, make_slide, bundle):
    one = serve(shutil.copytree(atlas, tmp_path / "atlas"))
    slide = make_slide(tmp_path / "new.tiff", side=1400, seed=4)
    added = one.client.post("/v1/slides", files={"file": ("new.tiff", slide.read_bytes())})
    assert added.status_code == 202, added.text
    deadline = time.monotonic() + 60
    while one.client.get("/v1/jobs").json()["jobs"][0]["state"] not in {"done", "failed"}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (done,) = embed_jobs(
        find_jobs([slide]), open_encoder(bundle), tmp_path / "f", EmbedOptions(overlays=False),
        lambda *_: None,
    )  # fmt: skip
    vectors = read_features(Path(done.features)).features[:1]
    hit = one.session.atlas.search(vectors, 1)[0][0]
    assert hit.slide == "new" and hit.score > 0.9999
