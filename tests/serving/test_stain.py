"""Which stain a slide has, from the colours of its tiles to a filter of the atlas."""

import numpy as np
import pytest

from histoseek.artifacts.feature_files import read_features
from histoseek.artifacts.feature_writer import amend
from histoseek.index.atlas import Atlas
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder
from histoseek.serving.slides.stain import COLOURS, STAINS, stain_of, tally

HAEMATOXYLIN, EOSIN, DAB = (95, 90, 170), (225, 130, 180), (130, 80, 40)
BLUE = (120, 150, 190)


def painted(*shares, side=240):
    """A tile with horizontal bands of colours on glass: (colour, share) each."""
    tile = np.full((side, side, 3), 245, np.uint8)
    top = 0
    for colour, share in shares:
        end = top + round(share * side)
        tile[top:end] = colour
        top = end
    return tile


@pytest.mark.parametrize(
    ("bands", "stain"),
    [
        ([(HAEMATOXYLIN, 0.3), (EOSIN, 0.6)], "H&E"),
        ([(EOSIN, 0.9)], "H&E"),
        ([(BLUE, 0.6), (DAB, 0.1)], "IHC"),
        ([(DAB, 0.8)], "IHC"),
        ([(BLUE, 0.8)], "other"),
        ([((60, 160, 90), 0.8)], "other"),
        ([((128, 128, 128), 0.9)], None),
        ([], None),
    ],
)
def test_the_stain_is_told_from_colours(bands, stain):
    tiles = np.stack([painted(*bands)] * 9)
    assert stain_of(tally(tiles)) == stain
    assert stain is None or stain in STAINS


def test_counts_are_of_tissue_only_and_add_up(tissue):
    tile = tissue[:240, :240]
    one = tally(tile[None])
    assert len(one) == len(COLOURS) and 0 < one.sum() <= 100
    assert (tally(np.stack([tile, tile])) == 2 * one).all()
    assert tally(np.zeros((1, 240, 240, 3), np.uint8)).sum() == 0
    assert stain_of(20 * one) == "IHC"  # this tissue is stained with DAB and haematoxylin


@pytest.fixture(scope="module")
def encoder():
    return open_encoder("default")


def embedded(slide, out, encoder, **options):
    options = {"min_sharpness": 0, "overlays": False, **options}
    (result,) = embed_jobs(
        find_jobs([slide]), encoder, out, EmbedOptions(**options), lambda *_: None
    )
    return result


def test_a_slide_has_a_stain_in_its_record_its_features_and_the_atlas(
    make_slide, tmp_path, encoder
):
    slide = make_slide(tmp_path / "a.tiff")
    result = embedded(slide, tmp_path / "out", encoder)
    again = embedded(slide, tmp_path / "out", encoder)
    assert (result.stain, again.state, again.stain) == ("IHC", "skipped", "IHC")
    path = next((tmp_path / "out").rglob("a.h5"))
    features = read_features(path)
    assert features.about["stain"] == "IHC" and features.about["row"] == {}
    atlas = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    atlas.add([path])
    assert atlas.slides()[0]["metadata"] == {"stain": "IHC"}
    vector = features.features[:1]
    assert atlas.search(vector, 2, where="stain = 'IHC'")[0]
    assert not atlas.search(vector, 2, where="stain = 'H&E'")[0]


def test_the_users_stain_takes_precedence_and_stays(make_slide, tmp_path, encoder):
    slide = make_slide(tmp_path / "a.tiff")
    embedded(slide, tmp_path / "out", encoder)
    path = next((tmp_path / "out").rglob("a.h5"))

    def stain():
        return atlas.slides()[0]["metadata"]["stain"]

    atlas = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    atlas.add([path], {"a": {"stain": "Masson"}})
    assert stain() == "Masson"
    embedded(slide, tmp_path / "out", encoder, overlap_px=112)
    other = next(p for p in (tmp_path / "out").rglob("a.h5") if p != path)
    (added,) = atlas.add([other], replace=True)
    assert added.state == "replaced" and stain() == "Masson"
    (added,) = atlas.add([path], {"a": {"stain": "Ki67"}}, replace=True)
    assert added.state == "replaced" and stain() == "Ki67"


def test_an_atlas_from_before_gets_the_stain_when_the_features_are_added_again(
    make_slide, tmp_path, encoder
):
    embedded(make_slide(tmp_path / "a.tiff"), tmp_path / "out", encoder)
    path = next((tmp_path / "out").rglob("a.h5"))
    amend(path, read_features(path).source, {"stain": None})
    atlas = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    atlas.add([path])
    assert atlas.slides()[0]["metadata"] == {}
    amend(path, read_features(path).source, {"stain": "IHC"})
    (added,) = atlas.add([path])
    assert added.state == "relabelled" and "stain 'IHC'" in added.reason
    assert atlas.slides()[0]["metadata"] == {"stain": "IHC"}
