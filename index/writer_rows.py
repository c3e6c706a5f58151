"""Rows of the catalog made from feature files."""

from __future__ import annotations

import json
from typing import Any

from ..artifacts.feature_files import STAIN, Features, content_sha256
from ..artifacts.tables import clean_row
from .clusters.mosaic import mosaic_of_groups
from .store.catalog import now
from .store.packing import pack_coded, pack_numbers, pack_places, pack_texts
from .store.rows import OWN, further
from .vectors.scan import Metric, prepared


def slide_row(item: Features, file: str, digest: str, given: dict[str, str]) -> dict[str, Any]:
    """Return the row of table ``slides`` for a feature file.

    ``given`` metadata overrides the table with which the slide was embedded, which overrides its stain.
    """
    stored = item.about.get("row", {})
    stored = clean_row(stored) if isinstance(stored, dict) else {}
    metadata = further({k: v for k, v in stored.items() if k not in OWN}) | further(given)
    metadata = stain_of(item) | metadata
    return {
        "name": item.name,
        "kind": item.kind,
        "source": item.source,
        "features_file": file,
        "features_sha256": digest,
        "content_sha256": content_sha256(item),
        "tiles": len(item.features),
        "size_px_level0": item.size_px_level0,
        "mpp": item.mpp,
        "target_mpp": item.target_mpp,
        "width": item.width,
        "height": item.height,
        "label": given.get("label") or stored.get("label") or None,
        "patient": given.get("patient") or stored.get("patient") or None,
        "metadata": json.dumps(metadata, sort_keys=True),
        "reason": str(item.about.get("reason", "")),
        "added_at": now(),
    }


def stain_of(item: Features) -> dict[str, str]:
    """Return the column with the stain that was told from a slide's colours; empty if there is none."""
    told = item.about.get(STAIN)
    return {STAIN: told} if isinstance(told, str) else {}


def tiles_row(item: Features, metric: Metric) -> dict[str, Any]:
    """Return the row of the table ``slide_tiles``, without the ids of the slide and its first tile."""
    rows = mosaic_of_groups(prepared(item.features, metric), item.coords, item.groups)
    return {
        "places": pack_places(item.coords),
        "files": pack_texts(item.files),
        "labels": pack_coded(item.labels),
        "patients": pack_coded(item.groups),
        "mosaic": pack_numbers(rows, "<i4"),
    }
