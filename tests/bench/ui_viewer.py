"""The slide viewer's server: pieces of warm and cold slides, 32 users on 50 slides, and a box to its hits.

Slides: copies of CMU-1-Small-Region.svs (a real Aperio slide), an OME-TIFF of 17,280 x 23,040 pixels and a
pyramid of 99,360 x 100,800, both made of its pixels. Pieces are asked for over HTTP; when warm and cold
slides are timed, each only once, so that none comes from the server's cache.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import tifffile

sys.path.insert(0, str(Path(__file__).parents[1]))
from made import SHARED, large_pyramid
from page_server import Server

from histoseek.artifacts.feature_files import Features, read_features
from histoseek.artifacts.feature_writer import write_features
from histoseek.index.atlas import Atlas
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder

SIDE_UM = 2_000
USERS = 32
COPIES = 50


def real_slide(path):
    import tarfile

    with tarfile.open(SHARED / "wsi_regions.tar") as pack:
        path.write_bytes(pack.extractfile("wsi/CMU-1-Small-Region.svs").read())
    return path


def ome_tiff(path, slide, across=8, down=8):
    """An OME-TIFF with two further levels, made of a slide's pixels."""
    with tifffile.TiffFile(slide) as opened:
        region = opened.pages[0].asarray()[:2880, :2160]
    common = {"photometric": "rgb", "tile": (512, 512), "compression": "jpeg"}
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as out:
        whole = np.tile(region, (down, across, 1))
        about = {"axes": "YXS", "PhysicalSizeX": 0.499, "PhysicalSizeY": 0.499}
        out.write(whole, subifds=2, metadata=about, **common)
        for factor in (4, 16):
            out.write(whole[::factor, ::factor], subfiletype=1, **common)
    return path


def atlas_of(folder, large):
    """An atlas of copies of the slide and the large ones; these have its embeddings, repeated."""
    slides = folder / "slides"
    slides.mkdir()
    first = real_slide(slides / "cmu-00.svs")
    (done,) = embed_jobs(
        find_jobs([first]),
        open_encoder("default"),
        folder / "features",
        EmbedOptions(),
        lambda *_: None,
    )
    known = read_features(folder / done.features)
    files = [folder / done.features]
    for number in range(1, COPIES):
        path = shutil.copy(first, slides / f"cmu-{number:02d}.svs")
        files.append(_copied(folder, known, path, known.coords, (known.width, known.height)))
    for name, (across, down) in large.items():
        path = slides / name
        if name.startswith("ome"):
            ome_tiff(path, first, across, down)
        else:
            large_pyramid(path, across, down)
        size = (across * 2160, down * 2880)
        steps = [(x * 2160, y * 2880) for y in range(down) for x in range(across)]
        coords = np.concatenate([known.coords + step for step in steps])
        files.append(_copied(folder, known, path, coords, size))
    atlas = Atlas.create(folder / "atlas", DEFAULT_BUNDLE)
    added = atlas.add(files)
    assert all(each.state == "added" for each in added), [a for a in added if a.state != "added"]
    return atlas


def _copied(folder, known, path, coords, size):
    path = Path(path)
    name = path.name.split(".")[0]
    repeats = len(coords) // len(known.features)
    file = folder / "features" / f"{name}.h5"
    write_features(
        file,
        Features(
            name=name, encoder=known.encoder, encoder_sha256=known.encoder_sha256,
            features=np.tile(known.features, (repeats, 1)), coords=coords, size_px=known.size_px,
            size_px_level0=known.size_px_level0, mpp=known.mpp, target_mpp=known.target_mpp,
            width=size[0], height=size[1], source=str(path),
        ),
    )  # fmt: skip
    return file


