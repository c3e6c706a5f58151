"""``index bind``: give an atlas of another tool's features the bundle of its encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import console
from ...errors import BadInput, HistoseekError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...artifacts.images import Rgb
    from ...index.atlas import Atlas
    from ...serving.slides.slide import Slide

AS_HERE = "read as `embed` reads them"
FILTERS = {"resized by a bilinear filter": "BILINEAR", "resized by a bicubic filter": "BICUBIC"}
"""Other ways to resize a tile, and Pillow's name of the filter."""
TILES = 32
"""Number of tiles to embed again."""
MIDDLE = "the middle square at the bundle's scale"


def bind(
    atlas: Path,
    bundle: Path,
    slides: list[Path] | None = None,
    tiles: int = TILES,
    link_encoder: bool = False,
) -> None:
    """Bind an atlas of imported features to a bundle, so that it can be searched with images.

    Some tiles are read from their slides and embedded again. The bundle is refused unless it computes the
    stored features.

    Options:
        bundle: Folder of the encoder bundle, made by `histoseek export`.
        slides: Slide files, or folders with them, of which the atlas has only features. The atlas stores
            their paths, so that the page can show them.
        tiles: Number of tiles to embed again.
    """
    console.emit(*bound(atlas, bundle, slides or [], tiles, link_encoder))


def bound(
    atlas: Path, bundle: Path, slides: Sequence[Path], tiles: int, link_encoder: bool
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Bind an atlas as ``index bind`` does; return its JSON document and what prints its text."""
    import numpy as np

    from ...artifacts.manifest import read_manifest
    from ...index.atlas import Atlas
    from ...index.care import binding
    from ...serving.encoders.open import open_encoder

    opened = Atlas(atlas)
    manifest = read_manifest(bundle)
    binding.check_bindable(opened, manifest)
    if manifest.stain_normalise:
        raise BadInput(
            f"{bundle} normalises stains, which the tool that made the atlas's features did not do; give "
            "the bundle without stain normalisation"
        )
    rows = {row["name"]: row for row in opened.store.tile_ranges()}
    paths, unreadable = _paths(rows, slides)
    squares = _read(opened, rows, paths, unreadable, tiles, manifest.size_px, manifest.mpp)
    if not squares:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(unreadable.items())[:3])
        raise BadInput(
            f"no tile of {atlas} could be read from its slide ({reasons or 'it has no slides'}); pass the "
            "folder of the slides by --slides"
        )
    stored = opened.vectors_of([square.tile for square in squares])
    with console.working("embedding tiles again"), closing(open_encoder(bundle)) as encoder:

        def way(name: str) -> Callable[[], NDArray[np.float32]]:
            return lambda: encoder.embed(np.stack([square.views[name] for square in squares]))

        names = [name for name in squares[0].views if all(name in s.views for s in squares)]
        proof = binding.prove(
            stored, {n: way(n) for n in names}, len({s.slide for s in squares}), unreadable
        )
    stored_paths = {name: str(path) for name, path in paths.items()}
    binding.bind(opened, bundle, proof, stored_paths, link_encoder)
    made = Atlas(atlas)
    document = {
        "atlas": str(atlas),
        "encoder": made.manifest.name,
        "encoder_sha256": made.manifest.sha256,
        "bundle": str(made.encoder_bundle),
        "paths": stored_paths,
        **proof._asdict(),
    }

    def human() -> None:
        console.say(
            f"{atlas}: bound to {made.manifest.name}; median cosine {proof.cosines[proof.best]:.5f} of "
            f"{proof.tiles} tiles of {proof.slides} slides, {proof.best}"
        )
        console.say(f"paths of slides stored: {len(paths)}, of which {proof.slides} were read")
        for name, why in list(proof.unreadable.items())[: console.FEW]:
            console.say(f"not read: {name}: {why}")
        if len(proof.unreadable) > console.FEW:
            console.say(f"not read: {len(proof.unreadable) - console.FEW} more; --json lists all")
        console.say(f"to embed further slides: `histoseek embed --encoder {made.encoder_bundle}`")

    return document, human


class _Square:
    """A tile of the atlas, read in several ways."""

    def __init__(self, slide: str, tile: int, views: dict[str, Rgb]) -> None:
        self.slide, self.tile, self.views = slide, tile, views


def slide_files(places: Sequence[Path]) -> dict[str, list[Path]]:
    """Return files, and those in folders, by their name without its ending."""
    from ...artifacts.slide_names import without_ending
    from ...artifacts.unread import belongs_to
    from ...artifacts.walking import walk

    files: dict[str, list[Path]] = {}
    for place in places:
        for file in walk(place, belongs_to).files if place.is_dir() else [place]:
            files.setdefault(without_ending(file.name), []).append(file.resolve())
    return files


def _paths(rows: dict[str, Any], places: Sequence[Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the file of each slide: as stored, else the only one of its name; and why there is none."""
    from ...artifacts.slide_names import without_ending

    files = slide_files(places)
    paths: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for name, row in rows.items():
        found = files.get(without_ending(name), [])
        if row["source"] and Path(row["source"]).exists():
            paths[name] = Path(row["source"])
        elif len(found) == 1:
            paths[name] = found[0]
        elif found:
            missing[name] = f"{len(found)} files have this name: {', '.join(map(str, found[:3]))}"
        else:
            missing[name] = "its slide was not found"
    return paths, missing


def _read(
    atlas: Atlas,
    rows: dict[str, Any],
    paths: dict[str, Path],
    unreadable: dict[str, str],
    count: int,
    size_px: int,
    mpp: float | None,
) -> list[_Square]:
    from ...index.care import binding
    from ...serving.slides.slide import open_slide

    squares: list[_Square] = []
    for name, ids in binding.sample([rows[name] for name in paths], count).items():
        row = rows[name]
        try:
            with open_slide(paths[name], stated_mpp=row["mpp"]) as slide:
                size = slide.width, slide.height
                if row["width"] and size != (row["width"], row["height"]):
                    raise BadInput(
                        f"{paths[name]} has {size[0]} x {size[1]} pixels, but the features are of "
                        f"{row['width']} x {row['height']}"
                    )
                for tile, found in atlas.tiles(ids).items():
                    place = int(found["x"]), int(found["y"]), int(row["size_px_level0"])
                    squares.append(_Square(name, tile, _views(slide, *place, size_px, mpp)))
        except (HistoseekError, OSError) as error:
            unreadable[name] = str(error)
            del paths[name]
    return squares


def _views(
    slide: Slide, x: int, y: int, side: int, size_px: int, mpp: float | None
) -> dict[str, Rgb]:
    """Return the ways in which another tool may have shown a tile to its encoder."""
    import numpy as np
    from PIL import Image

    views = {AS_HERE: slide.read_tile(x, y, side, size_px)}
    whole = Image.fromarray(slide.read_tile(x, y, side, side))
    for name, how in FILTERS.items():
        views[name] = np.asarray(whole.resize((size_px, size_px), Image.Resampling[how]))
    inner = round(size_px * mpp / slide.mpp) if mpp and slide.mpp else 0
    if 0 < inner < side:
        at = (side - inner) // 2
        views[MIDDLE] = slide.read_tile(x + at, y + at, inner, size_px)
    return views
