"""Checkpoints of published encoders: every naming convention, strict loading, bundles."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import (
    WRITERS,
    as_conch_v1_5,
    beit3,
    biomedclip,
    coca,
    conch_v1_5,
    dinov2,
    hugging_face_clip,
    hugging_face_dinov2,
    hugging_face_vit,
    keep,
    open_clip,
    seeded,
    teacher,
    timm,
)
from PIL import Image
from safetensors.torch import save_file
from schedule import DEEP

from histoseek.artifacts.manifest import (
    CARD,
    CHECKPOINT,
    GRAPH,
    check_bundle_graph,
    read_manifest,
)
from histoseek.artifacts.onnx_files import data_file, graph_bytes
from histoseek.errors import BadInput, Damaged
from histoseek.export.checkpoints import load, read_checkpoint
from histoseek.export.from_checkpoint import (
    build_published,
    export_checkpoint,
    fit_of,
    made_tiles,
)
from histoseek.export.half_precision import to_fp16
from histoseek.export.nets.vit import VitEncoder, VitShape
from histoseek.export.onnx_graph import Graph, Resize
from histoseek.export.options import ExportOptions, TritonOptions
from histoseek.export.published import PUBLISHED
from histoseek.export.triton import write_repository
from histoseek.index.atlas import Atlas
from histoseek.serving.encoders.onnx import OnnxEncoder
from histoseek.serving.encoders.open import open_encoder

TINY = VitShape(14, 32, 2, 2, 64, size_px=56)
GATED = VitShape(
    14, 32, 2, 2, 40, size_px=56, mlp="swiglu", layer_scale=True, registers=4, positions="patches"
)
CLIP = VitShape(
    14, 32, 2, 2, 64, size_px=56, mlp="quick_gelu", eps=1e-5, pre_norm=True, patch_bias=False,
    project=24,
)  # fmt: skip
EACH_KIND = (
    "lunit-s16", "h0-mini", "hibou-b", "quiltnet-b32", "plip", "conch", "keep", "ctranspath", "retccl",
    "gigapath-flash",
)  # fmt: skip
"""Small encoders of every kind and convention; HISTOSEEK_DEEP=1 takes all encoders."""


def last_pool(shape):
    """The pooling that takes most of the network: its head, if it has one."""
    return shape.pools()[-1] if shape.project else "cls"


def embeddings(net, size_px=56):
    torch.manual_seed(1)
    with torch.inference_mode():
        return net(torch.randn(2, 3, size_px, size_px))


def loaded(shape, tensors, pool=None):
    net = VitEncoder(shape, pool or last_pool(shape)).eval()
    return net, load(net, tensors, "a checkpoint")


@pytest.mark.parametrize(
    ("write", "shape", "convention"),
    [
        (timm, TINY, "timm"),
        (timm, GATED, "timm"),
        (dinov2, GATED, "DINOv2"),
        (hugging_face_vit, TINY, "Hugging Face ViT or DINOv2"),
        (hugging_face_dinov2, GATED, "Hugging Face ViT or DINOv2"),
        (hugging_face_clip, CLIP, "Hugging Face CLIP"),
        (open_clip, CLIP, "open_clip"),
        (coca, replace(TINY, head="pooler", pooled=16, project=16), "CoCa"),
        (conch_v1_5, replace(TINY, head="pooler", project=16), "CONCH v1.5"),
        (keep, replace(TINY, head="mlp", project=24, layer_scale=True), "KEEP"),
        (biomedclip, replace(TINY, project=24), "open_clip with timm's network"),
        (beit3, replace(TINY, sub_norm=True, project=32), "BEiT-3"),
    ],
)
def test_every_convention_loads_the_same_network(write, shape, convention):
    net = seeded(VitEncoder(shape, last_pool(shape)))
    if write is conch_v1_5:
        as_conch_v1_5(net)
    tensors = write(net)
    again, report = loaded(shape, tensors)
    assert report.convention == convention
    assert torch.allclose(embeddings(again), embeddings(net), atol=1e-6)
    for key in (max(tensors, key=lambda k: tensors[k].numel()), "blocks"):
        less = {k: v for k, v in tensors.items() if key not in k}
        if less != tensors:
            with pytest.raises(BadInput, match="missing: |no known convention"):
                loaded(shape, less)


@pytest.mark.parametrize(("side", "size", "how"), [(256, 224, "bilinear"), (512, 448, "bicubic")])
def test_tiles_are_resized_in_the_graph_as_pillow_resizes_them(side, size, how):
    rng = np.random.default_rng(0)
    tile = np.concatenate([made_tiles(side, 2)[0], rng.integers(0, 256, (side, side, 3))], 1)
    tiles = np.stack([tile[:, :side], tile[:, side:]]).astype(np.uint8)
    by = getattr(Image.Resampling, how.upper())
    wanted = np.stack([np.array(Image.fromarray(one).resize((size, size), by)) for one in tiles])
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).float()
    found = Resize(side, size, how)(pixels).permute(0, 2, 3, 1).numpy()
    assert np.abs(found - wanted).max() <= 1 and (found != wanted).mean() < 0.02


def test_the_field_of_view_is_recorded_as_it_is(tmp_path):
    """What the network sees of a tile, in µm, with the authors' settings and with others."""
    net = seeded(build_published(PUBLISHED["gigapath-flash"], depth=1))
    torch.save(timm(net), tmp_path / "net.bin")
    for number, (given, um, seen) in enumerate(
        (({}, 128, 112), ({"tile_px": 512, "mpp": 0.25}, 128, 112), ({"mpp": 0.25}, 64, 56),
         ({"tile_px": 224}, 112, 112), ({"fit": "bilinear"}, 128, 128))
    ):  # fmt: skip
        options = ExportOptions(published="gigapath-flash", **given)
        out = tmp_path / str(number)
        manifest = export_checkpoint(tmp_path / "net.bin", out, options, depth=1)
        tile = manifest.training["tile"]
        assert (tile["um"], tile["seen_um"]) == (um, seen)
        card = (out / CARD).read_text()
        assert f"a tile shows {um} µm, the network sees {seen} µm" in card
    tile = made_tiles(512, 2)[1]
    row = replace(PUBLISHED["gigapath-flash"], tile_px=512)
    shown = fit_of(row)(torch.from_numpy(tile[None]).permute(0, 3, 1, 2).float())
    middle = Image.fromarray(tile).resize((256, 256), Image.Resampling.BICUBIC)
    wanted = np.asarray(middle.crop((16, 16, 240, 240)))
    assert np.abs(shown[0].permute(1, 2, 0).numpy() - wanted).max() <= 1
    with pytest.raises(BadInput, match="has no middle of 224 px"):
        fit_of(replace(PUBLISHED["lunit-s16"], tile_px=128, fit="crop"))


