"""Snapshots: copy one committed state of an atlas, and restore it."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from typing import Any

from ... import stopping
from ...artifacts.audit_chain import FILE as AUDIT
from ...artifacts.files import exclusive, publish_folder, removed_at_end
from ...artifacts.remote import Remote, below, is_url, joined, require_room
from ...console import counted
from ...errors import BadInput, Busy, Damaged, HistoseekError, StorageFailed
from ..opened import OpenAtlas
from ..store.catalog import FILE, NEXT_TILE, REVISION, Catalog, get_meta, set_meta
from ..store.store import FEATURES, LOCK
from ..store.uploads import PENDING, UPLOADS, file_in, place
from .verify import Kind, problems


def take(atlas: OpenAtlas, out: Path | str, with_uploads: bool = True) -> dict[str, Any]:
    """Copy an atlas; see :meth:`Atlas.snapshot <histoseek.index.atlas.Atlas.snapshot>`."""
    if is_url(out):
        return _upload(atlas, str(out), with_uploads)
    out = Path(out)
    if out.resolve().is_relative_to(atlas.path.resolve()):
        raise BadInput(f"{out} is inside the atlas; choose a folder outside {atlas.path}")
    # Only a later writer deletes files of this state, so keep writers out; who may only read cannot.
    may_write = os.access(atlas.path, os.W_OK)
    lock: AbstractContextManager[None] = nullcontext()
    if may_write:
        lock = exclusive(atlas.path / LOCK, f"atlas {atlas.path}")
    before = atlas.catalog.revision()
    with lock, publish_folder(out) as folder:
        try:
            _copy_database(atlas.catalog, folder / FILE)
            encoder = atlas.store.encoder_folder
            shutil.copytree(encoder, folder / encoder.name)
            (folder / FEATURES).mkdir()
            for file in _named_files(atlas):
                stopping.check()
                shutil.copyfile(atlas.path / file, folder / file)
            uploads = _uploaded(atlas) if with_uploads else []
            for file in uploads:
                stopping.check()
                (folder / file).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                shutil.copyfile(atlas.path / file, folder / file)
        except FileNotFoundError as error:
            if not may_write and atlas.catalog.revision() != before:
                raise Busy(
                    f"{atlas.path} was written to while it was copied; try again when that ends"
                ) from error
            raise Damaged(f"{error.filename} is missing; run `histoseek index verify`") from error
        except (OSError, sqlite3.OperationalError) as error:
            raise StorageFailed(
                f"the snapshot {out} cannot be written ({error}); free space"
            ) from error
        copied = OpenAtlas(folder)
        wrong = [problem for problem in problems(copied) if problem.kind is not Kind.LINK]
        if wrong:
            first = wrong[0].text.replace(str(folder), str(atlas.path))
            raise Damaged(
                f"no snapshot was written: the atlas has {len(wrong)} problem(s), such as: {first}; "
                "run `histoseek index verify --repair`"
            )
        revision = copied.catalog.revision()
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    link = atlas.store.encoder_link
    return {
        "snapshot": str(out),
        "revision": revision,
        "bytes": size,
        "encoder_link": None if link is None else str(link),
        "uploads": len(uploads),
        "not_copied": _not_copied(atlas, len(uploads)),
    }


def _uploaded(atlas: OpenAtlas) -> list[str]:
    """Return the files of the slides that were uploaded, relative to the atlas."""
    rows = atlas.catalog.rows("SELECT source FROM slides ORDER BY id")
    places = (place(atlas.path, row["source"]) for row in rows)
    return [str(file.relative_to(atlas.path)) for file in places if file is not None]


def _not_copied(atlas: OpenAtlas, uploads: int) -> list[str]:
    """Return what else is in the atlas's folder and belongs to it, in words."""
    left_out = []
    rows = atlas.catalog.rows("SELECT source FROM slides")
    named = sum(file_in(row["source"]) is not None for row in rows)
    if named > uploads:
        left_out.append(f"the files of {counted(named - uploads, 'uploaded slide')}")
    if count := len(list((atlas.path / UPLOADS).glob(f"*/{PENDING}"))):
        left_out.append(f"{counted(count, 'upload')} not yet in the atlas")
    if (atlas.path / AUDIT).exists():
        left_out.append(f"the audit log ({AUDIT})")
    return left_out


def _upload(atlas: OpenAtlas, url: str, with_uploads: bool) -> dict[str, Any]:
    """Copy an atlas to a URL. The database comes last: without it, nothing there is an atlas."""
    if Remote(url).files(may_lack=True):
        raise BadInput(f"{url} is not empty; choose a new URL")
    with removed_at_end(_beside(atlas.path, "snapshot")) as local:
        report = take(atlas, local, with_uploads)
        files = [path for path in local.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == FILE):
            stopping.check()
            Remote(joined(url, path.relative_to(local).as_posix())).store(path)
    return {**report, "snapshot": url}


def _beside(atlas: Path, name: str) -> Path:
    return atlas.with_name(f"{atlas.name}.{name}-{os.getpid()}")


