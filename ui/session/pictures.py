"""Images of an atlas: tiles, their surroundings, and slides with clusters or a heat map overlaid."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ...artifacts.feature_files import read_about
from ...artifacts.images import Rgb, encode_jpeg, square
from ...artifacts.remote import is_url
from ...artifacts.tileset_files import open_tiles
from ...artifacts.tilesets import TileSet
from ...errors import BadInput, HistoseekError, NotFound
from ...index.atlas import Atlas
from ...index.view import View
from ...serving.slides.slide import Slide, open_slide
from .colours import colour_of, ramp, rgb

OPEN_SOURCES = 64
"""Maximum number of slides and tile sets that are kept open."""
WITH_PIXELS = 8
"""Number of the last ones that keep decoded pixels, up to 32 MiB each."""
KEPT_BYTES = 128 * 2**20
"""Maximum bytes of cached JPEGs."""
THUMBNAIL_PX = 1024
FIELD = 5
"""Side of the area around a tile, in tiles."""
FIELD_PX = 640
CONTACT = 3
_BOX = (255, 60, 0)

T = TypeVar("T")
_Source = Slide | tuple[TileSet, dict[str, int]]


class _Opened:
    """An open slide or tile set; one thread at a time reads it."""

    def __init__(self, source: _Source) -> None:
        self.source = source
        self.lock = threading.Lock()
        self.closed = False

    def forget(self) -> None:
        """Free cached pixels, unless the slide is being read."""
        if isinstance(self.source, Slide) and self.lock.acquire(blocking=False):
            try:
                if not self.closed:
                    self.source.forget()
            finally:
                self.lock.release()

    def close(self) -> None:
        with self.lock:
            self.closed = True
            if isinstance(self.source, Slide):
                self.source.close()


class Pictures:
    """Reads images from the tiles' source files; keeps a few slides open and caches the last JPEGs."""

    def __init__(self, atlas: Atlas) -> None:
        """Store the atlas; nothing is read yet."""
        self._atlas = atlas
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Opened] = OrderedDict()
        self._kept: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()
        self._bytes = 0

    def tile(self, tile: int) -> bytes:
        """Return a tile as the encoder sees it, as JPEG.

        Raises:
            NotFound: there is no such tile (any more), or its slide or image file was moved.
        """
        return self._keep_of_tile("tile", tile, lambda view, at: encode_jpeg(self._tile(view, at)))

    def field(self, tile: int) -> bytes:
        """Return the tile with its neighbours at a lower magnification, with a box around it, as JPEG.

        For a tile of a tile set: the whole image, with a box around the square that the encoder sees.
        """
        return self._keep_of_tile(
            "field", tile, lambda view, at: encode_jpeg(self._field(view, at))
        )

    def place(self, tile: int) -> bytes:
        """Return the whole slide with a box around the tile, as JPEG.

        Raises:
            NotFound: the tile belongs to a tile set, which has no such image.
        """

        def draw(view: View, at: int) -> bytes:
            number, _ = _row(view, at)
            thumbnail, down = self._overview(view, number)
            x, y, side = _square_of(view, at, number)
            box = (x / down - 4, y / down - 4, (x + side) / down + 4, (y + side) / down + 4)
            return encode_jpeg(_boxed(thumbnail, box, 4), 85)

        return self._keep_of_tile("place", tile, draw)

    def thumbnail(self, slide: str, longest: int = 320) -> bytes:
        """Return a thumbnail of a slide, or some tiles of a tile set, as JPEG."""
        view = self._atlas.view()
        number = slide_number(view, slide)
        key = ("thumbnail", view.columns.slides[number]["id"], longest)
        return self.keep(key, lambda: encode_jpeg(self._small(view, number, longest), 85))

    def clusters(self, slide: str, clustering: str | None) -> bytes:
        """Return a slide with its tiles coloured by cluster, as JPEG.

        Raises:
            NotFound: there is no such slide or clustering, or ``slide`` is a tile set.
        """
        return self._atlas.ask(self._clusters, slide, clustering)

    def _clusters(self, view: View, /, slide: str, clustering: str | None) -> bytes:
        number = slide_number(view, slide)
        assigned = view.columns.clusters(clustering)
        if assigned is None:
            raise NotFound(
                f"the atlas has no clustering {clustering or ''}; fit one with `histoseek index fit`"
            )
        rows = slice(*view.columns.starts[number : number + 2])
        colours = np.array([rgb(colour_of(c)) for c in assigned[rows].tolist()]).reshape(-1, 3)
        return encode_jpeg(self._painted(view, number, colours, 0.45), 85)

    def heat(
        self, slide: str, query: NDArray[np.float32], by_text: bool = False
    ) -> tuple[bytes, float, float]:
        """Return a slide with its tiles coloured by similarity to a query (D,), and the scale's ends."""
        return self._atlas.ask(self._heat, slide, query, by_text)

    def _heat(
        self, view: View, /, slide: str, query: NDArray[np.float32], by_text: bool
    ) -> tuple[bytes, float, float]:
        number = slide_number(view, slide)
        scores = view.scores_in(slide, query)
        if not len(scores):
            raise NotFound(f"slide {slide!r} has no tiles")
        low, high = self.scale(scores, by_text)
        share = np.clip((scores - low) / max(high - low, 1e-9), 0, 1)
        picture = self._painted(view, number, ramp(share), 0.6)
        return encode_jpeg(picture, 85), low, high

    def scale(self, scores: NDArray[np.float32], by_text: bool) -> tuple[float, float]:
        """Return the scores at the ends of a heat map: 0 and 1 for cosine, so that slides are comparable.

        Distances have no fixed range, and the cosines of a text lie close together: for both, the slide's
        lowest and highest score are returned.
        """
        if self._atlas.manifest.metric == "cosine" and not by_text:
            return 0.0, 1.0
        return float(scores.min()), float(scores.max())

    def on_slide(self, slide: str, read: Callable[[Slide], T]) -> T:
        """Return what ``read`` reads from an open slide; one thread at a time reads it.

        Raises:
            NotFound: there is no such slide, it is a set of ready tiles, or its file was moved.
        """
        view = self._atlas.view()

        def checked(source: _Source) -> T:
            if not isinstance(source, Slide):
                raise NotFound(
                    f"{slide!r} is a set of ready tiles, so there is no image of a whole slide"
                )
            return read(source)

        return self._read(view, slide_number(view, slide), checked)

    # -- reading --------------------------------------------------------------------------------

    def _keep_of_tile(self, kind: str, tile: int, make: Callable[[View, int], bytes]) -> bytes:
        """Return an image of a tile, made from a view and the tile's position in it, or cached."""

        def ask(view: View) -> bytes:
            position = int(view.columns.positions(np.array([tile], dtype=np.int64))[0])
            if position < 0:
                raise NotFound(f"the atlas has no tile {tile}, or it was removed; search again")
            return self.keep((kind, tile), lambda: make(view, position))

        return self._atlas.ask(ask)

    def keep(self, key: tuple[Any, ...], make: Callable[[], bytes]) -> bytes:
        """Return what was made for ``key``, from the cache if it is still there."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        blob = make()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = blob
                self._bytes += len(blob)
            while self._bytes > KEPT_BYTES:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return blob

    def _tile(self, view: View, at: int) -> Rgb:
        size = self._atlas.manifest.size_px or 224
        number, row = _row(view, at)

        def read(source: _Source) -> Rgb:
            if isinstance(source, Slide):
                return source.read_tile(*_square_of(view, at, number), size)
            return square(_picture(source, view.columns.files(number), row), size)

        return self._read(view, number, read)

    def _field(self, view: View, at: int) -> Rgb:
        number, row = _row(view, at)

        def read(source: _Source) -> Rgb:
            if isinstance(source, Slide):
                x, y, side = _square_of(view, at, number)
                left = side * (FIELD // 2)
                wide = source.read_tile(x - left, y - left, FIELD * side, FIELD_PX)
                unit = FIELD_PX / FIELD
                start = unit * (FIELD // 2)
                return _boxed(wide, (start, start, start + unit, start + unit))
            picture = Image.fromarray(_picture(source, view.columns.files(number), row))
            scale = FIELD_PX / max(picture.size)
            size = round(picture.width * scale), round(picture.height * scale)
            wide = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
            side = min(size)
            across, down = (size[0] - side) / 2, (size[1] - side) / 2
            return _boxed(wide, (across, down, across + side - 1, down + side - 1))

        return self._read(view, number, read)

    def _small(self, view: View, number: int, longest: int) -> Rgb:
        if view.columns.slides[number]["kind"] != "slide":
            return self._contact(view, number, longest)
        thumbnail, _ = self._overview(view, number)
        picture = Image.fromarray(thumbnail)
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        return np.asarray(picture)

    def _contact(self, view: View, number: int, longest: int) -> Rgb:
        """Return some tiles of a tile set side by side."""
        start, end = view.columns.starts[number : number + 2].tolist()
        if start == end:
            raise NotFound(f"tile set {view.columns.slides[number]['name']!r} has no tiles")
        rows = np.unique(np.linspace(start, end - 1, CONTACT * CONTACT).astype(int))
        side = longest // CONTACT
        sheet = Image.new("RGB", (side * CONTACT, side * CONTACT), "white")
        for n, at in enumerate(rows.tolist()):
            tile = Image.fromarray(self._tile(view, at)).resize((side, side))
            sheet.paste(tile, (side * (n % CONTACT), side * (n // CONTACT)))
        return np.asarray(sheet)

    def _overview(self, view: View, number: int) -> tuple[Rgb, float]:
        """Return a slide's thumbnail and its level-0 pixels per pixel."""

        def read(source: Slide) -> tuple[Rgb, float]:
            thumbnail = source.thumbnail(THUMBNAIL_PX)
            return thumbnail, source.width / thumbnail.shape[1]

        return self.on_slide(view.columns.slides[number]["name"], read)

    def _painted(self, view: View, number: int, colours: NDArray[np.uint8], strength: float) -> Rgb:
        """Return the thumbnail with the square of each of N tiles tinted by its colour, (N, 3)."""
        thumbnail, down = self._overview(view, number)
        start, end = view.columns.starts[number : number + 2].tolist()
        corners = view.columns.places_of(number) / down
        side = view.columns.slides[number]["size_px_level0"] / down
        height, width = thumbnail.shape[:2]
        tint = np.zeros((height, width, 3), dtype=np.float32)
        cover = np.zeros((height, width, 1), dtype=np.float32)
        for (x, y), colour in zip(corners.tolist(), colours, strict=True):
            rows = slice(int(y), max(int(y) + 1, round(y + side)))
            columns = slice(int(x), max(int(x) + 1, round(x + side)))
            tint[rows, columns] += colour
            cover[rows, columns] += 1
        mean = tint / np.maximum(cover, 1)
        mixed = np.where(cover > 0, (1 - strength) * thumbnail + strength * mean, thumbnail)
        return np.ascontiguousarray(mixed.round().astype(np.uint8))

    def _read(self, view: View, number: int, read: Callable[[_Source], T]) -> T:
        slide = view.columns.slides[number]
        try:
            while True:
                opened = self._source(slide)
                with opened.lock:
                    if opened.closed:  # just now, as the oldest one
                        continue
                    try:
                        return read(opened.source)
                    finally:
                        if isinstance(opened.source, Slide) and not self._is_recent(slide["id"]):
                            opened.source.forget()
        except NotFound:
            raise
        except (HistoseekError, OSError) as error:
            name = Path(slide["source"]).name
            text = str(error).replace(slide["source"], name)
            if is_url(slide["source"]):
                text = (
                    f"{name} was embedded from a URL; copy the slides to this machine, then run "
                    "`histoseek index relocate ATLAS --slides FOLDER`"
                )
            raise NotFound(f"the image cannot be shown: {text}") from error

    def _source(self, slide: Any) -> _Opened:
        key = slide["id"]
        with self._lock:
            known = self._open.get(key)
            if known is not None:
                self._open.move_to_end(key)
        if known is not None:
            self._free_pixels()
            return known
        path = Path(slide["source"])
        source: _Source
        if slide["kind"] == "slide":
            about = read_about(self._atlas.path / slide["features_file"]) or {}
            series = about.get("key", {}).get("series")
            source = open_slide(path, stated_mpp=slide["mpp"], series=series)
            size, embedded = (source.width, source.height), (slide["width"], slide["height"])
            if slide["width"] and size != embedded:
                source.close()
                raise BadInput(
                    f"{path} has {size[0]} x {size[1]} pixels, but the slide had {embedded[0]} x "
                    f"{embedded[1]} when it was embedded; restore that file, or embed the slide again"
                )
        else:
            tiles = open_tiles(path)
            source = tiles, {tile.file: number for number, tile in enumerate(tiles.tiles)}
        oldest = None
        with self._lock:
            opened = self._open.setdefault(key, _Opened(source))
            if len(self._open) > OPEN_SOURCES:
                _, oldest = self._open.popitem(last=False)
        self._free_pixels()
        if oldest is not None:
            oldest.close()
        if opened.source is not source and isinstance(source, Slide):
            source.close()  # another thread opened it first
        return opened

    def _is_recent(self, slide: int) -> bool:
        with self._lock:
            return slide in [*self._open][-WITH_PIXELS:]

    def _free_pixels(self) -> None:
        """Free the cached pixels of the slide that is no longer among the last ones used."""
        with self._lock:
            former = [*self._open.values()][-1 - WITH_PIXELS : -WITH_PIXELS]
        for each in former:
            each.forget()

    def close(self) -> None:
        """Close all open slides."""
        with self._lock:
            opened = list(self._open.values())
            self._open.clear()
        for source in opened:
            source.close()


