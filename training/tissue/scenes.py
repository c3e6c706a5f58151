"""Made overviews of slides with known tissue, to train and to test networks that find it.

A scene is a square of a slide at about 8 µm per pixel: glass, pieces of tissue with the texture of real
tiles, and what is not tissue: pen, edges of coverslips, air bubbles, dust, shading, borders of the scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from ...artifacts.images import Rgb, decode, encode_jpeg

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Random = np.random.Generator

MPP = 8.0
"""µm per pixel of a scene."""
GAP_PX = 6
"""Gaps in tissue up to this width count as tissue: 50 µm, as in tissue detection by absorbance."""
FAINTEST = 0.03
"""Optical density (to base 10) above that of the glass from which a pixel is tissue."""


class Scene(NamedTuple):
    """A picture, uint8 (S, S, 3), and where it shows tissue, (S, S)."""

    picture: Rgb
    tissue: Mask


def scene(rng: Random, tiles: Sequence[Rgb], side: int) -> Scene:
    """Return a random scene.

    Args:
        rng: source of all randomness.
        tiles: uint8 images of tissue, of any size.
        side: of the scene in pixels, S.
    """
    picture = glass(rng, side)
    tissue = np.zeros((side, side), dtype=bool)
    kind = rng.random()
    if kind > 0.15:
        share = 1.0 if kind > 0.9 else float(rng.uniform(0.05, 0.8))
        picture, tissue = _with_tissue(rng, picture, tiles, share)
    for chance, draw in ARTEFACTS:
        if rng.random() < chance:
            picture, tissue = draw(rng, picture, tissue)
    picture = _scanned(rng, picture)
    shown: Rgb = np.clip(picture, 0, 255).astype(np.uint8)
    if rng.random() < 0.6:
        shown = decode(encode_jpeg(shown, int(rng.integers(50, 96))))
    return Scene(shown, tissue)


def glass(rng: Random, side: int) -> Floats:
    """Return bright glass, float32 (side, side, 3): nearly colourless, shaded, with noise."""
    level = rng.uniform(215, 252) + rng.normal(0, 2.5, 3)
    y, x = (axis.astype(np.float32) / side - 0.5 for axis in np.mgrid[:side, :side])
    slope = rng.normal(0, 0.03, 2)
    shade = 1 + slope[0] * x + slope[1] * y
    if rng.random() < 0.3:
        shade = shade - rng.uniform(0, 0.12) * (x**2 + y**2)
    noise = rng.normal(0, rng.uniform(0.3, 2.0), (side, side, 3))
    made: Floats = (level * shade[..., None] + noise).astype(np.float32)
    return made


def _with_tissue(
    rng: Random, picture: Floats, tiles: Sequence[Rgb], share: float
) -> tuple[Floats, Mask]:
    """Lay pieces of tissue on the glass, over ``share`` of it."""
    from scipy.ndimage import binary_closing

    side = len(picture)
    density = _texture(rng, tiles, side)
    if rng.random() < 0.3:
        other = _texture(rng, tiles, side)
        at = _blobs(rng, side, 0.5)[..., None]
        density = density * at + other * (1 - at)
    density = density * np.float32(rng.choice([rng.uniform(0.15, 0.6), rng.uniform(0.6, 1.4)]))
    if rng.random() < 0.15:  # nearly without colour
        density += (density.mean(2, keepdims=True) - density) * np.float32(rng.uniform(0.6, 1))
    else:
        density = np.maximum(0, density @ _colours(rng))
    where = np.ones((side, side), np.float32) if share == 1 else _blobs(rng, side, share)
    if rng.random() < 0.25:  # spaces, as in lung and fat
        where = where * (1 - _blobs(rng, side, rng.uniform(0.1, 0.5), coarse=rng.uniform(3, 12)))
    laid = density * where[..., None]
    tissue: Mask = binary_closing(
        np.pad((laid.max(2) > FAINTEST) & (where > 0.3), GAP_PX, mode="edge"),
        np.ones((GAP_PX, GAP_PX)),
    )[GAP_PX:-GAP_PX, GAP_PX:-GAP_PX]
    return picture * np.power(np.float32(10), -laid), tissue


def _texture(rng: Random, tiles: Sequence[Rgb], side: int) -> Floats:
    """Return the optical density (S, S, 3) of tissue: a tile at a random size, mirrored side by side."""
    tile = Image.fromarray(tiles[int(rng.integers(len(tiles)))])
    small = int(2 ** rng.uniform(4, 7.3))
    picture = np.asarray(tile.resize((small, small), Image.Resampling.BOX), np.float32)
    picture = np.concatenate([picture, picture[::-1]])
    picture = np.concatenate([picture, picture[:, ::-1]], 1)
    times = -(-side // len(picture)) + 1
    top, left = rng.integers(0, len(picture), 2)
    whole = np.tile(picture, (times, times, 1))[top : top + side, left : left + side]
    brightest = np.percentile(picture, 99)
    density: Floats = np.maximum(0, -np.log10((whole + 1) / (brightest + 1)))
    return np.rot90(density, int(rng.integers(4))).copy()


def _colours(rng: Random) -> Floats:
    """Return a matrix (3, 3) that changes the colours of a density, sometimes strongly."""
    matrix = np.eye(3) + rng.normal(0, 0.15, (3, 3))
    if rng.random() < 0.2:  # brown, red, blue and other stains
        matrix = matrix[:, rng.permutation(3)]
    return matrix.astype(np.float32)


def _blobs(rng: Random, side: int, share: float, coarse: float | None = None) -> Floats:
    """Return a soft mask (S, S) from 0 to 1 of random outlines that covers about ``share``."""
    from scipy.ndimage import gaussian_filter

    coarse = side / rng.uniform(3, 14) if coarse is None else coarse
    field = np.zeros((side, side), np.float32)
    for octave in range(4):
        sigma = coarse / 2**octave
        if sigma < 0.8:
            break
        shrink = max(1, int(sigma / 2))  # coarse noise is computed small
        small = rng.normal(size=(side // shrink + 2,) * 2).astype(np.float32)
        layer = gaussian_filter(small, sigma / shrink)
        layer = np.asarray(Image.fromarray(layer).resize((side, side), Image.Resampling.BICUBIC))
        field += layer / (layer.std() + 1e-9) * np.float32(0.55**octave)
    field -= np.quantile(field, 1 - share)
    soft: Floats = np.clip(field * np.float32(rng.uniform(4, 25)) + 0.5, 0, 1)
    return soft


def pen(rng: Random, picture: Floats, tissue: Mask) -> tuple[Floats, Mask]:
    """Draw one to three strokes of a pen of any colour; below ink nothing counts as tissue."""
    from scipy.ndimage import gaussian_filter

    side = len(picture)
    colour = _ink(rng)
    sheet = Image.new("L", (side, side))
    width = int(rng.uniform(4, 45))
    for _ in range(int(rng.integers(1, 4))):
        points = [
            tuple(p) for p in rng.uniform(-0.2 * side, 1.2 * side, (int(rng.integers(2, 5)), 2))
        ]
        ImageDraw.Draw(sheet).line(points, fill=255, width=width, joint="curve")
    edge = sheet.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2))))
    ink = np.asarray(edge, np.float32)[..., None] / 255
    streaks = gaussian_filter(rng.normal(0, 1, (side, side)), rng.permutation([1.0, 8.0]))
    depth = rng.uniform(0.5, 1.2) + rng.uniform(0, 0.2) * streaks[..., None] / streaks.std()
    inked = picture * np.power(colour, np.clip(depth, 0.1, 2).astype(np.float32))
    return picture * (1 - ink) + inked * ink, tissue & (ink[..., 0] < 0.5)


def _ink(rng: Random) -> Floats:
    """Return the share of light (3,) that passes ink: black, red, green, blue or any other."""
    known = ((20, 20, 25), (210, 30, 45), (20, 120, 60), (30, 60, 180), (90, 40, 140))
    if rng.random() < 0.7:
        colour = np.array(known[int(rng.integers(len(known)))]) + rng.normal(0, 15, 3)
    else:
        colour = rng.uniform(10, 200, 3)
        colour[int(rng.integers(3))] = rng.uniform(0, 60)
    return (np.clip(colour, 5, 250) / 255).astype(np.float32)


def edge(rng: Random, picture: Floats, tissue: Mask) -> tuple[Floats, Mask]:
    """Draw an edge of a coverslip: one or two long lines, with another brightness beyond."""
    side = len(picture)
    y, x = np.mgrid[:side, :side] - side / 2
    angle = (
        rng.choice([0, np.pi / 2]) + rng.normal(0, 0.1) if rng.random() < 0.7 else rng.uniform(0, 3)
    )
    bend = rng.normal(0, 0.0003)
    along, off = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = off + bend * along**2 - rng.uniform(-0.5, 0.5) * side
    passes = np.where(distance > 0, 1 - rng.uniform(0, 0.08), 1)
    for shift in (0.0, rng.uniform(3, 20))[: int(rng.integers(1, 3))]:
        line = np.exp(-(((distance - shift) / rng.uniform(0.7, 5)) ** 2))
        passes = passes * (1 - rng.uniform(0.05, 0.7) * line)
    tint = 1 + rng.normal(0, 0.04, 3) * (1 - passes[..., None])
    return (picture * passes[..., None] * tint).astype(np.float32), tissue


def bubbles(rng: Random, picture: Floats, tissue: Mask) -> tuple[Floats, Mask]:
    """Draw air bubbles: dark rims, round or stretched, and what is inside them a little changed."""
    side = len(picture)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    for _ in range(int(rng.integers(1, 5))):
        cx, cy = rng.uniform(-0.1 * side, 1.1 * side, 2)
        radius, stretch = side * 2 ** rng.uniform(-6, -0.7), rng.uniform(0.75, 1.3)
        away = np.hypot(x - cx, (y - cy) * stretch)
        away += (
            rng.uniform(0, 0.1)
            * radius
            * np.sin(3 * np.arctan2(y - cy, x - cx) + rng.uniform(0, 6))
        )
        rim = np.exp(-(((away - radius) / rng.uniform(0.8, 4)) ** 2))
        picture = picture * (1 - rng.uniform(0.1, 0.7) * rim)[..., None]
        picture = picture * np.where(away < radius, rng.uniform(0.94, 1.04), 1)[..., None]
    return picture.astype(np.float32), tissue


def dust(rng: Random, picture: Floats, tissue: Mask) -> tuple[Floats, Mask]:
    """Draw specks and fibres."""
    side = len(picture)
    sheet = Image.new("L", (side, side))
    draw = ImageDraw.Draw(sheet)
    for x, y in rng.uniform(0, side, (int(rng.integers(3, 60)), 2)):
        size = rng.uniform(0.3, 2.5)
        draw.ellipse((x - size, y - size, x + size, y + size), fill=int(rng.integers(80, 256)))
    for _ in range(int(rng.integers(0, 4))):
        steps = np.cumsum(rng.normal(0, 4, (12, 2)) + rng.normal(0, 4, 2), 0)
        draw.line([tuple(p) for p in steps + rng.uniform(0, side, 2)], fill=200, width=1)
    dark = np.asarray(sheet.filter(ImageFilter.GaussianBlur(0.6)), np.float32)[..., None] / 255
    return (picture * (1 - rng.uniform(0.3, 0.9) * dark)).astype(np.float32), tissue


def border(rng: Random, picture: Floats, tissue: Mask) -> tuple[Floats, Mask]:
    """Replace a part at an edge by what was not scanned: white, black or grey."""
    side = len(picture)
    depth = int(rng.uniform(0.05, 0.6) * side)
    level = rng.choice([255.0, 0.0, rng.uniform(200, 245)])
    outside = np.zeros((side, side), bool)
    outside[:depth] = True
    outside = np.rot90(outside, int(rng.integers(4)))
    return np.where(outside[..., None], np.float32(level), picture), tissue & ~outside


def stripes(rng: Random, picture: Floats, tissue: Mask) -> tuple[Floats, Mask]:
    """Change the brightness from one field of view of the scanner to the next."""
    side = len(picture)
    step = int(rng.integers(12, 90))
    gains = rng.normal(1, rng.uniform(0.002, 0.015), (side // step + 2,) * 2)
    if rng.random() < 0.5:
        gains[:] = gains[:1]
    fields = np.repeat(np.repeat(gains, step, 0), step, 1)[:side, :side]
    return (picture * fields[..., None]).astype(np.float32), tissue


def writing(rng: Random, picture: Floats, tissue: Mask) -> tuple[Floats, Mask]:
    """Print letters, as on a label."""
    side = len(picture)
    sheet = Image.new("L", (side, side))
    for _ in range(int(rng.integers(1, 6))):
        text = "".join(chr(rng.integers(48, 91)) for _ in range(int(rng.integers(2, 9))))
        corner = tuple(rng.uniform(0, side, 2))
        ImageDraw.Draw(sheet).text(corner, text, fill=255, font_size=float(rng.uniform(8, 50)))
    ink = np.asarray(sheet, np.float32)[..., None] / 255 * rng.uniform(0.5, 1)
    made = picture * (1 - ink) + 255 * _ink(rng) * ink
    return made.astype(np.float32), tissue & (ink[..., 0] < 0.25)


def _scanned(rng: Random, picture: Floats) -> Floats:
    """Blur, resample, recolour and add noise, as scanners and pyramids do."""
    side = len(picture)
    sheet = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        sheet = sheet.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.5))))
    if rng.random() < 0.3:
        small = int(side * rng.uniform(0.5, 1))
        sheet = sheet.resize((small, small), Image.Resampling.BOX).resize((side, side))
    if rng.random() < 0.3:
        sheet = sheet.filter(ImageFilter.UnsharpMask(1, int(rng.uniform(30, 200)), 0))
    scanned = np.asarray(sheet, np.float32) / 255
    scanned = scanned ** np.float32(rng.uniform(0.8, 1.25)) * rng.uniform(0.94, 1.04, 3)
    noisy: Floats = (scanned * 255 + rng.normal(0, rng.uniform(0, 1.5), scanned.shape)).astype(
        np.float32
    )
    return noisy


ARTEFACTS: tuple[tuple[float, Callable[[Random, Floats, Mask], tuple[Floats, Mask]]], ...] = (
    (0.25, edge),
    (0.2, bubbles),
    (0.3, dust),
    (0.35, pen),
    (0.08, writing),
    (0.12, stripes),
    (0.12, border),
)
"""What is drawn on a scene, in this order, and how often."""
