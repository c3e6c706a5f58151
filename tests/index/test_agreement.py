"""Two encoders on the same tiles: shared neighbours, by another implementation."""

import numpy as np
import pytest
from atlases import features, grouped
from sklearn.metrics.pairwise import cosine_similarity

from histoseek.errors import BadInput
from histoseek.index.atlas import Atlas
from histoseek.index.studies.agreement import agreement
from histoseek.serving.encoders.open import DEFAULT_BUNDLE

SLIDES, TILES = 6, 40


def two_atlases(folder, noise=0.4):
    """Atlases of the same places with related vectors; the second lacks some tiles and has others."""
    vectors, coords = [], []
    for number in range(SLIDES):
        rng = np.random.default_rng(number)
        vectors.append(grouped(rng, TILES))
        coords.append(np.stack([np.arange(TILES) * 448, np.full(TILES, number)], 1))
    atlases = []
    for side in range(2):
        folder_of = folder / str(side)
        folder_of.mkdir()
        files = []
        for number in range(SLIDES):
            rng = np.random.default_rng(100 + number)
            moved = vectors[number] + side * noise * rng.normal(size=vectors[number].shape) / 11
            moved = (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)
            places = coords[number].copy()
            order = np.arange(TILES)
            if side:  # in another order; two tiles at other places
                order = rng.permutation(TILES)
                places[:2] += 7
            path = folder_of / f"slide-{number}.h5"
            files.append(features(path, features=moved[order], coords=places[order]))
        atlas = Atlas.create(folder_of / "atlas", DEFAULT_BUNDLE)
        given = {
            f"slide-{n}": {"slide": f"slide-{n}", "patient": f"P{n // 2}"} for n in range(SLIDES)
        }
        atlas.add(files, given)
        atlases.append(atlas)
    return atlases


def vectors_by_place(atlas):
    found = {}
    view = atlas.view()
    for slide in view.columns.slides:
        ids = [int(slide["first_tile"]) + n for n in range(slide["tiles"])]
        for (number, tile), vector in zip(
            sorted(view.tiles(ids).items()), view.vectors_of(ids), strict=True
        ):
            assert number == tile["tile"]
            found[tile["slide"], tile["x"], tile["y"]] = vector
    return found


def test_shared_neighbours_are_those_of_another_implementation(tmp_path, cli_json, cli):
    one, other = two_atlases(tmp_path)
    first, second = vectors_by_place(one), vectors_by_place(other)
    common = [place for place in first if place in second]
    patient = np.array([int(place[0].split("-")[1]) // 2 for place in common])
    tops = []
    for vectors in (first, second):
        scores = cosine_similarity([vectors[place] for place in common])
        scores[patient[:, None] == patient[None]] = -np.inf
        tops.append(np.argsort(-scores, axis=1)[:, :5])
    shared = [len(set(a) & set(b)) / 5 for a, b in zip(*tops, strict=True)]
    nearest = [a[0] in b for a, b in zip(*tops, strict=True)]
    report = cli_json("index", "agreement", one.path, other.path, "-k", 5)
    assert (report["tiles"], report["only_in_one"], report["only_in_other"]) == (228, 12, 12)
    assert (report["queries"], report["owners"]) == (228, 3)
    assert report["overlap"]["value"] == pytest.approx(np.mean(shared), abs=1e-3)
    assert report["nearest_found"]["value"] == pytest.approx(np.mean(nearest), abs=1e-3)
    assert report["overlap"]["random"] == pytest.approx(5 / 152, abs=1e-3)
    low, high = report["overlap"]["interval_95"]
    assert low <= report["overlap"]["value"] <= high
    shown = cli("index", "agreement", one.path, other.path, check=True).stdout
    assert "12 tiles only in" in shown and "random" in shown


def test_an_atlas_agrees_with_itself_and_strangers_do_not(tmp_path):
    one, other = two_atlases(tmp_path)
    same = agreement(one, Atlas(one.path), k=3)
    assert same["overlap"]["value"] == same["nearest_found"]["value"] == 1.0
    few = agreement(one, other, k=3, queries=20)
    assert few["queries"] == 20
    alone = Atlas.create(tmp_path / "alone", DEFAULT_BUNDLE)
    alone.add([features(tmp_path / "elsewhere.h5")])
    with pytest.raises(BadInput, match="have 0 tiles in common"):
        agreement(one, alone)
    with pytest.raises(BadInput, match="k is 0"):
        agreement(one, other, k=0)
