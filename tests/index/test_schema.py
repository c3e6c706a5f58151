"""Atlases of other schemas are refused by number; a change of the schema is applied once."""

import sqlite3

import pytest
from atlases import filled

from histoseek.errors import BadInput
from histoseek.index.atlas import Atlas
from histoseek.index.store import schema


def set_version(atlas, number):
    db = sqlite3.connect(atlas.path / "atlas.db")
    db.execute(f"PRAGMA user_version = {number}")
    db.close()


@pytest.mark.parametrize(
    "number, says",
    [
        (
            schema.newest() + 1,
            f"schema {schema.newest() + 1}.*schemas up to {schema.newest()}: upgrade histoseek",
        ),
        (1, "schema 1, which was never released; build the atlas again"),
    ],
)
def test_another_schema_is_refused_by_number(tmp_path, number, says):
    atlas = filled(tmp_path, slides=1, count=5)
    set_version(atlas, number)
    with pytest.raises(BadInput, match=says):
        Atlas(atlas.path)


def test_a_later_change_is_applied_when_an_atlas_is_opened_and_when_it_is_made(
    tmp_path, monkeypatch
):
    old = filled(tmp_path / "old", slides=1, count=5)

    def change(db):
        (key,) = db.execute("SELECT value FROM meta WHERE key = 'atlas_id'").fetchone()
        db.execute("CREATE TABLE later (atlas TEXT)")
        db.execute("INSERT INTO later VALUES (?)", (key,))

    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, change))
    for atlas in (Atlas(old.path), Atlas(old.path), filled(tmp_path / "new", slides=1, count=5)):
        rows = atlas.catalog.rows("SELECT atlas FROM later")
        assert [row["atlas"] for row in rows] == [atlas.store.identity]
