"""An atlas of every earlier schema opens, with all that was in it."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from atlases import SHA, features

from histoseek.artifacts.feature_files import content_sha256, read_features
from histoseek.artifacts.files import sha256_file
from histoseek.errors import BadInput
from histoseek.index.atlas import Atlas
from histoseek.index.clusters import fit
from histoseek.index.store.schema import MIGRATIONS
from histoseek.serving.encoders.open import DEFAULT_BUNDLE


def version_1(folder):
    """An atlas as the first schema was written: a row per tile, and per tile's cluster."""
    path = folder / "atlas"
    shutil.copytree(DEFAULT_BUNDLE, path / "encoder")
    (path / "features").mkdir()
    files = [features(path / f"features/s{n}.h5", 20 + n, n) for n in range(3)]
    files.append(
        features(
            path / "features/set.h5", 25, 9, name="set", kind="tiles",
            files=tuple(f"{i}.png" for i in range(25)),
            labels=tuple("xy"[i % 2] for i in range(25)),
        )
    )  # fmt: skip
    files.append(
        features(path / "features/glass.h5", 0, 10, about={"reason": "no tissue"})
    )  # fmt: skip
    db = sqlite3.connect(path / "atlas.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    MIGRATIONS[0](db)
    db.execute("PRAGMA user_version = 1")
    manifest = json.loads((DEFAULT_BUNDLE / "manifest.json").read_text())
    meta = {
        "encoder_name": manifest["name"], "encoder_sha256": SHA, "dim": str(manifest["dim"]),
        "metric": "cosine", "created_at": "2026-01-01T00:00:00Z", "revision": "4",
    }  # fmt: skip
    db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
    vectors = []
    for number, file in enumerate(files, start=1):
        item = read_features(file)
        vectors.append(item.features)
        db.execute(
            "INSERT INTO slides VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                number, item.name, item.kind, item.source, f"features/{file.name}",
                sha256_file(file), content_sha256(item), len(item.features),
                item.size_px_level0, item.mpp, item.target_mpp, item.width, item.height,
                "tumour" if number == 2 else None, "P1" if number == 2 else None,
                item.about.get("reason", ""), "2026-01-01T00:00:00Z",
            ),
        )  # fmt: skip
        for row in range(len(item.features)):
            db.execute(
                "INSERT INTO tiles (slide_id, row, x, y, file, label, patient) VALUES (?,?,?,?,?,?,?)",
                (
                    number, row, int(item.coords[row, 0]), int(item.coords[row, 1]),
                    item.files[row] if item.files else None,
                    item.labels[row] if item.labels else None, None,
                ),
            )  # fmt: skip
    clustering, placed = fit(np.concatenate(vectors), "kmeans", k=3)
    blob = clustering.to_bytes()
    (path / "clusters-kmeans.1.npz").write_bytes(blob)
    db.execute(
        "INSERT INTO clusterings VALUES (1, 'kmeans', 'kmeans', ?, 'clusters-kmeans.1.npz', ?, 3, 4, '')",
        (json.dumps(clustering.about), sha256_file(path / "clusters-kmeans.1.npz")),
    )
    for tile in range(len(placed.cluster)):
        db.execute(
            "INSERT INTO assignments VALUES (1, ?, ?, ?, ?, ?)",
            (
                tile + 1, int(placed.cluster[tile]), float(placed.distance[tile]),
                float(placed.strength[tile]), int(placed.unknown[tile]),
            ),
        )  # fmt: skip
    db.close()
    return path, vectors, placed


def test_the_first_schema_opens_with_everything(tmp_path):
    path, vectors, placed = version_1(tmp_path)
    atlas = Atlas(path)
    assert atlas.verify() == [] and len(atlas.slides()) == 5
    ids, stored = atlas.vectors()
    assert ids.tolist() == list(range(1, 20 + 21 + 22 + 25 + 1))
    assert np.array_equal(stored, np.concatenate(vectors))
    tumour = atlas.search(vectors[1][:1], 1)[0][0]
    assert (tumour.tile, tumour.slide, tumour.label, tumour.patient) == (21, "s1", "tumour", "P1")
    tile = atlas.search(vectors[3][4:5], 1)[0][0]
    assert (tile.slide, tile.file, tile.label) == ("set", "4.png", "x")
    assert tile.cluster == placed.cluster[20 + 21 + 22 + 4]
    assert np.array_equal(atlas.placed("kmeans")[1].cluster, placed.cluster)
    late = features(tmp_path / "late.h5", 5, 20)
    atlas.add([late])
    assert atlas.vectors()[0].max() == 93 and atlas.verify() == []  # ids go on after the last
    assert atlas.similar_slides("s1", 2)[0].name in {"s0", "s2", "set", "late"}


@pytest.mark.parametrize("statement", [1, 4, 9, 14])
def test_a_migration_that_is_killed_changes_nothing(tmp_path, statement):
    path, _, _ = version_1(tmp_path)
    code = (
        "import os, signal, sys, sqlite3\n"
        "from pathlib import Path\n"
        "from histoseek.index import migrations\n"
        "left = [int(sys.argv[2])]\n"
        "def run(db, script, real=migrations._run):\n"
        "    for statement in script.split(';\\n'):\n"
        "        if statement.strip():\n"
        "            left[0] -= 1\n"
        "            if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "            db.execute(statement)\n"
        "migrations._run = run\n"
        "from histoseek.index.atlas import Atlas\n"
        "Atlas(Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path, str(statement)])
    killed = done.returncode == -signal.SIGKILL
    db = sqlite3.connect(path / "atlas.db")
    assert db.execute("PRAGMA user_version").fetchone()[0] == (1 if killed else len(MIGRATIONS))
    db.close()
    assert Atlas(path).verify() == [] and os.path.exists(path)


def test_a_newer_schema_is_refused_by_number(tmp_path):
    path, _, _ = version_1(tmp_path)
    db = sqlite3.connect(path / "atlas.db")
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(BadInput, match=f"schema {len(MIGRATIONS) + 1}.*knows {len(MIGRATIONS)}"):
        Atlas(path)
