"""``export --against``: how did another tool make its features with this checkpoint?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import console
from ...errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...export.against import Trial
    from ...export.options import ExportOptions
    from ...export.published import Published

AS_HERE = "as `embed` reads it"
BY_PILLOW = {"by Pillow, bilinear": "BILINEAR", "by Pillow, bicubic": "BICUBIC"}
SHOWN = 8
"""Maximum number of trials that are printed."""


class Comparison(NamedTuple):
    """How features of another tool were computed again.

    Attributes:
        features: file of the features.
        trials: settings that were tried, the best one first.
        tile_um: side of the features' tiles in µm.
        tile_px: side of a tile for the encoder.
        given_mpp: µm per pixel that the options state, if any.
    """

    features: Path
    trials: list[Trial]
    tile_um: float
    tile_px: int
    given_mpp: float | None

    @property
    def mpp(self) -> float:
        """µm per pixel at which the encoder sees the features' tiles."""
        return round(self.tile_um / self.tile_px, 6)

    def options(self, given: ExportOptions) -> ExportOptions:
        """Return options of the export with the best settings; a scale that is given stays."""
        from dataclasses import replace

        best = self.trials[0]
        mean, std = (",".join(map(str, part)) for part in (best.mean, best.std))
        mpp = given.mpp if given.mpp is not None else self.mpp
        return replace(given, pool=best.pool, fit=best.fit, mean=mean, std=std, mpp=mpp)


def against(
    checkpoint: Path, options: ExportOptions, features: Path, places: list[Path], count: int
) -> Comparison:
    """Try to compute the features of another tool again."""
    from ...export.against import find_settings
    from ...export.checkpoints import read_checkpoint
    from ...export.from_checkpoint import chosen

    tensors, _ = read_checkpoint(checkpoint)
    known, _ = chosen(options, tensors, str(checkpoint))
    stored, shown, tile_um = _tiles(features, places, known, count)
    with console.working("computing features again"):
        trials = find_settings(known, tensors, str(checkpoint), stored, shown)
    return Comparison(features, trials, tile_um, known.side, options.mpp)


def as_json(compared: Comparison) -> dict[str, Any]:
    """Return the trials as JSON."""
    trials = compared.trials
    return {
        "features": str(compared.features),
        "tile_um": compared.tile_um,
        "mpp": compared.mpp,
        "given_mpp": compared.given_mpp,
        "same": trials[0].same,
        "best": trials[0].as_dict(),
        "trials": [trial.as_dict() for trial in trials],
    }


def show(compared: Comparison) -> None:
    """Print the best trials, and what follows."""
    trials = compared.trials
    rows = [
        (trial.cosine, trial.lowest, trial.pool, trial.colours, trial.fit, trial.shown)
        for trial in trials[:SHOWN]
    ]
    columns = ("median cosine", "lowest", "--pool", "colours of", "--fit", "tile read")
    console.table(f"{compared.features}: best of {len(trials)} settings", columns, rows)
    best = trials[0]
    if best.same:
        numbers = [",".join(f"{value:g}" for value in part) for part in (best.mean, best.std)]
        console.say(
            f"the features are computed again with --pool {best.pool} --fit {best.fit} "
            f"--mean {numbers[0]} --std {numbers[1]} --mpp {compared.mpp:g}"
        )
    if compared.given_mpp and abs(compared.given_mpp - compared.mpp) > 0.01 * compared.mpp:
        console.say(
            f"NOTE: --mpp is {compared.given_mpp:g}, but the features are of tiles of "
            f"{compared.tile_um:g} µm, which is {compared.mpp:g}; the bundle will embed other fields"
        )
    if best.same and best.shown != AS_HERE:
        console.say(
            f"NOTE: the tiles were read {best.shown}; `embed` resamples in another way, so its embeddings "
            "differ a little"
        )


def _tiles(
    features: Path, places: list[Path], known: Published, count: int
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.uint8]], float]:
    """Return features (N, D) of some tiles, the tiles as read in several ways, and their side in µm."""
    import numpy as np
    from PIL import Image

    from ...artifacts.hdf5_files import open_hdf5
    from ...index.exchange.encoder_marks import mark_of
    from ...index.exchange.imports import read_tool_features
    from ...serving.slides.slide import open_slide
    from .bind import slide_files

    with open_hdf5(features) as opened:
        mark = mark_of(opened, features)
    item = read_tool_features(features, mark.encoder if mark else "unnamed")
    if not item.size_px_level0 or not len(item.features):
        raise BadInput(
            f"{features} does not state the size of its tiles, or has none; expected a file of TRIDENT or "
            "STAMP"
        )
    found = slide_files(places).get(item.name, [])
    if len(found) != 1:
        raise BadInput(
            f"{len(found)} files in --slides are named as the slide of {features} ({item.name}); expected 1"
        )
    rows = np.unique(np.linspace(0, len(item.features) - 1, count).astype(int))
    ways: dict[str, list[NDArray[np.uint8]]] = {AS_HERE: [], **{name: [] for name in BY_PILLOW}}
    side = item.size_px_level0
    with open_slide(found[0], stated_mpp=item.mpp) as slide:
        tile_um = side * slide.require_mpp()
        for x, y in item.coords[rows].tolist():
            ways[AS_HERE].append(slide.read_tile(x, y, side, known.side))
            whole = Image.fromarray(slide.read_tile(x, y, side, side))
            for name, how in BY_PILLOW.items():
                small = whole.resize((known.side, known.side), Image.Resampling[how])
                ways[name].append(np.asarray(small))
    stored = np.asarray(item.features[rows], np.float32)
    return stored, {name: np.stack(tiles) for name, tiles in ways.items()}, round(tile_um, 4)
