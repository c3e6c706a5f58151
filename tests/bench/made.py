"""Data for the benchmarks of serving: a large pyramid made from the real slide, and encoders."""

import tarfile
from pathlib import Path

import numpy as np
import tifffile

SHARED = Path(__file__).parents[3] / "shared" / "data"
TILE = 240


def large_pyramid(path, across=12, down=9):
    """Repeat CMU-1-Small-Region into a pyramid of three levels; its JPEG tiles are kept as they are."""
    with tarfile.open(SHARED / "wsi_regions.tar") as pack:
        stream = pack.extractfile("wsi/CMU-1-Small-Region.svs")
        source = path.with_suffix(".svs")
        source.write_bytes(stream.read())
    with tifffile.TiffFile(source) as opened:
        page = opened.pages[0]
        pixels, tables = page.asarray(), page.jpegtables
        columns, rows = page.imagewidth // TILE, page.imagelength // TILE  # whole tiles only
        per_row = -(-page.imagewidth // TILE)
        blob = source.read_bytes()
        tiles = [
            [
                blob[page.dataoffsets[n] : page.dataoffsets[n] + page.databytecounts[n]]
                for n in range(r * per_row, r * per_row + columns)
            ]
            for r in range(rows)
        ]
    region = pixels[: rows * TILE, : columns * TILE]
    height, width = region.shape[0] * down, region.shape[1] * across
    common = {"photometric": "rgb", "tile": (TILE, TILE), "metadata": None}
    scale = {"resolution": (1e4 / 0.499, 1e4 / 0.499), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path, bigtiff=True) as out:
        encoded = (
            tile for _ in range(down) for row in tiles for _ in range(across) for tile in row
        )
        out.write(
            encoded, shape=(height, width, 3), dtype=np.uint8, compression="jpeg",
            jpegtables=tables, **common, **scale,
        )  # fmt: skip
        for factor in (4, 16):
            small = region.reshape(-1, factor, region.shape[1] // factor, factor, 3).mean((1, 3))
            out.write(
                np.tile(small.astype(np.uint8), (down, across, 1)), compression="jpeg",
                subfiletype=1, **common,
            )  # fmt: skip
    source.unlink()
    return path


def torch_graph(views, seed=0):
    """The paper's network with random weights, from pixels to embedding, in torch."""
    import torch

    from histoseek.export.onnx_graph import Graph
    from histoseek.training.models import build

    torch.manual_seed(seed)
    net = build("mobilenet-v3-small").eval()
    return Graph(net, net.mean, net.std, None, views).eval()


def bundle_of(folder, views):
    """The same network exported to a bundle; speed does not depend on what its weights are."""
    from histoseek.artifacts.files import sha256_file, write_json
    from histoseek.artifacts.manifest import GRAPH, MANIFEST, Manifest
    from histoseek.export.onnx_graph import OPSET, to_onnx

    folder.mkdir(parents=True)
    (folder / GRAPH).write_bytes(to_onnx(torch_graph(views), 224))
    manifest = Manifest(
        name=f"bench-{views}-view", sha256=sha256_file(folder / GRAPH), arch="mobilenet-v3-small",
        size_px=224, mpp=0.5, dim=64, metric="cosine", normalised=True, views=views, training={},
        licence="none", opset=OPSET, versions={},
    )  # fmt: skip
    write_json(folder / MANIFEST, manifest.model_dump())
    return folder
