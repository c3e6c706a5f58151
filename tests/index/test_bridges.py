"""Bridges: we read other tools' files and they read ours; duplicates and leakage."""

import json
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from atlases import DIM, features, filled, unit

from histoseek.errors import BadInput, Damaged, Mismatch, StorageFailed
from histoseek.index.atlas import Atlas
from histoseek.index.exchange.exports import export
from histoseek.index.exchange.imports import import_features, read_query, read_tool_features
from histoseek.index.exchange.qupath import origins
from histoseek.index.inputs import find_feature_files
from histoseek.index.studies.duplicates import duplicates, leakage
from histoseek.serving.encoders.open import DEFAULT_BUNDLE


def vectors_of(count, dim, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def trident(path, count=30, dim=1536, seed=0, encoder="uni_v2"):
    """As TRIDENT writes it: attributes on both data sets."""
    with h5py.File(path, "w") as out:
        data = out.create_dataset("features", data=vectors_of(count, dim, seed))
        data.attrs.update({"encoder": encoder, "name": path.stem, "savetodir": "/out"})
        coords = out.create_dataset("coords", data=np.arange(2 * count).reshape(-1, 2) * 512)
        coords.attrs.update(
            {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40,
             "target_magnification": 20, "overlap": 0, "level0_width": 9000, "level0_height": 8000,
             "name": path.stem, "savetodir": "/out"}
        )  # fmt: skip
    return path


def clam(path, count=30, dim=1024, seed=0):
    """As CLAM writes it: no attributes, int32 places."""
    with h5py.File(path, "w") as out:
        out["features"] = vectors_of(count, dim, seed)
        out["coords"] = (np.arange(2 * count).reshape(-1, 2) * 256).astype(np.int32)
    return path


def stamp(path, count=30, dim=4096, seed=0, unit_="um", extractor="virchow2"):
    """As STAMP writes it: float16, places in micrometres."""
    with h5py.File(path, "w") as out:
        out["feats"] = vectors_of(count, dim, seed).astype(np.float16)
        out["coords"] = (np.arange(2 * count).reshape(-1, 2) * 256.0).astype(np.float32)
        out.attrs.update(
            {"unit": unit_, "tile_size_um": 256.0, "tile_size_px": 224, "extractor": extractor}
        )
    return path


@pytest.mark.parametrize(
    "write, encoder, dim, mpp",
    [
        (trident, "uni_v2", 1536, None),
        (clam, "resnet50", 1024, 0.25),
        (stamp, "virchow2", 4096, 0.25),
    ],
)
def test_features_of_other_tools_are_searched_and_clustered(tmp_path, write, encoder, dim, mpp):
    files = [write(tmp_path / f"s{n}.h5", seed=n) for n in range(3)]
    atlas, results = import_features(
        tmp_path / "atlas", files, encoder, {"s1": {"label": "tumour", "patient": "P"}}, mpp
    )
    assert [r.state for r in results] == ["added"] * 3 and atlas.manifest.dim == dim
    assert atlas.manifest.name == encoder and atlas.verify() == []
    query = vectors_of(30, dim, 1).astype(np.float16 if write is stamp else np.float32)[4:5]
    best = atlas.search(query.astype(np.float32), 3)[0][0]
    assert (best.slide, best.label, best.patient) == ("s1", "tumour", "P")
    assert best.score == pytest.approx(1, abs=1e-5)
    expected = {trident: (8 * 512, 9 * 512, 512, None), clam: (8 * 256, 9 * 256, 0, 0.25),
                stamp: (8 * 256 * 4, 9 * 256 * 4, 1024, 0.25)}[write]  # fmt: skip
    assert (best.x, best.y, best.size_px_level0, best.mpp) == expected
    atlas.fit("kmeans", k=3)
    again = import_features(tmp_path / "atlas", files, encoder, {}, mpp)[1]
    assert [r.state for r in again] == ["unchanged"] * 3
    assert Atlas(atlas.path).verify() == []


def test_foreign_features_that_do_not_fit_are_refused(tmp_path, cli):
    good = trident(tmp_path / "good.h5")
    atlas, _ = import_features(tmp_path / "atlas", [good], "uni_v2", {})
    (tmp_path / "cut.h5").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "bag.pt").write_bytes(b"PK")
    with h5py.File(tmp_path / "other.h5", "w") as out:
        out["embeddings"] = np.zeros((3, 4))
    with h5py.File(tmp_path / "odd.h5", "w") as out:
        out["feats"], out["coords"] = np.zeros((3, 4), np.float16), np.zeros((5, 2))
    bad = {
        tmp_path / "cut.h5": "damaged or not an HDF5 file.*create it again",
        tmp_path / "bag.pt": "pickle",
        tmp_path / "other.h5": "embeddings",
        tmp_path / "odd.h5": "expected floats",
        stamp(tmp_path / "stamp.h5", extractor="uni_v2"): "micrometres.*--mpp",
        stamp(tmp_path / "px.h5", unit_="px", extractor="uni_v2"): "'px'",
        trident(
            tmp_path / "gigapath.h5", encoder="gigapath"
        ): "names the encoder 'gigapath' in .*but --encoder is 'uni_v2'",
        clam(tmp_path / "short.h5", dim=512): "512-dimensional",
        tmp_path / "absent.h5": "does not exist",
    }
    import re

    for file, said in bad.items():
        _, (result,) = import_features(atlas.path, [file], "uni_v2", {})
        assert result.state == "failed" and re.search(said, result.reason), result
    assert [s["name"] for s in atlas.slides()] == ["good"] and atlas.verify() == []
    with pytest.raises(Mismatch, match="into a separate atlas"):
        import_features(atlas.path, [good], "conch", {})
    with pytest.raises(BadInput, match="not possible; its metric"):
        Atlas.create_external(tmp_path / "x", "uni", 5, "dot")
    with pytest.raises(Damaged):
        read_tool_features(tmp_path / "cut.h5", "uni_v2")
    asked = cli("index", "search", atlas.path, tmp_path / "bag.pt")
    assert asked.returncode == 1 and "known by name only" in asked.stderr
    done = cli("index", "search", atlas.path, "--tile", 3, "-k", 2)
    assert done.returncode == 0 and "good" in done.stdout