@pytest.mark.deep
@pytest.mark.parametrize("name", PUBLISHED if DEEP else EACH_KIND)
def test_a_published_encoder_becomes_a_bundle(name, tmp_path):
    known = PUBLISHED[name]
    net = seeded(build_published(known, depth=1))
    if name == "conch-v1.5":
        as_conch_v1_5(net)
    path = tmp_path / "checkpoint.bin"
    torch.save(WRITERS.get(name, timm)(net), path)
    options = ExportOptions(published=name)
    manifest = export_checkpoint(path, tmp_path / name, options, depth=1)
    assert manifest == read_manifest(tmp_path / name)
    assert (manifest.name, manifest.dim, manifest.mpp) == (name, known.dim, known.mpp)
    assert known.licence in (tmp_path / name / CARD).read_text()
    tiles = made_tiles(known.side, 2)
    graph = Graph(net, *known.colours, fit=fit_of(known))
    with torch.inference_mode():
        wanted = graph(torch.from_numpy(tiles)).numpy()
    encoder = OnnxEncoder(tmp_path / name)
    np.testing.assert_allclose(encoder.embed(tiles), wanted, atol=1e-5)
    encoder.close()


def test_what_does_not_fit_is_named():
    tensors = timm(seeded(VitEncoder(TINY)))
    swapped = dict(tensors)
    swapped["norm.weight"], swapped["blocks.0.mlp.fc1.bias"] = (
        tensors["blocks.0.mlp.fc1.bias"],
        tensors["norm.weight"],
    )
    with pytest.raises(BadInput, match=r"norm\.weight is 64, expected 32"):
        loaded(TINY, swapped)
    with pytest.raises(BadInput, match=r"left over: blocks\.9\.norm1\.bias"):
        loaded(TINY, {**tensors, "blocks.9.norm1.bias": torch.zeros(32)})
    del tensors["blocks.1.attn.qkv.bias"]
    with pytest.raises(BadInput, match=r"missing: trunk\.blocks\.1\.attn\.qkv\.bias"):
        loaded(TINY, tensors)
    with pytest.raises(BadInput, match="no known convention"):
        loaded(TINY, {"a.weight": torch.zeros(2)})


