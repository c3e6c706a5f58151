"""Embedding slides and tile sets from Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...artifacts.remote import is_url
from ...errors import BadInput
from ...serving.embedding.job import Kind
from ...serving.embedding.jobs import find_inputs
from ...serving.embedding.meter import Meter
from ...serving.embedding.pipeline import embed_jobs
from ...serving.embedding.regions import unused_regions, with_regions
from ...serving.embedding.report import lines_of, summary, write_document
from ...serving.embedding.results import EmbedOptions, Result
from ...serving.embedding.run import Ran
from ...serving.encoders.open import DEFAULT, open_encoder
from ...serving.encoders.protocol import Encoder
from .show import table_html

Progress = Callable[[int, int, str], None]


class Features(list[Result]):
    """The result of each slide and tile set of a run.

    Attributes:
        folder: folder of the feature files.
        notes: inputs that were left out and values that were guessed, one sentence each.
    """

    def __init__(self, results: Iterable[Result], folder: Path, notes: Sequence[str]) -> None:
        """Store the results of a run that wrote to ``folder``."""
        super().__init__(results)
        self.folder, self.notes = folder, list(notes)

    @property
    def ok(self) -> bool:
        """Whether everything was embedded."""
        return all(result.ok for result in self)

    @property
    def files(self) -> list[Path]:
        """The feature files of this run."""
        return [Path(result.features) for result in self if result.features]

    def _repr_html_(self) -> str:
        rows = [(r.name, r.state, r.tiles, r.reason) for r in self]
        return table_html(("slide", "state", "tiles", "reason"), rows, self.notes)


def embed(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    encoder: Encoder | str | Path = DEFAULT,
    *,
    kind: Kind = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> Features:
    """Embed slides and tile sets into feature files; repeat the call to finish an interrupted run.

    Args:
        inputs: slides, folders of slides or tiles, ``.tar``, ``.npz`` or CSV; also URLs (``s3://…``).
        out: folder for the features and ``run.json``.
        encoder: an open encoder, or an argument for :func:`open_encoder`.
        kind: what a folder of images holds: ``slides``, ``tiles`` or ``auto``.
        progress: called with tiles done, tiles expected, and a line about the run.
        options: options of :class:`~histoseek.serving.embedding.results.EmbedOptions`, such as ``mpp=0.5``.

    Returns:
        One result per slide or tile set. A failed one does not stop the others; a warning names it.

    Raises:
        BadInput: an input does not exist, or an option is out of range.
    """
    paths = [inputs] if isinstance(inputs, str | Path) else inputs
    chosen = EmbedOptions(**options)
    if is_url(out):
        raise BadInput(
            f"out is {out!r}; expected a folder (the command `histoseek embed` takes URLs)"
        )
    given = find_inputs(list(paths), kind, chosen.manifest)
    jobs = with_regions(given.jobs, chosen.regions)
    unused = unused_regions(jobs, chosen.regions)
    opened = open_encoder(encoder) if isinstance(encoder, str | Path) else encoder
    meter, folder = Meter(), Path(out)
    try:
        results = embed_jobs(jobs, opened, folder, chosen, progress or (lambda *_: None), meter)
        ran = Ran(results, opened.manifest, opened.describe(), meter.read())
    finally:
        if opened is not encoder:
            opened.close()
    facts = {**given.as_dict(), "regions_unused": unused}
    write_document({**summary(ran), "inputs": facts}, str(folder))
    features = Features(results, folder, lines_of(results, facts))
    failed = [f"{result.name}: {result.reason}" for result in features if not result.ok]
    if failed:
        few = "; ".join(failed[:3]) + (" …" if len(failed) > 3 else "")
        warnings.warn(
            f"{len(failed)} of {len(features)} inputs could not be embedded completely: {few}",
            stacklevel=2,
        )
    return features
