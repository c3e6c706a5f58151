"""Snapshots of an atlas that a server uses: its uploads, its audit log, and who may only read it."""

import os
import shutil
import threading
import time

import pytest
from atlases import features, filled

from histoseek.artifacts.audit_chain import ChainedLog, problems
from histoseek.artifacts.files import exclusive, publish_folder
from histoseek.errors import BadInput, Busy
from histoseek.index.atlas import Atlas
from histoseek.index.care.snapshots import restore


def uploaded(atlas, name, number):
    """Add a slide whose file is an upload; returns the file."""
    file = atlas.path / "uploads" / (f"{number:x}" * 16) / f"{name}.svs"
    file.parent.mkdir(mode=0o700, parents=True)
    file.write_bytes(name.encode())
    made = features(atlas.path.parent / f"{name}.h5", 20, number, source=str(file))
    assert atlas.add([made])[0].state == "added"
    return file


@pytest.fixture
def atlas(tmp_path):
    made = filled(tmp_path / "here", slides=2, count=20)
    uploaded(made, "up", 10)
    return made


def test_uploads_are_copied_or_named(atlas, tmp_path, cli, cli_json):
    waiting = atlas.path / "uploads" / ("c" * 16)
    waiting.mkdir()
    (waiting / "pending.json").write_text("{}")
    log = ChainedLog(atlas.path / "audit.jsonl")
    log.close()
    report = cli_json("index", "snapshot", atlas.path, "--out", tmp_path / "with")
    assert report["uploads"] == 1
    assert report["not_copied"] == ["1 upload not yet in the atlas", "the audit log (audit.jsonl)"]
    (source,) = (s["source"] for s in Atlas(tmp_path / "with").slides() if s["name"] == "up")
    assert source == str(tmp_path / "with/uploads" / ("a" * 16) / "up.svs")
    assert (tmp_path / "with/uploads" / ("a" * 16)).stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "with/audit.jsonl").exists()

    words = ("index", "snapshot", atlas.path, "--out", tmp_path / "without", "--without-uploads")
    said = cli(*words, check=True).stdout
    assert "not copied: the files of 1 uploaded slide" in said
    assert not (tmp_path / "without/uploads").exists()


def test_a_restored_atlas_has_its_uploads_and_goes_on_with_the_audit_log(atlas, tmp_path, cli_json):
    atlas.snapshot(tmp_path / "copy", with_uploads=False)
    log = ChainedLog(atlas.path / "audit.jsonl")
    log.append({"action": "search"})
    atlas.remove(["slide-0"])
    later = uploaded(atlas, "later", 11)
    waiting = atlas.path / "uploads" / ("c" * 16)
    waiting.mkdir()
    for name in ("pending.json", "w.svs"):
        (waiting / name).write_text("{}")
    report = cli_json("index", "restore", tmp_path / "copy", atlas.path)
    assert (report["slides_back"], report["slides_gone"]) == (["slide-0"], ["later"])
    log.append({"action": "add"})  # by a server that has the log open meanwhile
    log.close()
    assert len((atlas.path / "audit.jsonl").read_text().splitlines()) == 2
    assert problems(atlas.path / "audit.jsonl") == [] and Atlas(atlas.path).verify() == []
    (source,) = (s["source"] for s in Atlas(atlas.path).slides() if s["name"] == "up")
    assert source == str(atlas.path / "uploads" / ("a" * 16) / "up.svs")
    assert {path.name for path in waiting.iterdir()} == {"pending.json", "w.svs"}
    kept = atlas.path.with_name("atlas.before-restore-1")
    assert report["kept"] == str(kept) and not (kept / "audit.jsonl").exists()
    assert (kept / later.relative_to(atlas.path)).exists()


def test_who_may_only_read_copies_too(atlas, tmp_path, monkeypatch):
    from histoseek.index.care import snapshots

    with exclusive(atlas.path / ".lock", "it"), pytest.raises(Busy):
        atlas.snapshot(tmp_path / "copy")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    with exclusive(atlas.path / ".lock", "it"):  # which it cannot ask for
        atlas.snapshot(tmp_path / "copy")
    assert Atlas(tmp_path / "copy").verify() == []

    def changed(copied):
        monkeypatch.setattr(os, "access", access)
        Atlas(atlas.path).remove(["slide-1"])
        return copied

    named = snapshots._named_files
    monkeypatch.setattr(snapshots, "_named_files", lambda atlas: changed(named(atlas)))
    with pytest.raises(Busy, match="was written to while it was copied"):
        atlas.snapshot(tmp_path / "second")


