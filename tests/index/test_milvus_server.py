"""Milvus in a process of its own, over its socket: push, search, assign, also after it was killed."""

import subprocess
import sys
import time
from contextlib import closing, contextmanager

import numpy as np
import pytest
from atlases import features, filled, grouped, same
from loopback import free_port

from histoseek.errors import Unavailable
from histoseek.index.exchange.milvus import MilvusAtlas
from histoseek.index.exchange.milvus_push import push
from histoseek.index.federation.federation import Federation
from histoseek.index.search.query import Query

QUERIES = grouped(np.random.default_rng(5), 6)


@contextmanager
def running(folder, port):
    """A server on loopback with its data in a folder; it is killed at the end."""
    words = ["-m", "milvus_lite", "server", "--host", "127.0.0.1", "--port", str(port)]
    log = (folder.parent / "milvus.log").open("a")
    process = subprocess.Popen(
        [sys.executable, *words, "--data-dir", str(folder)], stdout=log, stderr=log
    )
    try:
        wait_for(port, process)
        yield process
    finally:
        process.kill()
        process.wait()
        log.close()


def wait_for(port, process, seconds=60):
    import socket

    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)


def test_a_server_that_is_killed_and_comes_back(tmp_path, cli_json):
    atlas = filled(tmp_path, slides=4, count=80)
    atlas.fit("kmeans", k=3)
    port = free_port()
    url = f"milvus://127.0.0.1:{port}/cases"
    with running(tmp_path / "milvus", port) as server:
        assert push(atlas, url)["slides_pushed"] == 4
        with closing(MilvusAtlas(url)) as engine:
            for where in (None, "organ = 'colon'", "patient != 'P1' and cluster = 1"):
                query = Query(vectors=QUERIES, k=10, where=where)
                same(atlas.search(QUERIES, 10, where, exact=True), engine.search(query))
            assert engine.assign(QUERIES) == atlas.assign(QUERIES)

            server.kill()
            server.wait()
            with pytest.raises(Unavailable, match=rf"Milvus at milvus://127.0.0.1:{port}/cases"):
                engine.search(Query(vectors=QUERIES))
    lone = tmp_path / "lone"
    lone.mkdir()
    other = filled(lone, slides=2, count=40, seed=50, metadata={})
    with closing(Federation([other.path, url], timeout_s=3)) as together:
        answer = together.search(Query(vectors=QUERIES, k=5))
        assert [bool(shard.away) for shard in answer.shards] == [False, True]
        assert all(one.atlas == "atlas" for row in answer.hits for one in row)

        with running(tmp_path / "milvus", port):  # gRPC tries again after some seconds
            deadline = time.monotonic() + 60
            while (answer := together.search(Query(vectors=QUERIES, k=5))).away:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            assert {one.atlas for row in answer.hits for one in row} == {"atlas", "cases"}
            with closing(MilvusAtlas(url)) as engine:  # what it stored is there again
                same(atlas.search(QUERIES, 10, exact=True), engine.search(Query(vectors=QUERIES)))

            atlas.add([features(tmp_path / "late.h5", 30, 90)])
            report = cli_json("index", "push", atlas.path, url)
            assert (report["slides_pushed"], report["slides_removed"]) == (1, 0)
            found = cli_json(
                "index",
                "search",
                other.path,
                url,
                "--tile",
                "atlas:3",
                "-k",
                4,
                "--leave-out",
                "slide",
            )
            assert [a["atlas"] for a in found["atlases"]] == ["atlas", "cases"]
            (hits,) = found["answers"]
            assert len(hits) == 4 and "slide-0" not in {hit["slide"] for hit in hits}
