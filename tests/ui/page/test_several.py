"""The page of a server that searches further atlases with its own."""

import re
import signal
import subprocess
import sys

import pytest
from loopback import free_port, up
from pages import find, opened, pictures_are_there, shot, tab

from histoseek.index.atlas import Atlas
from histoseek.serving.encoders.open import DEFAULT_BUNDLE

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def server(made_atlas, tmp_path_factory):
    """The address of a page of the tiles, which also searches the CMU slide and an atlas that is away."""
    folder = tmp_path_factory.mktemp("several")
    files = {path.stem: path for path in (made_atlas.parent / "features").rglob("*.h5")}
    slide = next(path for name, path in files.items() if "CMU" in name)
    others = [path for path in files.values() if path != slide]
    Atlas.create(folder / "colon and lung", DEFAULT_BUNDLE).add(others)
    Atlas.create(folder / "skin", DEFAULT_BUNDLE).add([slide], {slide.stem: {"label": "skin"}})
    port, log = free_port(), folder / "log.txt"
    named = [str(folder / name) for name in ("colon and lung", "skin", "brain")]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "histoseek", "ui", *named, "--port", str(port)],
            stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        up(port, process)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(40) == 130
    assert "Traceback" not in log.read_text()


def test_several_atlases_are_searched(browser, server, tiles):
    page = opened(browser, server)
    assert "also searched: skin, brain" in page.locator(".hs-head").inner_text()
    find(page, tiles / "query.png")
    pictures_are_there(page, "#hits img")
    verdict = page.locator("#verdict")
    assert re.search(r"Hits by atlas: colon and lung \d+, skin \d+\.", verdict.inner_text())
    assert "Not searched, because they did not answer: brain." in verdict.inner_text()

    # Only the other atlas: its tiles are shown, opened and searched for.
    page.locator("#atlases").get_by_label("colon and lung").uncheck()
    page.locator("#find").click()
    verdict.filter(has_text="Hits by atlas: skin 12.").wait_for()
    pictures_are_there(page, "#hits img")
    first = page.locator("#hits .hs-card").first
    assert "atlas skin" in first.inner_text() and "CMU-1-Small-Region" in first.inner_text()
    key = first.get_attribute("data-tile")
    assert re.fullmatch(r"1:\d+", key)
    first.locator(".hs-open").click()
    dialog = page.locator(".hs-dialog")
    dialog.get_by_role("button", name="+ More like this").wait_for()
    pictures_are_there(page, ".hs-context img")
    assert "CMU-1-Small-Region" in dialog.inner_text()
    assert dialog.get_by_role("button", name="Open in the slide viewer").count() == 0
    shot(page, "several-dialog")
    dialog.get_by_role("button", name="+ More like this").click()
    page.locator(f'#basket [data-drop="{key}"]').wait_for()
    pictures_are_there(page, "#basket img")
    page.locator("#atlases").get_by_label("colon and lung").check()
    page.locator("#basket [data-image]").click()  # the tile alone
    page.wait_for_function("document.querySelectorAll('#basket [data-image]').length === 0")
    page.locator("#hits .hs-card", has_text="atlas skin").first.wait_for()
    assert page.locator(f'#hits [data-tile="{key}"]').count() == 0
    shot(page, "several")

    for name in ("colon and lung", "skin", "brain"):
        page.locator("#atlases").get_by_label(name).uncheck()
    page.locator("#find").click()
    page.locator("#verdict [role=alert]", has_text="choose one or more").wait_for()

    # Slides are compared with those of all atlases.
    tab(page, "Slides and cases")
    page.locator("[data-slide]").first.click()
    similar = page.locator(".hs-similar li", has_text="CMU-1-Small-Region")
    similar.wait_for()
    assert "atlas skin" in similar.inner_text()
    assert "did not answer: brain." in page.locator(".hs-detail").inner_text()
    assert similar.locator("[data-open^='1:']").count() > 0
    pictures_are_there(page, ".hs-pair img")
    similar.scroll_into_view_if_needed()
    shot(page, "several-slide")
    page.locator("#similar-in").get_by_label("skin").uncheck()
    page.locator(".hs-similar li", has_text="atlas skin").wait_for(state="detached")
    assert page.said == [] or all("Failed to load resource" in text for text in page.said)
    page.close()