def test_a_writer_can_wait_for_another(atlas, cli, monkeypatch):
    for wrong in ("soon", "-1", "1e9"):
        monkeypatch.setenv("HISTOSEEK_WAIT_S", wrong)
        with pytest.raises(BadInput, match="expected seconds from 0 to 86400"):
            atlas.remove(["slide-0"])
    monkeypatch.delenv("HISTOSEEK_WAIT_S")
    held, release = threading.Event(), threading.Event()

    def other():
        with exclusive(atlas.path / ".lock", "it"):
            held.set()
            release.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait(60)
    busy = cli("index", "remove", atlas.path, "slide-0")
    assert busy.returncode == 75 and "set HISTOSEEK_WAIT_S" in " ".join(busy.stderr.split())
    monkeypatch.setenv("HISTOSEEK_WAIT_S", "0.3")
    began = time.monotonic()
    assert cli("index", "remove", atlas.path, "slide-0").returncode == 75
    assert time.monotonic() - began >= 0.3
    monkeypatch.setenv("HISTOSEEK_WAIT_S", "60")
    threading.Timer(0.5, release.set).start()
    assert cli("index", "remove", atlas.path, "slide-0").returncode == 0
    thread.join()


def test_a_folder_of_a_group_stays_one(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    before = os.umask(0o002)
    try:
        with publish_folder(shared / "made") as folder:
            (folder / "x").write_text("x")
        with exclusive(shared / "made/.lock", "it"):
            pass
    finally:
        os.umask(before)
    assert (shared / "made").stat().st_mode & 0o7777 == 0o2775
    assert (shared / "made/.lock").stat().st_mode & 0o777 == 0o664


def test_an_upload_stays_while_the_slide_is_nowhere_else(atlas, tmp_path):
    """Features of the slide that were made on another machine, added to an atlas that was moved."""
    moved = Atlas(atlas.path.rename(tmp_path / "moved"))
    file = moved.path / "uploads" / ("a" * 16) / "up.svs"
    for seed, replace in ((10, False), (99, True)):
        made = features(tmp_path / "up.h5", 20, seed, source="/other/machine/up.svs")
        (done,) = moved.add([made], replace=replace)
        assert done.state != "failed" and file.exists()
        assert {s["name"]: s["source"] for s in moved.slides()}["up"] == str(file)
    assert moved.relocate(None, None, [tmp_path])[-1].state == "there"
    assert moved.view().columns.slides[-1]["source"] == str(file)
    moved.remove(["slide-0"])
    assert file.exists()
    other = moved.path / "uploads" / ("b" * 16) / "up.svs"
    other.parent.mkdir()
    other.write_bytes(b"new")
    moved.add([features(tmp_path / "up.h5", 20, 98, source=str(other))], replace=True)
    assert not file.parent.exists() and other.exists()


def test_uploads_on_another_disk_are_deleted_with_their_slide_only(atlas, tmp_path):
    uploaded(atlas, "two", 11)
    big = (atlas.path / "uploads").rename(tmp_path / "big")
    (atlas.path / "uploads").symlink_to(big)
    with atlas.catalog.write() as db:
        for name, folder in (("up", "a" * 16), ("two", "b" * 16)):
            db.execute(
                "UPDATE slides SET source = ? WHERE name = ?",
                (str(big / folder / f"{name}.svs"), name),
            )
    atlas.remove(["slide-0"])
    assert len(list(big.iterdir())) == 2
    atlas.remove(["up"])
    assert [path.name for path in big.iterdir()] == ["b" * 16]


def test_an_upload_that_cannot_be_deleted_is_said(atlas, cli, monkeypatch):
    from histoseek.index.store import uploads

    monkeypatch.setattr(uploads.shutil, "rmtree", lambda *_, **__: None)
    done = cli("index", "remove", atlas.path, "up")
    assert done.returncode == 1 and "cannot be deleted" in " ".join(done.stderr.split())
    assert "up" not in {s["name"] for s in atlas.slides()}


def test_a_copy_of_an_atlas_deletes_no_upload_of_the_first(atlas, tmp_path):
    copy = Atlas(shutil.copytree(atlas.path, tmp_path / "copy"))
    copy.remove(["up"])
    assert not (copy.path / "uploads" / ("a" * 16)).exists()
    assert (atlas.path / "uploads" / ("a" * 16) / "up.svs").exists()
    restored = tmp_path / "new"
    atlas.snapshot(tmp_path / "snap")
    assert restore(tmp_path / "snap", restored)["slides_back"] == []
    assert (restored / "uploads" / ("a" * 16) / "up.svs").read_bytes() == b"up"
