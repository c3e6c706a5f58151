"""Tile sets from every kind of source."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from histoseek.artifacts.tileset_files import open_tiles
from histoseek.artifacts.tilesets import concatenate
from histoseek.errors import BadInput


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_folder_per_class(tmp_path):
    for label, value in (("a", 10), ("b", 20)):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.png").write_bytes(png(value))
    (tmp_path / "notes.txt").write_text("not a tile")
    tiles = open_tiles(tmp_path)
    assert [(t.file, t.label, t.group) for t in tiles.tiles] == [
        ("a/1.png", "a", None), ("b/1.png", "b", None),
    ]  # fmt: skip
    assert tiles.read(1).shape == (8, 8, 3) and tiles.read(1)[0, 0, 0] == 20


@pytest.mark.parametrize("kind", ["w", "w:gz"])
def test_a_tar_with_and_without_manifest(tmp_path, kind):
    path = tmp_path / ("pack.tar" if kind == "w" else "pack.tar.gz")
    rows = b"file,label,group,organ\nx/1.png,t,g1,colon\nx/2.png,,,lung\nx/gone.png,t,g2,colon\n"
    for extra in ((), (("manifest.csv", rows),)):
        with tarfile.open(path, kind) as pack:
            for name, blob in (("x/1.png", png(1)), ("x/2.png", png(2)), *extra):
                info = tarfile.TarInfo(name)
                info.size = len(blob)
                pack.addfile(info, io.BytesIO(blob))
        tiles = open_tiles(path)
        assert tiles.name == "pack" and tiles.read(1)[0, 0, 0] == 2
    assert [t.label for t in tiles.tiles] == ["t", None, "t"] and tiles.tiles[1].extra[
        "organ"
    ] == "lung"
    with pytest.raises(BadInput, match=r"gone\.png is in the manifest but not in the tar"):
        tiles.read(2)
    assert len(tiles.without("organ", ["lung"])) == 2


def test_an_npz_with_labels_and_groups(tmp_path):
    np.savez(
        tmp_path / "p.npz", images=np.arange(3 * 16, dtype=np.uint8).reshape(3, 4, 4),
        labels=np.array([0, 1, -1]), class_names=np.array([b"a", b"b"]), group=np.array([7, 7, 8]),
        is_test=np.array([False, True, True]), readme=np.array("of nobody"),
    )  # fmt: skip
    tiles = open_tiles(tmp_path / "p.npz")
    assert [(t.label, t.group) for t in tiles.tiles] == [("a", "7"), ("b", "7"), (None, "8")]
    assert tiles.tiles[2].extra == {"is_test": "True"}
    assert len(tiles.without("is_test", ["True"])) == 1
    assert tiles.read(0).shape == (4, 4, 3)


def test_what_is_no_tile_set_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("no tar")
    (tmp_path / "text.npz").write_text("no npz")
    (tmp_path / "m.csv").write_text("name,label\na,b\n")
    (tmp_path / "twice.csv").write_text("file\na.png\na.png\n")
    (tmp_path / "x.parquet").write_text("")
    np.savez(tmp_path / "float.npz", images=np.zeros((2, 4, 4)))
    np.savez(tmp_path / "label.npz", images=np.zeros((2, 4, 4), np.uint8), label=np.zeros(2))
    np.savez(tmp_path / "rows.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(3))
    for name, says in (
        ("none", "does not exist"), ("empty", "no tile"), ("text.tar", "tar"), ("text.npz", "npz"),
        ("m.csv", "'file'"), ("twice.csv", "twice"), ("x.parquet", "not a tile set"),
        ("float.npz", "uint8"), ("rows.npz", "3 rows"),
        ("label.npz", "array 'label'; expected 'labels'"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=says):
            open_tiles(tmp_path / name)


def test_a_manifest_found_in_a_folder_stays_inside_it(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "set/manifest.csv").write_text("file\n../secret.png\n")
    with pytest.raises(BadInput, match="outside"):
        open_tiles(tmp_path / "set")


def test_the_fingerprint_knows_content_and_labels(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.png").write_bytes(png(1))
    first = open_tiles(tmp_path)
    assert open_tiles(tmp_path).identity() == first.identity()
    assert first.relabelled(["file"]).identity() != first.identity()
    assert first.take([0]).identity() != first.identity()
    (tmp_path / "b" / "1.png").write_bytes(png(1) + b"x")
    assert open_tiles(tmp_path).identity() != first.identity()


def test_sets_joined_share_no_group(tile_folder):
    one = open_tiles(tile_folder)
    both = concatenate([one, one.relabelled(["group"])])
    groups = {t.group for t in one.tiles}
    assert len({t.group for t in both.tiles}) == 2 * len(groups)
    assert len(both) == 144 and both.tiles[0].group.startswith("kinds/")
    assert np.array_equal(both.read(100), one.read(28))


@pytest.mark.shared
@pytest.mark.parametrize(
    ("pack", "count", "groups"),
    [
        ("lc25000.tar", 2843, 984), ("histo_mix.tar", 1154, 439), ("busi.tar", 607, 465),
        ("cxr_pneumonia.tar", 1560, 1283), ("idc_tiny.tar", 82, 1), ("mnist.npz", 20000, None),
        ("crchisto.npz", 7953, None), ("cifar10.tar.gz", 16000, None),
    ],
)  # fmt: skip
def test_the_real_packs_open_and_read(shared, pack, count, groups):
    tiles = open_tiles(shared / pack)
    assert len(tiles) == count
    if groups:
        assert len({t.group for t in tiles.tiles}) == groups
    for number in (0, count // 2, count - 1):
        assert tiles.read(number).ndim == 3
