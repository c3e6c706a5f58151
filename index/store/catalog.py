"""The catalog: the SQLite database (WAL) of an atlas. Every change is committed by writing its row here."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BadInput, Busy, Damaged, HistoseekError, StorageFailed
from . import schema
from .packing import SEAL, seal

FILE = "atlas.db"
REVISION = "revision"
ATLAS_ID = "atlas_id"
NEXT_TILE = "next_tile"
CANNOT_WRITE = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN
}  # fmt: skip


class Catalog:
    """The database of an atlas; every method opens its own connection, so threads may share it."""

    def __init__(self, folder: Path) -> None:
        """Use the database in the folder of an atlas; nothing is opened yet."""
        self.path = folder / FILE

    def create(self, meta: dict[str, str]) -> None:
        """Create the database and its first rows."""
        self.path.touch()
        with self._connect() as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("BEGIN IMMEDIATE")
            first = schema.create(db)
            for key, value in {**first, **meta, REVISION: "0"}.items():
                set_meta(db, key, value)
            db.execute(f"PRAGMA user_version = {schema.FIRST}")
            db.execute("COMMIT")
            self._migrate(db)

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        try:
            db = sqlite3.connect(self._uri(), uri=True, timeout=30, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise BadInput(f"{self.path} cannot be opened ({error}); check the path") from error
        try:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA synchronous = FULL")
            yield db
        except sqlite3.OperationalError as error:
            raise _operational(self.path, error) from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # damaged text is not UTF-8
            raise Damaged(
                f"{self.path} is damaged ({error}); restore the atlas from a copy, or create a new atlas "
                "from its feature files"
            ) from error
        finally:
            db.close()

    def _can_write(self) -> bool:
        return os.access(self.path.parent, os.W_OK) and os.access(self.path, os.W_OK)

    def _uri(self) -> str:
        """Return the address for SQLite: read-only without write permission.

        The database is then read together with the writer's log. If there is no log, it is opened as
        immutable, because SQLite could not create one.
        """
        uri = self.path.absolute().as_uri()
        if self._can_write():
            return f"{uri}?mode=rw"
        try:
            with closing(sqlite3.connect(f"{uri}?mode=ro", uri=True)) as db:
                db.execute("SELECT * FROM meta").fetchall()
            return f"{uri}?mode=ro"
        except sqlite3.OperationalError:
            return f"{uri}?mode=ro&immutable=1"

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection that sees one consistent state.

        Raises:
            BadInput: there is no database, or a newer histoseek wrote it.
            Damaged: the database cannot be read.
        """
        self._check_there()
        with self._connect() as db:
            self._check_version(db)
            db.execute("BEGIN")
            yield db
            db.execute("ROLLBACK")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection; its changes are committed together if the block raises nothing.

        Every commit increases the revision by one, so that readers notice the change.

        Raises:
            BadInput: there is no database.
            Busy: the database stayed locked for more than 30 s.
            StorageFailed: the database cannot be written.
        """
        self._check_there()
        with self._connect() as db:
            self._check_version(db)
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            set_meta(db, REVISION, str(int(get_meta(db, REVISION)) + 1))
            db.execute("COMMIT")

    def _check_there(self) -> None:
        try:
            exists = self.path.is_file()
        except OSError as error:
            raise BadInput(
                f"{self.path} cannot be read ({error.strerror}); check the permissions"
            ) from error
        if not exists:
            raise BadInput(
                f"{self.path.parent} is not an atlas: it has no file {FILE}; check the path, or create an "
                "atlas with `histoseek index create`"
            )

    def _check_version(self, db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            raise Damaged(
                f"{self.path} has no tables, because creating the atlas was interrupted; delete the folder "
                "and create the atlas again"
            )
        if version > schema.newest():
            raise BadInput(
                f"{self.path} has schema {version}; this version of histoseek reads schemas up to "
                f"{schema.newest()}: upgrade histoseek"
            )
        if version < schema.FIRST:
            raise BadInput(
                f"{self.path} has schema {version}, which was never released; build the atlas again from "
                "its feature files with `histoseek index create` and `histoseek index add`"
            )
        if version < schema.newest() and self._can_write():
            self._migrate(db)

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Bring the schema up to date in one transaction."""
        db.execute("BEGIN IMMEDIATE")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        for migrate in schema.MIGRATIONS[version - schema.FIRST :]:
            migrate(db)
        db.execute(f"PRAGMA user_version = {schema.newest()}")
        db.execute("COMMIT")

    def meta(self) -> dict[str, str]:
        """Return the atlas's properties: encoder, dim, revision and so on.

        Raises:
            Damaged: one of them is missing.
        """
        meta = {row["key"]: row["value"] for row in self.rows("SELECT key, value FROM meta")}
        for key in ("encoder_sha256", REVISION, NEXT_TILE, ATLAS_ID):
            if key not in meta:
                raise Damaged(
                    f"{self.path} has no value for {key!r}; restore the atlas from a copy"
                )
        return meta

    def revision(self) -> int:
        """Return the number of committed changes."""
        return int(self.meta()[REVISION])

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Run one query and return all rows."""
        with self.read() as db:
            return db.execute(query, values).fetchall()


def _operational(path: Path, error: sqlite3.OperationalError) -> HistoseekError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return Busy(f"{path} is locked by another process; wait until it ends and try again")
    if code in CANNOT_WRITE:
        return StorageFailed(
            f"cannot write {path} ({error}); nothing already stored was changed; free space or check "
            "the folder's permissions, then run the same command again"
        )
    return Damaged(f"{path} is not a valid atlas database ({error}); run `histoseek index verify`")


def insert(db: sqlite3.Connection, table: str, row: dict[str, Any]) -> int:
    """Insert one row (values by column name) with its checksum; return its id."""
    row = _plain(row)
    sealed = {**row, SEAL: seal(row)}
    marks = ", ".join("?" for _ in sealed)
    cursor = db.execute(
        f"INSERT INTO {table} ({', '.join(sealed)}) VALUES ({marks})", tuple(sealed.values())
    )
    return int(cursor.lastrowid or 0)


def update(
    db: sqlite3.Connection, table: str, where: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Change the rows that have the values ``where``, and update their checksums."""
    where, changes = _plain(where), _plain(changes)
    conditions = " AND ".join(f"{key} = ?" for key in where)
    select = f"SELECT rowid AS row_number, * FROM {table} WHERE {conditions}"
    for row in map(dict, db.execute(select, (*where.values(),)).fetchall()):
        number = row.pop("row_number")
        changed = {**changes, SEAL: seal({**row, **changes})}
        sets = ", ".join(f"{key} = ?" for key in changed)
        db.execute(f"UPDATE {table} SET {sets} WHERE rowid = ?", (*changed.values(), number))


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without numpy's numbers and texts, which SQLite would store as bytes."""
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()}


def get_meta(db: sqlite3.Connection, key: str) -> str:
    """Return one property of the atlas; "" if it is not stored."""
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return "" if row is None else str(row["value"])


def set_meta(db: sqlite3.Connection, key: str, value: str) -> None:
    """Set one property of the atlas, in the caller's transaction."""
    row = {"key": key, "value": value}
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", (key, value, seal(row)))


def now() -> str:
    """Return the time as UTC text."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
