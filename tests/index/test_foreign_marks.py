"""Features of other tools: encoder, scale and external data; nothing unverified passes silently."""

import json

import h5py
import numpy as np
import pytest

from histoseek.artifacts.feature_files import parse_features, read_about, read_features
from histoseek.artifacts.hdf5_files import open_hdf5
from histoseek.errors import BadInput, Damaged, Mismatch
from histoseek.index.atlas import Atlas
from histoseek.index.exchange.imports import import_features, read_tool_features
from histoseek.ui.page.view import gallery

DIM = 16
PLACES = np.stack(np.meshgrid(np.arange(4) * 512, np.arange(3) * 512), -1).reshape(-1, 2)


def vectors(seed=0, count=12):
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def write(path, seed=0, places=PLACES, features=None, on_features=(), on_coords=(), on_file=()):
    """A feature file as TRIDENT lays it out, with any attributes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as out:
        data = out.create_dataset("features", data=vectors(seed) if features is None else features)
        coords = out.create_dataset("coords", data=places)
        data.attrs.update(dict(on_features))
        coords.attrs.update({"patch_size": 256, "patch_size_level0": 512, **dict(on_coords)})
        out.attrs.update(dict(on_file))
    return path


# -- whose encoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "marks", "encoder", "place"),
    [
        ("x", {"on_features": {"encoder": "conch_v15"}}, "conch_v15", "'encoder'"),
        ("x", {"on_features": {"encoder": np.bytes_("conch_v15")}}, "conch_v15", "'encoder'"),
        ("x", {"on_features": {"savetodir": "/o/20x/features_conch_v15"}}, "conch_v15", "savetodir"),
        ("x", {"on_features": {"savetodir": "D:\\o\\features_conch_v15\\"}}, "conch_v15", "savetodir"),
        ("features_conch_v15", {}, "conch_v15", "folder 'features_conch_v15'"),
        ("x", {"on_file": {"extractor": "conch_v15"}}, "conch_v15", "'extractor'"),
        # the attribute goes before savetodir, and that before the folder
        (
            "features_c",
            {"on_features": {"encoder": "a", "savetodir": "/o/features_b"}},
            "a",
            "'encoder'",
        ),
        ("features_c", {"on_features": {"savetodir": "/o/features_b"}}, "b", "savetodir"),
        ("features_c", {"on_features": {"savetodir": "/somewhere"}}, "c", "folder"),
    ],
)  # fmt: skip
def test_the_tools_own_mark_is_heeded(tmp_path, folder, marks, encoder, place):
    file = write(tmp_path / folder / "s1.h5", **marks)
    with pytest.raises(
        Mismatch, match=f"names the encoder '{encoder}' in .*but --encoder is 'uni_v1'"
    ) as caught:
        read_tool_features(file, "uni_v1")
    assert place in str(caught.value) and str(file) in str(caught.value)
    with pytest.raises(Mismatch):
        import_features(tmp_path / "atlas", [file], "uni_v1", {})
    assert not (tmp_path / "atlas").exists()
    _, (added,) = import_features(tmp_path / "atlas", [file], encoder, {})
    assert added.state == "added" and place in added.encoder_by


def test_a_folder_of_several_encoders_is_refused_before_anything_is_written(tmp_path, cli):
    root = tmp_path / "20x_256px_0px_overlap"
    for encoder, count in (("uni_v1", 2), ("conch_v15", 3), ("hopt", 1)):
        for number in range(count):
            write(root / f"features_{encoder}" / f"s{number}.h5", number)
    (root / "broken.h5").write_bytes(b"no HDF5")
    asked = cli("index", "import", tmp_path / "atlas", root, "--encoder", "uni_v1")
    assert asked.returncode == 1 and not (tmp_path / "atlas").exists()
    for told in ("'conch_v15': 3 files", "'uni_v1': 2 files", "'hopt': 1 file ", "nothing was"):
        assert told in asked.stderr
    done = cli(
        "index", "import", tmp_path / "atlas", root / "features_uni_v1", "--encoder", "uni_v1"
    )
    assert done.returncode == 0 and "do not name their encoder" not in done.stdout


def test_what_says_no_encoder_is_told(tmp_path, cli, cli_json):
    write(tmp_path / "f/s1.h5", 1)
    write(tmp_path / "f/s2.h5", 2)
    write(tmp_path / "features_uni_v1/s3.h5", 3)
    words = ("index", "import", tmp_path / "a", tmp_path / "f", tmp_path / "features_uni_v1")
    report = cli_json(*words, "--encoder", "uni_v1")
    assert report["files_that_say_no_encoder"] == 2
    said = {r["slide"]: r["encoder_by"] for r in report["added"]}
    assert said["s1"] == said["s2"] == "--encoder" and "folder" in said["s3"]
    told = cli("index", "import", tmp_path / "b", tmp_path / "f", "--encoder", "uni_v1").stdout
    assert "files that do not name their encoder: 2; used --encoder 'uni_v1'" in told


def test_a_vector_of_a_whole_slide_is_no_tile(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as out:
        out["feats"], out["coords"] = vectors(count=1), np.zeros((1, 2), np.float32)
        out.attrs.update({"unit": "um", "tile_size_um": 256.0, "feat_type": "slide"})
    with pytest.raises(BadInput, match="one vector of a whole slide"):
        read_tool_features(tmp_path / "s.h5", "titan", 0.5)


# -- shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_first_axis_of_one_and_whole_floats_are_taken(tmp_path, dtype):
    right = read_tool_features(write(tmp_path / "plain.h5"), "uni")
    file = write(tmp_path / "odd.h5", places=PLACES.astype(dtype)[None], features=vectors()[None])
    found = read_tool_features(file, "uni")
    assert found.features.shape == (12, DIM) and np.array_equal(found.features, right.features)
    assert found.coords.dtype == np.int64 and np.array_equal(found.coords, PLACES)
    only = write(tmp_path / "one.h5", places=PLACES[:1], features=vectors()[:1])
    assert read_tool_features(only, "uni").features.shape == (1, DIM)


@pytest.mark.parametrize(
    ("places", "features", "says"),
    [
        (
            PLACES + 0.5,
            None,
            r"12 of 12 coords are not whole pixels; the first is \[0.5, 0.5\] in row 0",
        ),
        (
            np.where(PLACES == 1024, np.nan, PLACES),
            None,
            r"not whole pixels; the first is .* in row 2",
        ),
        (np.where(PLACES == 1024, np.inf, PLACES), None, "expected level-0 pixels"),
        (PLACES, np.stack([vectors(), vectors()]), r"\(2, 12, 16\)"),
        (PLACES[:5], None, "expected"),
        (PLACES, vectors()[None, None], "expected"),
        (PLACES, (100 * vectors()).astype(np.int8), "int8"),
    ],
)
def test_other_shapes_and_fractions_are_refused(tmp_path, places, features, says):
    with pytest.raises(BadInput, match=says):
        read_tool_features(write(tmp_path / "odd.h5", places=places, features=features), "uni")


# -- whose bytes ------------------------------------------------------------------------------------


def external_storage(out, folder):
    (folder / "secret.bin").write_bytes(vectors().tobytes())
    out.create_dataset(
        "features", (12, DIM), "f4", external=[(str(folder / "secret.bin"), 0, 12 * DIM * 4)]
    )


def external_link(out, folder):
    with h5py.File(folder / "secret.bin", "w") as other:
        other["x"] = vectors()
    out["features"] = h5py.ExternalLink(str(folder / "secret.bin"), "/x")


def link_through(out, folder):
    external_link(out, folder)
    out.move("features", "deep/x")
    out["features"] = h5py.SoftLink("/deep/x")


def virtual(out, folder):
    with h5py.File(folder / "secret.bin", "w") as other:
        other["x"] = vectors()
    layout = h5py.VirtualLayout((12, DIM), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "secret.bin"), "x", (12, DIM))
    out.create_virtual_dataset("features", layout)


def beside(out, folder):
    out["features"] = vectors()
    external_link(out.create_group("notes"), folder)


@pytest.mark.parametrize("make", [external_storage, external_link, link_through, virtual, beside])
def test_data_of_other_files_are_refused_by_name_and_never_read(tmp_path, make, cli):
    path = tmp_path / "f" / "s1.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as out:
        out["coords"] = PLACES
        make(out, tmp_path)
        out.attrs["about"] = json.dumps({"tiles": 12})
    with h5py.File(path) as stored:  # HDF5 itself reads them
        assert np.array_equal(stored["features"][()], vectors())
    for read in (
        lambda: read_features(path),
        lambda: parse_features(path.read_bytes(), path),
        lambda: read_tool_features(path, "uni"),
        lambda: open_hdf5(path).__enter__(),
    ):
        with pytest.raises(
            BadInput, match=r"external storage|external link|virtual dataset"
        ) as caught:
            read()
        assert "s1.h5" in str(caught.value) and "secret.bin" in str(caught.value)
    assert read_about(path) is None
    asked = cli("index", "import", tmp_path / "a", path, "--encoder", "uni")
    assert asked.returncode == 1 and "secret.bin" in asked.stderr and not (tmp_path / "a").exists()


def test_links_inside_of_the_file_and_loops_are_followed(tmp_path):
    path = write(tmp_path / "s.h5")
    with h5py.File(path, "a") as out:
        out.move("features", "deep/features")
        out["features"] = h5py.SoftLink("/deep/features")
        out["deep/loop"] = out["/"]
        out["nothing"] = h5py.SoftLink("/not/there")
    assert np.array_equal(read_tool_features(path, "uni").features, vectors())
    with pytest.raises(Damaged):
        parse_features(path.read_bytes()[:700], path)


# -- which scale ------------------------------------------------------------------------------------


def scaled(folder, name, seed, magnification):
    on = {"target_magnification": magnification, "level0_magnification": 40}
    return write(folder / f"{name}.h5", seed, on_coords=on)


def test_tiles_of_another_scale_are_refused_unless_said(
    tmp_path, cli, cli_json, cli_answers, monkeypatch
):
    atlas = tmp_path / "a"
    files = [
        scaled(tmp_path, "one", 1, 20),
        scaled(tmp_path, "near", 2, 20.8),
        scaled(tmp_path, "far", 3, 10),
        write(tmp_path / "unsaid.h5", 4),
    ]
    words = ("index", "import", atlas, *files, "--encoder", "uni")
    report = cli_json(*words, expect=1)
    states = {r["slide"]: (r["state"], r["reason"]) for r in report["added"]}
    assert {k: v[0] for k, v in states.items()} == {
        "one": "added",
        "near": "added",
        "far": "failed",
        "unsaid": "added",
    }
    assert "this slide sets the scale of the atlas: 0.5 µm per pixel" in states["one"][1]
    assert states["near"][1] == "" and states["unsaid"][1] == ""
    assert "1 µm per pixel" in states["far"][1] and "0.5" in states["far"][1]
    assert "--mixed-scales" in states["far"][1]
    scales = cli_json("index", "stats", atlas)["scales"]
    assert scales["mixed"] is False and scales["unknown"] == {"slides": 1, "tiles": 12}
    assert {s["target_mpp"]: s["tiles"] for s in scales["of_tiles"]} == {0.5: 12, 0.4808: 12}
    assert cli("index", "search", atlas, "--tile", 1).stdout.count("µm") == 0
    cli_json(*words, "--mixed-scales")
    assert [r["state"] for r in cli_json(*words)["added"]] == ["unchanged"] * 4  # kept in the atlas
    scales = cli_json("index", "stats", atlas)["scales"]
    assert scales["mixed"] is True and {s["target_mpp"] for s in scales["of_tiles"]} == {
        1,
        0.5,
        0.4808,
    }
    assert "mixed scales are allowed" in cli("index", "stats", atlas).stdout.replace("\n", " ")
    (hits,) = cli_answers("index", "search", atlas, "--tile", 1, "-k", 60)
    by_slide = {hit["slide"]: hit["target_mpp"] for hit in hits}
    assert by_slide["far"] == 1 and by_slide["one"] == 0.5 and by_slide["unsaid"] is None
    monkeypatch.setenv("COLUMNS", "200")
    shown = cli("index", "search", atlas, "--tile", 1, "-k", 60)
    assert "µm per pixel" in shown.stdout
    opened = Atlas(atlas)
    assert opened.verify() == []
    (only,) = opened.search(tiles=[1], k=60, where="target_mpp > 0.9")
    assert {hit.slide for hit in only} == {"far"}
    assert "1 µm per pixel" in gallery(only) and "µm" not in gallery(
        [only[0]._replace(target_mpp=None)]
    )


def test_replacing_the_only_slide_may_change_the_scale(tmp_path):
    atlas, _ = import_features(tmp_path / "a", [scaled(tmp_path / "x", "s", 1, 20)], "uni", {})
    other = scaled(tmp_path / "y", "s", 2, 10)
    _, (kept,) = import_features(atlas.path, [other], "uni", {})
    assert kept.state == "failed" and "--replace" in kept.reason
    _, (replaced,) = import_features(atlas.path, [other], "uni", {}, replace_known=True)
    assert replaced.state == "replaced"
    assert [s["target_mpp"] for s in atlas.slides()] == [1]
