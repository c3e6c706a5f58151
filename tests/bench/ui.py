"""The page and the API under load: start-up, clicks, 64 users, 10,000 broken uploads.

    make bench-ui                     # everything, about 8 minutes
    python tests/bench/ui.py --quick  # the same, shorter

Server and clients share the cores of this machine; all requests go over loopback.
"""

import argparse
import http.client
import io
import json
import os
import random
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # before this folder, which has an atlases.py too
from atlases import DIM, features
from mutated import mutated_uploads
from page_server import Server

from histoseek.index.atlas import Atlas
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder
from histoseek.ui.session.batching import Batcher

SHARED = Path(__file__).parents[3] / "shared" / "data"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-first-run"]  # fmt: skip


def real_tiles(count):
    """JPEGs of lc25000."""
    with tarfile.open(SHARED / "lc25000.tar") as pack:
        names = [m for m in pack.getmembers() if m.name.endswith(".jpeg")][:: 2843 // count]
        return [pack.extractfile(member).read() for member in names[:count]]


def large_atlas(folder, slides, tiles):
    """An atlas of the default encoder's length, its vectors around a few directions."""
    atlas = Atlas.create(folder / "atlas", DEFAULT_BUNDLE)
    files = []
    for number in range(slides):
        rng = np.random.default_rng(number)
        vectors = grouped(rng, tiles)
        path = folder / f"s{number}.h5"
        files.append(features(path, tiles, number, features=vectors))
    added = atlas.add(
        files, {f"s{n}": {"label": "ab"[n % 2], "patient": f"P{n}"} for n in range(slides)}
    )
    assert all(each.state == "added" for each in added), added
    atlas.fit("kmeans", k=12)
    return atlas.path


def grouped(rng, count):
    centres = np.random.default_rng(99).normal(size=(40, DIM))
    vectors = centres[rng.integers(0, 40, count)] + rng.normal(size=(count, DIM)) * 0.5
    vectors[:, -1] = 0  # the tissue gate
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def form(blob, **fields):
    """A body with one image, and its content type."""
    mark = "mark-7d1f"
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode()
        for k, v in fields.items()
    ]
    head = f'--{mark}\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
    body = b"".join([*parts, head.encode(), blob, f"\r\n--{mark}--\r\n".encode()])
    return body, {"content-type": f"multipart/form-data; boundary={mark}"}


def percentiles(values):
    cut = statistics.quantiles(values, n=100)
    return {name: round(cut[n - 1], 1) for name, n in (("p50", 50), ("p95", 95), ("p99", 99))}


def clicks(server, blobs, count):
    """Milliseconds of searches one after another, over HTTP."""
    times = []
    for number in range(count):
        body, headers = form(blobs[number % len(blobs)], k=12)
        started = time.perf_counter()
        status, _ = server.ask("POST", "/v1/search", body, headers)
        times.append(1000 * (time.perf_counter() - started))
        assert status == 200
    return percentiles(times)


def page_clicks(server, blobs, count):
    """Milliseconds from choosing a file on the page to twelve cards, in Chromium."""
    from playwright.sync_api import sync_playwright

    times = []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.locator("#find").wait_for()
        for number in range(count + 1):
            path = Path(folder) / f"{number}.png"
            Image.open(io.BytesIO(blobs[number % len(blobs)])).save(path)
            # From the change of the input to the answer that names the file's result.
            page.evaluate("""() => { window.seen = null; window.began = null;
              document.querySelector('#hs-query-file').addEventListener('change',
                () => { window.began = performance.now(); }, {once: true, capture: true});
              const old = document.querySelector('#verdict a')?.href;
              const watch = new MutationObserver(() => {
                const link = document.querySelector('#verdict a');
                if (link && link.href !== old && document.querySelectorAll('#hits .hs-card').length) {
                  window.seen = performance.now(); watch.disconnect(); } });
              watch.observe(document.body, {childList: true, subtree: true}); }""")
            page.set_input_files("#hs-query-file", path)
            page.wait_for_function("window.seen !== null", timeout=20_000)
            times.append(page.evaluate("window.seen - window.began"))
        browser.close()
    return round(statistics.median(times[1:]), 1)


