"""Reports the outcome of an embedding run: ``run.json``, a table, and whether every job succeeded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ... import console
from ...artifacts.files import write_json
from ...artifacts.remote import Remote, is_url, joined
from ...artifacts.walking import LeftOut, summarised
from ...errors import HistoseekError
from .results import Result
from .run import Ran

SHOWN = 40
FEW = 5
NOT_USED = {
    "rows_unused": "rows of the manifest that match no input",
    "slides_without_row": "slides without a row in the manifest",
    "regions_unused": "GeoJSON files that match no slide",
}
SLOWEST = 3
KEEPING = {"blurred": "--min-sharpness 0", "pen": "--max-pen 1"}
"""The option that keeps tiles with a fault."""


def report_results(ran: Ran, out: str, inputs: dict[str, Any]) -> bool:
    """Write ``run.json`` into the folder or URL ``out``, print the outcome; return whether all succeeded.

    ``inputs`` states which inputs and table rows were left out, and why.
    """
    document = {**summary(ran), "inputs": inputs}
    write_document(document, out)
    console.emit(document, lambda: _show(ran.results, document, out))
    return bool(document["ok"])


def record_end(
    error: BaseException, results: Sequence[Result], jobs: int, out: str, inputs: dict[str, Any]
) -> None:
    """Record in ``run.json`` that a run of ``jobs`` jobs ended early, why, and which had finished."""
    states: dict[str, int] = Counter(result.state for result in results)
    document = {
        "ok": False,
        "ended": f"{type(error).__name__}: {error}",
        "states": {**states, "not reached": jobs - len(results)},
        "results": [asdict(result) for result in results],
        "inputs": inputs,
    }
    with suppress(HistoseekError):  # the disk may be full, which may have ended the run
        if is_url(out) or Path(out).is_dir():
            write_document(document, out)


def summary(ran: Ran) -> dict[str, Any]:
    """Return counts by state, the encoder's settings, the speed, and every job's result."""
    return {
        "ok": all(result.ok for result in ran.results),
        "encoder": {"name": ran.manifest.name, "sha256": ran.manifest.sha256, **ran.encoder},
        "states": dict(Counter(result.state for result in ran.results)),
        "tiles": sum(result.tiles for result in ran.results),
        "speed": ran.speed,
        "results": [asdict(result) for result in ran.results],
    }


def write_document(document: dict[str, Any], out: str) -> None:
    """Write ``run.json`` into a folder, or to a URL through fsspec."""
    if not is_url(out):
        write_json(Path(out) / "run.json", document)
        return
    with TemporaryDirectory() as temp:
        write_json(Path(temp) / "run.json", document)
        Remote(joined(out, "run.json")).store(Path(temp) / "run.json")


def _show(results: Sequence[Result], document: dict[str, Any], out: str) -> None:
    notable = [r for r in results if not r.ok or r.state == "empty"]
    rest = [r for r in results if r not in notable]
    shown = [*notable, *rest][: max(SHOWN, len(notable))]
    rows = [
        (r.name, r.state, r.tiles, _percent(r.tissue), round(r.seconds, 1), r.reason) for r in shown
    ]
    columns = ("slide", "state", "tiles", "tissue", "seconds", "reason")
    console.table("Embedded", columns, rows)
    if len(shown) < len(results):
        console.say(f"… and {len(results) - len(shown)} more, all done")
    for result in results:
        for reason in result.unreadable[:3]:
            console.say(f"{result.name}: {reason}")
    _show_speed(results, document)
    for line in lines_of(results, document["inputs"]):
        console.say(line)
    for note in document["encoder"].get("notes", []):
        console.say(f"note: {note}")
    _show_profiles(results)
    states = ", ".join(f"{count} {state}" for state, count in document["states"].items())
    console.say(f"{states}; see {out}, where run.json has every result")


def lines_of(results: Sequence[Result], inputs: dict[str, Any]) -> list[str]:
    """Return a line for each input that was not used, and for each value guessed or overridden."""
    lines = [f"note: {note}" for note in inputs.get("notes", [])]
    left_out = [*inputs.get("left_out", []), *(left for r in results for left in r.left_out)]
    lines += summarised([LeftOut(**left) for left in left_out])
    for key, what in NOT_USED.items():
        names = inputs.get(key) or []
        if names:
            lines.append(f"{what}: {len(names)} ({_few(names)})")
    lines += _left_out_tiles(results)
    by_note: dict[str, list[str]] = {}
    for result in results:
        for note in result.notes:
            by_note.setdefault(note, []).append(result.name)
    return lines + [f"{_few(names)}: {note}" for note, names in by_note.items()]


def _left_out_tiles(results: Sequence[Result]) -> list[str]:
    """Return a line for each reason why tiles were left out."""
    lines = []
    for reason, option in KEEPING.items():
        counts = {r.name: r.left_out_tiles[reason] for r in results if reason in r.left_out_tiles}
        if counts:
            most = sorted(counts, key=lambda name: -counts[name])
            named = _few([f"{name}: {counts[name]}" for name in most])
            lines.append(
                f"tiles left out, {reason}: {sum(counts.values())} ({named}); {option} keeps them"
            )
    return lines


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")


def _show_profiles(results: Sequence[Result]) -> None:
    unused = Counter(r.icc_profile for r in results if r.icc_profile and not r.icc_applied)
    for name, count in unused.most_common(SLOWEST):
        console.say(
            f"colour profile {name!r} of {console.counted(count, 'slide')} was not applied: the "
            "pixels were embedded as they are stored"
        )
    if len(unused) > SLOWEST:
        console.say(f"… and {len(unused) - SLOWEST} more colour profiles; run.json lists all")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _show_speed(results: Sequence[Result], document: dict[str, Any]) -> None:
    speed = document.get("speed")
    if not speed or speed["tiles_done"] <= speed.get("tiles_unreadable", 0):
        return
    stages = speed["stages"]
    busy = speed.get("encoder_busy")
    console.say(
        f"{speed['tiles_done']} tiles in {speed['seconds']:.1f} s, {speed['tiles_per_s']:.0f} tiles/s; "
        f"reading {stages['read']['tiles_per_s']:.0f} and encoding "
        f"{stages['encode']['tiles_per_s']:.0f} tiles/s per worker"
        + (
            f"; from its first to its last batch the encoder was busy {busy:.0%} of the time"
            if busy is not None
            else ""
        )
    )
    done = sorted((r for r in results if r.state != "skipped"), key=lambda r: -r.seconds)
    if len(done) > SLOWEST:
        slow = ", ".join(f"{r.name} ({r.seconds:.1f} s)" for r in done[:SLOWEST])
        console.say(f"slowest: {slow}")
