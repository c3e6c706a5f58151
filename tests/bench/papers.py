"""Write docs/results/papers.md and the table of reports in docs/results.md, from reports of `reproduce`.

Run it after a report was added to docs/results or replaced; a test fails if the pages do not agree.
"""

from pathlib import Path

from histoseek.artifacts import files

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- papers: begin -->\n", "<!-- papers: end -->\n"
OTHER_DATA = {"breast-ae", "p4m-deepcluster", "arcface-busi", "arcface-he"}
"""Reports of another data set than the paper's, with which its values cannot be compared."""
REASONS = {
    "ae-dac": "unknown; it is not the epochs",
    "topology-mnist": "few epochs; codes of 16 and 32 are too low",
    "topology-mnist-ae": "unknown; it is not optimiser, loss or a ReLU after the code",
    "topology-mnist-ae-relu": "the linear code comes nearer",
    "topology-cifar10": "few epochs, although the loss is nearly flat; the images as JPEG",
    "topology-cifar10-ae": "the images as JPEG",
    "breast-ae": "tiles of colon; few tiles and epochs, one fold",
    "p4m-deepcluster": "children's X-rays; few epochs, an eighth of the widths",
    "p4m-deepcluster-nih": "796 images of the paper's set, an eighth of the widths",
    "arcface-busi": "another ultrasound set; a third of the images per fold, random initial weights",
    "arcface-he": "tissue instead of ultrasound, random initial weights, half of the epochs",
}
"""The main known differences, by the folder of the report; the conclusions in docs/results.md say more."""
REPRODUCED, IN_PART = 0.875, 0.5
"""Least share of values within two standard deviations."""
FEWEST = 5
"""Fewer runs have no standard deviation of ours that could decide."""


def reports():
    """The reports in docs/results, by folder."""
    found = {path.parent.name: files.read_json(path) for path in DOCS.glob("results/*/report.json")}
    papers = {name: report for name, report in found.items() if "paper" in report}
    return dict(sorted(papers.items(), key=lambda item: (item[1]["paper"], item[0])))


def verdict(cell):
    """Whether our mean is within two standard deviations of the published value; None if that is unknown.

    The deviation is the paper's, else that of at least five runs of ours.
    """
    spread = cell.get("published_sd") or (cell["sd"] if len(cell["ours"]) >= FEWEST else None)
    if cell["mean"] is None or spread is None:
        return None
    gap = cell["mean"] - cell["published"]
    return "within" if abs(gap) <= 2 * spread else "higher" if gap > 0 else "lower"


def conclusion(name, judged):
    """The verdict on a report from those on its values."""
    known = [one for one in judged if one]
    if name in OTHER_DATA:
        found = "cannot be compared"
    elif not known:
        found = "too few runs to tell"
    else:
        share = known.count("within") / len(known)
        found = (
            "not reproduced"
            if share < IN_PART
            else "in part"
            if share < REPRODUCED
            else "reproduced"
        )
    return f"{found}: {REASONS[name]}"


def cells(report):
    """Table, row, column and cell of every published value of a report."""
    for table in report["tables"]:
        if table.get("compares_settings"):
            continue  # its published values stand in another table
        for row, columns in table["rows"].items():
            for column, cell in columns.items():
                if cell["published"] is not None:
                    yield table, row, column, cell


def summary(found):
    """The table of reports, for docs/results.md."""
    lines = [
        "| report | data | epochs | values within 2 sd | verdict | training time | date, machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, report in found.items():
        about = report["about"]
        judged = [verdict(cell) for *_, cell in cells(report)]
        known = len(judged) - judged.count(None)
        columns = [
            f"[{name}](results/{name}/report.md) (paper {report['paper'][:3]})",
            about["data"],
            str(about.get("epochs", "see the report")),
            f"{judged.count('within')} of {known}" if known else "–",
            conclusion(name, judged),
            about.get("training time", "not recorded"),
            f"{about['date']}, {about['machine']}",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join([*lines, ""])


def page(found):
    """Every published value beside ours, for docs/results/papers.md."""
    lines = [
        "# Every published value",
        "",
        "`python tests/bench/papers.py` wrote this page from the reports in this folder. *Within*: our "
        "mean is within two standard deviations of the published value (the paper's, else those of at "
        "least five runs of ours). *Trivial* is reached without a model; each report says how. "
        "[results.md](../results.md) explains the differences.",
        "",
    ]
    for name, report in found.items():
        judged = [verdict(cell) for *_, cell in cells(report)]
        lines += [
            f"## {report['title']}: {name}",
            "",
            f"Paper {report['paper']}. Verdict: {conclusion(name, judged)}.",
            "",
        ]
        lines += [f"[Report]({name}/report.md)", ""]
        lines += [
            "| table | row | metric | published | ours | trivial | verdict |",
            "|---|---|---|---|---|---|---|",
        ]
        digits = 2 if max(cell["published"] for *_, cell in cells(report)) > 1 else 3
        for table, row, column, cell in cells(report):
            ours = number(digits, cell["mean"], cell["sd"])
            published = number(digits, cell["published"], cell.get("published_sd"))
            columns = [
                table["title"], row, column, published, ours, number(digits, cell["trivial"]),
                verdict(cell) or "–",
            ]  # fmt: skip
            lines.append("| " + " | ".join(columns) + " |")
        lines.append("")
    return "\n".join(lines)


def number(digits, value, spread=None):
    """A value with its standard deviation."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def main():
    found = reports()
    files.write_atomic(DOCS / "results/papers.md", page(found).encode())
    path = DOCS / "results.md"
    before, _, rest = path.read_text().partition(BEGIN)
    files.write_atomic(
        path, (before + BEGIN + summary(found) + END + rest.partition(END)[2]).encode()
    )


if __name__ == "__main__":
    main()