@pytest.mark.parametrize("version", ["2.0", "first"])
def test_places_of_earlier_stamps_are_read_right(tmp_path, version):
    with h5py.File(tmp_path / "s.h5", "w") as out:
        out["feats"] = vectors_of(3, 8).astype(np.float16)
        if version == "2.0":  # micrometres, the side under another name
            out["coords"] = np.array([[0, 0], [256, 0], [512, 256]], np.float32)
            out.attrs.update({"unit": "um", "tile_size": 256.0})
        else:  # pixels of tiles of 224 px, which are 256 um wide
            out["coords"] = np.array([[0, 0], [224, 0], [448, 224]], np.float32)
    item = read_tool_features(tmp_path / "s.h5", "ctranspath", 0.5)
    assert item.coords.tolist() == [[0, 0], [512, 0], [1024, 512]] and item.size_px_level0 == 512


def test_metadata_is_matched_by_stem_and_own_columns_are_refused(tmp_path):
    file = clam(tmp_path / "case-7.h5")
    known = {"case-7.svs": {"label": "x", "mpp": "0.5"}}
    files = [tmp_path / "absent.h5", file]
    atlas, _ = import_features(tmp_path / "atlas", files, "uni", known, tile_px=512)
    (slide,) = atlas.slides()
    assert (slide["label"], slide["mpp"], slide["size_px_level0"]) == ("x", 0.5, 512)
    _, (refused,) = import_features(
        tmp_path / "atlas", [clam(tmp_path / "other.h5")], "uni", {"other": {"x": "left"}}
    )
    assert refused.state == "failed" and "'x'; histoseek uses this name itself" in refused.reason
    _, (wrong,) = import_features(
        atlas.path, [clam(tmp_path / "n.h5")], "uni", {"n": {"mpp": "-1"}}
    )
    assert wrong.state == "failed" and "above 0" in wrong.reason


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bridges")
    made = filled(folder, slides=3, count=50)
    tiles = features(
        folder / "set.h5", 10, 30, kind="tiles", files=tuple(f"{n}.png" for n in range(10)),
        coords=np.zeros((10, 2), int), size_px_level0=0, labels=tuple("xy" * 5),
    )  # fmt: skip
    made.add([tiles])
    made.fit("kmeans", k=4)
    made.name_cluster(2, "stroma")
    return made


