"""A slide for a viewer: square pieces of every zoom, and regions of it as tiles of the encoder."""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...artifacts.images import Rgb, encode_jpeg
from ...errors import BadInput, NotFound
from ...index.atlas import Atlas
from ...index.view import View
from ...serving.slides.slide import Slide
from ...serving.slides.tissue import tissue_mask, tissue_share
from .colours import VIRIDIS, colour_of, ramp, rgb
from .pictures import Pictures, slide_number
from .regions import LEAST_TISSUE, MAX_TILES, Cut, Region, grid_in
from .words import cluster_name

PIECE_PX = 256
"""Side of a piece in pixels."""
OVERVIEW_PX = 1024
"""Longest side of the image of a whole slide, of which coarse pieces are cut."""
TISSUE_PX = 2048
"""The same, for finer pieces of slides with few levels, and to find the tissue in a region."""
DIRECT_PX = 2048
"""Largest side, in pixels of a level, of a piece that is read from the slide itself."""
TISSUE_CELLS = 400
"""Number of cells along the longest side of a slide in the layer of tissue."""
KEPT_BYTES = 192 * 2**20
"""Maximum bytes of images of whole slides that are kept."""
QUALITY = 80
TILES = "#0d9488"
"""Colour of the grid of tiles."""
TISSUE = "#16a34a"
"""Colour of what is taken for tissue."""
BACKGROUND = 255


class Pyramid(NamedTuple):
    """What a viewer needs to know of a slide.

    The piece (x, y) of zoom z shows ``piece_px * 2 ** (max_zoom - z)`` level-0 pixels a side, from
    (x, y) times as many; pieces at the edges are filled with white.

    Attributes:
        slide: name.
        width: of level 0, in pixels; ``height`` likewise.
        mpp: µm per pixel of level 0; None if unknown.
        magnification: 10 / mpp; None if unknown.
        piece_px: side of a piece in pixels.
        max_zoom: the zoom that shows level 0.
        tile_px_level0: side of an atlas's tile of this slide, in level-0 pixels.
        left: left edge of the area that QuPath shows, in level-0 pixels; ``top`` likewise.
    """

    slide: str
    width: int
    height: int
    mpp: float | None
    magnification: float | None
    piece_px: int
    max_zoom: int
    tile_px_level0: int
    left: int
    top: int


