"""The map of an atlas: what is sent to the browser, and which tiles are placed anew."""

import numpy as np
from atlases import features, filled

from histoseek.index.atlas import Atlas
from histoseek.ui.session import map as maps
from histoseek.ui.session.map import Points, _runs


def test_ids_are_sent_as_runs_where_that_is_short():
    ids = np.concatenate([np.arange(5, 105), np.arange(300, 310)])
    assert _runs(ids) == [[5, 100], [300, 10]]
    assert _runs(np.arange(0, 4000, 2)) is None and _runs(np.arange(0)) == []


def test_of_too_many_tiles_a_sample_of_those_in_view_is_sent(monkeypatch):
    rng = np.random.default_rng(0)
    places = rng.integers(0, 65536, (5000, 2)).astype(np.uint16)
    points = Points(np.arange(5000), places, 1, None)
    monkeypatch.setattr(maps, "MAP_POINTS", 300)
    rows, inside = maps._chosen(points, None)
    assert inside == 5000 and len(rows) == 300 and (np.diff(rows) > 0).all()
    assert abs(places[rows].mean() - places.mean()) < 3000, "not a part of the map"
    rows, inside = maps._chosen(points, (0, 0, 9000, 9000))
    assert inside == len(rows) == (places <= 9000).all(axis=1).sum() < 300
    again = maps._chosen(points, (0, 0, 60000, 60000))[0]
    assert (maps._chosen(points, (0, 0, 60000, 60000))[0] == again).all(), "colours come apart"


def test_new_slides_are_placed_and_others_stay(tmp_path, monkeypatch):
    atlas = filled(tmp_path, slides=4, count=60)
    layout, calls = atlas.make_layout(), []
    place = type(layout).place

    def counted(self, vectors):
        calls.append(len(vectors))
        return place(self, vectors)

    monkeypatch.setattr(type(layout), "place", counted)
    first = atlas.map_places(layout, lambda *_: None)
    assert calls == [60] * 4
    atlas.remove(["slide-1"])
    atlas.add([features(tmp_path / "new.h5", 50, seed=9)])
    second = Atlas(atlas.path).map_places(layout, lambda *_: None)
    assert calls == [60] * 4 + [50]
    kept = np.isin(first.ids, second.ids)
    assert (second.places[:180] == first.places[kept]).all() and len(second.ids) == 230
    (atlas.path / "map-places.npz").write_bytes(b"damaged")
    third = atlas.map_places(layout, lambda *_: None)
    assert (third.places == second.places).all() and len(calls) == 9
    assert atlas.verify() == []