def test_numpy_and_parquet_and_anndata_hold_the_same(atlas, tmp_path):
    import anndata
    import pyarrow.parquet as parquet

    ids, stored = atlas.vectors()
    clusters = atlas.assigned("kmeans")[1].cluster
    assert export(atlas, tmp_path / "a.npz", "numpy").tiles == 160
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert np.array_equal(found["vectors"], stored)
        assert np.array_equal(found["column_tile"], ids)
        assert np.array_equal(found["column_cluster.kmeans"], clusters)
        assert found["names_label"][found["codes_label"][-1]] == "y"
        assert found["names_organ"][found["codes_organ"][0]] == "colon"
        assert found["column_file"].tolist()[-2:] == ["8.png", "9.png"]
        assert json.loads(str(found["encoder"]))["sha256"] == atlas.manifest.sha256
    export(atlas, tmp_path / "a.parquet", "parquet", "organ = 'lung'")
    table = parquet.read_table(tmp_path / "a.parquet").to_pandas()
    assert set(table["slide"]) == {"slide-1"} and len(table) == 50
    assert np.allclose(np.stack(table["vector"]), stored[50:100])
    assert table["projection_x"].var() >= table["projection_y"].var() > 0
    for name in ("a.h5ad", "a.zarr"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata's own, about its string columns
            export(atlas, tmp_path / name, "anndata")
            read = anndata.read_h5ad if name.endswith("h5ad") else anndata.read_zarr
            found = read(tmp_path / name)
        assert np.array_equal(found.X, stored) and found.obs["label"].iloc[-1] == "y"
        assert (
            found.obsm["spatial"].shape == (160, 2) and found.uns["encoder"]["metric"] == "cosine"
        )


def test_tensorboards_projector_reads_what_is_written(atlas, tmp_path):
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    export(atlas, tmp_path / "projector", "projector")
    config = text_format.Parse(
        (tmp_path / "projector/projector_config.pbtxt").read_text(), ProjectorConfig()
    )
    (embedding,) = config.embeddings
    assert list(embedding.tensor_shape) == [160, DIM]
    raw = np.fromfile(tmp_path / "projector" / embedding.tensor_path, "<f4").reshape(160, DIM)
    assert np.array_equal(raw, atlas.vectors()[1])
    lines = (tmp_path / "projector" / embedding.metadata_path).read_text().splitlines()
    assert len(lines) == 161 and lines[0].split("\t")[:3] == ["tile", "x", "y"]


def test_qupath_gets_tiles_with_their_cluster_or_their_similarity(atlas, tmp_path):
    from histoseek.serving.slides.geojson import read_annotations

    assert set(origins(atlas.view())) == {"slide-0", "slide-1", "slide-2"}
    assert set(origins(atlas.view(), "slide = 'slide-1'")) == {"slide-1"}
    export(atlas, tmp_path / "clusters", "geojson")
    files = sorted(p.name for p in (tmp_path / "clusters").iterdir())
    assert files == [
        "slide-0.geojson",
        "slide-1.geojson",
        "slide-2.geojson",
    ]  # the set has no places
    document = json.loads((tmp_path / "clusters/slide-1.geojson").read_text())
    names = {f["properties"]["classification"]["name"] for f in document["features"]}
    assert "stroma" in names
    assert names <= {"stroma", "cluster 0", "cluster 1", "cluster 3", "unknown"}
    rings = read_annotations(tmp_path / "clusters/slide-1.geojson", ["stroma"])
    hits = atlas.search(
        unit(np.random.default_rng(0), 1), 500, where="slide = 'slide-1' and cluster = 2"
    )[0]
    assert {tuple(r[0].min(axis=0).astype(int)) for r in rings} == {(h.x, h.y) for h in hits}
    tile = hits[0].tile
    export(atlas, tmp_path / "heat", "geojson", "slide = 'slide-1'", like=tile)
    document = json.loads((tmp_path / "heat/slide-1.geojson").read_text())
    values = [f["properties"]["measurements"]["similarity"] for f in document["features"]]
    assert max(values) == pytest.approx(1, abs=1e-5) and len(values) == 50 and min(values) < 0.9


def test_exports_that_cannot_be_are_refused(atlas, tmp_path):
    (tmp_path / "there.npz").write_bytes(b"")
    with pytest.raises(BadInput, match="exists already"):
        export(atlas, tmp_path / "there.npz", "numpy")
    with pytest.raises(BadInput, match="anndata, geojson"):
        export(atlas, tmp_path / "x", "excel")
    with pytest.raises(BadInput, match="end in .parquet"):
        export(atlas, tmp_path / "x.pq", "parquet")
    with pytest.raises(BadInput, match="no tile passes"):
        export(atlas, tmp_path / "x.npz", "numpy", "label = 'nothing'")
    with pytest.raises(BadInput, match="no coordinates"):
        export(atlas, tmp_path / "g", "geojson", "slide = 'set'")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there.npz"]


def test_duplicates_and_leaks_are_found(tmp_path):
    rng = np.random.default_rng(0)
    atlas = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    base = unit(rng, 60)
    parts = [base[:20].copy(), base[20:40].copy(), base[40:].copy()]
    parts[1][3] = parts[0][7]  # the same picture on two slides
    parts[1][4] = parts[0][7]
    parts[2][5] = parts[2][6] + 1e-4 * unit(rng, 1)[0]
    files = [features(tmp_path / f"s{n}.h5", 20, n, features=part) for n, part in enumerate(parts)]
    atlas.add(
        files,
        {"s0": {"patient": "A", "split": "train"}, "s1": {"patient": "B", "split": "test"},
         "s2": {"patient": "B", "split": "train"}},
    )  # fmt: skip
    found = duplicates(atlas)
    assert (found["groups"], found["tiles_in_groups"], found["across_slides"]) == (2, 5, 1)
    assert found["shown"][0]["size"] == 3
    assert {t["slide"] for t in found["shown"][0]["tiles"]} == {"s0", "s1"}
    assert duplicates(atlas, where="slide = 's2'")["groups"] == 1
    with pytest.raises(BadInput, match="1.1 is not possible"):
        duplicates(atlas, 1.1)
    report = leakage(atlas, "split")
    (both,) = report["parts"]
    assert (
        report["leaks"] and both["patients"] == ["B"] and both["near_duplicates"] == 1
    )  # of train
    assert {t["slide"] for pair in both["examples"] for t in pair} == {"s0", "s1"}
    atlas.remove(["s1"])
    atlas.relabel([{"slide": "s2", "split": "test"}])
    clean = leakage(atlas, "split")
    assert not clean["leaks"] and clean["tiles_without_patient"] == 0
    with pytest.raises(BadInput, match="unknown column 'fold'.*split"):
        leakage(atlas, "fold")


def test_many_copies_of_one_tile_are_one_group(tmp_path):
    """More copies than neighbours are looked up at first."""
    atlas = Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)
    same = np.repeat(unit(np.random.default_rng(1), 1), 70, axis=0)
    atlas.add([features(tmp_path / "s.h5", 70, features=same)])
    found = duplicates(atlas)
    assert (found["groups"], found["tiles_in_groups"]) == (1, 70)


