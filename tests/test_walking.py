"""Searching folders as found in practice: links, loops, hidden copies."""

import os

import pytest

from histoseek.artifacts.walking import once, summarised, walk
from histoseek.errors import BadInput


def names(walked, root):
    return [file.relative_to(root).as_posix() for file in walked.files]


def test_links_to_folders_are_followed_once_and_without_loops(tmp_path):
    root, nas = tmp_path / "slides", tmp_path / "nas"
    (root / "real").mkdir(parents=True)
    (nas / "deep").mkdir(parents=True)
    for path in (root / "one", root / "real/two", nas / "three", nas / "deep/four"):
        path.write_text(path.name)
    (root / "a-link").symlink_to(root / "real")
    (root / "batch").symlink_to(nas)
    (nas / "back").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "self").symlink_to(root)
    walked = walk(root)
    assert names(walked, root) == ["batch/deep/four", "batch/three", "one", "real/two"]
    reasons = {os.path.relpath(left.path, root): left.reason for left in walked.left_out}
    assert reasons == {
        "a-link": "link to a folder that is searched already",
        "batch/back": "link to a folder that is searched already",
        "self": "link to a folder that is searched already",
        "up": "link to a folder that contains the searched one",
    }


def test_a_file_has_its_real_name_where_that_is_found(tmp_path):
    (tmp_path / "a.svs").write_text("a")
    (tmp_path / "z.svs").symlink_to(tmp_path / "a.svs")
    (tmp_path / "0.svs").symlink_to(tmp_path / "a.svs")
    (tmp_path / "lost.svs").symlink_to(tmp_path / "gone.svs")
    walked = walk(tmp_path)
    assert names(walked, tmp_path) == ["a.svs"]
    assert [p.name for p in walked.aliases[tmp_path / "a.svs"]] == ["0.svs", "z.svs"]
    left = {os.path.basename(path): reason for path, reason in walked.left_out}
    assert left["lost.svs"] == "broken link"
    assert left["z.svs"] == f"the same file as {tmp_path / 'a.svs'}"
    # A link whose file lies elsewhere keeps its own name: a store of objects has no names to give.
    assert once([tmp_path / "z.svs"]).files == (tmp_path / "z.svs",)


def test_hidden_and_system_folders_are_left_out_and_named(tmp_path):
    kept = tmp_path / ".histoseek-own" / "slides"
    for folder in (
        ".snapshot/daily.0",
        ".Trash-1000",
        "@eaDir",
        ".ipynb_checkpoints",
        "#recycle",
        "b",
    ):
        (kept / folder).mkdir(parents=True)
        (kept / folder / "x.svs").write_text(folder)
    (kept / "._b.svs").write_text("")
    (kept / "Thumbs.db").write_text("")
    walked = walk(kept)  # its own parents may be hidden
    assert names(walked, kept) == ["b/x.svs"]
    lines = summarised(walked.left_out)
    assert lines[0].startswith("left out, hidden or system file: 2 (")
    assert lines[1].startswith("left out, hidden or system folder: 5 (") and lines[1].endswith(
        " …)"
    )


def test_a_folder_that_belongs_to_a_file_is_not_walked(tmp_path):
    (tmp_path / "case").mkdir()
    (tmp_path / "store.zarr").mkdir()
    for path in ("case.mrxs", "case/Data0001.dat", "store.zarr/0"):
        (tmp_path / path).write_text(path)
    walked = walk(tmp_path, lambda here, folders, files: {"case": None, "store.zarr": "a zarr"})
    assert names(walked, tmp_path) == ["case.mrxs"]
    assert [left.reason for left in walked.left_out] == ["a zarr"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BadInput, match="secret cannot be read"):
        walk(tmp_path)
