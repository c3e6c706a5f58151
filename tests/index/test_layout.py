"""The map of an atlas: its quality, the positions of new tiles, and the handling of its file."""

import json

import numpy as np
import pytest
from atlases import features, filled, grouped

from histoseek.errors import BadInput, Damaged
from histoseek.index.atlas import Atlas
from histoseek.index.search import layout


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    made = filled(tmp_path_factory.mktemp("map"), slides=4, count=150)
    made.make_layout()
    return made


def test_alike_tiles_lie_together(atlas):
    made = atlas.layout()
    ids, vectors = atlas.vectors()
    places = made.place(vectors)
    assert len(ids) == 600 and np.abs(places).max() <= 1 and made.method == "t-SNE"
    assert made.trust > 0.9
    near = np.argsort(-(vectors @ vectors.T), axis=1)[:, 1]
    apart = np.linalg.norm(places - places[near], axis=1)
    shuffled = np.linalg.norm(places - places[np.random.default_rng(0).permutation(600)], axis=1)
    assert np.median(apart) < np.median(shuffled) / 5


def test_landmarks_and_their_doubles_lie_where_they_were(atlas):
    made = atlas.layout()
    assert np.abs(made.place(made.landmarks) - made.points).max() < 1e-3
    assert np.abs(made.place(3 * made.landmarks) - made.points).max() < 1e-3, "cosine"


def test_the_same_seed_gives_the_same_map(atlas):
    vectors = atlas.layout().landmarks[:200]
    one, two = (layout.make("a", 200, vectors, "cosine", seed=3) for _ in range(2))
    assert np.array_equal(one.points, two.points)


def test_it_stays_when_tiles_are_added_and_is_made_anew_when_they_doubled(tmp_path):
    atlas = filled(tmp_path, slides=2, count=100)
    made = atlas.make_layout()
    rng = np.random.default_rng(8)
    atlas.add([features(tmp_path / "more.h5", 150, features=grouped(rng, 150))])
    assert np.array_equal(atlas.layout().points, made.points)
    atlas.add([features(tmp_path / "yet.h5", 100, features=grouped(rng, 100))])
    assert atlas.layout() is None
    assert len(atlas.make_layout().points) == 450


def test_a_map_of_another_atlas_does_not_count(tmp_path, atlas):
    other = filled(tmp_path, slides=1, count=60)
    (other.path / layout.FILE).write_bytes((atlas.path / layout.FILE).read_bytes())
    assert other.layout() is None


def test_a_damaged_map_is_named_and_deleted_by_repair(tmp_path):
    atlas = filled(tmp_path, slides=1, count=60)
    atlas.make_layout()
    file = atlas.path / layout.FILE
    whole = file.read_bytes()
    for number in np.random.default_rng(0).integers(0, len(whole), 40).tolist():
        blob = bytearray(whole)
        blob[number] ^= 0xFF
        file.write_bytes(bytes(blob))
        try:
            found = atlas.layout()
        except Damaged as error:
            assert "map.npz is damaged" in str(error)
            assert any("map.npz" in text for text in atlas.verify())
        else:  # a byte of the container that means nothing, such as a time
            assert found is None or np.array_equal(found.points, layout.read(atlas.path).points)
    file.write_bytes(whole[:100])
    assert any("map.npz" in text for text in atlas.verify())
    assert any("map was deleted" in text for text in atlas.repair())
    assert atlas.verify() == [] and not file.exists()


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 12])
def test_few_tiles_have_a_map_too(count):
    vectors = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
    for given in (vectors, np.repeat(vectors[:1], count, axis=0)):
        for metric in ("cosine", "l2"):
            made = layout.make("a", count, given, metric)
            assert np.isfinite(made.points).all() and np.isfinite(made.place(given)).all()
    with pytest.raises(BadInput, match="has no tiles"):
        layout.make("a", 0, vectors[:0], "cosine")


def test_a_folder_that_is_only_read_still_has_one_and_says_so(tmp_path, monkeypatch, cli):
    from histoseek.errors import StorageFailed

    atlas = filled(tmp_path, slides=1, count=60)

    def refuse(*_):
        raise StorageFailed("read-only")

    monkeypatch.setattr("histoseek.index.atlas.write_atomic", refuse)
    made = atlas.make_layout()
    assert len(made.points) == 60 and not made.stored
    assert not (atlas.path / layout.FILE).exists()
    said = cli("index", "map", atlas.path, check=True)
    assert "not stored, because the folder cannot be written" in " ".join(said.stdout.split())
    assert (
        json.loads(cli("index", "map", atlas.path, "--json", check=True).stdout)["stored"] is False
    )
    monkeypatch.undo()
    assert atlas.make_layout().stored and atlas.layout().stored


def test_the_command_makes_it(tmp_path, cli_json):
    atlas = filled(tmp_path, slides=1, count=60)
    document = cli_json("index", "map", atlas.path)
    assert document["landmarks"] == document["tiles"] == 60 and document["trustworthiness"] > 0.5
    assert Atlas(atlas.path).layout() is not None
