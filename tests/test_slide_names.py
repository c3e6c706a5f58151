"""Slide names: no name refers to two slides, and no slide has two names."""

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoseek.artifacts.slide_names import SlideName, match, without_ending, without_last_ending
from histoseek.errors import BadInput

SLIDES = [
    SlideName("case", ("/data/s/case.svs",)),
    SlideName("case.2", ("/data/s/case.2.svs",)),
    SlideName("slide-a1", ("/data/s/patientA/slide.svs",)),
    SlideName("slide-b2", ("/data/s/patientB/slide.svs",)),
    SlideName("scan.ome", ("/data/s/scan.ome.tif",)),
    SlideName("1.2.840.1001", ("/data/s/1.2.840.1001",)),
    SlideName("accent", ("/data/s/e\u0301.svs",)),
    SlideName("imported"),
]


@pytest.mark.parametrize(
    ("name", "slide"),
    [
        ("case", "case"), ("case.svs", "case"), ("s/case.svs", "case"), ("s/case", "case"),
        ("/data/s/case.svs", "case"), ("./case.svs", "case"), ("s\\case.svs", "case"),
        ("case.2", "case.2"), ("case.2.svs", "case.2"), ("case.1", None), ("case.ndpi", None),
        ("ase", None), ("data/case.svs", None), ("/s/case.svs", None), ("CASE.svs", None),
        ("patientA/slide.svs", "slide-a1"), ("patientB/slide", "slide-b2"), ("slide-b2", "slide-b2"),
        ("scan", "scan.ome"), ("scan.ome", "scan.ome"), ("scan.ome.tif", "scan.ome"),
        ("1.2.840.1001", "1.2.840.1001"), ("1.2.840", None),
        ("\u00e9.svs", "accent"), ("\u00e9", "accent"),
        ("imported", "imported"), ("imported.svs", "imported"), ("p/imported.ndpi", "imported"),
        ("imported.2", None),
    ],
)  # fmt: skip
def test_a_name_means_one_slide_or_none(name, slide):
    found = match([name], SLIDES, "t.csv", "row")
    meant = [SLIDES[number].name for number in found.by_slide]
    assert meant == ([] if slide is None else [slide])
    assert found.unused == ([name] if slide is None else [])
    assert len(found.without) == len(SLIDES) - len(meant)


@pytest.mark.parametrize("name", ["slide.svs", "slide"])
def test_a_name_that_means_two_slides_is_refused_with_the_ways_out(name):
    with pytest.raises(
        BadInput, match=r"t\.csv: the row 'slide.*' matches 2 slides.*'patientA/slide\.svs'"
    ):
        match([name], SLIDES, "t.csv", "row")


def test_two_names_of_one_slide_are_refused():
    with pytest.raises(BadInput, match=r"'case' and 's/case\.svs' both match slide 'case'"):
        match(["case", "s/case.svs"], SLIDES, "t.csv", "row")


def test_a_slides_name_in_the_atlas_and_anothers_file_name_are_two_meanings():
    slides = [SlideName("slide", ("/a/slide.svs",)), SlideName("slide-1", ("/b/slide.svs",))]
    with pytest.raises(BadInput, match="matches 2 slides"):
        match(["slide"], slides, "t.csv", "row")
    assert match(["a/slide.svs"], slides, "t.csv", "row").by_slide == {0: "a/slide.svs"}
    nested = [SlideName("x", ("/s/slide.svs",)), SlideName("y", ("/s/b/slide.svs",))]
    with pytest.raises(BadInput, match=r"such as 's/slide\.svs'"):
        match(["slide.svs"], nested, "t.csv", "row")


def test_only_slide_endings_are_cut_off():
    assert [without_ending(n) for n in ("a.svs", "a.OME.TIF", "a.2", ".svs", "a.tar.gz")] == [
        "a", "a", "a.2", ".svs", "a.tar.gz"
    ]  # fmt: skip
    assert (
        without_last_ending("a.ome.tif") == "a.ome" and without_last_ending("1.2.840") == "1.2.840"
    )


PARTS = st.lists(
    st.sampled_from(["a", "b", "case", "case.2", "é", "e\u0301"]), min_size=1, max_size=3
)


@given(st.lists(PARTS, min_size=1, max_size=5, unique_by=tuple), PARTS)
def test_a_name_never_goes_to_a_slide_whose_path_does_not_end_so(paths, name):
    from histoseek.artifacts.tables import same_text

    slides = [SlideName(f"n{n}", (f"/r/{'/'.join(p)}.svs",)) for n, p in enumerate(paths)]
    asked = "/".join(name)
    ends = [
        n for n, p in enumerate(paths)
        if [same_text(x) for x in p][-len(name):] == [same_text(x) for x in name]
    ]  # fmt: skip
    try:
        found = match([asked], slides, "t", "row")
    except BadInput:
        assert len(ends) > 1
        return
    assert list(found.by_slide) == ends and len(ends) <= 1
    assert all(PurePosixPath(slides[n].paths[0]).stem for n in found.by_slide)