class Viewer:
    """Reads pieces and regions of the slides of an atlas; safe to use from several threads."""

    def __init__(self, atlas: Atlas, pictures: Pictures) -> None:
        """Store the atlas and what keeps its slides open; nothing is read yet."""
        self._atlas, self._pictures = atlas, pictures
        self._lock = threading.Lock()
        self._overviews: OrderedDict[tuple[int, int], tuple[Rgb, float]] = OrderedDict()

    def pyramid(self, slide: str) -> Pyramid:
        """Describe a slide.

        Raises:
            NotFound: there is no such slide, it is a set of ready tiles, or its file was moved.
        """
        row = self._row(slide)

        def describe(source: Slide) -> Pyramid:
            mpp = row["mpp"] or source.mpp
            longest = max(source.width, source.height)
            return Pyramid(
                slide, source.width, source.height, mpp, mpp and round(10 / mpp, 2), PIECE_PX,
                max(0, math.ceil(math.log2(longest / PIECE_PX))),
                row["size_px_level0"] or self._atlas.manifest.size_px,
                *(source.bounds[:2] if source.bounds else (0, 0)),
            )  # fmt: skip

        return self._pictures.on_slide(slide, describe)

    def piece(self, slide: str, z: int, x: int, y: int) -> bytes:
        """Return a piece of a zoom as JPEG.

        Raises:
            NotFound: there is no such slide or piece.
        """
        row = self._row(slide)

        def read(source: Slide) -> Rgb:
            longest = max(source.width, source.height)
            most = max(0, math.ceil(math.log2(longest / PIECE_PX)))
            side = PIECE_PX << (most - z) if 0 <= z <= most else 0
            if not side or not (0 <= x * side < source.width and 0 <= y * side < source.height):
                raise NotFound(f"slide {slide!r} has no piece {z}/{x}/{y}; zooms are 0 to {most}")
            coarse = side / PIECE_PX >= longest / OVERVIEW_PX
            large = source.level_for(side, PIECE_PX)[1] > DIRECT_PX
            px = OVERVIEW_PX if coarse else TISSUE_PX
            if large and side / PIECE_PX >= longest / px or coarse and self._is_kept(row["id"], px):
                overview, down = self._overview(row["id"], source, px)
                return _part(overview, x * side / down, y * side / down, side / down)
            return source.read_tile(x * side, y * side, side, PIECE_PX)

        def make() -> bytes:
            return encode_jpeg(self._pictures.on_slide(slide, read), QUALITY)

        return self._pictures.keep(("piece", row["id"], z, x, y), make)

    def tissue(self, slide: str) -> bytes:
        """Return what is taken for tissue on a slide, in the format of :meth:`layer`; N cells, not tiles.

        It is found now, with the default settings of ``histoseek embed``.

        Raises:
            NotFound: there is no such slide, or its file was moved.
        """
        row = self._row(slide)

        def read(source: Slide) -> tuple[Rgb, float, tuple[int, int], float | None]:
            overview, down = self._overview(row["id"], source, TISSUE_PX)
            return overview, down, (source.width, source.height), row["mpp"] or source.mpp

        def find() -> bytes:
            overview, down, (width, height), mpp = self._pictures.on_slide(slide, read)
            side = max(1, math.ceil(max(width, height) / TISSUE_CELLS))
            y, x = np.mgrid[0:height:side, 0:width:side]
            corners = np.stack([x.ravel(), y.ravel()], axis=1)
            mask = tissue_mask(overview, mpp and mpp * down)
            shown = tissue_share(mask, np.concatenate([corners, corners + side], 1) / down) >= 0.5
            size = f": {mask.sum() * (down * mpp / 1000) ** 2:,.1f} mm²" if mpp else ""
            colours = np.tile(np.array([*rgb(TISSUE), 255], np.uint8), (int(shown.sum()), 1))
            return _packed(corners[shown], colours, side, side, [(f"tissue{size}", TISSUE)])

        return self._pictures.keep(("tissue", row["id"]), find)

    def layer(
        self,
        slide: str,
        by: Literal["cluster", "label", "score", "grid"],
        clustering: str | None = None,
        query: NDArray[np.float32] | None = None,
        by_text: bool = False,
    ) -> bytes:
        """Return the slide's tiles with a colour of each, for a layer over the slide.

        Four bytes give the length of a JSON header (uint32), which is padded with spaces to a multiple of
        eight bytes with them; then N places (int32, N x 2) and N colours (uint8, N x 4, with opacity). The
        header has ``tiles`` (N), ``side`` of a tile and ``step`` between tiles in level-0 pixels, and
        ``legend``: texts with their colours.

        Args:
            slide: name.
            by: cluster, label, score (similarity to ``query``), or grid (one colour).
            clustering: of the clusters; the newest when None.
            query: (D,), for ``score``.
            by_text: whether ``query`` is of a text; see :meth:`Pictures.scale`.

        Raises:
            NotFound: there is no such slide or clustering.
        """
        return self._atlas.ask(self._layer, slide, by, clustering, query, by_text)

    def _layer(
        self,
        view: View,
        /,
        slide: str,
        by: str,
        clustering: str | None,
        query: NDArray[np.float32] | None,
        by_text: bool,
    ) -> bytes:
        number = slide_number(view, slide)
        row = view.columns.slides[number]
        rows = slice(*view.columns.starts[number : number + 2].tolist())
        places = view.columns.places_of(number)
        count = len(places)
        legend: list[tuple[str, str]] = []
        colours = np.tile(np.array([*rgb(TILES), 255], np.uint8), (count, 1))
        if by == "cluster":
            assigned = view.columns.clusters(clustering)
            if assigned is None:
                raise NotFound(f"the atlas has no clustering {clustering or ''}")
            codes, which = np.unique(assigned[rows], return_inverse=True)
            palette = np.array([rgb(colour_of(c)) for c in codes.tolist()], np.uint8).reshape(-1, 3)
            colours[:, :3] = palette[which]
            names = view.cluster_names(clustering)
            sizes = np.bincount(which, minlength=len(codes)).tolist()
            legend = [
                (f"{cluster_name(c, names)} ({size:,})", colour_of(c))
                for c, size in zip(codes.tolist(), sizes, strict=True)
            ]
        elif by == "label":
            coded = view.columns.coded("label")
            legend = _paint_labels(coded.names, coded.codes[rows], colours)
        elif by == "score" and query is not None and count:
            scores = view.scores_in(slide, query)
            low, high = self._pictures.scale(scores, by_text)
            colours[:, :3] = ramp(np.clip((scores - low) / max(high - low, 1e-9), 0, 1))
            ends = zip(np.linspace(low, high, len(VIRIDIS)), VIRIDIS, strict=True)
            legend = [(f"{score:.2f}", colour) for score, colour in ends]
        side = row["size_px_level0"] or self._atlas.manifest.size_px
        return _packed(places, colours, side, _step(places, side), legend)

    def tiles_in(self, region: Region) -> tuple[Cut, NDArray[np.uint8]]:
        """Cut a region into tiles as the encoder takes them, uint8 (N, S, S, 3).

        The tiles have the size of the slide's tiles in the atlas, do not overlap, and have their centre
        inside the region. Tiles without tissue are left out, unless there are no others.

        Raises:
            NotFound: there is no such slide.
            BadInput: the region is outside the slide.
        """
        about = self.pyramid(region.slide)
        low, high = np.min(region.ring, axis=0), np.max(region.ring, axis=0)
        if (high <= 0).any() or (low >= (about.width, about.height)).any():
            raise BadInput(
                f"the region is outside slide {region.slide!r} ({about.width:,} x {about.height:,} "
                "pixels); expected level-0 pixels"
            )
        size, side = self._atlas.manifest.size_px, about.tile_px_level0
        corners = grid_in(region.ring, side, (about.width, about.height))
        key = self._row(region.slide)["id"]

        def read(source: Slide) -> tuple[Cut, NDArray[np.uint8]]:
            overview, down = self._overview(key, source, TISSUE_PX)
            boxes = np.concatenate([corners, corners + side], axis=1) / down
            shown = tissue_share(tissue_mask(overview), boxes) >= LEAST_TISSUE
            kept = corners[shown] if shown.any() else corners
            rows = np.linspace(0, len(kept) - 1, min(len(kept), MAX_TILES)).round().astype(int)
            taken = kept[rows]
            tiles = np.empty((len(taken), size, size, 3), dtype=np.uint8)
            places = [(int(left), int(top)) for left, top in taken]
            failed = source.read_tiles(places, side, tiles)
            if failed:
                raise next(iter(failed.values()))
            cut = Cut(region, taken, side, len(corners) - len(kept), len(kept) - len(taken))
            return cut, tiles

        return self._pictures.on_slide(region.slide, read)

    def _row(self, slide: str) -> Any:
        view = self._atlas.view()
        return view.columns.slides[slide_number(view, slide)]

    def _is_kept(self, slide: int, px: int) -> bool:
        with self._lock:
            return (slide, px) in self._overviews

    def _overview(self, slide: int, source: Slide, px: int) -> tuple[Rgb, float]:
        """Return an image of the whole slide, and its level-0 pixels per pixel; the last ones are kept."""
        key = slide, px
        with self._lock:
            if key in self._overviews:
                self._overviews.move_to_end(key)
                return self._overviews[key]
        image = source.thumbnail(px)
        made = image, source.width / image.shape[1]
        with self._lock:
            self._overviews[key] = made
            while sum(kept.nbytes for kept, _ in self._overviews.values()) > KEPT_BYTES:
                self._overviews.popitem(last=False)
        return made