def load(server, blobs, users, seconds):
    """Many users who each search again as soon as they have their answer."""
    times, statuses, lock = [], Counter(), threading.Lock()
    until = time.perf_counter() + seconds

    def user(number):
        rng = random.Random(number)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        own, seen = [], Counter()
        while time.perf_counter() < until:
            body, headers = form(rng.choice(blobs), k=12)
            started = time.perf_counter()
            try:
                connection.request("POST", "/v1/search", body, headers)
                answer = connection.getresponse()
                answer.read()
                seen[answer.status] += 1
            except (OSError, http.client.HTTPException) as error:
                seen[type(error).__name__] += 1
                connection.close()
            own.append(1000 * (time.perf_counter() - started))
        with lock:
            times.extend(own)
            statuses.update(seen)

    before = server.memory_mb()
    marks = []
    threads = [threading.Thread(target=user, args=(n,)) for n in range(users)]
    started = time.perf_counter()
    [thread.start() for thread in threads]
    while time.perf_counter() < until:
        time.sleep(max(0.2, min(seconds / 20, until - time.perf_counter())))
        marks.append(round(server.memory_mb()))
    [thread.join() for thread in threads]
    spent = time.perf_counter() - started
    return {
        "users": users, "seconds": round(spent), "searches": sum(statuses.values()),
        "per_s": round(sum(statuses.values()) / spent, 1), "statuses": dict(statuses), **percentiles(times),
        "memory_mb": {"before": round(before), "fifth": marks[len(marks) // 5], "end": marks[-1]},
    }  # fmt: skip


def broken(server, blobs, count):
    """Statuses of mutated uploads by kind, and the memory they leave."""
    statuses, marks = Counter(), []
    for number, (_, blob) in enumerate(mutated_uploads(blobs[:6], count, random.Random(0))):
        body, headers = form(blob)
        status, answer = server.ask("POST", "/v1/embeddings", body, headers)
        statuses[status] += 1
        assert status == 200 or json.loads(answer)["error"]["code"]
        if number % (count // 10) == 0:
            marks.append(round(server.memory_mb()))
    assert server.ask("GET", "/ready")[0] == 200
    return {"uploads": count, "statuses": dict(sorted(statuses.items())), "memory_mb": marks}


def batching(blobs, users=16, seconds=8):
    """Images/s through the gate with and without batches, in turn."""
    encoder = open_encoder("default")
    gate = Batcher(encoder)
    measured = gate.measure()
    chosen = gate.batch
    size = encoder.manifest.size_px
    tiles = [
        np.asarray(Image.open(io.BytesIO(b)).convert("RGB").resize((size, size))) for b in blobs
    ]
    rates = {1: [], 8: []}
    for _ in range(2):
        for batch, found in rates.items():
            gate.batch = batch
            done, until = Counter(), time.perf_counter() + seconds / 2

            def ask(number, done=done, until=until):
                while time.perf_counter() < until:
                    gate.embed(tiles[number][None])
                    done[number] += 1

            threads = [threading.Thread(target=ask, args=(n,)) for n in range(users)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            found.append(sum(done.values()) / (seconds / 2))
    gate.close()
    speeds = {f"images_per_s_batch_{b}": round(statistics.median(r), 1) for b, r in rates.items()}
    return {**measured, "chosen_batch": chosen, **speeds}


TICKS = """() => {
  const times = [];
  let on = true;
  const tick = (now) => { times.push(now); if (on) requestAnimationFrame(tick); };
  requestAnimationFrame(tick);
  window.ticked = () => { on = false; return 1000 * (times.length - 1) / (times.at(-1) - times[0]); };
}"""
"""Counts the frames that the browser draws until ``ticked`` is called."""


def map_drawn(path, rounds=3):
    """Seconds until the map of an atlas is drawn in Chromium, frames per second of a drag, and more."""
    from playwright.sync_api import sync_playwright

    server = Server(path)
    started = time.perf_counter()
    while server.ask("GET", "/v1/map?by=slide")[0] == 202:
        time.sleep(0.5)
    once = round(time.perf_counter() - started, 1)
    server.stop()
    server = Server(path)  # as after a restart: the places are in a file
    found = {"drawn_s": [], "lasso_ms": [], "frames_per_s": [], "recoloured_ms": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"http://127.0.0.1:{server.port}/")
            page.locator("#find").wait_for()
            started = time.perf_counter()
            page.get_by_role("tab", name="Atlas").click()
            page.locator("#atlas-map .hs-maplegend li").first.wait_for(timeout=120_000)
            found["drawn_s"].append(round(time.perf_counter() - started, 2))
            shown = page.locator("#atlas-map .hs-map-note").inner_text().split(".")[0]
            page.wait_for_timeout(500)
            box = page.locator("#atlas-map .hs-lasso").bounding_box()
            for number, (x, y) in enumerate([(0.3, 0.3), (0.7, 0.3), (0.7, 0.7), (0.3, 0.7)]):
                page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=6)
                page.mouse.down() if number == 0 else None
            started = time.perf_counter()
            page.mouse.up()
            page.locator(".hs-lassoed", has_text="tiles selected").wait_for(timeout=60_000)
            found["lasso_ms"].append(round(1000 * (time.perf_counter() - started)))
            page.locator("#atlas-map .hs-tool[data-tool=move]").click()
            page.evaluate(TICKS)
            page.mouse.move(box["x"] + 300, box["y"] + 200)
            page.mouse.down()
            for step in range(60):
                page.mouse.move(box["x"] + 300 + 3 * step, box["y"] + 200 + step)
            page.mouse.up()
            found["frames_per_s"].append(round(page.evaluate("window.ticked()"), 1))
            started = time.perf_counter()
            page.select_option("#hs-colour", "label")
            page.locator("#atlas-map .hs-maplegend li", has_text="a (").wait_for(timeout=60_000)
            found["recoloured_ms"].append(round(1000 * (time.perf_counter() - started)))
            page.close()
        browser.close()
    server.stop()
    return {"computed_once_s": once, "shown": shown, **found}


PARTS = ("start", "clicks", "load", "broken", "batching", "map")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=PARTS, help="one part")
    arguments = parser.parse_args()
    quick = arguments.quick
    parts = {arguments.only} if arguments.only else set(PARTS)
    blobs = real_tiles(32)
    report = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        path = None
        if parts - {"batching", "map"}:
            slides, tiles = (20, 500) if quick else (20, 5_000)
            path = large_atlas(Path(folder), slides, tiles)
            report["tiles"] = slides * tiles
        if "start" in parts:
            starts = []
            for _ in range(3):
                server = Server(path)
                starts.append(server.up_s)
                server.stop()
            report["start_to_first_page_s"] = [round(s, 2) for s in starts]
        if parts & {"clicks", "load", "broken"}:
            server = Server(path)
            time.sleep(15)  # what is made once in the background after a start
            if "clicks" in parts:
                report["search_over_http_ms"] = clicks(server, blobs, 20 if quick else 200)
                report["click_on_the_page_ms"] = page_clicks(server, blobs, 5 if quick else 25)
            if "load" in parts:
                report["load"] = load(server, blobs, 64, 20 if quick else 300)
            if "broken" in parts:
                report["broken"] = broken(server, blobs, 500 if quick else 10_000)
            server.stop()
        if "map" in parts:
            (Path(folder) / "map").mkdir()
            slides, tiles = (20, 500) if quick else (400, 5_000)
            report["map"] = map_drawn(large_atlas(Path(folder) / "map", slides, tiles))
    if "batching" in parts:
        report["batching"] = batching(blobs)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
