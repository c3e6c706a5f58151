"""Reads the inputs of an atlas that a user gives: feature files, folders of them, tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from .. import stopping
from ..artifacts.remote import Remote, is_url, require_room
from ..artifacts.tables import Table, read_csv
from ..artifacts.walking import LeftOut, once, walk
from ..errors import BadInput

PICKLES = frozenset({".pt", ".pth", ".pkl"})


def read_metadata(path: Path | None) -> Table | None:
    """Read a CSV of slides.

    Raises:
        BadInput: the file cannot be read, or has no column ``slide`` (or ``file``).
    """
    return None if path is None else read_csv(path, "slide", "file")


def rows_of(table: Table | None) -> dict[str, dict[str, str]]:
    """Return the rows of a table by slide name as written there."""
    return {} if table is None else {row[table.key]: row for row in table.rows}


@contextmanager
def local_copies(inputs: Sequence[str | Path]) -> Iterator[list[Path]]:
    """Yield the inputs with local copies in the place of URLs; the copies are deleted at the end.

    Raises:
        BadInput: a URL leads to no feature files, or they cannot be read.
        StorageFailed: the local disk is full.
    """
    with ExitStack() as stack:
        paths: list[Path] = []
        for given in inputs:
            if not is_url(given):
                paths.append(Path(given))
                continue
            remote = Remote(str(given))
            files = [file for file in remote.files() if file.url.lower().endswith(".h5")]
            if not files:
                raise BadInput(f"{given} has no .h5 files; run `histoseek embed` first")
            temp = Path(stack.enter_context(TemporaryDirectory(prefix="histoseek-features-")))
            require_room(temp, sum(file.size for file in files), str(given))
            for file in files:
                stopping.check()
                Remote(file.url).fetch(temp / file.url.partition("://")[2])
            paths.append(temp)
        yield paths


def find_feature_files(inputs: Sequence[Path]) -> tuple[list[Path], list[LeftOut]]:
    """Expand folders to the feature files in them; also return the entries that were left out.

    Raises:
        BadInput: a path does not exist, or a folder has no feature files.
    """
    files: list[Path] = []
    left_out: list[LeftOut] = []
    for path in inputs:
        if not path.exists():
            raise BadInput(f"{path} does not exist; check the path")
        if not path.is_dir():
            files.append(path)
            continue
        walked = walk(path)
        inside = [file for file in walked.files if file.suffix.lower() == ".h5"]
        pickles = [file for file in walked.files if file.suffix.lower() in PICKLES]
        if not inside:
            hint = " (its pickle files, such as .pt, are not read)" if pickles else ""
            raise BadInput(
                f"{path} has no .h5 files{hint}; run `histoseek embed` first, or give a folder of "
                "another tool's feature files"
            )
        files += inside
        left_out += walked.left_out
        left_out += [LeftOut(str(file), "a pickle, which can run code") for file in pickles]
    unique = set(once(files).files)
    return [file for file in dict.fromkeys(files) if file in unique], left_out
