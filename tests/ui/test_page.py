"""The page in a real browser: upload a real tile in both tabs and read what comes back."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip
CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def served(atlas_with_tiles, tmp_path_factory):
    log = tmp_path_factory.mktemp("ui") / "log.txt"
    port = free_port()
    command = [
        sys.executable,
        "-u",
        "-m",
        "histoseek",
        "ui",
        str(atlas_with_tiles),
        "--port",
        str(port),
    ]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/", process, log)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


@pytest.fixture(scope="module")
def atlas_with_tiles(tmp_path_factory, tile_folder, make_slide):
    folder = tmp_path_factory.mktemp("atlas")
    make_slide(folder / "case-1.tiff", side=1200)
    run = [sys.executable, "-m", "histoseek"]
    atlas = str(folder / "atlas")
    for words in (
        ["embed", str(folder / "case-1.tiff"), str(tile_folder), "--out", str(folder / "features")],
        ["index", "create", atlas],
        ["index", "add", atlas, str(folder / "features")],
        ["index", "fit", atlas, "--k", "4"],
    ):
        subprocess.run([*run, *words], check=True, capture_output=True)
    return folder / "atlas"


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url, process, log, seconds=90):
    import time
    import urllib.request

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the page did not come up: {log.read_text()}")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = str(CHROMIUM) if CHROMIUM.exists() else None
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, served):
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    requests = []
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(served, wait_until="networkidle")
    yield opened
    foreign = [u for u in requests if not u.startswith((served, "data:", "blob:"))]
    assert foreign == [], "the page asks other servers"
    opened.close()


def shot(page, name):
    """Save a screenshot where HISTOSEEK_SCREENSHOTS says, for the README and for looking at."""
    folder = os.environ.get("HISTOSEEK_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def test_find_similar(page, tile_folder):
    page.set_input_files("#query input[type=file]", tile_folder / "tissue/09.png")
    first = page.locator("#hits figure").first
    first.wait_for(timeout=30_000)
    text = first.inner_text()
    # tiles 08 to 11 are quarter turns of one place, which the default encoder holds to be the same
    assert "#1" in text and re.search(r"(08|09|10|11)\.png", text) and "tissue" in text
    assert "cluster" in text and "score 1.000" in text and "kinds" in text
    page.wait_for_function("document.querySelector('#hits img').naturalWidth === 224")
    assert page.locator("#hits figure").count() == 12
    assert "tissue" in page.locator("#verdict").inner_text()
    page.locator("#hit-table").get_by_text("tissue-2").locator("visible=true").first.wait_for(
        timeout=10_000
    )
    assert "kinds" in page.locator("#hit-table").inner_text()
    shot(page, "find-similar")


def test_a_bad_upload_is_refused_on_the_page(page, tmp_path, tissue):
    import numpy as np
    from PIL import Image

    deep = Image.fromarray(tissue[..., 0].astype(np.uint16) * 200)
    deep.save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, says in (("deep.png", "8 bits"), ("text.png", "not a picture")):
        page.set_input_files("#query input[type=file]", tmp_path / name)
        page.locator("#verdict", has_text=says).wait_for(timeout=30_000)
        assert name in page.locator("#verdict").inner_text()
        page.reload(wait_until="networkidle")


def test_nothing_uploaded_says_so(page):
    page.click("#find")
    page.locator("#verdict", has_text="No image yet").wait_for(timeout=20_000)
    assert page.locator("#hits figure").count() == 0


def test_upload_and_cluster(page, tile_folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.get_by_role("tab", name="Upload and cluster").click()
    files = [tile_folder / "cat/02.png", tile_folder / "retina/07.png", tmp_path / "broken.png"]
    page.set_input_files("#uploads input[type=file]", files)
    page.locator("#uploads").get_by_text("broken").wait_for(timeout=20_000)
    page.click("#place")
    page.locator("#placed-note", has_text="2 placed").wait_for(timeout=30_000)
    assert "1 refused" in page.locator("#placed-note").inner_text()
    page.locator("#placed").get_by_text("broken.png").locator("visible=true").first.wait_for(
        timeout=10_000
    )
    table = page.locator("#placed").inner_text()
    assert re.search(r"02\.png\s+cluster \d", table) and re.search(r"07\.png\s+cluster \d", table)
    assert "refused" in table and "broken.png" in table
    page.locator("#map .legendtext", has_text="new images (2)").wait_for(timeout=20_000)
    page.wait_for_timeout(500)
    shot(page, "upload-and-cluster")


def test_about(page):
    page.get_by_role("tab", name="About").click()
    table = page.get_by_role("table").filter(has_text="encoder sha256")
    table.wait_for(timeout=10_000)
    assert "mobilenet-v3-small" in table.inner_text()
    assert page.get_by_text("Research use only").locator("visible=true").count() >= 1
    shot(page, "about")