def slide_number(view: View, slide: str) -> int:
    """Return the number of a slide by name.

    Raises:
        NotFound: there is no such slide.
    """
    for number, row in enumerate(view.columns.slides):
        if row["name"] == slide and slide:
            return number
    raise NotFound(f"the atlas has no slide {slide!r}")


def _row(view: View, at: int) -> tuple[int, int]:
    """Return the slide's number and the tile's row within the slide."""
    number = int(view.columns.slide_of(np.array([at]))[0])
    return number, at - int(view.columns.starts[number])


def _picture(
    source: tuple[TileSet, dict[str, int]], files: list[str | None] | None, row: int
) -> Rgb:
    tiles, rows = source
    file = None if files is None else files[row]
    if file not in rows:
        raise BadInput(f"{Path(tiles.source).name} no longer contains {file}; restore it")
    return tiles.read(rows[file])


def _square_of(view: View, at: int, number: int) -> tuple[int, int, int]:
    """Return a tile's left and top edge and its side in level-0 pixels."""
    x, y = view.columns.places_of(number)[at - view.columns.starts[number]].tolist()
    return x, y, view.columns.slides[number]["size_px_level0"]


def _boxed(picture: Rgb, box: tuple[float, float, float, float], width: int = 3) -> Rgb:
    drawn = Image.fromarray(picture)
    ImageDraw.Draw(drawn).rectangle(box, outline=_BOX, width=width)
    return np.asarray(drawn)
