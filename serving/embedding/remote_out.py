"""Features behind a URL: written to a temporary folder, and uploaded slide by slide."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...artifacts.files import temporary_folder
from ...artifacts.remote import Remote, below, is_url, joined
from .job import Job, distinct_name
from .results import Result


class RemoteOut:
    """The folder of features behind a URL, and the local folder in its place."""

    def __init__(self, url: str, local: Path) -> None:
        """Stand for ``url`` by the folder ``local``."""
        Remote(url)  # an unknown scheme is reported before anything is read
        self.url, self.local = url.rstrip("/"), local
        self._lock = threading.Lock()  # several threads open slides
        self._before: dict[Path, int] = {}

    def fetch(self, job: Job, folders: Sequence[str]) -> None:
        """Copy the features that the job may already have, in one of these folders of ``local``."""
        with self._lock:
            for folder in folders:
                for name in dict.fromkeys((job.name, job.stem, distinct_name(job))):
                    path = self.local / folder / f"{name}.h5"
                    known = Remote(self.url_of(path))
                    if not path.exists() and known.is_file():
                        known.fetch(path)
                        self._before[path] = path.stat().st_mtime_ns

    def url_of(self, path: Path) -> str:
        """Return the URL of a local file."""
        return joined(self.url, path.relative_to(self.local).as_posix())

    def publish(self, result: Result) -> None:
        """Upload the files of a slide that are new, its features last, and delete the local ones."""
        name = result.name
        files = [
            self.local / "overlays" / f"{name}.jpg",
            *(self.local / "geojson" / f"{name}.{part}.geojson" for part in ("tissue", "tiles")),
            self.local / "status" / f"{name}.json",
        ]
        if result.features is not None:
            files.append(self.local / below(result.features, self.url))
        for path in files:
            if path.is_file():
                if self._before.pop(path, None) != path.stat().st_mtime_ns:
                    Remote(self.url_of(path)).store(path)
                path.unlink()


def check_writable(out: Path | str) -> None:
    """Write an empty file behind the URL and remove it, so that a run does not fail after its first slide.

    Raises:
        StorageFailed: the URL cannot be written, for example because its bucket does not exist.
    """
    if not is_url(out):
        return
    probe = Remote(joined(str(out), ".writable"))
    with temporary_folder("probe") as folder:
        empty = folder / "empty"
        empty.touch()
        probe.store(empty)
    probe.remove()


@contextmanager
def features_at(out: Path | str) -> Iterator[tuple[Path, RemoteOut | None]]:
    """Yield the local folder for features, and what stands behind it if ``out`` is a URL."""
    if not is_url(out):
        yield Path(out), None
        return
    with temporary_folder("features") as local:
        yield local, RemoteOut(str(out), local)
