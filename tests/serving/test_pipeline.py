"""Embedding: one complete feature file per slide or none, and a record of every failure."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from schedule import rounds

from histoseek.artifacts.feature_files import Features, read_features
from histoseek.artifacts.feature_writer import write_features
from histoseek.errors import BadInput, StorageFailed
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import open_encoder


@pytest.fixture(scope="module")
def encoder():
    return open_encoder("default")


def embed(inputs, encoder, out, kind="auto", **options):
    chosen = EmbedOptions(**options)
    jobs = find_jobs(inputs, kind, chosen.manifest)
    return embed_jobs(jobs, encoder, out, chosen, lambda *_: None)


def test_a_slide_becomes_a_file_in_tridents_layout(make_slide, encoder, tmp_path):
    path = make_slide(tmp_path / "case-1.tiff")
    (result,) = embed([path], encoder, tmp_path / "out")
    assert result.state == "done" and result.tiles > 5
    file = tmp_path / f"out/20x_224px_0px_overlap/features_{encoder.manifest.name}/case-1.h5"
    assert str(file) == result.features
    with h5py.File(file) as stored:
        features, coords = stored["features"], stored["coords"]
        assert features.shape == (result.tiles, encoder.manifest.dim)
        assert features.dtype == np.float32 and coords.dtype == np.int64
        assert features.attrs["encoder_sha256"] == encoder.manifest.sha256
        expected = {
            "patch_size": 224, "patch_size_level0": 224, "level0_magnification": 20,
            "target_magnification": 20, "overlap": 0, "level0_width": 1024, "level0_height": 1024,
            "name": "case-1",
        }  # fmt: skip
        assert {k: coords.attrs[k] for k in expected} == expected
        assert {"savetodir", "mpp"} <= set(coords.attrs)


def test_features_are_the_encoders_own(make_slide, encoder, tmp_path):
    from histoseek.serving.slides.slide import open_slide

    path = make_slide(tmp_path / "a.tiff")
    (result,) = embed([path], encoder, tmp_path / "out", jobs=3)
    item = read_features(tmp_path / "out" / result.features)
    with open_slide(path) as slide:
        tiles = np.stack([slide.read_tile(int(x), int(y), 224, 224) for x, y in item.coords])
    assert np.abs(item.features - encoder.embed(tiles)).max() < 1e-5


def test_a_second_run_skips_and_another_folder_gets_the_same_features(
    make_slide, encoder, tmp_path
):
    path = make_slide(tmp_path / "a.tiff")
    (first,) = embed([path], encoder, tmp_path / "out")
    (second,) = embed([path], encoder, tmp_path / "out")
    assert (first.state, second.state) == ("done", "skipped")
    (again,) = embed([path], encoder, tmp_path / "elsewhere")
    one, two = (read_features(tmp_path / r.features) for r in (first, again))
    assert np.array_equal(one.features, two.features) and one.about == two.about


def test_other_options_or_a_changed_slide_are_embedded_again(make_slide, encoder, tmp_path):
    path = make_slide(tmp_path / "a.tiff")
    embed([path], encoder, tmp_path / "out")
    assert embed([path], encoder, tmp_path / "out", min_tissue=0.9)[0].state == "done"
    make_slide(path, seed=3)
    assert embed([path], encoder, tmp_path / "out", min_tissue=0.9)[0].state == "done"


def test_slides_of_one_name_do_not_overwrite_each_other(make_slide, encoder, tmp_path):
    paths = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        paths.append(make_slide(tmp_path / str(number) / "slide.tiff", seed=number, side=512))
    together = embed(paths, encoder, tmp_path / "out")
    assert len({r.features for r in together}) == 3 and all(r.state == "done" for r in together)
    for path in paths:
        embed([path], encoder, tmp_path / "one by one")
    files = list((tmp_path / "one by one").rglob("*.h5"))
    assert len(files) == 3
    assert {read_features(f).source for f in files} == {str(p) for p in paths}


def test_a_slide_embedded_before_its_namesake_came_stays_one(make_slide, encoder, tmp_path):
    for number in "12":
        (tmp_path / number).mkdir()
        make_slide(tmp_path / number / "slide.tiff", seed=int(number), side=512)
    both = [tmp_path / number / "slide.tiff" for number in "12"]
    embed(both[:1], encoder, tmp_path / "out")
    states = [r.state for r in embed(both, encoder, tmp_path / "out")]
    assert states == ["skipped", "done"] and len(list(tmp_path.rglob("*.h5"))) == 2


def test_a_replaced_tile_is_noticed(tile_folder, encoder, tmp_path):
    import shutil

    shutil.copytree(tile_folder, tmp_path / "kinds")
    manifest = tmp_path / "kinds/manifest.csv"
    assert embed([manifest], encoder, tmp_path / "out")[0].state == "done"
    shutil.copy(tmp_path / "kinds/cat/01.png", tmp_path / "kinds/cat/00.png")
    assert embed([manifest], encoder, tmp_path / "out")[0].state == "done"


def test_a_corrected_label_is_taken_over(make_slide, encoder, tmp_path):
    path = make_slide(tmp_path / "a.tiff", side=512)
    for label in ("benign", "malignant"):
        (tmp_path / "m.csv").write_text(f"file,label\na.tiff,{label}\n")
        (result,) = embed([path], encoder, tmp_path / "out", manifest=tmp_path / "m.csv")
        assert read_features(tmp_path / result.features).about["row"]["label"] == label


def test_tiles_are_not_invented_from_a_far_coarser_slide(make_slide, encoder, tmp_path):
    path = make_slide(tmp_path / "overview.tiff", mpp=29.0, side=512)
    (result,) = embed([path], encoder, tmp_path / "out")
    assert result.state == "failed" and "29 µm" in result.reason and "--mpp" in result.reason
    (result,) = embed([path], encoder, tmp_path / "out", mpp=29.0)
    assert result.state == "done"


def test_slides_beside_their_manifest_are_slides(make_slide, tmp_path):
    make_slide(tmp_path / "a.tiff", side=512)
    (tmp_path / "manifest.csv").write_text("file,label\na.tiff,benign\n")
    (job,) = find_jobs([tmp_path], manifest=tmp_path / "manifest.csv")
    assert job.kind == "slide" and job.row["label"] == "benign"


def test_less_than_one_worker_is_refused():
    with pytest.raises(BadInput, match="--jobs"):
        EmbedOptions(jobs=0)


@pytest.mark.shared
def test_every_file_of_other_projects_is_embedded_or_refused_with_a_reason(
    shared, encoder, tmp_path
):
    with tarfile.open(shared / "formats.tar") as pack:
        pack.extractall(tmp_path / "formats", filter="data")
    inside = sorted((tmp_path / "formats").rglob("*"))
    files = [p for p in inside if p.is_file() and p.suffix not in {".csv", ".txt", ".md"}]
    results = embed(files, encoder, tmp_path / "out", assume_mpp=0.5)
    assert len(results) == len(files) == 29
    for result in results:
        assert result.ok or (len(result.reason) > 30 and "unexpected" not in result.reason), result
        assert result.state in {"done", "empty", "failed", "partial"}


def test_no_tissue_is_a_result_with_a_reason(make_slide, encoder, tmp_path):
    glass = np.full((600, 600, 3), 243, np.uint8)
    path = make_slide(tmp_path / "glass.tiff", pixels=glass)
    (result,) = embed([path], encoder, tmp_path / "out")
    assert result.state == "empty" and "no tissue" in result.reason
    item = read_features(tmp_path / result.features)
    assert item.features.shape == (0, encoder.manifest.dim) and item.coords.shape == (0, 2)
    assert "no tissue" in item.about["reason"]


def test_bad_slides_stop_no_good_one_and_the_exit_code_tells(make_slide, cli, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    good = make_slide(slides / "good.tiff", side=512)
    (slides / "zero.svs").write_bytes(b"")
    (slides / "text.svs").write_text("no slide")
    (slides / "cut.tiff").write_bytes(good.read_bytes()[: good.stat().st_size // 3])
    make_slide(slides / "no-mpp.tiff", mpp=None, side=512)
    missing = slides / "missing.svs"
    done = cli("embed", slides, missing, "--as", "slides", "--out", tmp_path / "out", "--json")
    report = json.loads(done.stdout)
    states = {r["name"]: (r["state"], r["reason"]) for r in report["results"]}
    assert done.returncode == 1 and not report["ok"]
    assert states["good"][0] == "done"
    assert {n: s for n, (s, _) in states.items() if n != "good"} == dict.fromkeys(
        ["zero", "text", "cut", "no-mpp", "missing"], "failed"
    )
    for name, words in (
        ("zero", "0 bytes"), ("text", "slide"), ("no-mpp", "--assume-mpp"), ("missing", "not exist"),
    ):  # fmt: skip
        assert words in states[name][1]
        assert name in states[name][1]
    assert json.loads((tmp_path / "out/status/zero.json").read_text())["state"] == "failed"
    mended = cli(
        "embed",
        slides,
        "--as",
        "slides",
        "--out",
        tmp_path / "out",
        "--assume-mpp",
        "0.5",
        "--json",
    )
    assert {r["name"]: r["state"] for r in json.loads(mended.stdout)["results"]}["no-mpp"] == "done"


@pytest.mark.shared
def test_a_slide_cut_short_is_named_and_one_bad_tile_costs_only_itself(
    cmu_slide, encoder, tmp_path
):
    blob = cmu_slide.read_bytes()
    (tmp_path / "cut.svs").write_bytes(blob[: len(blob) * 2 // 3])
    (tmp_path / "header.svs").write_bytes(blob[:2000])
    damaged = bytearray(blob)
    import tifffile

    with tifffile.TiffFile(cmu_slide) as tiff:
        page = tiff.pages[0]
        number = int(np.argmax(page.databytecounts))
        start = page.dataoffsets[number]
        damaged[start : start + 600] = b"\0" * 600
    (tmp_path / "one-bad-tile.svs").write_bytes(damaged)
    results = {r.name: r for r in embed([tmp_path], encoder, tmp_path / "out", geojson=True)}
    for name in ("cut", "header"):
        assert results[name].state == "failed" and "copy it again" in results[name].reason
    partial = results["one-bad-tile"]
    assert partial.state == "partial" and not partial.ok
    assert 1 <= len(partial.unreadable) <= 6 and "x=" in partial.unreadable[0]
    drawn = json.loads((tmp_path / "out/geojson/one-bad-tile.tiles.geojson").read_text())[
        "features"
    ]
    names = [tile["properties"]["name"] for tile in drawn]
    assert names.count("left out: unreadable") == len(partial.unreadable)
    assert [name for name in names if name.isdigit()] == list(map(str, range(partial.tiles)))
    whole = embed([cmu_slide], encoder, tmp_path / "whole")[0]
    places, all_places = (
        {tuple(xy) for xy in read_features(Path(r.features)).coords.tolist()}
        for r in (partial, whole)
    )
    assert len(all_places - places) <= len(partial.unreadable)  # nothing vanished without a record
    assert len(places - all_places) <= 4  # glass beside the bad spot may have been tried too


def test_a_folder_of_tiles_keeps_labels_groups_and_names_what_it_could_not_read(
    tile_folder, encoder, tmp_path
):
    import shutil

    folder = tmp_path / "kinds"
    shutil.copytree(tile_folder, folder)
    (folder / "cat/03.png").write_bytes(b"broken")
    (result,) = embed([folder], encoder, tmp_path / "out")
    assert result.state == "partial" and "cat/03.png" in result.unreadable[0]
    item = read_features(tmp_path / result.features)
    assert item.kind == "tiles" and len(item.features) == 71
    assert set(item.labels) == {"cat", "retina", "tissue"} and "cat/03.png" not in item.files
    assert item.groups[item.files.index("cat/04.png")] == "cat-1"
    shutil.copy(tile_folder / "cat/03.png", folder / "cat/03.png")
    assert embed([folder], encoder, tmp_path / "out")[0].state == "done"


def test_a_tar_and_a_manifest_are_tile_sets_too(tile_folder, encoder, tmp_path):
    with tarfile.open(tmp_path / "pack.tar", "w") as pack:
        pack.add(tile_folder, arcname=".")
    results = embed(
        [tmp_path / "pack.tar", tile_folder / "manifest.csv"], encoder, tmp_path / "out"
    )
    one, two = (read_features(tmp_path / r.features) for r in results)
    assert one.files == two.files and np.array_equal(one.features, two.features)


def test_columns_of_a_tile_set_that_are_not_stored_are_named(tile_folder, encoder, tmp_path):
    (tmp_path / "m.csv").write_text("File;LABEL;patient;Scanner\ncat/00.png;cat;P1;Aperio\n")
    (result,) = embed([tile_folder], encoder, tmp_path / "out", manifest=tmp_path / "m.csv")
    assert result.notes[-1] == "columns of the manifest that are not stored per tile: Scanner"
    assert any("column 'LABEL' is read as 'label'" in note for note in result.notes)
    item = read_features(tmp_path / result.features)
    assert (item.labels, item.groups) == (("cat",), ("P1",))


def test_slides_and_pictures_mixed_are_not_guessed_at(make_slide, tissue, tmp_path):
    make_slide(tmp_path / "a.tiff", side=512)
    Image.fromarray(tissue).save(tmp_path / "b.png")
    with pytest.raises(BadInput, match="--as slides"):
        find_jobs([tmp_path])


def test_a_manifest_gives_slides_their_scale_label_and_patient(make_slide, encoder, tmp_path):
    path = make_slide(tmp_path / "a.tiff", mpp=None, side=512)
    (tmp_path / "m.csv").write_text("file,mpp,label,patient\na.tiff,0.5,benign,P1\n")
    (result,) = embed([path], encoder, tmp_path / "out", manifest=tmp_path / "m.csv")
    about = read_features(tmp_path / result.features).about
    assert about["row"]["patient"] == "P1" and about["key"]["mpp"] == 0.5
    (tmp_path / "m.csv").write_text("file,mpp\na.tiff,fine\n")
    (failed,) = embed([path], encoder, tmp_path / "out2", manifest=tmp_path / "m.csv")
    assert failed.state == "failed" and "'fine'" in failed.reason


def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path):
    """RLIMIT_FSIZE makes every write past the limit fail, as a full disk or a quota does."""
    path = tmp_path / "slide.h5"
    small = Features("s", "e", "0" * 64, np.ones((4, 8), np.float32), np.zeros((4, 2), np.int64))
    write_features(path, small)
    before = path.read_bytes()
    code = (
        "import numpy as np, resource, sys\n"
        "from pathlib import Path\n"
        "from histoseek.artifacts.feature_files import Features\n"
        "from histoseek.artifacts.feature_writer import write_features\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "big = Features('s', 'e', '0' * 64, np.ones((9000, 64), np.float32), np.zeros((9000, 2), int))\n"
        "try:\n"
        "    write_features(Path(sys.argv[1]), big)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout.startswith("StorageFailed no space left"), done.stdout + done.stderr
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["slide.h5"]


@pytest.mark.slow
@pytest.mark.deep
@pytest.mark.parametrize("whose", ["library", "command line"])
def test_ctrl_c_at_any_moment_of_writing_ends_cleanly(tmp_path, whose):
    """An exception inside a call of HDF5 would break the process."""
    sent = rounds(30, 100)
    code = (
        "import os, random, signal, sys, threading, time\n"
        "import numpy as np\n"
        "from pathlib import Path\n"
        "from histoseek.artifacts.feature_files import Features\n"
        "from histoseek import stopping\n"
        "from histoseek.artifacts.feature_writer import FeatureWriter\n"
        "if sys.argv[2] == 'command line': stopping.arm()\n"
        "random.seed(0)\n"
        "rows, stopped = np.ones((5, 64), np.float32), 0\n"
        "item = Features('s', 'e', '0' * 64, np.ones((400, 64), np.float32), np.zeros((400, 2), int))\n"
        "for n in range(int(sys.argv[3])):\n"
        "    wait = random.uniform(0, .02)\n"
        "    timer = threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT))\n"
        "    try:\n"
        "        timer.start()\n"
        "        with FeatureWriter(Path(sys.argv[1]) / f'{n}.h5', 64, 5) as out:\n"
        "            for _ in range(80):\n"
        "                out.append(rows)\n"
        "                stopping.check()\n"
        "            out.publish(item)\n"
        "        for _ in range(100): stopping.check(), time.sleep(.01)\n"
        "    except KeyboardInterrupt:\n"
        "        stopped += 1\n"
        "    stopping.settle()\n"
        "print('stopped', stopped)\n"
    )
    command = [sys.executable, "-X", "faulthandler", "-c", code, tmp_path, whose, str(sent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Python itself drops an exception that meets a callback of a weak reference; it says so, and goes on.
    dropped = done.stderr.count("Exception ignored") if whose == "library" else 0
    assert done.stdout == f"stopped {sent - dropped}\n" and dropped <= sent / 10
    assert dropped or done.stderr == ""
    assert list(tmp_path.glob("*.histoseek-tmp")) == []
    for path in tmp_path.glob("*.h5"):
        assert read_features(path).features.shape == (400, 64)


def test_a_full_disk_in_the_middle_of_embed_keeps_what_is_done(make_slide, cli_process, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    make_slide(slides / "a-small.tiff", side=300)
    make_slide(slides / "b-large.tiff", side=2600)
    limit = 40_000
    done = cli_process(
        "embed", slides, "--out", tmp_path / "out", "--overlap", "100", "--min-tissue", "0",
        "--no-overlays", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1 and "no space left" in done.stderr
    assert [p.stem for p in (tmp_path / "out").rglob("*.h5")] == ["a-small"]
    again = cli_process(
        "embed",
        slides,
        "--out",
        tmp_path / "out",
        "--overlap",
        "100",
        "--min-tissue",
        "0",
        "--json",
    )
    states = {r["name"]: r["state"] for r in json.loads(again.stdout)["results"]}
    assert states == {"a-small": "skipped", "b-large": "done"}


def test_an_unwritable_folder_is_named(make_slide, encoder, tmp_path):
    path = make_slide(tmp_path / "a.tiff", side=512)
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(StorageFailed, match="out"):
        embed([path], encoder, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.deep
def test_killed_at_random_moments_a_rerun_completes(make_slide, cli_json, tmp_path):
    """SIGKILL again and again, then one run to the end: every slide is there once and whole."""
    slides = tmp_path / "slides"
    slides.mkdir()
    for number in range(8):
        make_slide(slides / f"case-{number}.tiff", side=900, seed=number)
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "histoseek",
        "embed",
        str(slides),
        "--out",
        str(out),
        "--overlap",
        "112",
    ]
    rng, killed, partly = random.Random(4), 0, 0
    kills = rounds(8, 24)
    while killed < kills:
        before = {p.name for p in out.rglob("*.h5")}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if killed % 2:  # half of the kills fall right after a slide is done, half anywhere
            while {p.name for p in out.rglob("*.h5")} == before and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.1)
        else:
            time.sleep(0.4 + rng.random() * 1.2)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
        done = list(out.rglob("*.h5"))
        partly += 0 < len(done) < 8
        if len(done) == 8:  # it got to the end: begin anew, so that kills fall into work
            for path in done[: rng.randint(4, 8)]:
                path.unlink()
        process.wait()
        for path in out.rglob("*.h5"):
            assert len(read_features(path).features) > 0
    assert partly >= kills / 5
    report = cli_json("embed", slides, "--out", out, "--overlap", "112")
    status = {p.stem: json.loads(p.read_text())["state"] for p in (out / "status").glob("*.json")}
    assert len(status) == 8 and set(status.values()) <= {"done", "skipped"}
    assert report["ok"] and {r["state"] for r in report["results"]} <= {"done", "skipped"}
    files = sorted(p.stem for p in out.rglob("*.h5") if not p.name.startswith("."))
    assert files == [f"case-{n}" for n in range(8)]
    clean = tmp_path / "clean"
    cli_json("embed", slides, "--out", clean, "--overlap", "112")
    for path in clean.rglob("*.h5"):
        mine = read_features(out / path.relative_to(clean))
        assert np.array_equal(mine.features, read_features(path).features)
    assert not list(out.rglob("*.histoseek-tmp"))


def test_strange_names_stop_no_other_slide(make_slide, encoder, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    good = make_slide(folder / "good.tiff", side=512)
    latin = os.fsencode(folder) + b"/caf\xe9.tiff"
    with open(latin, "wb") as stream:
        stream.write(good.read_bytes())
    wide, long, longest = "組" * 80 + ".tiff", "x" * 248 + ".tiff", "y" * 251 + ".tif"
    for name in (wide, long, longest):
        (folder / name).write_bytes(good.read_bytes())
    results = embed([folder], encoder, tmp_path / "out", geojson=True)
    states = {r.name: (r.state, r.reason) for r in results}
    assert states["good"][0] == "done" and states["組" * 80][0] == "done"
    (bad,) = [reason for name, (state, reason) in states.items() if name.startswith("caf")]
    assert "not valid UTF-8" in bad
    for name in ("x" * 248, "y" * 251):
        assert states[name][0] == "failed" and "cannot be named" in states[name][1]
    for path in (tmp_path / "out/status").glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))


def test_pictures_asked_for_later_are_made_without_embedding_again(make_slide, encoder, tmp_path):
    path = make_slide(tmp_path / "a.tiff", side=600)
    embed([path], encoder, tmp_path / "out", overlays=False)
    (result,) = embed([path], encoder, tmp_path / "out", geojson=True)
    assert result.state == "skipped"
    names = {p.name for p in (tmp_path / "out").glob("*/a.*")}
    assert {"a.jpg", "a.tissue.geojson", "a.tiles.geojson"} <= names


def test_another_precision_is_embedded_again(make_slide, encoder, tmp_path):
    path = make_slide(tmp_path / "a.tiff", side=600)
    embed([path], encoder, tmp_path / "out")

    class Lower:
        def __getattr__(self, name):
            return getattr(encoder, name)

        def describe(self):
            return {**encoder.describe(), "precision": "bf16"}

    (result,) = embed([path], Lower(), tmp_path / "out")
    assert result.state == "done"
    about = read_features(tmp_path / result.features).about
    assert about["key"]["precision"] == "bf16"
    assert embed([path], encoder, tmp_path / "out")[0].state == "done"  # and back again


@pytest.mark.shared
def test_dicom_of_two_folders_are_two_slides(shared, tmp_path):
    with tarfile.open(shared / "formats.tar") as pack:
        (name,) = [n for n in pack.getnames() if n.endswith("highdicom/sm_image.dcm")]
        blob = pack.extractfile(name).read()
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.dcm").write_bytes(blob)
    assert len(find_jobs([tmp_path])) == 2


def test_a_folder_that_cannot_be_read_is_named(make_slide, tmp_path, monkeypatch):
    make_slide(tmp_path / "a.tiff", side=512)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (tmp_path / "secret").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BadInput, match="secret cannot be read"):
        find_jobs([tmp_path])


def test_a_run_that_ends_early_says_so_in_its_record(make_slide, cli_process, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    make_slide(slides / "a-small.tiff", side=300)
    make_slide(slides / "b-large.tiff", side=2600)
    done = cli_process(
        "embed", slides, "--out", tmp_path / "out", "--overlap", "100", "--min-tissue", "0",
        "--no-overlays", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000,) * 2),
    )  # fmt: skip
    assert done.returncode == 1
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert not record["ok"] and "StorageFailed: no space left" in record["ended"]
    assert record["states"] == {"done": 1, "not reached": 1}


def test_options_that_cannot_apply_are_refused(cli, tile_folder, tmp_path):
    for words, says in (
        (["--encoder", "triton://h:1/m", "--precision", "bf16"], "--precision"),
        (["--encoder", "triton://h:1/m", "--engine", "openvino"], "--engine"),
        (["--ray-gpus-per-actor", "1"], "--ray"),
        (["--mpp", "0.5", "--magnification", "20"], "--magnification"),
        (["--region-class", "Tumor"], "--regions"),
        (["--engine", "tensorflow"], "onnxruntime"),
        (["--engine", "onnxruntime", "--precision", "bf16"], "openvino"),
    ):
        done = cli("embed", tile_folder, "--out", tmp_path / "out", *words)
        assert done.returncode == 1 and says in done.stderr, (words, done.stderr)
