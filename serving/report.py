"""Saying what became of a run of embedding: ``run.json``, a table, and whether all was done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import console
from ..files import write_json
from ..manifest import Manifest
from .results import Result

SHOWN = 40


def report_results(results: Sequence[Result], manifest: Manifest, out: Path) -> bool:
    """Write ``out/run.json`` and print the outcome; return whether everything asked for was done."""
    document = summary(results, manifest)
    write_json(out / "run.json", document)
    console.emit(document, lambda: _show(results, document, out))
    return bool(document["ok"])


def summary(results: Sequence[Result], manifest: Manifest) -> dict[str, Any]:
    """Return counts by state and every job's result."""
    return {
        "ok": all(result.ok for result in results),
        "encoder": {"name": manifest.name, "sha256": manifest.sha256},
        "states": dict(Counter(result.state for result in results)),
        "tiles": sum(result.tiles for result in results),
        "results": [asdict(result) for result in results],
    }


def _show(results: Sequence[Result], document: dict[str, Any], out: Path) -> None:
    telling = [r for r in results if not r.ok or r.state == "empty"]
    rest = [r for r in results if r not in telling]
    shown = [*telling, *rest][: max(SHOWN, len(telling))]
    rows = [(r.name, r.state, r.tiles, round(r.seconds, 1), r.reason) for r in shown]
    console.table("Embedded", ("slide", "state", "tiles", "seconds", "reason"), rows)
    if len(shown) < len(results):
        console.say(f"… and {len(results) - len(shown)} more, all done")
    for result in results:
        for reason in result.unreadable[:3]:
            console.say(f"{result.name}: {reason}")
    states = ", ".join(f"{count} {state}" for state, count in document["states"].items())
    console.say(f"{states}; features and run.json in {out}")