def _copy_database(source: Catalog, target: Path) -> None:
    target.touch()  # with the rights of other files
    with source.read() as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)
        new.execute("PRAGMA journal_mode = WAL")


def _named_files(atlas: OpenAtlas) -> list[str]:
    queries = (
        "SELECT features_file AS file FROM slides",
        "SELECT file FROM clusterings",
        "SELECT file FROM generations",
        "SELECT raw_file AS file FROM generations WHERE raw_file IS NOT NULL",
    )
    return [row["file"] for query in queries for row in atlas.catalog.rows(query)]


def restore(snapshot: Path | str, atlas: Path) -> dict[str, Any]:
    """Replace an atlas by a snapshot; the old atlas is kept beside it under another name.

    The audit log goes on with the restored atlas. So do uploaded slides that the snapshot lacks.

    Args:
        snapshot: folder or URL that :func:`take` wrote; it is not changed.
        atlas: path where the atlas is, or was.

    Returns:
        The new path of the old atlas, the restored revision, and the slides that came back or went.

    Raises:
        BadInput: there is no snapshot.
        Damaged: the snapshot is incomplete or damaged; the atlas is not changed.
        Busy: another process is writing to the atlas.
    """
    if is_url(snapshot):
        return _download(str(snapshot), atlas)
    snapshot = Path(snapshot)
    fresh = atlas.with_name(f"{atlas.name}.restoring-{os.getpid()}")
    try:
        return _swap(snapshot, fresh, atlas)
    except (HistoseekError, OSError):
        if atlas.exists():  # else the old one was renamed already, and the copy is wanted
            shutil.rmtree(fresh, ignore_errors=True)
        raise


def _swap(snapshot: Path, fresh: Path, atlas: Path) -> dict[str, Any]:
    """Copy a snapshot to ``fresh``, and put that in the place of the atlas."""
    take(OpenAtlas(snapshot), fresh)
    kept: Path | None = None
    now = _names(Catalog(fresh))
    old = now
    if atlas.exists():
        with exclusive(atlas / LOCK, f"atlas {atlas}"):
            old = _names(Catalog(atlas))
            _go_on_counting(fresh, atlas)
            logs = _carry_over(atlas, fresh)
            kept = _free_name(atlas)
            atlas.rename(kept)
            fresh.rename(atlas)
            for log in logs:  # of which the restored atlas has the same file
                (kept / log).unlink(missing_ok=True)
    else:
        fresh.rename(atlas)
    return {
        "atlas": str(atlas),
        "revision": OpenAtlas(atlas).catalog.revision(),
        "kept": None if kept is None else str(kept),
        "slides_back": sorted(now - old),
        "slides_gone": sorted(old - now),
    }


def _names(catalog: Catalog) -> set[str]:
    return {row["name"] for row in catalog.rows("SELECT name FROM slides")}


def _carry_over(atlas: Path, fresh: Path) -> list[str]:
    """Give the restored atlas what its snapshot lacks: uploads, also waiting ones, and the audit log.

    They are linked, so that a server that writes to the log goes on.

    Returns:
        The names of the log's files.
    """
    logs = [path.name for path in atlas.glob(f"{AUDIT}*") if path.is_file()]
    rows = Catalog(fresh).rows("SELECT source FROM slides")
    uploads = [path for row in rows if (path := place(atlas, row["source"])) is not None]
    for pending in (atlas / UPLOADS).glob(f"*/{PENDING}"):
        uploads += pending.parent.glob("*")
    for file in (*logs, *(str(path.relative_to(atlas)) for path in uploads)):
        if not (fresh / file).exists():
            (fresh / file).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                os.link(atlas / file, fresh / file)
            except OSError:  # a file system without links, or the file was just added to the atlas
                with suppress(FileNotFoundError):
                    shutil.copy2(atlas / file, fresh / file)
    return logs


def _download(url: str, atlas: Path) -> dict[str, Any]:
    """Restore an atlas from a URL."""
    files = Remote(url).files()
    with removed_at_end(_beside(atlas, "download")) as local:
        local.mkdir(parents=True)
        require_room(local, sum(file.size for file in files), url)
        for file in files:
            stopping.check()
            Remote(file.url).fetch(local / below(file.url, url))
        try:
            return restore(local, atlas)
        except (BadInput, Damaged) as error:
            raise type(error)(str(error).replace(str(local), url)) from error


def _go_on_counting(fresh: Path, atlas: Path) -> None:
    """Continue ids and revisions after those of the replaced atlas, so that none is used twice."""
    old, new = Catalog(atlas), Catalog(fresh)
    sequences = old.rows("SELECT name, seq FROM sqlite_sequence")
    meta = old.meta()
    with new.write() as db:
        for name, last in sequences:
            row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (name,)).fetchone()
            if row is None:
                db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (name, last))
            else:
                highest = max(last, row["seq"])
                db.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = ?", (highest, name))
        for key in (NEXT_TILE, REVISION):
            set_meta(db, key, str(max(int(meta[key]), int(get_meta(db, key)))))


def _free_name(atlas: Path) -> Path:
    number = 1
    while (path := atlas.with_name(f"{atlas.name}.before-restore-{number}")).exists():
        number += 1
    return path
