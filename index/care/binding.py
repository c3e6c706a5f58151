"""Bind an atlas of another tool's features to a bundle of the encoder that made them.

Such an atlas knows its encoder by name only, so it cannot be asked with new images. The bundle is accepted
only if it computes the stored features again, from tiles of the slides.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...artifacts.files import publish_folder
from ...artifacts.manifest import PROJECTION_SHA256, Manifest, read_manifest
from ...errors import BadInput, Mismatch
from ...metrics import unit_rows
from ..opened import OpenAtlas
from ..store.catalog import set_meta, update
from ..store.store import BOUND_FROM, ENCODER_FOLDER, copy_bundle

SAMPLE = 32
"""Number of tiles that are embedded again."""
LEAST = 0.999
"""Least median cosine of the stored features and those of the bundle: half precision stays above it."""
BOUND_TO = "bound_to"


class Proof(NamedTuple):
    """How well a bundle computes an atlas's features again.

    Attributes:
        tiles: number of tiles that were embedded again.
        slides: number of their slides.
        cosines: by the way the tiles were read, the median cosine with the stored features.
        best: the way with the highest median.
        unreadable: slides whose image could not be read, with the reason.
    """

    tiles: int
    slides: int
    cosines: dict[str, float]
    best: str
    unreadable: dict[str, str]


def check_bindable(atlas: OpenAtlas, manifest: Manifest) -> None:
    """Check what can be known without reading a slide.

    Raises:
        BadInput: the atlas already has a bundle, or is not compared by cosine.
        Mismatch: the embeddings have another length.
    """
    own = atlas.manifest
    if not own.external:
        raise BadInput(
            f"{atlas.path} already has a bundle of its encoder {own.name!r}; only an atlas of another "
            "tool's features can be bound"
        )
    if own.metric != "cosine":
        raise BadInput(
            f"{atlas.path} compares by {own.metric}; a bundle's embeddings are compared by cosine: import "
            "the features again with --metric cosine"
        )
    if own.dim != manifest.dim:
        raise Mismatch(
            f"the atlas's features have {own.dim} numbers, the bundle's embeddings {manifest.dim}; if the "
            "encoder is the same, its tokens were pooled in another way: export it with another --pool"
        )


def prove(
    stored: NDArray[np.float32],
    ways: Mapping[str, Callable[[], NDArray[np.float32]]],
    slides: int,
    unreadable: dict[str, str],
) -> Proof:
    """Compare stored features (N, D) with those that a bundle computes of the same tiles.

    Args:
        stored: from the atlas.
        ways: functions that read the tiles in some way and embed them, (N, D), by the name of the way. The
            first that reaches :data:`LEAST` ends the comparison.
        slides: number of slides of the tiles.
        unreadable: slides that could not be read, with the reason.
    """
    cosines: dict[str, float] = {}
    for name, embed in ways.items():
        cosines[name] = float(np.median(np.sum(unit_rows(stored) * unit_rows(embed()), axis=1)))
        if cosines[name] >= LEAST:
            break
    best = max(cosines, key=lambda name: cosines[name])
    return Proof(len(stored), slides, cosines, best, unreadable)


def bind(
    atlas: OpenAtlas,
    bundle: Path,
    proof: Proof,
    paths: Mapping[str, str] | None = None,
    link_encoder: bool = False,
) -> None:
    """Give the atlas a copy of the bundle, or a link to it; atlases that are open must be opened again.

    Args:
        atlas: an atlas of another tool's features.
        bundle: folder of the bundle.
        proof: from :func:`prove`, of this atlas and this bundle.
        paths: paths of slides, by name, for those whose path the atlas does not know.
        link_encoder: refer to the bundle instead of copying its graphs.

    Raises:
        BadInput: see :func:`check_bindable`.
        Mismatch: the proof fails; the message has the medians and likely reasons.
        Busy: another process is writing.
        StorageFailed: the bundle cannot be copied.
    """
    manifest = read_manifest(bundle)
    check_bindable(atlas, manifest)
    if proof.cosines[proof.best] < LEAST:
        raise Mismatch(_refusal(atlas, manifest, proof))
    with atlas.writing():
        target = atlas.path / f"encoder-{manifest.sha256[:12]}"
        if target.exists():  # a former attempt ended before the commit
            shutil.rmtree(target)
        with publish_folder(target) as folder:
            properties = copy_bundle(bundle, folder, link_encoder)
        before = atlas.store.encoder_folder
        with atlas.catalog.write() as db:
            set_meta(db, BOUND_FROM, atlas.manifest.name)
            set_meta(db, BOUND_TO, json.dumps(proof._asdict()))
            set_meta(db, ENCODER_FOLDER, target.name)
            set_meta(db, "encoder_name", manifest.name)
            set_meta(db, "encoder_sha256", manifest.sha256)
            for key, value in properties.items():
                set_meta(db, key, value)
            for name, path in (paths or {}).items():
                update(db, "slides", {"name": name, "source": ""}, {"source": path})
        shutil.rmtree(before, ignore_errors=True)


def sample(slides: Sequence[Mapping[str, Any]], count: int = SAMPLE) -> dict[str, list[int]]:
    """Return tile ids to embed again, by slide: spread over the slides, and within each.

    Args:
        slides: rows of the catalog with ``name``, ``kind``, ``tiles``, ``first_tile`` and
            ``size_px_level0``; tile sets and slides without a tile size are left out.
        count: number of tiles.
    """
    usable = [s for s in slides if s["kind"] == "slide" and s["tiles"] and s["size_px_level0"]]
    if not usable:
        return {}
    chosen = [
        usable[n]
        for n in np.unique(np.linspace(0, len(usable) - 1, min(count, len(usable))).astype(int))
    ]
    each = -(-count // len(chosen))
    return {
        slide["name"]: [
            int(slide["first_tile"] + row)
            for row in np.unique(
                np.linspace(0, slide["tiles"] - 1, min(each, slide["tiles"])).astype(int)
            )
        ]
        for slide in chosen
    }


def _refusal(atlas: OpenAtlas, manifest: Manifest, proof: Proof) -> str:
    found = ", ".join(f"{value:.4f} ({name})" for name, value in proof.cosines.items())
    best = proof.cosines[proof.best]
    reason = (
        "the bundle is of another encoder, or pools other tokens (export it with another --pool)"
    )
    if PROJECTION_SHA256 in manifest.training:
        reason += ", or the features are from before the head's last map (`index import --project`)"
    if best > 0.9:
        reason = (
            "the encoder seems to be the same, but sees the tiles in another way: `histoseek export "
            "--against` finds colours, pooling and scale"
        )
    return (
        f"{manifest.name!r} does not compute the features of {atlas.path} again: the median cosine of "
        f"{proof.tiles} tiles is {found}; expected at least {LEAST}. Nothing was changed; {reason}"
    )