def test_wrappers_prefixes_and_half_precision_are_looked_through(tmp_path):
    net = seeded(VitEncoder(TINY))
    wrapped = {"epoch": 3, "state_dict": {f"module.model.{k}": v for k, v in timm(net).items()}}
    torch.save(wrapped, tmp_path / "a.pth")
    again, _ = loaded(TINY, read_checkpoint(tmp_path / "a.pth")[0])
    assert torch.equal(embeddings(again), embeddings(net))
    inside = {f"visual.trunk.{k}": v.half().contiguous() for k, v in timm(net).items()}
    save_file(inside, tmp_path / "b.safetensors")
    half, _ = loaded(TINY, read_checkpoint(tmp_path / "b.safetensors")[0])
    assert embeddings(half).dtype == torch.float32
    assert torch.allclose(embeddings(half), embeddings(net), atol=1e-2)
    trained = teacher(seeded(VitEncoder(GATED)), chunks=1)
    torch.save({**trained, "student": {}, "epoch": 3}, tmp_path / "c.pth")
    tensors, notes = read_checkpoint(tmp_path / "c.pth")
    assert notes == ["read the parameters under 'teacher', not epoch, student"]
    _, report = loaded(GATED, tensors)
    assert report.notes == ["added the class token's position to the class token"]
    assert set(report.dropped) == {"mask_token", "dino_head.last_layer.weight"}


def test_parameters_outside_the_image_network_are_named():
    tensors = {f"visual.trunk.{k}": v for k, v in timm(seeded(VitEncoder(TINY))).items()}
    others = {"text.ln.weight": torch.zeros(2), "visual.neck.weight": torch.zeros(2, 2)}
    _, report = loaded(TINY, {**tensors, **others})
    assert report.dropped == ["text.ln.weight", "visual.neck.weight"]


def test_positions_of_another_grid_are_resampled_and_said():
    net = seeded(VitEncoder(TINY))
    tensors = timm(net)
    grid = torch.linspace(0, 1, 8)[:, None, None].expand(8, 8, 32).reshape(1, 64, 32)
    tensors["pos_embed"] = torch.cat([torch.ones(1, 1, 32), grid], 1)
    again, report = loaded(TINY, tensors)
    assert "from 8 x 8 to 4 x 4" in report.notes[0]
    places = again.trunk.pos_embed[0]
    assert torch.equal(places[0], torch.ones(32))
    rows = places[1:].reshape(4, 4, 32)
    assert torch.allclose(rows[:, 0], rows[:, 3]) and (rows[1:, 0] > rows[:-1, 0]).all()


def test_only_plain_tensors_are_read(tmp_path):
    torch.save({"state_dict": VitEncoder(TINY)}, tmp_path / "module.pth")
    with pytest.raises(Damaged, match=r"convert it to \.safetensors"):
        read_checkpoint(tmp_path / "module.pth")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(Damaged, match="not a readable"):
        read_checkpoint(tmp_path / "text.safetensors")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(BadInput, match="holds no tensors, but: epoch"):
        read_checkpoint(tmp_path / "empty.pth")


