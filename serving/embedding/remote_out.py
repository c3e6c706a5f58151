"""Features behind a URL: written to a temporary folder, and uploaded slide by slide."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ...artifacts.remote import Remote, is_url, joined
from .jobs import Job, distinct_name
from .results import Result


class RemoteOut:
    """The folder of features behind a URL, and the local folder in its place."""

    def __init__(self, url: str, local: Path, encoder: str) -> None:
        """Stand for ``url`` by the folder ``local``, for features of one encoder."""
        self.url, self.local = url.rstrip("/"), local
        self._features = f"/features_{encoder}/"
        self._lock = threading.Lock()
        self._known: dict[str, list[str]] | None = None
        self._before: dict[Path, int] = {}

    def fetch(self, job: Job) -> None:
        """Copy the features that the job may already have into the local folder."""
        for name in dict.fromkeys((job.name, job.stem, distinct_name(job))):
            for url in self._listed().get(name, []):
                path = self.local / url.removeprefix(self.url).lstrip("/")
                if not path.exists():
                    Remote(url).fetch(path)
                    self._before[path] = path.stat().st_mtime_ns

    def _listed(self) -> dict[str, list[str]]:
        """Return the URLs of all features of this encoder by name; listed once."""
        with self._lock:  # several threads open slides
            if self._known is None:
                known: dict[str, list[str]] = {}
                for file in Remote(self.url).files(may_lack=True):
                    if file.url.endswith(".h5") and self._features in file.url:
                        known.setdefault(Path(file.url).stem, []).append(file.url)
                self._known = known
            return self._known

    def url_of(self, path: str) -> str:
        """Return the URL of a local file."""
        return joined(self.url, Path(path).relative_to(self.local).as_posix())

    def publish(self, result: Result) -> None:
        """Upload the files of a slide that are new, its features last, and delete the local ones."""
        name = result.name
        files = [
            self.local / "overlays" / f"{name}.jpg",
            *(self.local / "geojson" / f"{name}.{part}.geojson" for part in ("tissue", "tiles")),
            self.local / "status" / f"{name}.json",
        ]
        if result.features is not None:
            files.append(self.local / result.features.removeprefix(self.url).lstrip("/"))
        for path in files:
            if path.is_file():
                if self._before.pop(path, None) != path.stat().st_mtime_ns:
                    Remote(self.url_of(str(path))).store(path)
                path.unlink()


@contextmanager
def features_at(out: Path | str, encoder: str) -> Iterator[tuple[Path, RemoteOut | None]]:
    """Yield the local folder for features, and what stands behind it if ``out`` is a URL."""
    if not is_url(out):
        yield Path(out), None
        return
    with TemporaryDirectory(prefix="histoseek-features-") as temp:
        yield Path(temp), RemoteOut(str(out), Path(temp), encoder)
