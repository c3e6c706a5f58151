"""Describe the vision transformer of a checkpoint that ``--as`` does not name (``--arch vit``).

Nearly all sizes follow from the shapes of the parameters. What a checkpoint does not state is guessed, and
every guess is reported.
"""

from __future__ import annotations

import math
import re
from typing import Any

from ..errors import BadInput
from .checkpoints import Tensors, in_our_names
from .nets.vit import POOLER_HEADS, Activation, Head, Positions, VitShape
from .options import ExportOptions
from .published import IMAGENET, Published

HEAD_WIDTH = 64
"""Numbers of a token that each attention head sees, in nearly all vision transformers."""
EPS_CLIP, EPS = 1e-5, 1e-6


def unlisted_vit(
    tensors: Tensors, source: str, options: ExportOptions
) -> tuple[Published, list[str]]:
    """Return a row like those of the published encoders, and what was guessed.

    Args:
        tensors: of the checkpoint.
        source: its name, for messages.
        options: ``heads``, ``input_px``, ``activation`` and the colours count.

    Raises:
        BadInput: the checkpoint is no vision transformer whose names are known.
    """
    name, renamed = in_our_names(tensors, source)
    own = {key.removeprefix("trunk."): value for key, value in renamed.items()}
    patches = own.get("patch_embed.proj.weight")
    first, second = (own.get(f"blocks.0.mlp.fc{n}.weight") for n in (1, 2))
    if patches is None or patches.ndim != 4 or first is None or second is None:
        raise BadInput(
            f"{source} is no plain vision transformer ({name} names, without patch_embed.proj or "
            "blocks.0.mlp); --arch knows only vit: export the network to ONNX and pass that file"
        )
    width, patch = patches.shape[0], patches.shape[-1]
    registers = own["reg_token"].shape[-2] if "reg_token" in own else 0
    positions, grid = _positions(own, registers, source)
    gated = first.shape[0] == 2 * second.shape[1]
    mlp: Activation = "swiglu" if gated else options.activation or "gelu"
    heads = options.heads or max(1, width // HEAD_WIDTH)
    clip = "norm_pre.weight" in own
    shape = VitShape(
        patch, width, 1 + max(int(m[1]) for m in map(_BLOCK.match, own) if m), heads, second.shape[1],
        size_px=options.input_px or grid * patch,
        mlp=mlp,
        layer_scale="blocks.0.ls1.gamma" in own,
        registers=registers,
        positions=positions,
        eps=EPS_CLIP if clip else EPS,
        pre_norm=clip,
        patch_bias="patch_embed.proj.bias" in own,
        sub_norm="blocks.0.attn.norm.weight" in own,
        **_head(own),
    )  # fmt: skip
    guesses = [f"epsilon {shape.eps:g} of the layer norms"]
    if not options.heads:
        guesses.insert(0, f"{heads} attention heads of {width // heads} numbers (--heads)")
    if not gated and not options.activation:
        guesses.append("the activation GELU (--activation)")
    if gated:
        guesses.append("a packed SwiGLU, because fc1 is twice as wide as fc2")
    if options.pool is None:
        guesses.append("the class token as the embedding (--pool)")
    known = Published(
        source="a checkpoint that --as does not name",
        licence=options.licence,
        gated=False,
        shape=shape,
        colours=options.colours() if options.mean or options.std else IMAGENET,
        mpp=None,
    )
    return known, [f"guessed, as the file does not state it: {', '.join(guesses)}"]


_BLOCK = re.compile(r"blocks\.(\d+)\.")


def _positions(own: Tensors, registers: int, source: str) -> tuple[Positions, int]:
    """Return which tokens have positions, and the patches along a side."""
    places = own.get("pos_embed")
    count = 0 if places is None else places.shape[-2]
    choices: tuple[tuple[Positions, int], ...] = (
        ("class and patches", 1),
        ("patches", 0),
        ("all", 1 + registers),
    )
    for kind, prefix in choices:
        side = math.isqrt(max(count - prefix, 0))
        if side and side**2 == count - prefix and not (registers and kind == "class and patches"):
            return kind, side
    if registers and math.isqrt(count - 1) ** 2 == count - 1:
        return "patches", math.isqrt(count - 1)  # the class token's position is added to the token
    raise BadInput(
        f"{source} has {count} learned positions (pos_embed); expected a square of patches, with or "
        "without the class token: export networks with other positions (rotary, none) to ONNX by their own "
        "code"
    )


def _head(own: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the shape that describe what follows the tokens."""
    if "pooler.query" in own:
        kind: Head = "pooler"
        pooled, mapped = own["pooler.query"].shape[-1], own.get("project.weight")
        if pooled % POOLER_HEADS:
            raise BadInput(f"the pooler's length {pooled} is no multiple of {POOLER_HEADS} heads")
        if mapped is None:
            return {"head": kind, "project": pooled}
        return {"head": kind, "project": mapped.shape[0], "pooled": pooled}
    if "project.0.weight" in own:
        return {"head": "mlp", "project": own["project.0.weight"].shape[0]}
    if "project.weight" in own:
        return {"project": own["project.weight"].shape[0]}
    return {}