def pieces(server, slide, rng):
    """Yield different pieces of a slide, of every zoom with more than one, in random order."""
    about = json.loads(server.ask("GET", f"/v1/slides/{slide}/pyramid")[1])
    found = []
    for z in range(1, about["max_zoom"] + 1):
        side = about["piece_px"] << (about["max_zoom"] - z)
        columns, rows = -(-about["width"] // side), -(-about["height"] // side)
        for n in rng.choice(columns * rows, min(columns * rows, 60), replace=False).tolist():
            found.append(f"/v1/slides/{slide}/tiles/{z}/{n % columns}/{n // columns}.jpg")
    rng.shuffle(found)
    return found


def timed(server, path):
    started = time.perf_counter()
    status, blob = server.ask("GET", path)
    assert status == 200 and blob[:2] == b"\xff\xd8", (path, status)
    return 1000 * (time.perf_counter() - started)


def spread(values):
    p50, p95 = np.percentile(values, (50, 95)).round(1).tolist()
    return {"n": len(values), "p50": p50, "p95": p95, "most": round(max(values), 1)}


def load(server, slides, seconds):
    """Errors, pieces per second, latency and memory while users look at random places of random slides."""
    latencies, errors = [], []
    memory = [server.memory_mb()]
    until = time.perf_counter() + seconds

    def user(number):
        rng = np.random.default_rng(number)
        while time.perf_counter() < until:
            slide = slides[rng.integers(len(slides))]
            about = json.loads(server.ask("GET", f"/v1/slides/{slide}/pyramid")[1])
            z = int(rng.integers(1, about["max_zoom"] + 1))
            side = about["piece_px"] << (about["max_zoom"] - z)
            columns, rows = -(-about["width"] // side), -(-about["height"] // side)
            left, top = int(rng.integers(columns)), int(rng.integers(rows))
            for x in range(left, min(columns, left + 4)):
                for y in range(top, min(rows, top + 3)):
                    started = time.perf_counter()
                    status, _ = server.ask("GET", f"/v1/slides/{slide}/tiles/{z}/{x}/{y}.jpg")
                    latencies.append(1000 * (time.perf_counter() - started))
                    if status != 200:
                        errors.append(status)

    threads = [threading.Thread(target=user, args=(n,)) for n in range(USERS)]
    [thread.start() for thread in threads]
    while any(thread.is_alive() for thread in threads):
        time.sleep(seconds / 10)
        memory.append(server.memory_mb())
    [thread.join() for thread in threads]
    return {
        "users": USERS, "slides": len(slides), "errors": len(errors),
        "pieces_per_s": round(len(latencies) / seconds, 1), "ms": spread(latencies),
        "memory_mb": [round(m) for m in memory],
    }  # fmt: skip


def box(server, slide, mpp, times):
    """Milliseconds from a box of 2 x 2 mm, at random places, to its hits on other slides."""
    side, rng, found = round(SIDE_UM / mpp), np.random.default_rng(5), []
    about = json.loads(server.ask("GET", f"/v1/slides/{slide}/pyramid")[1])
    for _ in range(times):
        x, y = (int(rng.integers(about[key] - side)) for key in ("width", "height"))
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]
        asked = {
            "regions": [{"slide": slide, "ring": ring}],
            "k": 24,
            "where": f"slide != '{slide}'",
        }
        started = time.perf_counter()
        status, blob = server.ask(
            "POST", "/v1/search", json.dumps(asked), {"content-type": "application/json"}
        )
        found.append(1000 * (time.perf_counter() - started))
        answer = json.loads(blob)
        assert status == 200 and len(answer["hits"]) == 24, blob[:200]
    return {**spread(found), "tiles": answer["provenance"]["examples"]["regions"][0]["tiles"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller pyramid, fewer questions")
    quick = parser.parse_args().quick
    large = {"ome.ome.tif": (8, 8), "large.tif": (8, 6) if quick else (46, 35)}
    report = {"machine": f"{os.cpu_count()} CPU cores, {platform.machine()}"}
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        atlas = atlas_of(Path(folder), large)
        copies = [f"cmu-{n:02d}" for n in range(COPIES)]
        report["tiles"] = atlas.stats()["tiles"]
        for slide in ("cmu-00", "ome", "large"):
            cold = []
            for _ in range(2 if quick else 5):
                server = Server(atlas.path)
                asked = pieces(server, "cmu-49", rng)  # the server has started up
                timed(server, asked[0])
                about = f"/v1/slides/{slide}/tiles/3/0/0.jpg"
                cold.append(timed(server, about))
                if len(cold) < (2 if quick else 5):
                    server.stop()
            asked = pieces(server, slide, rng)
            warm = [timed(server, path) for path in asked[20:]]
            report[slide] = {"cold_ms": spread(cold), "warm_ms": spread(warm)}
            server.stop()
        server = Server(atlas.path)
        report["load"] = load(server, [*copies, "ome", "large"], 15 if quick else 120)
        report["box_2_x_2_mm_ms"] = box(server, "large", 0.499, 3 if quick else 20)
        server.stop()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
