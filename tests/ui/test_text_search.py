"""Search by text: on the command line, in Python, over HTTP and on clusters."""

import json
import shutil

import numpy as np
import pytest

from histoseek.index.atlas import Atlas as Index
from histoseek.serving.encoders.onnx import OnnxEncoder
from histoseek.serving.encoders.text import TextEncoder
from histoseek.ui.notebook.atlas import Atlas
from histoseek.ui.page import cluster_view

TEXT = "signet ring cells floating in mucin"
NOTICE = "does not prove that a tile shows"


@pytest.fixture(scope="module")
def text_atlas(text_bundle, tile_folder, tmp_path_factory):
    """An atlas of real tiles, embedded by an encoder with a text network of random weights."""
    from histoseek.serving.embedding.jobs import find_jobs
    from histoseek.serving.embedding.pipeline import embed_jobs
    from histoseek.serving.embedding.results import EmbedOptions

    folder = tmp_path_factory.mktemp("text")
    encoder = OnnxEncoder(text_bundle / "bundle")
    done = embed_jobs(
        find_jobs([tile_folder]), encoder, folder / "f", EmbedOptions(), lambda *_: None
    )
    encoder.close()
    atlas = Index.create(folder / "atlas", text_bundle / "bundle")
    atlas.add([folder / "f" / result.features for result in done])
    atlas.fit("kmeans", k=3)
    return folder / "atlas"


@pytest.fixture(scope="module")
def wanted(text_atlas):
    """Every tile's score for the text, by tile, computed from the stored vectors."""
    atlas = Index(text_atlas)
    vector = TextEncoder(atlas.encoder_bundle, atlas.manifest).embed([TEXT])[0]
    ids = [hit.tile for hit in atlas.search(atlas.view().vectors_of([1]), k=1000)[0]]
    vectors = atlas.view().vectors_of(ids)
    return dict(zip(ids, (vectors @ vector).tolist(), strict=True))


def ranked(scores, k=5):
    return sorted(scores, key=lambda tile: -scores[tile])[:k]


def test_the_command_line_ranks_tiles_by_text(text_atlas, wanted, tile_folder, cli, cli_answers):
    (hits,) = cli_answers("index", "search", text_atlas, "--text", TEXT, "-k", 5)
    assert [hit["tile"] for hit in hits] == ranked(wanted)
    np.testing.assert_allclose(
        [h["score"] for h in hits], [wanted[h["tile"]] for h in hits], atol=1e-5
    )
    shown = cli("index", "search", text_atlas, "--text", TEXT, check=True)
    assert repr(TEXT) in shown.stdout and NOTICE in shown.stdout + shown.stderr
    image = tile_folder / "cat" / "00.png"
    words = ("index", "search", text_atlas, image, "--text", TEXT, "--text", "fat", "--tile", 3)
    assert len(cli_answers(*words)) == 4
    assert len(cli_answers(*words, "--unlike-text", "necrosis", "--where", "label = 'cat'")) == 1
    refused = cli("index", "search", text_atlas, "--text", " ")
    assert refused.returncode == 1 and "the text is empty" in refused.stderr


def test_python_combines_text_with_images_and_tiles(text_atlas, wanted, tile_folder):
    with Atlas(text_atlas) as atlas:
        hits = atlas.search(text=TEXT, k=5)
        assert [hit.tile for hit in hits] == ranked(wanted)
        both = atlas.search(like=[tile_folder / "cat" / "00.png", 3], text=TEXT, k=5)
        less = atlas.search(text=TEXT, unlike_text="necrosis", k=5)
        assert len(both) == len(less) == 5 and [h.tile for h in both] != [h.tile for h in hits]


def test_the_api_answers_and_reports_text(text_atlas, wanted, serve, tmp_path):
    served = serve(shutil.copytree(text_atlas, tmp_path / "atlas"))
    answer = served.client.post("/v1/search", json={"texts": [TEXT], "k": 5}).json()
    assert [hit["tile"] for hit in answer["hits"]] == ranked(wanted)
    assert answer["provenance"]["examples"]["texts"] == [TEXT]
    verdict = answer["verdict"]
    assert NOTICE in verdict["text"] and not verdict["unknown"] and verdict["placed"] is None
    report = served.client.get(f"/v1/results/{answer['result']}/html").text
    assert TEXT in report
    noted = [line for line in served.lines() if line["action"] == "search"]
    assert noted[-1]["texts"] == [TEXT]
    for body in (
        {"texts": []},
        {"texts": ["q" * 1001]},
        {"texts": ["q" * 500]},
        {"texts": ["fat"] * 9},
    ):
        assert served.client.post("/v1/search", json=body).status_code in (400, 422)


