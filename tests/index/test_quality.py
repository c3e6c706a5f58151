"""The quality of tiles in an atlas: filters, exports, and atlases or slides without it."""

import numpy as np
import pyarrow.parquet as parquet
import pytest
from atlases import DIM, features, filled

from histoseek.artifacts.feature_files import QUALITY
from histoseek.errors import BadInput, Damaged
from histoseek.index.atlas import Atlas
from histoseek.index.federation.federation import Federation
from histoseek.index.search import filters
from histoseek.index.search.query import Query
from histoseek.serving.encoders.open import DEFAULT_BUNDLE

VECTOR = np.ones((1, DIM), np.float32)


def quality(count, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, (count, len(QUALITY))).astype(np.float32)


@pytest.fixture()
def atlas(tmp_path):
    made = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    measured = features(tmp_path / "measured.h5", 40, 1, quality=quality(40))
    without = features(tmp_path / "without.h5", 30, 2)
    made.add([measured, without])
    return made


def passing(atlas, where):
    columns = atlas.view().columns
    mask = filters.select(columns, filters.parse(where))
    return [columns.slides[n]["name"] for n in columns.slide_of(np.flatnonzero(mask)).tolist()]


def test_filters_use_the_measures(atlas):
    values = quality(40)
    for number, name in enumerate(QUALITY):
        found = passing(atlas, f"{name} > .5")
        assert found == ["measured"] * int((values[:, number].astype(np.float16) > 0.5).sum())
    assert passing(atlas, "sharpness is null") == ["without"] * 30
    hits = atlas.search(VECTOR, k=5, where="sharpness > .9")
    assert {hit.slide for hit in hits[0]} == {"measured"}


def test_a_column_of_the_metadata_hides_its_namesake(atlas):
    atlas.relabel([{"slide": "measured", "density": "high"}])
    assert passing(atlas, "density = 'high'") == ["measured"] * 40
    assert "density" not in atlas.view().columns.qualities()


def test_an_atlas_without_measures_has_no_such_field(tmp_path):
    made = filled(tmp_path, slides=1, count=10)
    with pytest.raises(BadInput, match="sharpness"):
        passing(made, "sharpness > .3")


def test_the_same_features_with_measures_add_them(tmp_path):
    made = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    made.add([features(tmp_path / "a.h5", 20, 1)])
    (added,) = made.add([features(tmp_path / "a.h5", 20, 1, quality=quality(20))])
    assert added.state == "unchanged"
    assert len(passing(made, "sharpness is not null")) == 20
    assert made.verify() == []


@pytest.mark.parametrize("change", ["quality = substr(quality, 1, 20)", "seal = x'00'", None])
def test_damaged_or_lost_measures_are_found_and_restored(atlas, change):
    assert atlas.verify() == []
    with atlas.catalog.write() as db:
        db.execute(f"UPDATE tile_quality SET {change}" if change else "DELETE FROM tile_quality")
    (text, *_) = atlas.verify()
    assert "tile_quality" in text or "lacks the measures" in text
    if change and change.startswith("quality"):
        with pytest.raises(Damaged, match="verify --repair"):
            passing(Atlas(atlas.path), "sharpness > .5")
    assert atlas.repair() == ["the measures of the tiles of 1 slides were restored"]
    assert atlas.verify() == [] and len(passing(Atlas(atlas.path), "sharpness is not null")) == 40


def test_exports_have_the_measures(atlas, tmp_path, cli_json):
    out = tmp_path / "tiles.parquet"
    cli_json("index", "export", atlas.path, "--to", "parquet", "--out", out)
    rows = parquet.read_table(out).to_pylist()
    values = [row["sharpness"] for row in rows if row["slide"] == "measured"]
    assert np.allclose(values, quality(40)[:, 0], atol=1e-3)
    assert all(np.isnan(row["sharpness"]) for row in rows if row["slide"] == "without")


def test_several_atlases_of_which_one_has_measures(atlas, tmp_path):
    other = Atlas.create(tmp_path / "other", DEFAULT_BUNDLE)
    other.add([features(tmp_path / "elsewhere.h5", 10, 5)])
    both = Federation([atlas.path, other.path])
    answer = both.search(Query(vectors=VECTOR, k=50, where="sharpness > .5"))
    assert {hit.hit.slide for hit in answer.hits[0]} == {"measured"}
