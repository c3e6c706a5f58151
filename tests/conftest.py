"""Shared fixtures: real images from packages, real data beside the checkout, and synthetic slides."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

sys.path.append(str(Path(__file__).parent))  # the tests' own modules

import schedule
from triton_server import TritonServer

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
MPP = 0.5
WORKER = "PYTEST_XDIST_WORKER" in os.environ

# A shell that starts the tests in the background has them ignore Ctrl-C, and all their children too.
signal.signal(signal.SIGINT, signal.default_int_handler)


LEFT_OUT = pytest.StashKey[int]()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test that is slow."""
    schedule.mark(item)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out the groups of schedule.py (pytest-xdist 3.8 finds no xdist_group under pytest 9.2)."""
    config.option.loadscopereorder = False
    return schedule.Schedule(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs ../shared/data where that folder is missing; the long groups go first."""
    if WORKER:
        items.sort(key=schedule.order)
    if SHARED.is_dir():
        return
    without = [item for item in items if item.get_closest_marker("shared") is None]
    left_out = len(items) - len(without)
    items[:] = without
    config.stash[LEFT_OUT] = left_out
    if WORKER:
        config.workeroutput["left_out"] = left_out


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Give every worker one thread per library: two workers with two each would fight for two cores."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker left out; every worker collects all tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    left_out = config.stash.get(LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(
            f"{SHARED} is not there: {left_out} tests on its data sets were left out"
        )


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a folder once for all workers: the first one to ask makes it, the others wait for it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if WORKER else root

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, made = root / f"once-{name}", root / f"once-{name}.made"
        with FileLock(root / f"once-{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets; only tests marked ``shared`` may ask for it."""
    return SHARED


@pytest.fixture(scope="session")
def cmu_slide(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    """The real Aperio slide CMU-1-Small-Region.svs (CC0)."""
    return unpack(shared / "wsi_regions.tar", "wsi/CMU-1-Small-Region.svs", tmp_path_factory)


def unpack(pack: Path, member: str, factory: pytest.TempPathFactory) -> Path:
    path = factory.mktemp("unpacked") / Path(member).name
    with tarfile.open(pack) as opened:
        stream = opened.extractfile(member)
        assert stream is not None
        path.write_bytes(stream.read())
    return path


@pytest.fixture(scope="session")
def tissue() -> np.ndarray:
    """Real tissue, 512 x 512 RGB: scikit-image's immunohistochemistry picture."""
    from skimage import data

    return np.asarray(data.immunohistochemistry())


@pytest.fixture(scope="session")
def pictures(tissue: np.ndarray) -> dict[str, np.ndarray]:
    """Real pictures of three kinds, from scikit-image: tissue, retina, a cat."""
    from skimage import data

    return {"tissue": tissue, "retina": data.retina(), "cat": data.chelsea()}


@pytest.fixture(scope="session")
def make_slide(tissue: np.ndarray) -> Callable[..., Path]:
    """Write a tiled TIFF slide of real tissue; returns its path."""

    def make(
        path: Path,
        side: int = 1024,
        mpp: float | None = MPP,
        seed: int = 0,
        pixels: np.ndarray | None = None,
    ) -> Path:
        import tifffile

        rng = np.random.default_rng(seed)
        picture = Image.fromarray(tissue if pixels is None else pixels)
        if pixels is None:
            picture = picture.rotate(90 * int(rng.integers(4)))
            zoom = rng.uniform(1.0, 1.5)
            picture = picture.resize(
                (round(side * zoom), round(side * zoom)), Image.Resampling.BICUBIC
            )
            left, top = rng.integers(0, max(1, picture.width - side), 2)
            picture = picture.crop((left, top, left + side, top + side))
            # enlarged tissue is blurred; with grain its tiles count as sharp, as those of scanners do
            grain = np.random.default_rng(seed).normal(0, 4, (side, side, 1))
            grainy = np.asarray(picture) + grain
            picture = Image.fromarray(grainy.clip(0, 255).astype(np.uint8))
        where: dict[str, Any] = {}
        if mpp is not None:
            where = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
        buffer = io.BytesIO()
        tifffile.imwrite(
            buffer,
            np.asarray(picture),
            photometric="rgb",
            tile=(256, 256),
            compression="zlib",
            metadata=None,
            **where,
        )
        path.write_bytes(buffer.getvalue())
        return path

    return make


@pytest.fixture(scope="session")
def tile_folder(tmp_path_factory: pytest.TempPathFactory, pictures: dict[str, np.ndarray]) -> Path:
    """A folder per class with 24 real tiles of each, and a manifest with groups of four."""
    folder = tmp_path_factory.mktemp("tiles") / "kinds"
    rows = ["file,label,group"]
    for name, picture in pictures.items():
        (folder / name).mkdir(parents=True)
        rng = np.random.default_rng(1)
        for number in range(24):
            if number % 4 == 0:
                y, x = (int(rng.integers(0, s - 120)) for s in picture.shape[:2])
            tile = np.rot90(picture[y : y + 120, x : x + 120], number % 4)
            file = f"{name}/{number:02d}.png"
            Image.fromarray(np.ascontiguousarray(tile)).save(folder / file)
            rows.append(f"{file},{name},{name}-{number // 4}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def other_bundle(made_once: Callable[..., Path], tile_folder: Path) -> Path:
    """A second encoder, of another dimension: random weights, exported for real."""

    def make(folder: Path) -> None:
        from histoseek.artifacts.tileset_files import open_tiles
        from histoseek.export.bundle import export_run
        from histoseek.export.options import ExportOptions
        from histoseek.training.arcface_options import ArcFaceOptions
        from histoseek.training.fit_arcface import fit
        from histoseek.training.models import build

        options = ArcFaceOptions(size_px=96, dim=16, epochs=0, folds=3, seed=5, accelerator="cpu")
        tiles = open_tiles(tile_folder)
        fit(options, tiles, folder / "run", lambda *_: None)
        export_run(folder / "run", folder / "other", tiles, build, ExportOptions(mpp=MPP))

    return made_once("other", make) / "other"


@pytest.fixture(scope="session")
def text_bundle(made_once: Callable[..., Path]) -> Path:
    """A folder with a checkpoint of an image and a text network, its tokenizer, and its bundle."""

    def make(folder: Path) -> None:
        import torch
        from checkpoints import byte_pairs, open_clip, seeded

        from histoseek.export.from_checkpoint import build_published, export_checkpoint
        from histoseek.export.nets.text import text_net
        from histoseek.export.options import ExportOptions
        from histoseek.export.published import PUBLISHED

        known = PUBLISHED["quiltnet-b32"]
        assert known.text is not None
        net, text = build_published(known, depth=1), text_net(known.text.shallow(1))
        torch.save(open_clip(seeded(net), seeded(text, 1)), folder / "net.bin")
        byte_pairs(folder / "words.json")
        options = ExportOptions(
            published="quiltnet-b32", tokenizer=folder / "words.json", mpp=MPP, name="quilt"
        )
        export_checkpoint(folder / "net.bin", folder / "bundle", options, depth=1)

    return made_once("text", make)


@pytest.fixture
def triton(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Start real Triton servers on repositories; they are stopped when the test ends."""
    with ExitStack() as stack:

        def start(repository: Path, extra: Sequence[str] = (), preexec: Any = None) -> Any:
            work = tmp_path_factory.mktemp("triton")
            return stack.enter_context(TritonServer(repository, work, extra, preexec))

        yield start


@pytest.fixture
def cli_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own: for limits, signals and what a shell sees."""

    def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "histoseek", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)

    return run


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run the command line in this process, which spares seconds of imports per command."""
    from histoseek.__main__ import main

    def run(*words: object, check: bool = False) -> SimpleNamespace:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert not check or ended.value.code == 0, err + out
        return SimpleNamespace(returncode=ended.value.code, stdout=out, stderr=err)

    return run


@pytest.fixture
def cli_json(cli: Callable[..., SimpleNamespace]) -> Callable[..., Any]:
    """Run the command line in this process with --json and parse what it prints."""

    def run(*words: object, expect: int = 0) -> Any:
        done = cli(*words, "--json")
        assert done.returncode == expect, done.stderr + done.stdout
        return json.loads(done.stdout)

    return run


@pytest.fixture
def cli_answers(cli_json: Callable[..., Any]) -> Callable[..., Any]:
    """Run a query on the command line and return its answers."""
    return lambda *words, **more: cli_json(*words, **more)["answers"]
