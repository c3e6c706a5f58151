"""Fixtures: a real atlas with slides, tile sets and two clusterings, and its server without a network."""

import asyncio
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest

from histoseek.index.atlas import Atlas
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder
from histoseek.ui.access.audit import Audit
from histoseek.ui.access.policy import Access
from histoseek.ui.server import make_app
from histoseek.ui.session.additions import Additions
from histoseek.ui.session.session import Session


@pytest.fixture(scope="session")
def ui_atlas(tmp_path_factory, make_slide, tile_folder):
    """Two slides with patient and organ, and a set of labelled tiles."""
    folder = tmp_path_factory.mktemp("page")
    slides = [make_slide(folder / f"case-{n}.tiff", side=1400, seed=n) for n in (1, 2)]
    jobs = find_jobs([*slides, tile_folder])
    results = embed_jobs(
        jobs, open_encoder("default"), folder / "features", EmbedOptions(), lambda *_: None
    )
    atlas = Atlas.create(folder / "atlas", DEFAULT_BUNDLE)
    metadata = {
        f"case-{n}": {"slide": f"case-{n}", "patient": f"P{n}", "organ": organ}
        for n, organ in ((1, "colon"), (2, "lung"))
    }
    atlas.add([folder / r.features for r in results], metadata)
    atlas.fit("hdbscan", min_cluster_size=5)
    atlas.fit("kmeans", k=4)
    return folder / "atlas"


@pytest.fixture
def own_atlas(ui_atlas, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(ui_atlas, tmp_path / "atlas")


@contextmanager
def loops_made():
    """Give the event loops that are made meanwhile: Gradio makes some with its page and closes none."""
    policy, made = asyncio.get_event_loop_policy(), []
    make = policy.new_event_loop

    def noted():
        made.append(make())
        return made[-1]

    policy.new_event_loop = noted
    try:
        yield made
    finally:
        del policy.new_event_loop


class Served:
    """The app of an atlas with a client that speaks to it directly."""

    def __init__(
        self, atlas, access=None, folders=(), peer="testclient", with_page=False, others=()
    ):
        from starlette.testclient import TestClient

        self.session = Session(atlas, others=[str(other) for other in others])
        self.log = atlas / "audit.jsonl"
        self.audit = Audit(self.log, self.session)
        self.additions = Additions(self.session, folders)
        with loops_made() as self.loops:
            app = make_app(
                self.session, self.additions, self.audit, access or Access(), with_page
            )  # fmt: skip
        self.client = TestClient(
            app, base_url="http://127.0.0.1:7860", raise_server_exceptions=False, client=(peer, 5)
        )

    def lines(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def close(self):
        self.client.close()
        self.additions.close()
        self.audit.close()
        self.session.close()
        if self.loops:
            asyncio.set_event_loop(None)
        for loop in self.loops:
            loop.close()


def every_route(routes):
    """Return every route of an app with its methods, those of routers and of the mounted page too."""
    from fastapi.routing import iter_route_contexts
    from starlette.routing import Mount

    for route in iter_route_contexts(routes):
        if isinstance(route.original_route, Mount):
            yield from every_route(route.original_route.routes)
        else:
            yield route.path, frozenset(getattr(route, "methods", None) or ())


@pytest.fixture
def served_routes(serve, own_atlas):
    """The server of an atlas with its page, and every path of it with its methods."""

    def start(access=None):
        one = serve(own_atlas, access, with_page=True)
        return one, sorted({*every_route(one.client.app._app.routes)}, key=str)

    return start


@pytest.fixture
def serve():
    """Serve an atlas as long as the test runs."""
    made = []

    def start(atlas, *options, **more):
        made.append(Served(atlas, *options, **more))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def served(ui_atlas, tmp_path_factory):
    """A server that tests only read from."""
    one = Served(shutil.copytree(ui_atlas, tmp_path_factory.mktemp("read") / "atlas"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def client(served):
    return served.client


@pytest.fixture
def histoseek_ui(tmp_path):
    """Start ``histoseek ui`` in a process of its own; ended when the test is over.

    Its output goes to a file, since a full pipe would stop it; ``stdout`` reads that file.
    """
    running = []

    def start(atlas, *options, env=None):
        command = [sys.executable, "-u", "-m", "histoseek", "ui", str(atlas), *map(str, options)]
        log = tmp_path / f"server-{len(running)}.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=env)
        process.stdout = log.open("rb")
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()
