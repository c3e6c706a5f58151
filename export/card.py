"""The model card: what to know before trusting an encoder, taken from the record of its run."""

from __future__ import annotations

from typing import Any

from ..artifacts.manifest import Manifest
from ..metrics import flat_rows

JUDGED = ("trained", "random_init", "pixels")


def model_card(
    manifest: Manifest, record: dict[str, Any], parity: dict[str, Any], notes: str = ""
) -> str:
    """Return the card as Markdown; all numbers come from the run's record or the parity test."""
    data, split = record["data"], record["split"]
    mpp = f"{manifest.mpp} µm per pixel" if manifest.mpp else "not stated"
    lines = [
        f"# {manifest.name}",
        "",
        f"A {manifest.arch} encoder: {manifest.size_px} x {manifest.size_px} RGB tiles to "
        f"{manifest.dim}-dimensional embeddings of length 1, compared by cosine."
        + (" The last component tells how foreign a picture is." if manifest.tissue_gate else ""),
        "",
        "**For research only.** Similarity is no diagnosis.",
        "",
        "| | |",
        "|---|---|",
        f"| encoder sha256 | `{manifest.sha256}` |",
        f"| slides are read at | {mpp} |",
        f"| views averaged in the graph | {manifest.views} |",
        f"| recipe | `{record['recipe']}` ({record['paper']}) |",
        f"| licence of the weights | {manifest.licence} |",
        f"| opset | {manifest.opset} |",
        "",
        "## Training data",
        f"{data['name']}: {data['tiles']} tiles, {len(data['classes'])} classes, "
        f"{data['groups'] or 'no'} groups; {len(data['unreadable'])} unreadable tiles left out. "
        f"{_left_out(data)}Fingerprint `{data['fingerprint'][:16]}`.",
        "",
        f"Split by {split['by']}: {split['train_tiles']} tiles trained on, "
        f"{split['held_out_tiles']} held out.",
        "",
        "## Measured on the held-out tiles"
        if split["held_out_tiles"]
        else "## Measured on the training tiles (nothing was held out)",
    ]
    if manifest.views > 1:
        lines += [
            "",
            f"Of the net as trained, with one view of each tile; the graph averages {manifest.views}.",
        ]
    lines += _tables(record.get("metrics", {}))
    lines += [
        "",
        "## Parity of the graph with torch",
        f"On {parity['tiles']} real tiles: largest difference {parity['max_abs']:.1e} "
        f"(allowed {parity['bounds']['max_abs']:.0e}), largest cosine error "
        f"{parity['max_cosine_error']:.1e}, batch of 1 against batch of 64 "
        f"{parity['batch_max_abs']:.1e} (allowed {parity['bounds']['batch_max_abs']:.0e}).",
        "",
    ]
    return "\n".join([*lines, notes.strip(), ""]) if notes.strip() else "\n".join(lines)


def _left_out(data: dict[str, Any]) -> str:
    rules = data.get("selection", {}).get("exclude", [])
    return f"Left out on purpose: {'; '.join(rules)}. " if rules else ""


def _tables(metrics: dict[str, Any]) -> list[str]:
    own = flat_rows({k: v for k, v in metrics.items() if k not in JUDGED})
    lines = _judged(metrics) if "trained" in metrics else []
    if own:
        lines += [
            "",
            "The recipe's own:",
            "",
            "| metric | value | trivial baseline |",
            "|---|---|---|",
        ]
    for name, row in own.items():
        values = ("–" if row[k] is None else f"{row[k]:.3f}" for k in ("value", "baseline"))
        lines.append(f"| {name} | {' | '.join(values)} ({row['baseline_is']}) |")
    return lines or ["Nothing was held out, so nothing was measured."]


def _judged(metrics: dict[str, Any]) -> list[str]:
    trained, untrained = metrics["trained"], metrics["random_init"]
    lines = [
        "",
        "| metric | this encoder | random weights | trivial baseline |",
        "|---|---|---|---|",
    ]
    sections = [("", "retrieval")]
    sections += [(f"{k}: ", k) for k in trained if isinstance(trained[k], dict)]
    for prefix, key in sections:
        rows, others = (
            (side[key] if key == "retrieval" else side[key]["scores"])
            for side in (trained, untrained)
        )
        for row, other in zip(rows, others, strict=True):
            values = (row["value"], other["value"], row["baseline"])
            shown = ["–" if v is None else f"{v:.3f}" for v in values]
            lines.append(f"| {prefix}{row['name']} | {' | '.join(shown)} ({row['baseline_is']}) |")
    return lines
