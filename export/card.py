"""The model card: what to know before trusting an encoder, taken from the record of its run."""

from __future__ import annotations

from typing import Any

from ..artifacts.manifest import Manifest
from ..metrics import flat_rows

JUDGED = ("trained", "random_init", "pixels")
GATE = "The last component (tissue gate) says how far an image is out of distribution."


def model_card(
    manifest: Manifest, record: dict[str, Any], parity: dict[str, Any], notes: str = ""
) -> str:
    """Return the card as Markdown; all numbers come from the run's record or the parity test."""
    data, split = record["data"], record["split"]
    excluded = "; ".join(data.get("selection", {}).get("exclude", []))
    measured = (
        "held-out tiles" if split["held_out_tiles"] else "training tiles (nothing was held out)"
    )
    recipe = f"| recipe | `{record['recipe']}` ({record['paper']}) |"
    lines = [
        *card_head(manifest, f"A {manifest.arch} encoder", recipe),
        "## Training data",
        f"{data['name']}: {data['tiles']} tiles, {len(data['classes'])} classes, "
        f"{data['groups'] or 'no'} groups; {len(data['unreadable'])} unreadable tiles left out. "
        f"{f'Excluded on purpose: {excluded}. ' if excluded else ''}"
        f"Fingerprint `{data['fingerprint'][:16]}`.",
        "",
        f"Split by {split['by']}: {split['train_tiles']} tiles for training, "
        f"{split['held_out_tiles']} held out.",
        "",
        f"## Measured on the {measured}",
    ]
    if manifest.views > 1:
        views = f"the graph averages {manifest.views} views"
        lines += ["", f"Measured for the trained network with one view of each tile; {views}."]
    lines += _tables(record.get("metrics", {}))
    lines += [
        "",
        "## Parity of the graph with torch",
        f"On {parity['tiles']} real tiles: largest difference {parity['max_abs']:.1e} "
        f"(allowed {parity['bounds']['max_abs']:.0e}), largest cosine error "
        f"{parity['max_cosine_error']:.1e}, batch of 1 against batch of {parity.get('batch', 64)} "
        f"{parity['batch_max_abs']:.1e} (allowed {parity['bounds']['batch_max_abs']:.0e}).",
        "",
    ]
    return "\n".join([*lines, notes.strip(), ""]) if notes.strip() else "\n".join(lines)


HALF = "| weights | stored in half precision (float16); computed in float32 |"


def card_head(manifest: Manifest, what: str, *rows: str) -> list[str]:
    """Return the first lines of every card: what the encoder is, and the table of its manifest.

    Args:
        manifest: of the encoder.
        what: where it comes from; the first words of the card.
        rows: further rows of the table.
    """
    mpp = f"{manifest.mpp} µm per pixel" if manifest.mpp else "not stated; pass --mpp to `embed`"
    return [
        f"# {manifest.name}",
        "",
        f"{what}: {manifest.size_px} x {manifest.size_px} RGB tiles to {manifest.dim}-dimensional "
        "embeddings of length 1, which are compared by cosine similarity."
        + (f" {GATE}" if manifest.tissue_gate else ""),
        "",
        "**For research only.** Similarity is no diagnosis.",
        "",
        "| | |",
        "|---|---|",
        f"| encoder sha256 | `{manifest.sha256}` |",
        f"| slides are read at | {mpp} |",
        f"| views averaged in the graph | {manifest.views} |",
        *rows,
        *([HALF] if "weights" in manifest.training else []),
        f"| licence of the weights | {manifest.licence} |",
        f"| opset | {manifest.opset} |",
        "",
    ]


def _tables(metrics: dict[str, Any]) -> list[str]:
    lines = _judged(metrics) if "trained" in metrics else []
    others = flat_rows({k: v for k, v in metrics.items() if k not in JUDGED})
    if others:
        lines += ["", "Metrics of the recipe itself:", ""]
        lines += ["| metric | value | trivial baseline |", "|---|---|---|"]
    lines += [_line(name, row, row["value"]) for name, row in others.items()]
    return lines or ["Nothing was held out, so nothing was measured."]


def _judged(metrics: dict[str, Any]) -> list[str]:
    trained, untrained = metrics["trained"], metrics["random_init"]
    head = "| metric | this encoder | random weights | trivial baseline |"
    lines = ["", head, "|---|---|---|---|"]
    pairs = [("", trained["retrieval"], untrained["retrieval"])]
    for key, part in trained.items():
        if isinstance(part, dict):
            pairs.append((f"{key}: ", part["scores"], untrained[key]["scores"]))
    for prefix, rows, others in pairs:
        for row, other in zip(rows, others, strict=True):
            lines.append(_line(f"{prefix}{row['name']}", row, row["value"], other["value"]))
    return lines


def _line(name: str, row: dict[str, Any], *values: float | None) -> str:
    numbers = ("–" if v is None else f"{v:.3f}" for v in (*values, row["baseline"]))
    return f"| {name} | {' | '.join(numbers)} ({row['baseline_is']}) |"
