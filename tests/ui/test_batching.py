"""The bounded queue before the encoder."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from histoseek.errors import Busy, Unavailable
from histoseek.ui.session.batching import Batcher


class Slow:
    """An encoder whose runs can be held, and whose answer is the first pixel."""

    def __init__(self, parallel=1, per_run=0.0, per_tile=0.0):
        self.manifest = SimpleNamespace(size_px=4, dim=1)
        self.batch, self.parallel = 4, parallel
        self.go = threading.Event()
        self.go.set()
        self.runs = []
        self.per_run, self.per_tile = per_run, per_tile
        self.fails = False

    def embed(self, tiles):
        self.go.wait(20)
        self.runs.append(len(tiles))
        time.sleep(self.per_run + self.per_tile * len(tiles))
        if self.fails:
            raise RuntimeError("broken")
        return tiles[:, 0, 0, :1].astype(np.float32)


def tile(value):
    return np.full((1, 4, 4, 3), value, np.uint8)


def ask(gate, values):
    found = {}
    threads = [
        threading.Thread(target=lambda v=v: found.__setitem__(v, gate.embed(tile(v))[0, 0]))
        for v in values
    ]
    [thread.start() for thread in threads]
    return threads, found


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_everyone_gets_their_own_answer_and_waiting_ones_go_together():
    encoder = Slow()
    gate = Batcher(encoder)
    gate.batch = 8
    encoder.go.clear()
    first, found_first = ask(gate, [1])
    until(lambda: gate.waiting == 0)
    rest, found = ask(gate, range(2, 20))
    until(lambda: gate.waiting == 18)
    encoder.go.set()
    [thread.join(20) for thread in first + rest]
    assert found_first | found == {v: float(v) for v in range(1, 20)}
    assert encoder.runs == [1, 8, 8, 2]
    gate.close()


def test_alone_an_image_goes_at_once():
    gate = Batcher(Slow())
    gate.batch = 64
    took = []
    for number in range(10):
        started = time.perf_counter()
        gate.embed(tile(number))
        took.append(time.perf_counter() - started)
    assert min(took) < 0.05, took  # a busy machine may delay some
    gate.close()


def test_a_full_queue_turns_away_and_recovers():
    encoder = Slow()
    gate = Batcher(encoder, max_waiting=3)
    encoder.go.clear()
    threads, found = ask(gate, [0])
    until(lambda: gate.waiting == 0)
    more, also = ask(gate, [1, 2, 3])
    until(lambda: gate.waiting == 3)
    with pytest.raises(Busy, match="3 images are waiting"):
        gate.embed(tile(9))
    encoder.go.set()
    [thread.join(20) for thread in threads + more]
    assert len(found | also) == 4 and gate.embed(tile(7))[0, 0] == 7
    assert gate.embed(np.zeros((30, 4, 4, 3), np.uint8)).shape == (30, 1), "alone it gets in"
    gate.close()


def test_a_failed_run_fails_its_own_and_no_other():
    encoder = Slow()
    gate = Batcher(encoder)
    encoder.fails = True
    with pytest.raises(RuntimeError, match="broken"):
        gate.embed(tile(1))
    encoder.fails = False
    assert gate.embed(tile(2))[0, 0] == 2
    gate.close()


def test_nobody_waits_for_ever():
    encoder = Slow()
    gate = Batcher(encoder)
    encoder.go.clear()
    with pytest.raises(Unavailable, match="did not answer"):
        gate.embed(tile(1), patience_s=0.05)
    threads, _ = ask(gate, [])
    caught = []

    def waits():
        try:
            gate.embed(tile(2))
        except Unavailable as error:
            caught.append(str(error))

    thread = threading.Thread(target=waits)
    thread.start()
    until(lambda: gate.waiting == 1)
    encoder.go.set() if not threading.Timer(0.2, encoder.go.set).start() else None
    gate.close()
    thread.join(20)
    assert caught == [] or "shutting down" in caught[0]
    assert not thread.is_alive()
    with pytest.raises(Unavailable, match="shutting down"):
        gate.embed(tile(3))


def test_a_batch_is_used_where_measuring_shows_that_it_pays():
    pays, costs = Batcher(Slow(per_run=0.01)), Batcher(Slow(per_tile=0.003))
    assert pays.measure()["together_ms"] < 5 and pays.batch == 8
    costs.measure()
    assert costs.batch == 1
    pays.close(), costs.close()
