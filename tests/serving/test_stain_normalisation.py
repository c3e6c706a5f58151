"""Encoders with stain normalisation: the methods, the bundle, slides, tile sets, and a Triton server."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histoseek.artifacts.feature_files import read_features
from histoseek.artifacts.manifest import OOD_THRESHOLD, Manifest, read_manifest
from histoseek.errors import BadInput, Damaged
from histoseek.export.normalising import export_normalising
from histoseek.export.options import ExportOptions, TritonOptions
from histoseek.export.triton import write_repository
from histoseek.index.atlas import Atlas
from histoseek.metrics import unit_rows
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.embedding.tiles_work import spread
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder
from histoseek.serving.encoders.stain_normalisation import (
    embed_images,
    fitted,
    graph_of,
    normalised,
    sampled,
)

METHODS = ("macenko", "reinhard")
SCANNER = np.array([[1.2, 0.1, 0.0], [0.05, 0.85, 0.1], [0.0, 0.05, 1.1]])
"""Mixes the optical densities of the colours, as another scanner and stronger stains do."""


def rescanned(picture):
    """The picture as another scanner would show it."""
    density = -np.log((picture.astype(np.float64) + 1) / 256)
    return (256 * np.exp(-density @ SCANNER) - 1).clip(0, 255).astype(np.uint8)


def square(picture, left=0, top=0, side=224):
    return np.ascontiguousarray(picture[top : top + side, left : left + side])


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The default encoder with each method."""
    folder = tmp_path_factory.mktemp("normalising")
    for name in METHODS:
        export_normalising(DEFAULT_BUNDLE, folder / name, ExportOptions(stain_normalise=name))
    return folder


@pytest.fixture(scope="module")
def encoder(bundles, method):
    return open_encoder(bundles / method)


# -- the methods ------------------------------------------------------------------------------------


def test_two_scans_of_the_same_tissue_get_the_same_colours(tissue, method):
    other = rescanned(tissue)
    before = np.abs(tissue.astype(int) - other).mean()
    made = [normalised(t[None], fitted(t.reshape(-1, 3), method))[0] for t in (tissue, other)]
    assert np.abs(made[0].astype(int) - made[1]).mean() < before / 2
    again = normalised(made[0][None], fitted(made[0].reshape(-1, 3), method))[0]
    assert np.abs(again.astype(int) - made[0]).mean() < 5, "a slide like the reference stays"


