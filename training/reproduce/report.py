"""A report of a paper's tables: published number, our number and trivial baseline, side by side."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from ...artifacts.files import write_atomic, write_json
from ...console import counted

FOLDS_OVERLAP = (
    "The training parts of folds overlap, so the interval of a difference is too narrow."
)
FEWER = "Fewer epochs."
SAYS = ("The paper claims.", "What came out.", "What it means.")


@dataclass(frozen=True)
class Cell:
    """One number of a table: published, measured by us, and of a trivial baseline.

    Attributes:
        published: the paper's number, or None.
        ours: our values, one per seed or fold.
        trivial: number reached without a model, or None.
        published_sd: the paper's standard deviation, or None.
    """

    published: float | None = None
    ours: tuple[float, ...] = ()
    trivial: float | None = None
    published_sd: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean of ``ours``; None if it is empty."""
        return float(np.mean(self.ours)) if self.ours else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation of ``ours`` (n - 1); None for fewer than two values."""
        return float(np.std(self.ours, ddof=1)) if len(self.ours) > 1 else None

    @property
    def near(self) -> bool | None:
        """Whether the mean is within two published standard deviations; None if a number is missing."""
        if self.mean is None or self.published is None or self.published_sd is None:
            return None
        return abs(self.mean - self.published) <= 2 * self.published_sd

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "published": self.published,
            "published_sd": self.published_sd,
            "ours": [_finite(value) for value in self.ours],
            "mean": _finite(self.mean),
            "sd": _finite(self.sd),
            "trivial": _finite(self.trivial),
        }


def difference(a: Cell, b: Cell, digits: int = 3) -> str:
    """Return the mean of a minus that of b, with its 95 % interval by Student's t, as text.

    Values are paired (same seeds or folds) if there are as many of both; otherwise the interval is Welch's.
    The training parts of folds overlap, so for folds the interval is too narrow.
    """
    gap = float(np.mean(a.ours) - np.mean(b.ours)) if a.ours and b.ours else math.nan
    if math.isnan(gap):
        return "no value"
    sizes = len(a.ours), len(b.ours)
    if min(sizes) < 2:
        return f"{gap:+.{digits}f} (one run cannot tell whether that is chance)"
    if sizes[0] == sizes[1]:
        parts = [float(np.var(np.subtract(a.ours, b.ours), ddof=1)) / sizes[0]]
    else:
        parts = [float(np.var(cell.ours, ddof=1)) / len(cell.ours) for cell in (a, b)]
    spread = sum(part**2 / (size - 1) for part, size in zip(parts, sizes, strict=False))
    freedom = sum(parts) ** 2 / spread if spread else math.inf
    reach = float(stats.t.ppf(0.975, freedom)) * sum(parts) ** 0.5
    chance = "" if abs(gap) > reach else "; it may be chance"
    low, high = gap - reach, gap + reach
    return f"{gap:+.{digits}f} (95 % interval {low:+.{digits}f} to {high:+.{digits}f}{chance})"


def said(cell: Cell, digits: int = 3) -> str:
    """Return our mean and standard deviation as text."""
    spread = f" ± {cell.sd:.{digits}f}" if cell.sd is not None else ""
    return "no value" if cell.mean is None else f"{cell.mean:.{digits}f}{spread}"


def fewer_epochs(epochs: int, whole: int, paper_names_them: bool = False, of: str = "") -> str:
    """Return that there are fewer epochs than in the paper or, if it names none, the protocol; else ""."""
    if epochs >= whole:
        return ""
    has = "the paper has" if paper_names_them else "the paper names no number, this protocol has"
    return f"{counted(epochs, 'epoch')}{of}; {has} {whole}."


def _finite(value: float | None) -> float | None:
    return None if value is None or value != value else value


def row(
    metrics: Sequence[str],
    runs: Sequence[Mapping[str, float]],
    published: Iterable[float | None] | None = None,
    trivial: Iterable[float | None] | None = None,
    scale: float = 1,
) -> list[Cell]:
    """Return a row of a table: one cell per metric, with its value in every run times ``scale``."""
    none = [None] * len(metrics)
    numbers = zip(metrics, published or none, trivial or none, strict=True)
    return [Cell(p, tuple(scale * run[name] for run in runs), t) for name, p, t in numbers]


@dataclass
class Table:
    """Rows of cells.

    Attributes:
        title: title of the table.
        columns: names of the metrics.
        rows: cells by row name, in the order of ``columns``.
        trivial_is: description of the trivial baseline.
        digits: number of decimals.
        notes: text below the table.
        compares_settings: the table compares settings of ours; its published values stand in another table.
    """

    title: str
    columns: Sequence[str]
    rows: dict[str, list[Cell]]
    trivial_is: str = ""
    digits: int = 3
    notes: list[str] = field(default_factory=list)
    compares_settings: bool = False

    def markdown(self) -> list[str]:
        """Return the table as lines of Markdown; a metric has columns for what is known of it."""
        kinds = ("published", "ours", "trivial")
        texts = {name: [self._texts(cell) for cell in cells] for name, cells in self.rows.items()}
        shown = [
            [at for at in range(3) if at == 1 or any(row[number][at] for row in texts.values())]
            for number in range(len(self.columns))
        ]
        head = [
            f"{column}: {' | '.join(kinds[at] for at in those)}" if len(those) > 1 else column
            for column, those in zip(self.columns, shown, strict=True)
        ]
        lines = [f"### {self.title}", "", f"| | {' | '.join(head)} |"]
        lines.append("|---" * (1 + sum(map(len, shown))) + "|")
        for name, row in texts.items():
            cells = [
                text[at] or "–" for text, those in zip(row, shown, strict=True) for at in those
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        if self.trivial_is:
            lines += ["", f"Trivial: {self.trivial_is}."]
        return [*lines, *(f"\n{note}" for note in self.notes), ""]

    def _texts(self, cell: Cell) -> tuple[str, str, str]:
        """Return the published value, ours and the trivial one; "" for one that is missing."""

        def number(value: float | None, sd: float | None = None) -> str:
            if value is None or value != value:
                return ""
            spread = f" ± {sd:.{self.digits}f}" if sd is not None and sd == sd else ""
            return f"{value:.{self.digits}f}{spread}"

        published = number(cell.published, cell.published_sd)
        return published, number(cell.mean, cell.sd), number(cell.trivial)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        rows = {
            name: dict(zip(self.columns, (c.as_dict() for c in cells), strict=True))
            for name, cells in self.rows.items()
        }
        about: dict[str, Any] = {"title": self.title, "trivial_is": self.trivial_is}
        about["compares_settings"] = self.compares_settings
        return {**about, "rows": rows, "notes": self.notes}


@dataclass
class Report:
    """The results of a protocol.

    Attributes:
        title: title of the report.
        paper: number and name of the paper.
        command: command that reproduces the report.
        about: data, split, seeds and epochs, by name.
        tables: tables of numbers.
        figures: file name and caption of each figure.
        notes: what a reader must know before comparing the numbers.
        says: what the paper claims, what came out, and what that means: a sentence each.
        fewer: how many epochs there were instead of how many, the report's first line; "" if not fewer.
    """

    title: str
    paper: str
    command: str
    about: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    says: tuple[str, str, str] = ("", "", "")
    fewer: str = ""

    def add_figure(self, file: str, caption: str) -> None:
        """Append a figure."""
        self.figures.append((file, caption))

    def write(self, out: Path) -> dict[str, Any]:
        """Write report.md and report.json into ``out``; returns the JSON document."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        about = {
            **self.about,
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {gpu}",
            "torch": torch.__version__,
        }
        lines = [f"# {self.title}", ""]
        for head, text in zip((FEWER, *SAYS), (self.fewer, *self.says), strict=True):
            lines += [f"**{head}** {text}", ""] if text else []
        lines += [f"Paper {self.paper}.", "", "```", self.command, "```", ""]
        lines += ["| | |", "|---|---|"]
        lines += [*(f"| {name} | {value} |" for name, value in about.items()), ""]
        lines += [f"- {note}" for note in self.notes] + ([""] if self.notes else [])
        for table in self.tables:
            lines += table.markdown()
        for file, caption in self.figures:
            lines += [f"![{caption}]({file})", "", f"*{caption}*", ""]
        write_atomic(out / "report.md", "\n".join(lines))
        document = {
            "title": self.title,
            "paper": self.paper,
            "command": self.command,
            "about": about,
            "fewer": self.fewer,
            "says": list(self.says),
            "notes": self.notes,
            "tables": [table.as_dict() for table in self.tables],
            "figures": [{"file": file, "caption": caption} for file, caption in self.figures],
        }
        write_json(out / "report.json", document)
        return document
