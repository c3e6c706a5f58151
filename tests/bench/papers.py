"""Write docs/results/papers.md and the table of reports in docs/results.md, from reports of `reproduce`.

Run it after a report was added to docs/results or replaced; a test fails if the pages do not agree.
"""

from pathlib import Path

from histoseek.artifacts import files

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- papers: begin -->\n", "<!-- papers: end -->\n"
VERDICTS = {
    "ae-dac": "not reproduced; 12 + 25 epochs instead of 50 + 75",
    "topology-mnist": "in part; Adam and squared error, 15 epochs, a third of the images",
    "topology-mnist-ae": "in part; Adam and squared error, a third of the images",
    "topology-cifar10": "in part; Adam and squared error, 15 epochs, a third of the images, as JPEG",
    "breast-ae": "cannot be compared: not the IDC set; 600 tiles, at most 8 epochs, 2 of 5 folds",
    "p4m-deepcluster": "cannot be compared: other X-rays; 8 epochs, K = 78, an eighth of the widths",
    "p4m-deepcluster-nih": "in part: 796 images of the paper's set, K = 39, an eighth of the widths",
    "arcface-busi": "not reproduced: another ultrasound set; 96 px, 5 epochs, folds of 61",
    "arcface-he": "cannot be compared: tissue; 96 px, 5 epochs, folds of 40",
}
"""Verdict and main reason, by the folder of the report; the conclusions in docs/results.md say more."""


def reports():
    """The reports in docs/results, by folder."""
    found = {path.parent.name: files.read_json(path) for path in DOCS.glob("results/*/report.json")}
    papers = {name: report for name, report in found.items() if "paper" in report}
    return dict(sorted(papers.items(), key=lambda item: (item[1]["paper"], item[0])))


def verdict(cell):
    """Whether our mean is within two standard deviations of the published value; None if it has none."""
    spread = cell.get("published_sd") or cell["sd"]
    if cell["published"] is None or cell["mean"] is None or spread is None:
        return None
    gap = cell["mean"] - cell["published"]
    return "within" if abs(gap) <= 2 * spread else "higher" if gap > 0 else "lower"


def cells(report):
    """Table, row, column and cell of every published value of a report."""
    for table in report["tables"]:
        for row, columns in table["rows"].items():
            for column, cell in columns.items():
                if cell["published"] is not None:
                    yield table, row, column, cell


def summary(found):
    """The table of reports, for docs/results.md."""
    lines = [
        "| report | data | epochs | published values within 2 sd | verdict | training time | date |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, report in found.items():
        about = report["about"]
        judged = [verdict(cell) for *_, cell in cells(report)]
        columns = [
            f"[{name}](results/{name}/report.md) (paper {report['paper'][:3]})", about["data"],
            str(about.get("epochs", "see the report")), f"{judged.count('within')} of {len(judged)}",
            VERDICTS[name], about.get("training time", "not recorded"), about["date"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(columns) + " |")
    machines = {report["about"]["machine"] for report in found.values()}
    return "\n".join([*lines, "", f"Machine: {'; '.join(sorted(machines))}.", ""])


def page(found):
    """Every published value beside ours, for docs/results/papers.md."""
    lines = [
        "# Every published value",
        "",
        "`python tests/bench/papers.py` wrote this page from the reports in this folder. *Within*: our "
        "mean is within two standard deviations of the published value (the paper's, or ours if it has "
        "none). *Trivial* is reached without a model; each report says how. "
        "[results.md](../results.md) explains the differences.",
        "",
    ]
    for name, report in found.items():
        lines += [
            f"## {report['title']}: {name}",
            "",
            f"Paper {report['paper']}. Verdict: {VERDICTS[name]}.",
            "",
        ]
        lines += [f"[Report]({name}/report.md)", ""]
        lines += [
            "| table | row | metric | published | ours | trivial | verdict |",
            "|---|---|---|---|---|---|---|",
        ]
        for table, row, column, cell in cells(report):
            ours = number(cell["mean"], cell["sd"])
            published = number(cell["published"], cell.get("published_sd"))
            columns = [
                table["title"], row, column, published, ours, number(cell["trivial"]), verdict(cell) or "–",
            ]  # fmt: skip
            lines.append("| " + " | ".join(columns) + " |")
        lines.append("")
    return "\n".join(lines)


def number(value, spread=None):
    """A value with its standard deviation; percents with two decimals, shares with three."""
    if value is None:
        return "–"
    digits = 2 if abs(value) > 1 else 3
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