def test_pooling_can_be_chosen_and_is_recorded(tmp_path, cli_json, cli):
    net = seeded(build_published(PUBLISHED["lunit-s16"]))
    path = tmp_path / "lunit.safetensors"
    save_file(timm(net), path)
    words = ("export", path, "--out", tmp_path / "b", "--as", "lunit-s16", "--pool", "cls+mean")
    made = cli_json(*words, "--licence", "made up")
    assert (made["dim"], made["licence"], made["mpp"]) == (768, "made up", 0.5)
    record = json.loads((tmp_path / "b" / CHECKPOINT).read_text())
    assert made["loaded"] == record
    assert record["pool"] == "cls+mean" and record["checkpoint"]["convention"] == "timm"
    refused = cli("export", path, "--out", tmp_path / "c")
    assert refused.returncode == 1 and "name its encoder by --as" in refused.stderr
    for flag, value in (("--layout", "nhwc"), ("--pca", 0.9)):
        refused = cli("export", path, "--out", tmp_path / "c", "--as", "lunit-s16", flag, value)
        assert f"{flag} is not for a checkpoint" in refused.stderr
    for flag, value in (("--mean", "123,116,103"), ("--std", "nan,1,1"), ("--std", "0,1,1")):
        refused = cli("export", path, "--out", tmp_path / "c", "--as", "lunit-s16", flag, value)
        assert "expected three numbers for red, green and blue in 0..1" in refused.stderr
    refused = cli(
        "export", path, "--out", tmp_path / "c", "--as", "lunit-s16", "--slides", tmp_path
    )
    assert "--slides is for --against" in refused.stderr
    listed = {row["name"]: row for row in cli_json("export", "--list")}
    assert listed.keys() == PUBLISHED.keys()
    assert listed["uni"]["parameters"] == 303_350_784 and listed["uni"]["gated"]
    assert listed["conch"]["text"] and not listed["uni"]["text"]


@pytest.fixture(scope="module")
def in_two_files(tmp_path_factory):
    """A bundle whose weights are in a file of their own, as those above 2 GB are; and its network."""
    folder = tmp_path_factory.mktemp("large")
    net = seeded(build_published(PUBLISHED["lunit-s16"], depth=1))
    torch.save(timm(net), folder / "net.bin")
    options = ExportOptions(published="lunit-s16")
    export_checkpoint(folder / "net.bin", folder / "bundle", options, depth=1, largest=10**6)
    return folder / "bundle", net


def test_weights_in_a_second_file_embed_the_same_and_go_where_the_bundle_goes(
    in_two_files, tmp_path, cli, monkeypatch
):
    bundle, net = in_two_files
    assert (bundle / GRAPH).stat().st_size < 10**6 < (bundle / f"{GRAPH}.data").stat().st_size
    tiles = made_tiles(224, 3)
    with torch.inference_mode():
        wanted = Graph(net, *PUBLISHED["lunit-s16"].colours)(torch.from_numpy(tiles)).numpy()
    Atlas.create(tmp_path / "atlas", bundle)
    cli("index", "snapshot", tmp_path / "atlas", "--out", tmp_path / "copy", check=True)
    for place in (bundle, tmp_path / "copy" / "encoder"):
        for engine in ("onnxruntime", "openvino"):
            encoder = OnnxEncoder(place, engine=engine)
            np.testing.assert_allclose(encoder.embed(tiles), wanted, atol=1e-4)
            encoder.close()
    write_repository([bundle], tmp_path / "models", TritonOptions())
    served = tmp_path / "models" / "bundle" / "1"
    small = (served.parent / "config.pbtxt").read_text()
    assert "max_batch_size: 64" in small and "count: 2" in small
    monkeypatch.setattr("histoseek.export.triton.LARGE", 10**6)
    write_repository([bundle], tmp_path / "large", TritonOptions())
    large = (tmp_path / "large" / "bundle" / "config.pbtxt").read_text()
    assert "max_batch_size: 16" in large and "count: 1 }" in large
    assert 'key: "intra_op_thread_count" value: { string_value: "0" }' in large
    assert "default_timeout_microseconds: 300000000" in large
    session = onnxruntime.InferenceSession(served / "model.onnx")
    np.testing.assert_allclose(session.run(None, {"tiles": tiles})[0], wanted, atol=1e-5)
    in_two = partial(to_fp16, largest=10**6)
    monkeypatch.setattr("histoseek.export.half_precision.to_fp16", in_two)
    _, half = write_repository([bundle], tmp_path / "half", TritonOptions(fp16=True))
    served = tmp_path / "half" / "bundle-fp16" / "1" / "model.onnx"
    assert half.cosine_error < 1e-4 and served.stat().st_size < 10**6
    assert data_file(served).stat().st_size < 0.6 * data_file(bundle / GRAPH).stat().st_size