def test_a_leak_is_found_in_an_l2_atlas_too(tmp_path):
    atlas = Atlas.create_external(tmp_path / "atlas", "uni", DIM, "l2")
    data = unit(np.random.default_rng(1), 40) * 7
    known = {"encoder": "uni", "encoder_sha256": atlas.manifest.sha256}
    files = [
        features(tmp_path / f"{n}.h5", 40, features=data, source=n, **known) for n in ("a", "b")
    ]
    atlas.add(files, {"a": {"split": "train"}, "b": {"split": "test"}})
    assert leakage(atlas, "split")["parts"][0]["near_duplicates"] == 40
    assert duplicates(atlas)["groups"] == 40


def test_a_tile_size_that_is_learnt_later_is_taken_over(tmp_path, cli_json):
    """CLAM's files do not say it; the geojson export names what it cannot draw."""
    files = [clam(tmp_path / "a.h5", seed=1), clam(tmp_path / "b.h5", seed=2)]
    _, added = import_features(tmp_path / "atlas", files, "resnet50", {}, 0.25)
    assert "--tile-px" in added[0].reason and added[0].state == "added"
    _, (known, *_) = import_features(tmp_path / "atlas", files[:1], "resnet50", {}, 0.25, 512)
    assert known.state == "replaced" and known.reason == ""
    atlas = Atlas(tmp_path / "atlas")
    sizes = {s["name"]: (s["size_px_level0"], s["mpp"], s["tiles"]) for s in atlas.slides()}
    assert sizes == {"a": (512, 0.25, 30), "b": (0, 0.25, 30)} and atlas.verify() == []
    _, (same, *_) = import_features(tmp_path / "atlas", files[:1], "resnet50", {}, 0.25, 512)
    assert same.state == "unchanged"
    _, (other, *_) = import_features(tmp_path / "atlas", files[:1], "resnet50", {}, 0.25, 256)
    assert other.state == "failed" and "--replace" in other.reason
    atlas.fit("kmeans", k=2)
    report = cli_json("index", "export", atlas.path, "--to", "geojson", "--out", tmp_path / "out")
    assert report["tiles"] == 30 and report["left_out"] == {"b": 30}