def _packed(
    places: NDArray[np.int32],
    colours: NDArray[np.uint8],
    side: int,
    step: int,
    legend: list[tuple[str, str]],
) -> bytes:
    """Return a layer as :meth:`Viewer.layer` describes it."""
    header = {"tiles": len(places), "side": side, "step": step, "legend": legend}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 4) % 8)
    length = np.uint32(len(text)).astype("<u4").tobytes()
    return b"".join([length, text, places.astype("<i4").tobytes(), colours.tobytes()])


def _paint_labels(
    names: list[str], codes: NDArray[np.int32], colours: NDArray[np.uint8]
) -> list[tuple[str, str]]:
    """Colour tiles (N, 4) by the numbers of their labels (N,); return the legend. No label: transparent."""
    colours[codes < 0, 3] = 0
    legend = []
    for code in np.unique(codes[codes >= 0]).tolist():
        colours[codes == code, :3] = rgb(colour_of(code))
        legend.append((f"{names[code]} ({int((codes == code).sum()):,})", colour_of(code)))
    return legend


def _step(places: NDArray[np.int32], side: int) -> int:
    """Return the smallest distance of two columns or rows of tiles, at least an eighth of a tile."""
    gaps = [np.diff(np.unique(places[:, axis])) for axis in (0, 1)]
    least = min([int(gap.min()) for gap in gaps if len(gap)], default=side)
    return max(1, side // 8, min(side, least))


def _part(image: Rgb, left: float, top: float, side: float) -> Rgb:
    """Return a square of an image at the size of a piece; what is beyond the image is white."""
    height, width = image.shape[:2]
    right, bottom = min(width, left + side), min(height, top + side)
    size = (
        max(1, round((right - left) / side * PIECE_PX)),
        max(1, round((bottom - top) / side * PIECE_PX)),
    )
    shown = Image.fromarray(image).resize(
        size, Image.Resampling.LANCZOS, box=(left, top, right, bottom)
    )
    piece = np.full((PIECE_PX, PIECE_PX, 3), BACKGROUND, dtype=np.uint8)
    piece[: size[1], : size[0]] = np.asarray(shown)
    return piece
