"""The catalog: what an atlas holds, in SQLite (WAL). A row here is the commit mark of every change."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import BadInput, Busy, Damaged, HistoseekError, StorageFailed

FILE = "atlas.db"


_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE slides (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    source TEXT NOT NULL,
    features_file TEXT NOT NULL,
    features_sha256 TEXT NOT NULL,
    content_sha256 TEXT NOT NULL,
    tiles INTEGER NOT NULL,
    size_px_level0 INTEGER NOT NULL,
    mpp REAL,
    target_mpp REAL,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    label TEXT,
    patient TEXT,
    reason TEXT NOT NULL,
    added_at TEXT NOT NULL
);
CREATE TABLE tiles (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    slide_id INTEGER NOT NULL REFERENCES slides (id),
    row INTEGER NOT NULL,
    x INTEGER NOT NULL,
    y INTEGER NOT NULL,
    file TEXT,
    label TEXT,
    patient TEXT,
    UNIQUE (slide_id, row)
);
CREATE TABLE generations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    revision INTEGER NOT NULL,
    file TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    vectors INTEGER NOT NULL,
    created_at TEXT NOT NULL
);
CREATE TABLE clusterings (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    method TEXT NOT NULL,
    about TEXT NOT NULL,
    file TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    clusters INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    created_at TEXT NOT NULL
);
CREATE TABLE assignments (
    clustering_id INTEGER NOT NULL REFERENCES clusterings (id),
    tile_id INTEGER NOT NULL REFERENCES tiles (id),
    cluster INTEGER NOT NULL,
    distance REAL NOT NULL,
    strength REAL NOT NULL,
    unknown INTEGER NOT NULL,
    PRIMARY KEY (clustering_id, tile_id)
) WITHOUT ROWID;
CREATE INDEX assignments_of_tile ON assignments (tile_id);
"""


def _version_1(db: sqlite3.Connection) -> None:
    for statement in _TABLES.split(";\n"):
        db.execute(statement)


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_version_1,)
"""Schema changes in order; the database's ``user_version`` is how many were applied."""


class Catalog:
    """An atlas's database; every method opens its own connection, so threads need no care."""

    def __init__(self, folder: Path) -> None:
        """Name the database of the atlas in ``folder``; nothing is opened yet."""
        self.path = folder / FILE

    def create(self, meta: dict[str, str]) -> None:
        """Make the database with its first rows."""
        with self._connect() as db:
            db.execute("PRAGMA journal_mode = WAL")
            self._migrate(db)
        with self.write() as db:
            db.executemany("INSERT INTO meta VALUES (?, ?)", [*meta.items(), ("revision", "0")])

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        try:
            db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise BadInput(f"{self.path} cannot be opened ({error}); check the path") from error
        try:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA synchronous = FULL")
            yield db
        except sqlite3.OperationalError as error:
            raise _operational(self.path, error) from error
        except sqlite3.DatabaseError as error:
            raise Damaged(
                f"{self.path} is damaged ({error}); restore the atlas from a copy, or build it again "
                "from its feature files"
            ) from error
        finally:
            db.close()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection that sees one consistent state.

        Raises:
            BadInput: no database, or one of a newer histoseek.
            Damaged: the database is not readable.
        """
        if not self.path.is_file():
            raise BadInput(f"{self.path.parent} is not an atlas (no {FILE}); create one first")
        with self._connect() as db:
            self._check_version(db)
            db.execute("BEGIN")
            yield db
            db.execute("ROLLBACK")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection whose changes are committed together when the block ends well."""
        with self._connect() as db:
            self._check_version(db)
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def _check_version(self, db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            raise Damaged(f"{self.path} has no schema; the atlas was not created whole: remove it")
        if version > len(MIGRATIONS):
            raise BadInput(
                f"{self.path} has schema {version}; this histoseek knows {len(MIGRATIONS)}: upgrade it"
            )
        if version < len(MIGRATIONS):
            self._migrate(db)

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Bring the schema up to date in one transaction."""
        db.execute("BEGIN IMMEDIATE")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        for migrate in MIGRATIONS[version:]:
            migrate(db)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")

    def meta(self) -> dict[str, str]:
        """Return the atlas's own facts: encoder, dim, revision."""
        with self.read() as db:
            return {row["key"]: row["value"] for row in db.execute("SELECT key, value FROM meta")}

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Run one query and return all rows."""
        with self.read() as db:
            return db.execute(query, values).fetchall()


def _operational(path: Path, error: sqlite3.OperationalError) -> HistoseekError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return Busy(f"{path} is locked by another process; wait until it ends and try again")
    if code in {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
    }:
        return StorageFailed(
            f"cannot write {path} ({error}); nothing already stored was changed; free space or check "
            "the folder's permissions, then run the same command again"
        )
    return Damaged(f"{path} does not answer as an atlas should ({error}); run `index verify`")


def insert(db: sqlite3.Connection, table: str, row: dict[str, Any]) -> int:
    """Insert one row given by column names; return its id."""
    marks = ", ".join("?" for _ in row)
    cursor = db.execute(
        f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values())
    )
    return int(cursor.lastrowid or 0)


def now() -> str:
    """Return the time as UTC text."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def bump_revision(db: sqlite3.Connection) -> int:
    """Count one more change of the vectors, inside the caller's transaction; return the number."""
    db.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'revision'")
    return int(db.execute("SELECT value FROM meta WHERE key = 'revision'").fetchone()[0])