def test_the_heat_map_of_a_text_spans_the_scores_of_the_slide(
    text_bundle, make_slide, tmp_path, serve
):
    from histoseek.serving.embedding.jobs import find_jobs
    from histoseek.serving.embedding.pipeline import embed_jobs
    from histoseek.serving.embedding.results import EmbedOptions

    slide = make_slide(tmp_path / "case.tiff", side=1400, seed=1)
    encoder = OnnxEncoder(text_bundle / "bundle")
    (done,) = embed_jobs(
        find_jobs([slide]), encoder, tmp_path / "f", EmbedOptions(), lambda *_: None
    )
    atlas = Index.create(tmp_path / "atlas", text_bundle / "bundle")
    atlas.add([tmp_path / "f" / done.features])
    served = serve(tmp_path / "atlas")
    answer = served.client.post("/v1/search", json={"texts": [TEXT]}).json()
    heat = served.client.get("/v1/slides/case/heat.jpg", params={"result": answer["result"]})
    assert heat.headers["content-type"] == "image/jpeg"
    vector = TextEncoder(atlas.encoder_bundle, atlas.manifest).embed([TEXT])[0]
    scores = atlas.scores_in("case", vector)
    _, low, high = served.session.pictures.heat("case", vector, by_text=True)
    assert (low, high) == (pytest.approx(scores.min()), pytest.approx(scores.max()))
    assert served.session.pictures.heat("case", vector)[1:] == (0.0, 1.0)
    encoder.close()


def test_an_encoder_without_text_says_so(client, ui_atlas, cli):
    answer = client.post("/v1/search", json={"texts": [TEXT]})
    assert answer.status_code == 422 and "has no text network" in answer.text
    refused = cli("index", "search", ui_atlas, "--text", TEXT)
    assert refused.returncode == 1 and "has no text network" in refused.stderr


def test_names_are_proposed_for_clusters(text_atlas, cli, cli_json, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\ufefffat\n# a remark\n\nnecrosis\nmucin\nfat\n", encoding="utf-8")
    rows = cli_json("index", "name", text_atlas, "--suggest", path)
    assert [row["cluster"] for row in rows] == [0, 1, 2]
    assert all(sorted(row["words"]) == ["fat", "mucin", "necrosis"] for row in rows)
    atlas = Index(text_atlas)
    tiles = [
        [t["tile"] for t in c["examples"]] for c in atlas.clusters(None, 1000) if c["cluster"] >= 0
    ]
    centres = [atlas.view().vectors_of(group).mean(0) for group in tiles]
    centres = np.array([centre / np.linalg.norm(centre) for centre in centres])
    words = TextEncoder(atlas.encoder_bundle, atlas.manifest).embed(["fat", "necrosis", "mucin"])
    scores = centres @ words.T
    best = np.argmax(scores - scores.mean(0), axis=1)
    assert [row["words"][0] for row in rows] == [["fat", "necrosis", "mucin"][n] for n in best]
    path.write_text("fat\n")
    assert "expected at least 2" in cli("index", "name", text_atlas, "--suggest", path).stderr
    assert "expected `histoseek index name" in cli("index", "name", text_atlas).stderr


def test_names_are_proposed_over_http_and_by_the_page(text_atlas, serve, cli_json, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("fat\nnecrosis\nmucin\n")
    expected = cli_json("index", "name", text_atlas, "--suggest", path)
    one = serve(shutil.copytree(text_atlas, tmp_path / "atlas"))
    body = {"words": ["fat", " necrosis ", "mucin", "fat"]}
    answer = one.client.post("/v1/cluster-names", json=body).json()
    assert [row["words"] for row in answer["clusters"]] == [row["words"] for row in expected]
    assert one.lines()[-1]["action"] == "suggest" and "mucin" in one.lines()[-1]["words"]
    shown = cluster_view.proposed_names(one.session.suggest_names(["<b>", "fat"], None))
    assert "&lt;b&gt;" in shown and "<b>" not in shown
    for words in (["fat"], ["fat", "fat"], ["a"] * 65, [str(n) for n in range(65)]):
        assert one.client.post("/v1/cluster-names", json={"words": words}).status_code == 422


def test_the_text_network_goes_with_the_atlas(text_atlas, tmp_path, cli):
    cli("index", "snapshot", text_atlas, "--out", tmp_path / "copy", check=True)
    copy = tmp_path / "copy"
    assert json.loads((copy / "encoder" / "manifest.json").read_text())["text"]["context"] == 77
    (copy / "encoder" / "text.onnx").write_bytes(b"")
    problems = cli("index", "verify", copy)
    assert problems.returncode == 1 and "text.onnx" in problems.stdout + problems.stderr
