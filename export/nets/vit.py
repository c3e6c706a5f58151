"""Vision transformers: the image networks of nearly all pathology foundation models.

One class covers ViT (Dosovitskiy et al. 2021), DINOv2 (Oquab et al. 2024; registers: Darcet et al. 2024)
and the image tower of CLIP (Radford et al. 2021). Parameters have timm's names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from ...errors import BadInput

Mlp = Literal["gelu", "quick_gelu", "swiglu"]
Positions = Literal["class and patches", "patches", "all"]
Pool = Literal["cls", "cls+mean", "mean"]


@dataclass(frozen=True)
class VitShape:
    """Sizes of a vision transformer.

    Attributes:
        patch: side of a patch in pixels.
        width: length of a token.
        depth: number of blocks.
        heads: attention heads of a block.
        hidden: length of the vector inside an MLP, after the gate of ``swiglu``.
        size_px: side of the input in pixels.
        mlp: activation: GELU, its approximation x * sigmoid(1.702 x), or a gate, SiLU(a) * b.
        layer_scale: whether each branch is multiplied by learned weights.
        registers: number of additional tokens.
        positions: the tokens that have learned positions.
        eps: epsilon of the layer norms.
        pre_norm: whether a layer norm precedes the first block (CLIP).
        patch_bias: whether the embedding of a patch has a bias.
        project: length after a final linear map without bias (CLIP); 0 for none.
    """

    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    size_px: int = 224
    mlp: Mlp = "gelu"
    layer_scale: bool = False
    registers: int = 0
    positions: Positions = "class and patches"
    eps: float = 1e-6
    pre_norm: bool = False
    patch_bias: bool = True
    project: int = 0

    @property
    def grid(self) -> int:
        """Number of patches along a side."""
        return self.size_px // self.patch

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches."""
        return 1 + self.registers

    @property
    def placed(self) -> int:
        """Number of prefix tokens with a learned position."""
        return {"class and patches": 1, "patches": 0, "all": self.prefix}[self.positions]

    def shallow(self, depth: int) -> VitShape:
        """Return the shape with fewer blocks, for tests."""
        return replace(self, depth=depth)


class Vit(nn.Module):
    """Map normalised tiles (N, 3, S, S) to tokens (N, 1 + registers + patches, width)."""

    def __init__(self, shape: VitShape) -> None:
        """Create the network; weights are torch's defaults until a checkpoint is loaded."""
        super().__init__()
        if shape.size_px % shape.patch:
            raise BadInput(
                f"size_px is {shape.size_px}; expected a multiple of patch {shape.patch}"
            )
        if shape.width % shape.heads:
            raise BadInput(f"width is {shape.width}; expected a multiple of heads {shape.heads}")
        self.shape = shape
        self.patch_embed = _PatchEmbedding(shape)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        if shape.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, shape.registers, shape.width))
        count = shape.placed + shape.grid**2
        self.pos_embed = nn.Parameter(torch.zeros(1, count, shape.width))
        if shape.pre_norm:
            self.norm_pre = nn.LayerNorm(shape.width, eps=shape.eps)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return all tokens, after the last layer norm."""
        shape = self.shape
        patches = self.patch_embed(tiles)
        # shape[0], not len(): export keeps it variable
        prefix = [self.cls_token.expand(patches.shape[0], -1, -1)]
        if shape.registers:
            prefix.append(self.reg_token.expand(patches.shape[0], -1, -1))
        first = torch.cat(prefix, 1)
        places = self.pos_embed[:, : shape.placed]
        if shape.placed:
            first = torch.cat([first[:, : shape.placed] + places, first[:, shape.placed :]], 1)
        tokens = torch.cat([first, patches + self.pos_embed[:, shape.placed :]], 1)
        if shape.pre_norm:
            tokens = self.norm_pre(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        normed: torch.Tensor = self.norm(tokens)
        return normed


class VitEncoder(nn.Module):
    """Map normalised tiles (N, 3, S, S) to embeddings (N, D): pooled tokens of a :class:`Vit`."""

    def __init__(self, shape: VitShape, pool: Pool = "cls") -> None:
        """Pool the class token, the mean of the patches, or both side by side."""
        super().__init__()
        self.trunk, self.pool = Vit(shape), pool
        self.dim = (2 if pool == "cls+mean" else 1) * shape.width
        if shape.project:
            self.project = nn.Linear(shape.width, shape.project, bias=False)
            self.dim = shape.project

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return embeddings, not normalised."""
        tokens = self.trunk(tiles)
        first, mean = tokens[:, 0], tokens[:, self.trunk.shape.prefix :].mean(1)
        pooled = {"cls": first, "mean": mean}.get(self.pool)
        if pooled is None:
            pooled = torch.cat([first, mean], 1)
        if self.trunk.shape.project:
            pooled = self.project(pooled)
        return pooled


class _PatchEmbedding(nn.Module):
    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, shape.width, shape.patch, shape.patch, bias=shape.patch_bias)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        patches: torch.Tensor = self.proj(tiles).flatten(2).transpose(1, 2)
        return patches


class _Block(nn.Module):
    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.attn = Attention(shape.width, shape.heads)
        self.ls1 = _Scale(shape.width) if shape.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.mlp = _Gated(shape) if shape.mlp == "swiglu" else _Mlp(shape)
        self.ls2 = _Scale(shape.width) if shape.layer_scale else nn.Identity()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        after: torch.Tensor = tokens + self.ls2(self.mlp(self.norm2(tokens)))
        return after


class Attention(nn.Module):
    """Multi-head self-attention of tokens (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        """Create one map to queries, keys and values, and one of the joined heads."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens of the same shape."""
        joined = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = joined.unbind(0)
        found = nn.functional.scaled_dot_product_attention(query, key, value)
        output: torch.Tensor = self.proj(found.transpose(1, 2).flatten(2))
        return output


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens * self.gamma


class _Mlp(nn.Module):
    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.hidden)
        self.fc2 = nn.Linear(shape.hidden, shape.width)
        self.quick = shape.mlp == "quick_gelu"

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inside = self.fc1(tokens)
        inside = (
            inside * torch.sigmoid(1.702 * inside) if self.quick else nn.functional.gelu(inside)
        )
        output: torch.Tensor = self.fc2(inside)
        return output


class _Gated(nn.Module):
    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, 2 * shape.hidden)
        self.fc2 = nn.Linear(shape.hidden, shape.width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        gate, value = self.fc1(tokens).chunk(2, -1)
        output: torch.Tensor = self.fc2(nn.functional.silu(gate) * value)
        return output