@pytest.mark.parametrize("largest", [2**29, 10**6])
def test_half_precision_halves_the_bundle_and_states_what_it_changed(tmp_path, largest, cli_json):
    net = seeded(build_published(PUBLISHED["lunit-s16"], depth=1))
    torch.save(timm(net), tmp_path / "net.bin")
    sizes, found = {}, {}
    tiles = made_tiles(224, 3)
    for precision in ("fp32", "fp16"):
        out = tmp_path / precision
        options = ExportOptions(published="lunit-s16", precision=precision)
        manifest = export_checkpoint(tmp_path / "net.bin", out, options, depth=1, largest=largest)
        assert manifest.training.get("weights") == ("float16" if precision == "fp16" else None)
        sizes[precision] = graph_bytes(out / GRAPH)
        found[precision] = OnnxEncoder(out).embed(tiles)
        check_bundle_graph(out, manifest, whole=True)
    assert sizes["fp16"] < 0.52 * sizes["fp32"]
    stored = net.half().float()
    with torch.inference_mode():
        halved = Graph(stored, *PUBLISHED["lunit-s16"].colours)(torch.from_numpy(tiles)).numpy()
    np.testing.assert_allclose(found["fp16"], halved, atol=1e-4)
    assert not np.allclose(found["fp16"], found["fp32"], atol=1e-6)
    parity = json.loads((tmp_path / "fp16" / "parity.json").read_text())
    assert parity["precision"] == "fp16" and parity["bounds"]["max_cosine_error"] == 1e-4
    assert "half precision" in (tmp_path / "fp16" / "MODEL_CARD.md").read_text()


def test_weights_too_large_for_half_precision_are_refused(tmp_path):
    net = seeded(build_published(PUBLISHED["lunit-s16"], depth=1))
    with torch.no_grad():
        net.get_parameter("trunk.blocks.0.mlp.fc1.weight")[0, 0] = 1e5
    torch.save(timm(net), tmp_path / "net.bin")
    options = ExportOptions(published="lunit-s16", precision="fp16")
    with pytest.raises(BadInput, match="values above 65504"):
        export_checkpoint(tmp_path / "net.bin", tmp_path / "out", options, depth=1)
    assert not (tmp_path / "out").exists()


def test_a_second_file_that_is_changed_or_missing_is_refused(in_two_files, tmp_path, monkeypatch):
    bundle = tmp_path / "bundle"
    shutil.copytree(in_two_files[0], bundle)
    data = bundle / f"{GRAPH}.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Damaged, match="is not the file that the graph states"):
        read_manifest(bundle)
    monkeypatch.setattr("histoseek.artifacts.onnx_files.HASHED", 10**6)
    manifest = read_manifest(bundle)  # of a large file only the size is compared
    with pytest.raises(Damaged, match="is not the file that the graph states"):
        check_bundle_graph(bundle, manifest, whole=True)
    data.write_bytes(whole[:-1])
    with pytest.raises(Damaged, match="is not the file that the graph states"):
        read_manifest(bundle)
    data.unlink()
    with pytest.raises(Damaged, match="is missing"):
        read_manifest(bundle)
    data.symlink_to(in_two_files[0] / f"{GRAPH}.data")
    with pytest.raises(BadInput, match="is a link"):
        read_manifest(bundle)


def test_the_real_server_embeds_as_in_process(in_two_files, tmp_path, triton):
    """A published encoder whose weights are in a second file, through the server and in this process."""
    bundle, _ = in_two_files
    write_repository([bundle], tmp_path / "models", TritonOptions())
    server = triton(tmp_path / "models")
    tiles = made_tiles(224, 5)
    local, served = OnnxEncoder(bundle), open_encoder(server.url("bundle"), read_manifest(bundle))
    np.testing.assert_allclose(served.embed(tiles), local.embed(tiles), atol=1e-5)
    served.close()
    local.close()
