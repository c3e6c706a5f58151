"""The public names, and the Python lines in the README, run unchanged."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import histoseek as hs

ROOT = Path(__file__).parents[1]


def python_blocks(page):
    """Return the Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


@pytest.fixture(scope="module")
def lines(tmp_path_factory, make_slide, pictures):
    """The README's lines, run in a folder with the files they name; their variables."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "slides").mkdir()
    for n, name in enumerate(("slide-17", "slide-18", "slide-19")):
        make_slide(folder / f"slides/{name}.tiff", side=1400, seed=n)
    table = ["slide,patient,organ", "slide-17,P1,colon", "slide-18,P2,colon", "slide-19,P3,lung"]
    (folder / "cases.csv").write_text("\n".join(table) + "\n")
    crop = Image.fromarray(pictures["tissue"][:220, :220])
    for name in ("region.png", "blood.png", "a.png", "b.png"):
        crop.save(folder / name)
    variables = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(python_blocks("README.md")[0], variables)
        yield variables


def test_the_lines_give_what_they_say(lines):
    assert [r.state for r in lines["features"]] == ["done"] * 3 and lines["features"].ok
    hits = lines["hits"]
    assert len(hits) == 10 and {h.slide for h in hits} <= {"slide-17", "slide-18"}
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert not {17, 42} & {h.tile for h in lines["more"]}
    assert len(lines["placed"]) == 2 and lines["placed"][0] == lines["placed"][1]
    similar = lines["atlas"].similar("slide-17")
    assert [s.name for s in similar] and "slide-17" not in {s.name for s in similar}
    assert lines["atlas"].verify() == []


def test_the_lines_of_the_python_page_run(lines):
    first, *others = python_blocks("docs/python.md")
    assert first == python_blocks("README.md")[0] and len(others) == 4
    variables = dict(lines)
    for block in others:
        exec(block, variables)
    assert [len(hits) for hits in (variables["one"], *variables["two"])] == [3, 3, 3]
    slides = [hit.slide for hit in variables["both"]]
    assert slides and len(slides) == len(set(slides))
    assert len(variables["table"]) == len(lines["hits"])
    assert "slide-99" in variables["message"] and "slide-17" in variables["message"]
    assert variables["view"].stats()["slides"] == 3


def test_answers_go_into_pandas_and_show_themselves(lines):
    import pandas

    frame = pandas.DataFrame(lines["hits"])
    assert list(frame.columns[:4]) == ["rank", "score", "tile", "slide"] and len(frame) == 10
    assert list(pandas.DataFrame(lines["placed"]).columns) == list(lines["placed"][0]._fields)
    html = lines["hits"]._repr_html_()
    assert html.count("data:image/jpeg;base64,") == 10 and "slide-1" in html
    assert "slide-17" in lines["atlas"].slides()._repr_html_()
    assert "done" in lines["features"]._repr_html_()
    assert "slide-18" in lines["atlas"].similar("slide-17")._repr_html_()


def test_an_image_is_a_path_bytes_an_array_or_pil(lines, tmp_path):
    atlas = lines["atlas"]
    path = Path.cwd() / "region.png"
    picture = Image.open(path)
    forms = [str(path), path, path.read_bytes(), np.asarray(picture), picture]
    answers = atlas.search(forms, 3)
    assert len(answers) == len(forms) and all(a == answers[0] for a in answers)
    assert atlas.search(path, 3) == answers[0]
    see_through = Image.fromarray(
        np.dstack([np.asarray(picture), np.full(picture.size[::-1], 90, np.uint8)])
    )
    see_through.convert("RGBA").save(tmp_path / "alpha.png")
    by_path, by_pil = atlas.search([tmp_path / "alpha.png", Image.open(tmp_path / "alpha.png")], 3)
    assert by_path == by_pil
    assert atlas.search(like=np.array([17, 42]), k=3) == atlas.search(like=[17, 42], k=3)
    with pytest.raises(hs.HistoseekError, match="no image was given"):
        atlas.assign([])
    with pytest.raises(hs.HistoseekError, match="an image is of type dict"):
        atlas.search([{}], 3)
    with pytest.raises(hs.HistoseekError, match="the query has no example"):
        atlas.search()


def test_an_atlas_opens_by_its_path_alone(lines):
    again = hs.Atlas("atlas")
    found = again.search("region.png", k=10, where="organ = 'colon'")
    # clusters were fitted after the first search
    assert [h._replace(cluster=None) for h in found] == list(lines["hits"])
    assert again.stats()["slides"] == 3


def test_what_could_not_be_embedded_is_named_in_a_warning(lines, tmp_path):
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    with pytest.warns(UserWarning, match="1 of 1 inputs could not be embedded completely: broken"):
        found = hs.embed(tmp_path / "broken.svs", tmp_path / "out", lines["encoder"])
    assert not found.ok and found.files == []


def test_the_public_names_are_those_of_the_list():
    from histoseek import _HOME

    assert sorted([*_HOME, "__version__"]) == sorted(hs.__all__)
    for name in hs.__all__:
        value = getattr(hs, name)
        if name != "__version__":
            assert value.__module__ == "histoseek" + _HOME[name], name
    assert set(hs.__all__) <= set(dir(hs))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hs.nothing  # noqa: B018


def test_import_is_light():
    code = (
        "import sys, time; started = time.perf_counter(); import histoseek; "
        "print(time.perf_counter() - started, *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
        for _ in range(5)
    ]
    assert min(float(seconds) for seconds, *_ in runs) < 0.05
    assert not {"numpy", "torch", "faiss", "pydantic"} & set(runs[0])


def test_nothing_warns_in_a_clean_run(lines, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hs.embed("slides/slide-17.tiff", tmp_path / "out", lines["encoder"]).ok
