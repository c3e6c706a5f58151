"""Reads the inputs of an atlas that a user gives: feature files, folders of them, tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .. import stopping
from ..artifacts.files import temporary_folder
from ..artifacts.remote import Remote, below, is_url, require_room
from ..artifacts.tables import Table, read_csv
from ..artifacts.walking import LeftOut, once, walk
from ..errors import BadInput, HistoseekError

PICKLES = frozenset({".pt", ".pth", ".pkl"})
VECTORS = frozenset({".npy", ".npz", ".parquet", ".feather", ".h5ad", ".mat"})
"""Further files in which people keep vectors, and which are not read."""


def read_metadata(path: Path | None) -> Table | None:
    """Read a CSV of slides.

    Raises:
        BadInput: the file cannot be read, or has no column ``slide`` (or ``file``).
    """
    return None if path is None else read_csv(path, "slide", "file")


def rows_of(table: Table | None) -> dict[str, dict[str, str]]:
    """Return the rows of a table by slide name as written there."""
    return {} if table is None else {row[table.key]: row for row in table.rows}


NOT_READ = "its name does not end in .h5; a feature file has features and coords"


class Copies:
    """Local copies of feature files behind URLs."""

    def __init__(self) -> None:
        """Start without copies."""
        self.paths: list[Path] = []
        self._urls: dict[str, str] = {}

    def add(self, url: str, folder: Path) -> None:
        """Copy the feature files at a URL into a folder."""
        files = [file for file in Remote(url).files() if file.url.lower().endswith(".h5")]
        if not files:
            raise BadInput(f"{url} has no .h5 files; run `histoseek embed` first")
        require_room(folder, sum(file.size for file in files), url)
        root = url if files[0].url != url else url.rpartition("/")[0]
        for file in files:
            stopping.check()
            Remote(file.url).fetch(folder / below(file.url, root))
        self._urls[str(folder)] = root.rstrip("/")
        self.paths.append(folder)

    def named(self, text: str) -> str:
        """Return a text with URLs in the place of local copies."""
        for folder, url in self._urls.items():
            text = text.replace(folder, url)
        return text


@contextmanager
def local_copies(inputs: Sequence[str | Path]) -> Iterator[Copies]:
    """Yield the inputs with local copies in the place of URLs; the copies are deleted at the end.

    Raises:
        BadInput: a URL leads to no feature files, or they cannot be read.
        StorageFailed: the local disk is full.
        HistoseekError: what the block raises, with URLs in the place of copies.
    """
    copies = Copies()
    with ExitStack() as stack:
        for given in inputs:
            if is_url(given):
                copies.add(
                    str(given).rstrip("/"), stack.enter_context(temporary_folder("features"))
                )
            else:
                copies.paths.append(Path(given))
        try:
            yield copies
        except HistoseekError as error:
            raise type(error)(copies.named(str(error))) from error


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
        unread = [
            LeftOut(str(file), "a pickle, which can run code" if kind in PICKLES else NOT_READ)
            for file in walked.files
            if (kind := file.suffix.lower()) in PICKLES | VECTORS | {".hdf5"}
        ]
        if not inside:
            kinds = ", ".join(sorted({Path(item.path).suffix.lower() for item in unread}))
            hint = f" (its {kinds} files are not read)" if unread else ""
            raise BadInput(
                f"{path} has no .h5 files{hint}; run `histoseek embed` first, or give a folder of "
                "another tool's .h5 feature files"
            )
        files += inside
        left_out += [*walked.left_out, *unread]
    unique = set(once(files).files)
    return [file for file in dict.fromkeys(files) if file in unique], left_out
