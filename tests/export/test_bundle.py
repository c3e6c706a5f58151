"""Export: one graph that takes raw pixels, and the proof that it gives the net's embeddings."""

import json

import numpy as np
import onnx
import pytest
import torch

from histoseek.artifacts.images import square
from histoseek.artifacts.manifest import read_manifest
from histoseek.artifacts.tileset_files import open_tiles
from histoseek.artifacts.tilesets import sample_tiles
from histoseek.errors import BadInput, Damaged, Mismatch
from histoseek.export.bundle import export_run, load_run, parity_tiles
from histoseek.export.onnx_graph import Graph
from histoseek.export.options import ExportOptions
from histoseek.training.arcface_options import ArcFaceOptions
from histoseek.training.commands import select
from histoseek.training.data import load, split
from histoseek.training.fit_arcface import fit
from histoseek.training.fit_autoencoder import AutoencoderOptions
from histoseek.training.fit_autoencoder import fit as fit_autoencoder
from histoseek.training.models import build


@pytest.fixture(scope="module")
def run(tile_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    options = AutoencoderOptions(
        model="vae",
        model_options="dim=24",
        size_px=64,
        epochs=1,
        batch=16,
        folds=3,
        accelerator="cpu",
    )  # a small graph: an export of mobilenet-v3-small takes 20 s of one core
    fit_autoencoder(options, open_tiles(tile_folder), folder, lambda *_: None)
    return folder


def test_the_bundle_is_complete_and_loads_in_older_runtimes(run, tile_folder, tmp_path):
    from histoseek.serving.encoders.onnx import OnnxEncoder

    manifest = export_run(
        run, tmp_path / "b", open_tiles(tile_folder), build, ExportOptions(mpp=0.5, licence="CC0")
    )
    assert {p.name for p in (tmp_path / "b").iterdir()} == {
        "encoder.onnx", "manifest.json", "MODEL_CARD.md", "parity.json", "run.json", "clusters.npz",
    }  # fmt: skip
    assert read_manifest(tmp_path / "b") == manifest and (manifest.dim, manifest.mpp) == (24, 0.5)
    model = onnx.load(tmp_path / "b/encoder.onnx")
    # Opset 18 loads since ONNX Runtime 1.14, IR 10 since 1.18; asked for is 1.24.
    assert model.opset_import[0].version == 18 and model.ir_version <= 10
    blob = (tmp_path / "b/encoder.onnx").read_bytes()
    assert b"site-packages" not in blob and str(tmp_path).encode() not in blob
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    (tiles,), (embedding,) = model.graph.input, model.graph.output
    shape = [d.dim_value or d.dim_param for d in tiles.type.tensor_type.shape.dim]
    assert shape[1:] == [64, 64, 3] and isinstance(shape[0], str)
    assert tiles.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert (tiles.name, embedding.name) == ("tiles", "embedding")
    card = (tmp_path / "b/MODEL_CARD.md").read_text()
    assert manifest.sha256 in card and "CC0" in card and "random weights" in card
    images = sample_tiles(open_tiles(tile_folder), 64, 8)
    _, encoder, _ = load_run(run, build)
    with torch.inference_mode():
        expected = Graph(encoder, encoder.mean, encoder.std)(torch.from_numpy(images)).numpy()
    assert np.abs(OnnxEncoder(tmp_path / "b").embed(images) - expected).max() <= 1e-4


@pytest.mark.parametrize("views", [2, 4, 8])
def test_averaged_views_make_a_turned_tile_the_same(run, tile_folder, tmp_path, views):
    from histoseek.serving.encoders.onnx import OnnxEncoder

    tiles = open_tiles(tile_folder)
    assert export_run(run, tmp_path / "b", tiles, build, ExportOptions(views=views)).views == views
    encoder, images = OnnxEncoder(tmp_path / "b"), sample_tiles(tiles, 64, 6)
    upright = encoder.embed(images)
    assert np.allclose(np.linalg.norm(upright, axis=1), 1, atol=1e-5)
    for quarter in (2,) if views == 2 else range(1, 4):
        turned = np.ascontiguousarray(np.rot90(images, quarter, (1, 2)))
        assert np.abs(encoder.embed(turned) - upright).max() < 1e-5
        mirrored = np.abs(encoder.embed(np.ascontiguousarray(turned[:, :, ::-1])) - upright).max()
        assert views < 8 or mirrored < 1e-5
    with pytest.raises(BadInput, match="--views"):
        export_run(run, tmp_path / "c", tiles, build, ExportOptions(views=3))


def test_pca_lives_in_the_graph(run, tile_folder, tmp_path):
    from histoseek.serving.encoders.onnx import OnnxEncoder

    tiles = open_tiles(tile_folder)
    manifest = export_run(run, tmp_path / "b", tiles, build, ExportOptions(pca=0.9))
    assert manifest.dim < 24
    images = sample_tiles(tiles, 64, 12)
    _, encoder, basis = load_run(run, build)
    with torch.inference_mode():
        whole = Graph(encoder, encoder.mean, encoder.std)(torch.from_numpy(images)).numpy()
    reduced = (whole - basis["pca.mean"].numpy()) @ basis["pca.components"][
        : manifest.dim
    ].numpy().T
    reduced /= np.linalg.norm(reduced, axis=1, keepdims=True)
    assert np.abs(OnnxEncoder(tmp_path / "b").embed(images) - reduced).max() < 1e-4
    with pytest.raises(BadInput, match="--pca"):
        export_run(run, tmp_path / "c", tiles, build, ExportOptions(pca=1.5))


def test_whitening_makes_the_components_count_alike(run, tile_folder, tmp_path):
    from histoseek.serving.encoders.onnx import OnnxEncoder

    tiles = open_tiles(tile_folder)
    images = sample_tiles(tiles, 64, 12)
    _, encoder, basis = load_run(run, build)
    with torch.inference_mode():
        whole = Graph(encoder, encoder.mean, encoder.std)(torch.from_numpy(images)).numpy()
    for power in (0.5, 1.0):
        out = tmp_path / f"w{power}"
        manifest = export_run(run, out, tiles, build, ExportOptions(pca=0.9, whiten=power))
        rows = basis["pca.components"][: manifest.dim].numpy()
        flat = (whole - basis["pca.mean"].numpy()) @ rows.T
        flat /= basis["pca.variance"][: manifest.dim].numpy() ** (power / 2)
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
        assert np.abs(OnnxEncoder(out).embed(images) - flat).max() < 1e-4
    for wrong in ({"whiten": 2.0, "pca": 0.9}, {"whiten": 0.5}):
        with pytest.raises(BadInput, match="--whiten"):
            export_run(run, tmp_path / "c", tiles, build, ExportOptions(**wrong))


@pytest.mark.shared
def test_a_gate_puts_foreign_pictures_at_a_right_angle_to_tissue(shared, tmp_path):
    from histoseek.serving.encoders.onnx import OnnxEncoder

    chosen = select([shared / "histo_mix.tar"], [], ["label"])
    made = {"gate": True, "drop_head": True}
    options = ArcFaceOptions(size_px=64, dim=24, epochs=1, folds=3, accelerator="cpu", **made)
    fit(options, chosen, tmp_path / "run", lambda *_: None)
    assert export_run(tmp_path / "run", tmp_path / "b", chosen, build).dim == 24
    with pytest.raises(BadInput, match="at least 2 with gate"):
        ArcFaceOptions(dim=1, **made)
    gated = OnnxEncoder(tmp_path / "b")
    _, encoder, _ = load_run(tmp_path / "run", build)
    encoder.gate = None
    other = Graph(encoder, encoder.mean, encoder.std)
    data = load(chosen, 64, lambda *_: None)
    tissue = data.tiles[split(data, 3, 0, 0).test]
    grey = [square(p, 64) for p in map(open_tiles(shared / "busi.tar").read, range(40))]
    seen, foreign = gated.embed(tissue), gated.embed(np.stack(grey))
    np.testing.assert_allclose(np.linalg.norm(seen, axis=1), 1, atol=1e-5)
    assert (
        gated.manifest.out_of_distribution(seen).mean() < 0.1
        and gated.manifest.out_of_distribution(foreign).all()
    )
    known = ~gated.manifest.out_of_distribution(seen)
    surely = foreign[foreign[:, -1] > 0.8] @ seen[seen[:, -1] < 0.1].T
    assert surely.shape[0] > 20 and surely.shape[1] > 100 and surely.max() < 0.7  # whatever it sees
    # tissue is told apart as without a gate
    flat = seen[known, :-1] / np.linalg.norm(seen[known, :-1], axis=1, keepdims=True)
    with torch.inference_mode():
        np.testing.assert_allclose(flat, other(torch.from_numpy(tissue[known])), atol=1e-4)
    turned = np.rot90(tissue, 1, (1, 2))[:, :, ::-1].copy()
    np.testing.assert_allclose(gated.embed(turned)[:, -1], seen[:, -1], atol=1e-4)


def test_clusters_found_in_training_are_those_of_the_atlas(tile_folder, tmp_path, cli_json):
    """DeepCluster's whole chain ends in the atlas: a new tile gets the cluster that training gave it."""
    from histoseek.training.checkpoint import load_tensors
    from histoseek.training.fit_deepcluster import DeepClusterOptions
    from histoseek.training.fit_deepcluster import fit as fit_deepcluster
    from histoseek.training.kmeans import assign

    tiles = open_tiles(tile_folder)
    options = DeepClusterOptions(
        model="p4m-cnn", model_options="widths=2-4-8", size_px=32, epochs=2, batch=16, folds=3,
        clusters=5, pca_dim=6, accelerator="cpu",
    )  # fmt: skip
    fit_deepcluster(options, tiles, tmp_path / "run", lambda *_: None)
    manifest = export_run(tmp_path / "run", tmp_path / "b", tiles, build)
    assert manifest.dim == 6 and (tmp_path / "b/clusters.npz").exists()
    from histoseek.index.atlas import Atlas
    from histoseek.serving.encoders.onnx import OnnxEncoder

    features = tmp_path / "features"
    cli_json("embed", tile_folder, "--encoder", tmp_path / "b", "--out", features)
    cli_json("index", "create", tmp_path / "atlas", "--encoder", tmp_path / "b")
    cli_json("index", "add", tmp_path / "atlas", features)
    fitted = cli_json("index", "fit", tmp_path / "atlas", "--method", "encoder")
    assert fitted["from"] == "encoder" and sum(fitted["sizes"].values()) == 72
    pictures = sample_tiles(tiles, 32, 20)
    vectors = OnnxEncoder(tmp_path / "b").embed(pictures)
    centres = load_tensors(tmp_path / "run/weights.safetensors")[0]["clusters.centres"].numpy()
    found = Atlas(tmp_path / "atlas").assign(vectors)
    assert [row["cluster"] for row in found] == assign(vectors, centres).tolist()
    assert sum(row["unknown"] for row in found) < 10
    export_run(tmp_path / "run", tmp_path / "four", tiles, build, ExportOptions(views=4))
    assert not (tmp_path / "four/clusters.npz").exists()  # they are of embeddings of one view
    with pytest.raises(BadInput, match="has no clusters"):
        Atlas.create(tmp_path / "plain", tmp_path / "four").fit("encoder")


def test_a_graph_that_is_not_the_net_is_refused_and_nothing_is_written(
    run, tile_folder, tmp_path, monkeypatch
):
    from histoseek.export import onnx_graph

    real = onnx_graph.to_onnx

    def other_net(graph, size_px):
        with torch.no_grad():
            graph.encoder.head.weight[0] *= 1.01
            blob = real(graph, size_px)
            graph.encoder.head.weight[0] /= 1.01
        return blob

    monkeypatch.setattr(onnx_graph, "to_onnx", other_net)
    with pytest.raises(Mismatch, match="max_abs is .* expected at most 1e-04"):
        export_run(run, tmp_path / "b", open_tiles(tile_folder), build)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_is_refused(run, tile_folder, tmp_path):
    tiles = open_tiles(tile_folder)
    with pytest.raises(BadInput, match="no finished run"):
        export_run(tmp_path, tmp_path / "b", tiles, build)
    (tmp_path / "taken").mkdir()
    with pytest.raises(BadInput, match="exists already"):
        export_run(run, tmp_path / "taken", tiles, build)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text((run / "run.json").read_text())
    (broken / "weights.safetensors").write_bytes((run / "weights.safetensors").read_bytes()[:5000])
    with pytest.raises(Damaged, match="weights"):
        export_run(broken, tmp_path / "b", tiles, build)


def test_parity_needs_real_tiles(run, tmp_path):
    with pytest.raises(BadInput, match="--tiles"):
        parity_tiles(run, None)  # this run's record names no source
    copy = tmp_path / "run"
    copy.mkdir()
    record = json.loads((run / "run.json").read_text())
    record["data"]["selection"] = {"sources": [str(tmp_path / "gone.tar")]}
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match=r"gone\.tar"):
        parity_tiles(copy, None)