def test_glass_does_not_change_the_fit(tissue, method):
    pixels = tissue.reshape(-1, 3)[::16]
    glass = np.full((len(pixels) // 2, 3), 245, np.uint8)
    tile = square(tissue)[None]
    one, other = (normalised(tile, fitted(each, method)) for each in (pixels, np.r_[pixels, glass]))
    assert (one == other).all()


def test_what_cannot_be_fitted_is_said(tissue, method):
    with pytest.raises(BadInput, match="0 of 900 pixels have colours of stained tissue"):
        fitted(np.full((900, 3), 240, np.uint8), method)
    with pytest.raises(BadInput, match="0 of 0 pixels"):
        fitted(np.zeros((0, 3), np.uint8), method)
    uniform = np.full((50_176, 3), (150, 90, 160), np.uint8)
    uniform[::40, 0] = 151
    for pixels in (uniform, uniform[1:40]):
        with pytest.raises(BadInput, match="hardly differ|one stain only|39 of 39"):
            fitted(pixels, method)


@pytest.mark.parametrize("colour", [(0, 0, 0), (18, 12, 20), (20, 190, 60), (60, 200, 200)])
def test_black_and_green_do_not_change_the_fit(tissue, method, colour):
    tile = square(tissue)
    bar = tile.copy()
    bar[200:208, 20:120] = colour
    one, other = (
        normalised(tile[None], fitted(sampled(each[None]), method)).astype(int)
        for each in (tile, bar)
    )
    assert np.abs(one - other).mean() < 1.5


def test_dark_nuclei_are_fitted(tissue, method):
    dark = (tissue // 6).reshape(-1, 3)  # a strongly stained slide
    made = normalised(square(tissue)[None] // 6, fitted(dark, method))
    assert made.mean() > 2 * (square(tissue) // 6).mean()


def test_pixels_are_sampled_from_all_tiles():
    assert len(sampled(np.zeros((1, 32, 32, 3), np.uint8))) == 32 * 32
    assert len(sampled(np.zeros((1, 224, 224, 3), np.uint8))) == 112 * 112
    many = np.stack([np.full((224, 224, 3), n, np.uint8) for n in range(48)])
    assert (
        set(sampled(many)[:, 0].tolist()) == set(range(48)) and len(sampled(many)) == 48 * 56 * 56
    )


# -- the bundle -------------------------------------------------------------------------------------


def test_the_bundle_has_the_same_network_and_another_identity(bundles, encoder, method, tissue):
    plain = open_encoder("default")
    assert encoder.manifest.stain_normalise == method and encoder.manifest.name == method
    assert encoder.manifest.sha256 != plain.manifest.sha256
    assert len({read_manifest(bundles / name).sha256 for name in METHODS}) == 2
    assert encoder.describe()["stain_normalise"] == method
    tile = square(tissue)[None]
    assert (graph_of(encoder).embed(tile) == plain.embed(tile)).all()
    card = (bundles / method / "MODEL_CARD.md").read_text()
    assert card.startswith(f"# {method}\n") and method in card.lower()
    assert card.count(encoder.manifest.sha256) == 1 and card.count(plain.manifest.sha256) == 1
    assert "stain_normalise" not in (DEFAULT_BUNDLE / "manifest.json").read_text()
    assert "stain_normalise" not in plain.manifest.model_dump()


def test_what_cannot_be_exported_is_said(bundles, tmp_path):
    out = tmp_path / "out"
    for bundle, options, says in (
        (bundles / "macenko", {"stain_normalise": "reinhard"}, "stain normalisation already"),
        (DEFAULT_BUNDLE, {}, "--stain-normalise macenko or reinhard"),
        (DEFAULT_BUNDLE, {"stain_normalise": "macenko", "views": 4}, "--views is not for a bundle"),
        (DEFAULT_BUNDLE, {"stain_normalise": "macenko", "notes": tmp_path}, "--notes is not for"),
        (DEFAULT_BUNDLE, {"stain_normalise": "macenko", "name": "a b"}, "expected letters"),
        (DEFAULT_BUNDLE, {"stain_normalise": "macenko", "mpp": 0.25}, "--mpp is not for"),
        (DEFAULT_BUNDLE, {"stain_normalise": "macenko", "licence": "MIT"}, "--licence is not for"),
    ):
        with pytest.raises(BadInput, match=says):
            export_normalising(bundle, out, ExportOptions(**options))
    assert not out.exists()
    with pytest.raises(BadInput, match="is in the bundle"):
        export_normalising(
            bundles / "macenko",
            bundles / "macenko" / "new",
            ExportOptions(stain_normalise="macenko"),
        )


def test_a_manifest_with_an_unknown_method_is_refused(bundles, tmp_path):
    folder = shutil.copytree(bundles / "macenko", tmp_path / "bundle")
    path = folder / "manifest.json"
    path.write_text(
        path.read_text().replace('"stain_normalise": "macenko"', '"stain_normalise": "vahadane"')
    )
    with pytest.raises(Damaged, match="stain_normalise"):
        read_manifest(folder)


def test_the_command_makes_a_bundle_without_torch(cli, cli_json, tmp_path, monkeypatch):
    monkeypatch.setattr("histoseek.ui.cli.model.find_spec", lambda _: None)
    document = cli_json(
        "export", "default", "--stain-normalise", "macenko", "--out", tmp_path / "he"
    )
    assert (
        Manifest.model_validate({k: v for k, v in document.items() if k != "bundle"}).name == "he"
    )
    for words, says in (
        (["default", "--out", tmp_path / "b"], "is a bundle already"),
        (
            ["default", "--out", tmp_path / "b", "--tiles", tmp_path],
            "and at most --name",
        ),
    ):
        refused = cli("export", *words)
        assert refused.returncode == 1 and says in refused.stderr, refused.stderr
    monkeypatch.undo()
    refused = cli("export", tmp_path, "--stain-normalise", "macenko", "--out", tmp_path / "b")
    assert refused.returncode == 1 and "is not a bundle" in refused.stderr


# -- queries ----------------------------------------------------------------------------------------


def test_a_query_from_another_scanner_gets_a_similar_embedding(encoder, method, tissue):
    tiles = np.stack([square(tissue, x, y) for x in (0, 250) for y in (0, 250)])
    other = rescanned(tiles)

    def cosines(embed):
        """Without the gate, which looks at the tiles as they are."""
        one, two = (unit_rows(embed(t)[:, :-1]) for t in (tiles, other))
        return (one * two).sum(1)

    plain = cosines(open_encoder("default").embed)
    found = cosines(encoder.embed)
    if method == "macenko":
        assert found.mean() > 0.97 > plain.mean()
    assert found.min() > 0.85
    assert np.allclose(np.linalg.norm(encoder.embed(tiles), axis=1), 1, atol=1e-5)


def test_the_tissue_gate_looks_at_the_image_as_it_is(encoder, pictures, tissue):
    cat = np.asarray(Image.fromarray(pictures["cat"]).resize((224, 224)))
    graph, method = graph_of(encoder), encoder.manifest.stain_normalise
    found = encoder.embed(cat[None])[0]
    assert found[-1] == graph.embed(cat[None])[0, -1] > OOD_THRESHOLD
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
    made = graph.embed(normalised(cat[None], fitted(sampled(cat[None]), method)))[0]
    assert unit_rows(found[None, :-1]) @ unit_rows(made[None, :-1]).T == pytest.approx(1, abs=1e-5)
    known = square(tissue, 250, 250)[
        None
    ]  # of an image that passes, the vector is the normalised tile's
    assert graph.embed(known)[0, -1] < OOD_THRESHOLD
    made = graph.embed(normalised(known, fitted(sampled(known), method)))
    assert np.abs(encoder.embed(known) - made).max() < 1e-6


def test_a_tile_of_a_slide_and_the_same_tile_as_a_query_agree(
    encoder, make_slide, tmp_path, pictures
):
    """Also where the gate says that it is no tissue."""
    cat = np.asarray(Image.fromarray(pictures["cat"]).resize((224, 224)))
    slide = make_slide(tmp_path / "cat.tiff", pixels=np.asarray(Image.fromarray(cat)))
    _, features = embedded(slide, encoder, tmp_path / "out", min_tissue=0, max_pen=1)
    assert len(features.features) == 1
    (query,) = encoder.embed(cat[None])
    assert query[-1] > OOD_THRESHOLD and query @ features.features[0] > 0.999


def test_parts_of_one_image_are_fitted_together(encoder, tissue):
    tiles = np.stack([square(tissue, x) for x in (0, 250)])
    alone, _ = embed_images(encoder, tiles)
    together, reasons = embed_images(encoder, tiles, one_image=True)
    table = fitted(sampled(tiles), encoder.manifest.stain_normalise)
    wanted = graph_of(encoder).embed(normalised(tiles, table))
    cosines = (unit_rows(together[:, :-1]) * unit_rows(wanted[:, :-1])).sum(1)
    assert np.allclose(cosines, 1, atol=1e-5) and reasons == ["", ""]
    assert np.abs(alone - together).max() > 1e-3


def test_an_image_without_tissue_is_embedded_as_it_is_and_said(encoder, tissue):
    glass = np.full((1, 224, 224, 3), 240, np.uint8)
    tiles = np.concatenate([square(tissue)[None], glass])
    vectors, reasons = embed_images(encoder, tiles)
    assert reasons[0] == "" and "colours of stained tissue" in reasons[1]
    assert np.allclose(vectors[1:], graph_of(encoder).embed(glass), atol=1e-6)
    plain = open_encoder("default")
    assert embed_images(plain, glass)[1] == [""]
    with pytest.raises(BadInput, match=r"expected uint8 \(N, 224, 224, 3\)"):
        encoder.embed(np.zeros((1, 10, 10, 3), np.uint8))
    assert encoder.embed(np.zeros((0, 224, 224, 3), np.uint8)).shape == (0, 128)


# -- slides and tile sets ---------------------------------------------------------------------------


def embedded(path, encoder, out, **options):
    options = {"min_sharpness": 0, "overlays": False, **options}
    (result,) = embed_jobs(
        find_jobs([path]), encoder, out, EmbedOptions(**options), lambda *_: None
    )
    return result, read_features(Path(result.features))


def test_a_slide_from_another_scanner_finds_its_places(encoder, make_slide, tissue, tmp_path):
    large = np.asarray(Image.fromarray(tissue).resize((1792, 1792), Image.Resampling.LANCZOS))
    results = {}
    for name, pixels in (("one", large), ("other", rescanned(large))):
        slide = make_slide(tmp_path / f"{name}.tiff", pixels=pixels)
        results[name] = embedded(slide, encoder, tmp_path / "features")
    one, other = (unit_rows(features.features[:, :-1]) for _, features in results.values())
    assert len(one) > 9 and ((one @ other.T).argmax(1) == np.arange(len(one))).all()
    result, features = results["one"]
    assert features.encoder_sha256 == encoder.manifest.sha256
    assert result.notes == [
        "the slide looks like immunohistochemistry; its stain was normalised, which gives it colours of H&E"
    ]
    again, _ = embedded(tmp_path / "one.tiff", encoder, tmp_path / "features")
    assert again.state == "skipped" and again.notes == result.notes
    atlas = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    (added,) = atlas.add([Path(result.features)])
    assert added.state == "failed" and "embed the slide with the atlas's encoder" in added.reason


@pytest.mark.parametrize("ink", [(20, 190, 60), (30, 70, 220), (44, 36, 48)])
def test_ink_on_a_slide_does_not_change_the_fit(encoder, make_slide, tissue, tmp_path, ink):
    large = np.asarray(Image.fromarray(tissue).resize((1344, 1344), Image.Resampling.LANCZOS))
    inked = large.copy()
    inked[:, :448] = ink  # the left third: whole tiles
    clean = large.copy()
    clean[:, :448] = 245
    tiles = [
        embedded(
            make_slide(tmp_path / f"{n}.tiff", pixels=pixels), encoder, tmp_path / n, max_pen=1
        )[1]
        for n, pixels in (("inked", inked), ("clean", clean))
    ]
    vectors = [
        {tuple(xy): v for xy, v in zip(f.coords.tolist(), f.features, strict=True)} for f in tiles
    ]
    common = vectors[0].keys() & vectors[1].keys()
    assert len(common) > 5 and len(vectors[0]) > len(common)
    assert all(np.abs(vectors[0][xy] - vectors[1][xy]).max() < 1e-5 for xy in common)


def test_features_do_not_depend_on_the_workers(encoder, make_slide, tmp_path):
    slide = make_slide(tmp_path / "a.tiff", side=1400)
    runs = [embedded(slide, encoder, tmp_path / f"out-{jobs}", jobs=jobs) for jobs in (1, 3)]
    (_, first), (_, second) = runs
    assert len(first.features) > 9 and (first.features == second.features).all()


def test_a_slide_with_one_stain_keeps_its_colours_and_says_so(bundles, make_slide, tmp_path):
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.2, 1.2, (1024, 1024, 1))
    pixels = (256 * np.exp(-amounts * [0.56, 0.72, 0.41]) - 1).clip(0, 255).astype(np.uint8)
    slide = make_slide(tmp_path / "blue.tiff", pixels=pixels)
    normalising = open_encoder(bundles / "macenko")
    result, features = embedded(slide, normalising, tmp_path / "features")
    assert "the stain was not normalised: the pixels show one stain only" in " ".join(result.notes)
    _, plain = embedded(slide, open_encoder("default"), tmp_path / "plain")
    assert np.allclose(features.features, plain.features, atol=1e-6)


def test_tiles_of_a_group_are_fitted_together(bundles, tissue, tmp_path):
    folder = tmp_path / "tiles"
    folder.mkdir()
    tiles = [square(tissue, x, y) for x in (0, 250) for y in (0, 250)]
    rows = ["file,label,group"]
    for n, (tile, group) in enumerate(
        [*((t, "P1") for t in tiles), *((rescanned(t), "P2") for t in tiles), (tiles[0], "")]
    ):
        Image.fromarray(tile).save(folder / f"{n}.png")
        rows.append(f"{n}.png,a,{group}")
    Image.new("RGB", (224, 224), (240, 240, 240)).save(folder / "glass.png")
    rows.append("glass.png,a,P3")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    encoder = open_encoder(bundles / "macenko")
    result, features = embedded(folder, encoder, tmp_path / "out")
    rows = {file.rsplit("/", 1)[-1]: row for row, file in enumerate(features.files)}
    vectors = features.features[[rows[f"{n}.png"] for n in range(9)]]
    wanted = graph_of(encoder).embed(
        normalised(np.stack(tiles), fitted(sampled(np.stack(tiles)), "macenko"))
    )
    vectors, wanted = unit_rows(vectors[:, :-1]), unit_rows(wanted[:, :-1])  # without the gate
    assert np.abs(vectors[:4] - wanted).max() < 1e-5
    assert ((vectors[:4] * vectors[4:8]).sum(1) > 0.95).all()
    assert np.abs(vectors[8] - vectors[0]).max() > 1e-3, "a tile without a group is fitted alone"
    (note,) = [note for note in result.notes if "stain" in note]
    assert note.startswith("the stain of 1 tile was not normalised, first of P3: 0 of ")


def test_notes_and_features_of_a_tile_set_do_not_depend_on_the_workers(bundles, tissue, tmp_path):
    folder = tmp_path / "tiles"
    folder.mkdir()
    rows = ["file,label,group"]
    for n in range(130):
        Image.fromarray(
            square(tissue, n, n) if n % 3 else np.full((224, 224, 3), 240, np.uint8)
        ).save(folder / f"{n:03d}.png")
        rows.append(f"{n:03d}.png,a,P{n % 3}-{n % 2}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    encoder = open_encoder(bundles / "macenko")
    made, blobs = [], []
    for jobs in (1, 4):
        result, _ = embedded(folder, encoder, tmp_path / "out", jobs=jobs)
        made.append(result)
        blobs.append(Path(result.features).read_bytes())
        shutil.rmtree(tmp_path / "out")  # feature files state their folder
    assert blobs[0] == blobs[1]
    (note,) = made[0].notes
    assert note.startswith("the stain of 44 tiles was not normalised, first of P0-0: 0 of ")


def test_a_group_whose_first_tiles_are_unreadable_is_fitted_to_others(bundles, tissue, tmp_path):
    folder = tmp_path / "tiles"
    folder.mkdir()
    files = [f"{n:03d}.png" for n in range(320)]
    broken = {files[n] for n in spread(320)[:16]}
    for n, file in enumerate(files):
        if file in broken:
            (folder / file).write_bytes(b"no image")
        else:
            Image.fromarray(square(tissue, n % 250, n % 200)).resize((64, 64)).save(folder / file)
    (folder / "manifest.csv").write_text("file,group\n" + "".join(f"{f},P1\n" for f in files))
    result, _ = embedded(folder, open_encoder(bundles / "macenko"), tmp_path / "out")
    assert result.state == "partial" and not [n for n in result.notes if "stain" in n]


def test_a_server_gets_normalised_tiles(bundles, triton, tissue, tmp_path):
    write_repository([bundles / "macenko"], tmp_path / "models", TritonOptions())
    server = triton(tmp_path / "models")
    local = open_encoder(bundles / "macenko")
    remote = open_encoder(server.url("macenko"), expect=local.manifest)
    tiles = np.stack([square(tissue, x) for x in (0, 250)])
    assert remote.manifest.stain_normalise == "macenko"
    assert np.abs(remote.embed(tiles) - local.embed(tiles)).max() < 1e-5
    assert np.abs(remote.embed(tiles) - open_encoder("default").embed(tiles)).max() > 0.01
    remote.close()
