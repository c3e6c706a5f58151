"""Make a bundle of a tissue network: from a training run, or from an ONNX graph of another program.

The bundle's graph takes raw pixels and returns how certain tissue is. The ends that an ONNX graph gets for
that: in front, pixels are scaled, normalised and brought to its layout; behind, its classes become
probabilities, and those of the classes that are tissue are added.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..artifacts import files
from ..artifacts.files import read_json, sha256_file, write_atomic, write_json
from ..artifacts.manifest import CARD, INPUT, MANIFEST, PARITY, RUN
from ..artifacts.onnx_files import check_graph_whole
from ..artifacts.tissue_bundle import TISSUE_GRAPH, TISSUE_OUTPUT, TissueManifest
from ..errors import BadInput, Damaged, Mismatch, need
from .from_checkpoint import made_tiles
from .from_onnx import constant, front, joined, load_graph, opset_of, size_of
from .onnx_graph import OPSET, to_onnx_of
from .options import TissueExportOptions, checked_name, colours

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
RANGE = 1e-3
"""Tolerance with which numbers count as probabilities."""
BOUND = 1e-4
"""Largest accepted difference between the bundle's graph and its source."""
SQUARES = 4


class TissueGraph(nn.Module):
    """A network from images in 0..1 to logits, with the ends of the bundle's graph."""

    def __init__(self, net: nn.Module) -> None:
        """Wrap the network."""
        super().__init__()
        self.net = net

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 (N, S, S, 3) -> float32 (N, s, s) in 0..1."""
        logits: torch.Tensor = self.net(tiles.permute(0, 3, 1, 2).float() / 255)
        return logits.sigmoid()[:, 0]


def export_tissue_run(
    run: Path,
    out: Path,
    build: Callable[[tuple[int, ...]], nn.Module],
    options: TissueExportOptions,
) -> TissueManifest:
    """Export a run of ``histoseek tissue train`` as a bundle.

    Args:
        run: folder of the run.
        out: folder of the bundle, which must not exist.
        build: builds the network from its widths.
        options: name, licence, threshold and notes; the others are for ONNX graphs.

    Raises:
        BadInput: there is no finished run, or ``out`` exists.
        Damaged: the weights do not fit the network.
        Mismatch: the graph differs from the network; nothing is written.
    """
    record = read_json(run / RUN) if (run / RUN).is_file() else {}
    architecture = record.get("architecture", {})
    if architecture.get("model") != "tissue":
        raise BadInput(f"{run} has no finished run of `histoseek tissue train`")
    plain = TissueExportOptions()
    for field in ("mpp", "mean", "std", "size_px", "tissue", "output", "layout"):
        if getattr(options, field) != getattr(plain, field):
            name = {"tissue": "class", "size_px": "size-px"}.get(field, field)
            raise BadInput(f"--{name} is for an .onnx file; leave it out")
    net = build(tuple(architecture["widths"]))
    try:
        net.load_state_dict(load_file(run / "weights.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise Damaged(
            f"{run / 'weights.safetensors'} does not fit the network ({error})"
        ) from error
    graph = TissueGraph(net).eval()
    size_px = int(record["size_px"])

    def expected(squares: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return graph(torch.from_numpy(squares)).numpy()  # type: ignore[no-any-return]

    example = (torch.zeros(2, size_px, size_px, 3, dtype=torch.uint8),)
    blob = to_onnx_of(graph, example, INPUT, TISSUE_OUTPUT)
    training = {key: record[key] for key in ("recipe", "options", "data", "metrics")}
    about = {
        "size_px": size_px, "mpp": record["mpp"], "opset": OPSET, "training": training,
        "versions": {**record["versions"], "onnx": onnx.__version__},
    }  # fmt: skip
    return _publish(out, blob, expected, about, options)


def export_tissue_onnx(model: Path, out: Path, options: TissueExportOptions) -> TissueManifest:
    """Export an ONNX segmentation network of another program as a bundle.

    Args:
        model: an .onnx file in one piece, from float images (N, 3, S, S) to classes (N, C, s, s) or one
            map (N, s, s), in the layout ``nchw``; N must be variable.
        out: folder of the bundle, which must not exist.
        options: ``mpp``, ``mean`` and ``std`` are required.

    Raises:
        BadInput: an option is missing, the graph is no such network, or ``out`` exists.
        Damaged: the file is no ONNX graph.
        Mismatch: the new graph differs from the given one; nothing is written.
    """
    check_graph_whole(model)
    if options.mpp is None:
        raise BadInput(f"{model} does not state its scale; pass --mpp, such as 10 for 1x")
    mean, std = map(list, colours(options.mean, options.std))
    given = load_graph(model)
    size_px = size_of(given, options.layout, model, options.size_px)
    classes = _classes(given, options, model)
    whole = joined(given, front(size_px, mean, std, options.layout), _back(given, classes, options))
    onnx.checker.check_model(whole, full_check=True)
    onnxruntime = need("onnxruntime", "cpu")
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = session.get_inputs()[0].name, session.get_outputs()[0].name

    def expected(squares: NDArray[np.uint8]) -> NDArray[np.float32]:
        images = ((squares / 255 - mean) / std).astype(np.float32)
        if options.layout == "nchw":
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        found = session.run([names[1]], {names[0]: images})[0].astype(np.float64)
        if found.ndim == 3:
            found = found[:, None]
        elif options.layout == "nhwc":
            found = found.transpose(0, 3, 1, 2)
        _check_output(found, options.output, bool(classes), model)
        if options.output == "logits":
            powers = np.exp(found - found.max(1, keepdims=True))
            found = powers / powers.sum(1, keepdims=True) if classes else 1 / (1 + np.exp(-found))
        return np.asarray(found[:, list(classes) or [0]].sum(1), np.float32)

    about = {
        "size_px": size_px, "mpp": options.mpp, "opset": opset_of(given),
        "training": {
            "onnx": model.name, "onnx_sha256": sha256_file(model), "mean": mean, "std": std,
            "layout": options.layout, "classes": list(classes), "output": options.output,
        },
        "versions": {"onnx": onnx.__version__},
    }  # fmt: skip
    return _publish(out, whole.SerializeToString(), expected, about, options)


def _check_output(found: NDArray[np.float64], output: str, several: bool, path: Path) -> None:
    """Refuse an output (N, C, s, s) that is not what ``--output`` says."""
    inside = bool((found >= -RANGE).all() and (found <= 1 + RANGE).all())
    is_sum = not several or bool(np.abs(found.sum(1) - 1).max() < RANGE)
    if output == "logits" and inside and is_sum:
        raise BadInput(
            f"{path} returns {found.min():.2g} to {found.max():.2g}, which are probabilities already; pass "
            "--output probabilities"
        )
    if output == "probabilities" and not inside:
        raise BadInput(
            f"{path} returns {found.min():.2g} to {found.max():.2g}, which are no probabilities; pass "
            "--output logits"
        )


def _classes(given: Any, options: TissueExportOptions, path: Path) -> tuple[int, ...]:
    """Return the classes that are tissue; none if the graph has only one."""
    output = given.graph.output[0]
    shape = [dim.dim_value for dim in output.type.tensor_type.shape.dim]
    if len(shape) not in (3, 4):
        raise BadInput(
            f"{path} returns an output of {len(shape)} axes ({output.name}); expected classes "
            "(N, C, H, W) or one map (N, H, W)"
        )
    kind = output.type.tensor_type.elem_type
    if kind != TensorProto.FLOAT:
        raise BadInput(
            f"{path} returns {TensorProto.DataType.Name(kind)}; expected float logits or probabilities: "
            "export it without argmax, in float32"
        )
    count = 1 if len(shape) == 3 else shape[1 if options.layout == "nchw" else 3]
    if not count:
        raise BadInput(f"{path} does not state its number of classes ({output.name})")
    if count == 1:
        if options.tissue:
            raise BadInput(f"{path} has one class only; leave out --class")
        return ()
    if not options.tissue or not all(0 <= number < count for number in options.tissue):
        given_text = ", ".join(map(str, options.tissue)) or "not given"
        raise BadInput(
            f"{path} has {count} classes, and --class is {given_text}; expected the number of the class "
            f"that is tissue, 0 to {count - 1}"
        )
    return tuple(dict.fromkeys(options.tissue))


def _back(given: Any, classes: tuple[int, ...], options: TissueExportOptions) -> Any:
    """Return the graph from a network's output to probabilities of tissue."""
    rank = len(given.graph.output[0].type.tensor_type.shape.dim)
    nodes: list[Any] = []
    found = "features"

    def add(kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"step{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    if rank == 4 and options.layout == "nhwc":
        found = add("Transpose", found, perm=[0, 3, 1, 2])
    if options.output == "logits":
        found = add("Softmax", found, axis=1) if classes else add("Sigmoid", found)
    constants = [
        constant(np.array(classes or (0,), np.int64), "classes"),
        constant(np.array([1], np.int64), "axis"),
    ]
    if rank == 4:
        found = add("Gather", found, "classes", axis=1)
        found = add("ReduceSum", found, "axis", keepdims=0)
    nodes.append(helper.make_node("Identity", [found], [TISSUE_OUTPUT]))
    return helper.make_graph(
        nodes,
        "back",
        [
            helper.make_tensor_value_info(
                "features", TensorProto.FLOAT, ["batch", *([None] * (rank - 1))]
            )
        ],
        [helper.make_tensor_value_info(TISSUE_OUTPUT, TensorProto.FLOAT, ["batch", None, None])],
        constants if rank == 4 else [],
    )


def _publish(
    out: Path, blob: bytes, expected: Run, about: dict[str, Any], options: TissueExportOptions
) -> TissueManifest:
    """Test the graph against its source, and write the bundle, all or nothing."""
    name = checked_name(options.name or out.name)
    onnxruntime = need("onnxruntime", "cpu")
    session = onnxruntime.InferenceSession(blob, providers=["CPUExecutionProvider"])
    squares = made_tiles(about["size_px"])[:SQUARES]
    found = np.concatenate(
        [session.run([TISSUE_OUTPUT], {INPUT: part[None]})[0] for part in squares]
    )
    together = session.run([TISSUE_OUTPUT], {INPUT: squares})[0]
    wanted = expected(squares)
    sides = found.shape[1:]
    if (
        found.shape != wanted.shape
        or found.ndim != 3
        or sides[0] != sides[1]
        or about["size_px"] % sides[0]
    ):
        raise BadInput(
            f"the network returns maps of {' x '.join(map(str, wanted.shape[1:]))} for squares of "
            f"{about['size_px']} pixels; expected square maps whose side divides that of the squares"
        )
    parity = {
        "squares": len(squares),
        "max_abs": float(np.abs(found - wanted).max()),
        "batch_max_abs": float(np.abs(found - together).max()),
        "bound": BOUND,
    }
    if not max(parity["max_abs"], parity["batch_max_abs"]) <= BOUND:
        raise Mismatch(
            f"the bundle's graph differs from its source by {parity['max_abs']:.1e}, and alone from in a "
            f"batch by {parity['batch_max_abs']:.1e}; at most {BOUND:.0e} is accepted"
        )
    with files.publish_folder(out) as folder:
        write_atomic(folder / TISSUE_GRAPH, blob)
        manifest = TissueManifest(
            name=name, sha256=sha256_file(folder / TISSUE_GRAPH), threshold=options.threshold,
            licence=options.licence, **about,
        )  # fmt: skip
        write_json(folder / MANIFEST, manifest.model_dump())
        write_json(folder / PARITY, parity)
        notes = files.read_text(options.notes) if options.notes else ""
        write_atomic(folder / CARD, _card(manifest, parity, notes))
    return manifest


def _card(manifest: TissueManifest, parity: dict[str, Any], notes: str) -> str:
    data, metrics = (manifest.training.get(key, {}) for key in ("data", "metrics"))
    lines = [
        f"# {manifest.name}",
        "",
        f"Finds tissue on squares of {manifest.size_px} x {manifest.size_px} pixels at {manifest.mpp:g} µm "
        "per pixel. `histoseek embed --tissue-model` takes the folder.",
        "",
        "| | |",
        "|---|---|",
        f"| sha256 | `{manifest.sha256}` |",
        f"| threshold | {manifest.threshold:g} |",
        f"| licence of the weights | {manifest.licence} |",
        f"| opset | {manifest.opset} |",
        f"| largest difference from its source | {parity['max_abs']:.1e} |",
    ]
    if data:
        excluded = "; ".join(data.get("selection", {}).get("exclude", []))
        lines += [
            f"| training data | made scenes with {data['tiles']} tiles of {data['name']} (fingerprint "
            f"`{data['fingerprint'][:16]}`){f'; excluded: {excluded}' if excluded else ''} |",
            f"| pixels of {metrics['scenes']} held-out made scenes | precision {metrics['precision']:.3f}, "
            f"recall {metrics['recall']:.3f} |",
        ]
    return "\n".join([*lines, "", notes.strip()]).rstrip() + "\n"
