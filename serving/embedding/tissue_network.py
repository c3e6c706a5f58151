"""Tissue found by a network, instead of by absorbance."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...artifacts.images import Rgb
from ...artifacts.manifest import INPUT
from ...artifacts.remote import is_url
from ...artifacts.tissue_bundle import (
    TISSUE_GRAPH,
    TISSUE_OUTPUT,
    TissueManifest,
    read_tissue_manifest,
)
from ...errors import BadInput, Damaged
from ..encoders.engines import CPU, CUDA, load_onnxruntime
from ..encoders.fetched import fetched
from ..slides.slide import Slide
from ..slides.tissue import METHOD, Mask, glass_colour, tissue_mask

SMALL = "small"
SMALL_BUNDLE = Path(__file__).parents[1] / "tissue_network"
MARGIN = 8
"""This fraction of a square, at each side, is used as context only, where the slide goes on."""
LARGEST_PX, MOST = 13_000, 1_000_000
"""Largest side of a square as it is read, which takes 500 MB; largest number of squares of a slide."""
COARSEST = 4.0
"""A slide whose pixels are this many times as large as those of the network is not shown to it."""
AT_ONCE = 4
CLOSE = 8
"""A square is not read if its thumbnail is this close to glass, white or black everywhere, in levels."""


class TissueNetwork:
    """A tissue bundle, loaded by ONNX Runtime; safe to use from several threads."""

    def __init__(self, bundle: Path) -> None:
        """Load a bundle.

        Raises:
            BadInput: the folder is not a tissue bundle.
            Damaged: the graph does not match the manifest.
        """
        self.manifest: TissueManifest = read_tissue_manifest(bundle)
        runtime = load_onnxruntime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        usable = [p for p in (CUDA, CPU) if p in runtime.get_available_providers()]
        path = bundle / TISSUE_GRAPH
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=usable)
            probe = np.zeros((1, self.manifest.size_px, self.manifest.size_px, 3), np.uint8)
            shape = self.shares(probe).shape
        except Exception as error:
            raise Damaged(f"{path} cannot be run by ONNX Runtime: {error}") from error
        if len(shape) != 3 or shape[1] != shape[2] or self.manifest.size_px % shape[1]:
            raise Damaged(
                f"{path} returns {' x '.join(map(str, shape))} for a square of {self.manifest.size_px} "
                "pixels; expected 1 x s x s, where s divides the square's side"
            )

    @property
    def method(self) -> str:
        """Name and checksum of the manifest, which features of slides state."""
        text = self.manifest.model_dump_json()  # with the graph's checksum, scale and threshold
        return f"{self.manifest.name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def shares(self, squares: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return how certain tissue is, (N, s, s) in 0..1, of squares (N, S, S, 3)."""
        return np.asarray(self._session.run([TISSUE_OUTPUT], {INPUT: squares})[0], np.float32)

    def _check_squares(self, slide: Slide, side: int, step: int) -> None:
        """Refuse a slide whose squares are too large to read, or too many."""
        read = slide.level_for(side, self.manifest.size_px)[1]
        count = (slide.width // step + 2) * (slide.height // step + 2)
        if read > LARGEST_PX or count > MOST:
            raise BadInput(
                f"{slide.path}: the tissue network {self.manifest.name} needs {count:,} squares of "
                f"{read:,} x {read:,} pixels; at most {MOST:,} of {LARGEST_PX:,} are read: save the slide "
                "as a pyramid, or find tissue by absorbance"
            )

    def mask(self, slide: Slide, thumbnail: Rgb) -> Mask:
        """Return where a slide shows tissue, at the size of its thumbnail (H, W, 3).

        The slide is read in overlapping squares. If it is too coarse, and where a square cannot be read,
        tissue is found by absorbance on the thumbnail, and a note of the slide says so.
        """
        height, width = thumbnail.shape[:2]
        mpp = slide.require_mpp()
        if mpp > COARSEST * self.manifest.mpp:
            slide.notes.append(
                f"the slide has {mpp:g} µm per pixel, too coarse for the tissue network "
                f"{self.manifest.name} ({self.manifest.mpp:g}); tissue was found by absorbance"
            )
            return tissue_mask(thumbnail, mpp * slide.width / width)
        size = self.manifest.size_px
        side = max(1, round(size * self.manifest.mpp / mpp))
        margin = side // MARGIN
        self._check_squares(slide, side, side - 2 * margin)
        found = np.zeros((height, width), np.float32)
        rows, columns = (
            range(-margin, length - margin, side - 2 * margin)
            for length in (slide.height, slide.width)
        )
        corners = [(x, y) for y in rows for x in columns]
        spots = [_Spot(corner, margin, side, slide, (height, width)) for corner in corners]
        empty = _empty(thumbnail)
        spots = [spot for spot in spots if not empty[spot.inside].all()]
        unread: list[_Spot] = []
        for start in range(0, len(spots), AT_ONCE):
            part = spots[start : start + AT_ONCE]
            squares = np.full((len(part), size, size, 3), 255, np.uint8)
            failed = slide.read_tiles([spot.corner for spot in part], side, squares)
            for square, spot in zip(squares, part, strict=True):
                spot.extend(square)
            for number, (spot, share) in enumerate(zip(part, self.shares(squares), strict=True)):
                if number in failed:
                    unread.append(spot)
                else:
                    spot.lay(share, found)
        mask: Mask = found > self.manifest.threshold
        if unread:
            instead = tissue_mask(thumbnail, mpp * slide.width / width)
            for spot in unread:
                mask[spot.inside] = instead[spot.inside]
            slide.notes.append(
                f"{len(unread)} of {len(spots)} squares for the tissue network {self.manifest.name} could "
                "not be read; there, tissue was found by absorbance"
            )
        return mask


def _empty(thumbnail: Rgb) -> Mask:
    """Return where a thumbnail (H, W, 3) is like the glass, white or black."""
    grey = thumbnail.dot(np.full(3, 1 / 3, np.float32))
    colours = [(255, 255, 255), (0, 0, 0)]
    glass = glass_colour(thumbnail, grey)
    if glass is not None:
        colours.append(tuple(glass.tolist()))
    like = [
        (np.abs(thumbnail.astype(np.int16) - np.array(colour, np.int16)) < CLOSE).all(2)
        for colour in colours
    ]
    empty: Mask = np.any(like, axis=0)
    return empty


class _Spot:
    """A square of a slide, and the part of the mask for which it is used: all but its margins."""

    def __init__(
        self, corner: tuple[int, int], margin: int, side: int, slide: Slide, shape: tuple[int, int]
    ) -> None:
        self.corner, self._margin, self._side = corner, margin, side
        self._whole = slide.width, slide.height
        across, down = shape[1] / slide.width, shape[0] / slide.height
        x, y = corner
        self._box = (
            round((x + margin) * across), round((y + margin) * down),
            round((x + side - margin) * across), round((y + side - margin) * down),
        )  # fmt: skip
        left, top, right, bottom = self._box
        self.inside = (
            slice(min(top, shape[0] - 1), max(bottom, min(top, shape[0] - 1) + 1)),
            slice(min(left, shape[1] - 1), max(right, min(left, shape[1] - 1) + 1)),
        )

    def extend(self, square: NDArray[np.uint8]) -> None:
        """Repeat the slide's last pixels where a square (S, S, 3) lies beyond it, in place."""
        size = len(square)
        ends = []
        for start, length in zip(self.corner, self._whole, strict=True):
            low, high = (round(size * (at - start) / self._side) for at in (0, length))
            ends.append((max(0, low), min(size, max(low + 1, high))))
        (left, right), (top, bottom) = ends
        if (left, top, right, bottom) != (0, 0, size, size):
            edges = ((top, size - bottom), (left, size - right), (0, 0))
            square[:] = np.pad(square[top:bottom, left:right], edges, mode="edge")

    def lay(self, share: NDArray[np.float32], found: NDArray[np.float32]) -> None:
        """Write the middle of the network's answer (s, s) to the whole (H, W)."""
        left, top, right, bottom = self._box
        cut = self._margin / self._side * len(share)
        size = max(1, right - left), max(1, bottom - top)
        middle = Image.fromarray(share).resize(
            size, Image.Resampling.BILINEAR, box=(cut, cut, len(share) - cut, len(share) - cut)
        )
        place = found[self.inside]
        place[:] = np.asarray(middle)[: place.shape[0], : place.shape[1]]


def open_network(spec: str) -> TissueNetwork | None:
    """Return the tissue network of a name, a folder or a URL; None for detection by absorbance.

    Raises:
        BadInput: there is none.
        Damaged: its graph does not match its manifest.
    """
    if spec == METHOD:
        return None
    if spec == SMALL:
        return _opened(SMALL_BUNDLE)
    if is_url(spec):
        return _opened(_fetched(spec))
    if not Path(spec).is_dir():
        raise BadInput(
            f"--tissue-model {spec}: expected {METHOD}, {SMALL}, or the folder of a tissue network"
        )
    return _opened(Path(spec).resolve())


@cache
def _fetched(url: str) -> Path:
    """Return a local copy of the bundle at a URL; it is copied once, so that a run uses one network."""
    try:
        return fetched(url)
    except BadInput as error:
        reason = str(error).replace("an encoder bundle", "a bundle of a tissue network")
        raise BadInput(reason) from error


_opened = cache(TissueNetwork)


def located(spec: str) -> str:
    """Return a name or URL as it is, and the absolute path of a folder, for a process elsewhere."""
    is_folder = spec not in (METHOD, SMALL) and Path(spec).is_dir()
    return str(Path(spec).resolve()) if is_folder else spec
