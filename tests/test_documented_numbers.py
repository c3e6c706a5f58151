"""The numbers of README.md and docs/results.md are those of the reports that the benchmarks wrote."""

import json
import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
OWN, LITE0, VIEWS, RANDOM = (
    "histoseek-he-small-3", "EfficientNet-Lite0", "EfficientNet-Lite0, 8 views", "random weights",
)  # fmt: skip
LENIENT = {"blur 1.2 px", "field x 0.8"}
"""Changes of which .95 of the crops are to be found; of all others .98."""


def report(name):
    return json.loads((RESULTS / name / "report.json").read_text())


def rows(text):
    """Cells of every table row of a page without bold marks; an empty first cell repeats that above."""
    found, above = [], ""
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
            above = cells[0] or above
            found.append([above, *cells[1:]])
    return found


def shown(value):
    return "" if value is None else f"{value:.3f}".lstrip("0") if value < 1 else f"{value:.3f}"


def found(who):
    """Share of crops found, by slide and change; None for an encoder that was not asked."""
    slides = report("viewer")["slides"].values()
    if any(who not in slide["of"] for slide in slides):
        return None
    return [(how, row["found"]) for slide in slides for how, row in slide["of"][who].items()]


def test_the_table_of_the_readme():
    table = rows((ROOT / "README.md").read_text())
    scores = report("encoder")["retrieval"]
    expected = {}
    for begin, name in {
        "LC25000": "lc25000, held out",
        "histo_mix,": "histo_mix, held out",
        "laboratories never": "histo_mix, sources never trained on",
        "GlaS": "GlaS, benign or malignant",
    }.items():
        whole = scores[name]
        for metric, key in {
            "same-source": "same_r1",
            "majority": "mmv5",
            "nearest": "top1",
        }.items():
            if (metric == "nearest") != (begin == "GlaS"):
                continue
            who = (OWN, LITE0, VIEWS) if begin == "GlaS" else (OWN, LITE0, VIEWS, RANDOM)
            values = [shown(whole["of"][one][key]["value"]) for one in who]
            expected[begin, metric] = (f"{whole['tiles']} ", values)
    crops = [found(who) for who in (OWN, LITE0, VIEWS)]
    slides = report("viewer")["slides"].values()
    queries = f"{sum(slide['queries'] for slide in slides)} of five scans in "
    queries += f"{len(next(iter(slides))['of'][OWN])} ways"
    for metric, measure in {"found, mean": np.mean, "found, worst": min}.items():
        values = [shown(float(measure([share for _, share in cells]))) for cells in crops]
        expected["crops by other", metric] = (queries, values)
    for (begin, metric), (label, values) in expected.items():
        (row,) = [r for r in table if r[0].startswith(begin) and r[1].startswith(metric)]
        assert label in row[0], (row, label)
        assert row[2 : 2 + len(values)] == values, (row, values)
    (row,) = [r for r in table if r[1].startswith("tiles/s")]
    rates = report("encoder")["tiles_per_s"]
    assert row[2:5] == [f"{rates[who]:.0f}" for who in (OWN, LITE0, VIEWS)]


def test_crops_made_by_other_programs():
    text = (RESULTS.parent / "results.md").read_text()
    table = {row[0]: row[1:] for row in rows(text)}
    crops = [found(who) for who in (OWN, LITE0, VIEWS)]
    shares = [[share for _, share in cells] for cells in crops]
    below = f"cells (slide and change) below .98, of {len(shares[0])}"
    assert table["found, mean of slides and changes"] == [shown(float(np.mean(s))) for s in shares]
    assert table[below] == [str(sum(share < 0.98 for share in s)) for s in shares]
    assert table["worst cell"] == [shown(min(s)) for s in shares]
    missed = sum(share < (0.95 if how in LENIENT else 0.98) for how, share in crops[0])
    assert f"is **missed in {missed} cells**" in text
    queries = sum(slide["queries"] for slide in report("viewer")["slides"].values())
    assert f"({queries} queries in all)" in text


def test_crops_between_tiles():
    (on, between), half, most = (report("encoder")["crops"][OWN][o] for o in ("0", "112", "168"))
    text = (RESULTS.parent / "results.md").read_text()
    said = f"| {on}: yes. {between} (previous encoder: 41 of other tiles): **no**; "
    assert f"{said}{half[1]} if tiles overlap by half, {most[1]} with" in text
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
    assert f"is found in {between} of 100 cases" in readme
