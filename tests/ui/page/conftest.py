"""The page in a real browser, of an atlas of LC25000 tiles and a CMU slide."""

import io
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from loopback import free_port, up
from pages import opened
from PIL import Image

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip
CHROMIUM = Path("/usr/bin/chromium")
HELD_OUT = "colon_n"


@pytest.fixture(scope="session")
def tiles(tmp_path_factory, shared):
    """120 groups of lc25000, as a folder with a manifest; and a tile of another group, turned."""
    folder = tmp_path_factory.mktemp("lc25000")
    with tarfile.open(shared / "lc25000.tar") as pack:
        rows = pack.extractfile("manifest.csv").read().decode().splitlines()
        head, rows = rows[0].split(","), [row.split(",") for row in rows[1:]]
        group, label, file = (head.index(name) for name in ("group", "label", "file"))
        groups = sorted({row[group] for row in rows})[::8]
        chosen = [row for row in rows if row[group] in set(groups)]
        for row in chosen:
            path = folder / "tiles" / row[file]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pack.extractfile(row[file]).read())
        lines = [f"{row[file]},{row[label]},{row[group]}" for row in chosen]
        (folder / "tiles/manifest.csv").write_text("\n".join(["file,label,group", *lines]) + "\n")
        asked = next(r for r in rows if r[group] not in set(groups) and r[label] == HELD_OUT)
        picture = Image.open(io.BytesIO(pack.extractfile(asked[file]).read()))
        picture.rotate(90).save(folder / "query.png")
    return folder


@pytest.fixture(scope="session")
def made_atlas(tiles, cmu_slide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    metadata = "slide,patient,organ\nCMU-1-Small-Region,P-CMU,skin\ntiles,,mixed\n"
    (folder / "cases.csv").write_text(metadata)
    path, features = str(folder / "atlas"), str(folder / "features")
    for words in (
        ["embed", str(cmu_slide), str(tiles / "tiles"), "--out", features, "--overlap", "112"],
        ["index", "create", path],
        ["index", "add", path, features, "--metadata", str(folder / "cases.csv")],
        ["index", "fit", path, "--method", "hdbscan"],
        ["index", "fit", path, "--k", "6"],
    ):
        subprocess.run([sys.executable, "-m", "histoseek", *words], check=True, capture_output=True)
    return folder / "atlas"


@pytest.fixture(scope="module")
def atlas(made_atlas, tmp_path_factory):
    """A copy for the tests of one file."""
    return shutil.copytree(made_atlas, tmp_path_factory.mktemp("page") / "atlas")


@pytest.fixture(scope="module")
def served(atlas, tmp_path_factory):
    log = tmp_path_factory.mktemp("ui") / "log.txt"
    port = free_port()
    command = [sys.executable, "-u", "-m", "histoseek", "ui", str(atlas), "--port", str(port)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        up(port, process)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(40) == 130
    said = log.read_text()
    assert "Traceback" not in said and "Warning" not in said, said


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
    made = opened(browser, served)
    yield made
    foreign = [u for u in made.requested if not u.startswith((served, "data:", "blob:"))]
    assert foreign == [], "the page asks other servers"
    assert [text for text in made.said if "Failed to load resource" not in text] == []
    made.close()