def test_vectors_of_several_lengths_found_no_atlas(tmp_path):
    files = [trident(tmp_path / f"{n}.h5", seed=n, dim=dim) for n, dim in enumerate((32, 64, 64))]
    with pytest.raises(
        Mismatch, match=r"2 lengths.*64: 2 files \(first .*1.h5\); 32: 1 file \(first"
    ):
        import_features(tmp_path / "atlas", files, "uni_v2", {})
    assert not (tmp_path / "atlas").exists()
    atlas, _ = import_features(tmp_path / "atlas", files[1:], "uni_v2", {})
    _, (other,) = import_features(atlas.path, files[:1], "uni_v2", {})
    assert other.state == "failed" and other.reason.endswith("import files of one encoder")


@pytest.mark.parametrize("given", [{"mpp": 0.0}, {"mpp": -1.0}, {"tile_px": 0}, {"tile_px": -5}])
def test_impossible_sizes_are_refused(tmp_path, given):
    with pytest.raises(BadInput, match="expected"):
        import_features(tmp_path / "atlas", [clam(tmp_path / "a.h5")], "uni", {}, **given)
    assert not (tmp_path / "atlas").exists()


def test_zeros_and_a_scale_that_contradicts_the_file_are_said(tmp_path):
    padded, scaled = trident(tmp_path / "padded.h5"), trident(tmp_path / "scaled.h5", seed=1)
    with h5py.File(padded, "a") as stored:
        stored["features"][3:5] = 0
    metadata = {"padded": {"mpp": "0.25"}, "scaled": {"mpp": "1.0"}}
    _, (zeros, scale) = import_features(tmp_path / "atlas", [padded, scaled], "uni_v2", metadata)
    assert zeros.reason.endswith("; 2 tiles have only zeros as vector, which is often padding")
    assert scale.reason == (
        "the file states 0.5 µm per pixel of its tiles, but 512 level-0 pixels of 1 µm as 256 pixels give 2"
    )


def test_what_is_no_hdf5_file_and_what_a_folder_leaves_out_are_named(tmp_path):
    table = tmp_path / "emb.parquet"
    table.write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=r"not read; expected .h5 with features \(N, D\)"):
        read_tool_features(table, "uni")
    np.save(tmp_path / "b.npy", np.zeros((3, 4)))
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(BadInput, match=r"\(its .npy, .parquet, .pt files are not read\)"):
        find_feature_files([tmp_path])
    clam(tmp_path / "c.h5")
    files, left_out = find_feature_files([tmp_path])
    assert [file.name for file in files] == ["c.h5"]
    assert {(Path(one.path).name, one.reason) for one in left_out} == {
        ("a.pt", "a pickle, which can run code"),
        ("b.npy", "its name does not end in .h5; a feature file has features and coords"),
        ("emb.parquet", "its name does not end in .h5; a feature file has features and coords"),
    }


def test_a_slide_by_its_file_is_compared_as_by_its_name(tmp_path):
    files = [trident(tmp_path / f"s{n}.h5", count=120, dim=32, seed=n) for n in range(4)]
    atlas, _ = import_features(tmp_path / "atlas", files, "uni_v2", {})
    query = read_query(files[2], atlas.manifest)
    assert len(query) < 120  # its mosaic
    by_file = {one.name: one.score for one in atlas.similar(query, k=9)}
    by_name = {one.name: one.score for one in atlas.similar("s2", k=9)}
    assert by_file.pop("s2") == pytest.approx(1, abs=1e-5)
    assert by_file == pytest.approx(by_name, abs=1e-6)


def test_a_conflict_of_imported_slides_says_what_can_be_done(tmp_path):
    atlas, _ = import_features(tmp_path / "atlas", [clam(tmp_path / "a.h5")], "uni", {})
    (tmp_path / "more").mkdir()
    other = clam(tmp_path / "more/a.h5", seed=3)
    _, (refused,) = import_features(atlas.path, [other], "uni", {})
    assert "slide 'a'; to replace" in refused.reason and refused.reason.endswith("rename its file")


def test_a_name_that_cannot_be_and_a_folder_that_cannot_be_written_are_said(atlas, tmp_path):
    with pytest.raises(BadInput, match=r"its name: expected at most 64 letters, digits"):
        import_features(tmp_path / "a", [clam(tmp_path / "a.h5")], "uni v2", {})
    with pytest.raises(BadInput, match=r"must end in .npz for this format; .* with --to"):
        export(atlas, tmp_path / "a.parquet", "numpy")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match="file"):
        export(atlas, tmp_path / "file/under/a.npz", "numpy")
    with pytest.raises(StorageFailed, match="cannot write"):
        export(atlas, Path("/proc/a.npz"), "numpy")
