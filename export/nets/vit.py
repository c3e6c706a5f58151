"""Vision transformers: the image networks of nearly all pathology foundation models.

One class covers ViT (Dosovitskiy et al. 2021), DINOv2 (Oquab et al. 2024; registers: Darcet et al. 2024),
the image towers of CLIP (Radford et al. 2021), CoCa (Yu et al. 2022) and BEiT-3 (Wang et al. 2023).
Parameters have timm's names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from ...errors import BadInput

Activation = Literal["gelu", "quick_gelu", "swiglu"]
Positions = Literal["class and patches", "patches", "all"]
Pool = Literal["cls", "cls+mean", "mean", "pooler", "head"]
Head = Literal["linear", "mlp", "pooler"]
POOLER_HEADS = 8
POOLER_EPS = 1e-5
"""The pooler's layer norms keep torch's epsilon, whatever that of the transformer."""


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
        sub_norm: whether a layer norm precedes the last map of each branch (BEiT-3).
        head: what follows the tokens: a linear map without bias of the class token (CLIP), an MLP (KEEP),
            or a pooler: attention of one learned query to all tokens, and a layer norm (CONCH).
        project: length after the head; 0 for no head.
        pooled: length after a pooler, before a last linear map without bias; 0 if there is no such map.
        built_grid: patches along a side for which the network was built, if its authors' code resamples
            positions from there as DINO does; 0: they are resampled once, as timm does.
    """

    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    size_px: int = 224
    mlp: Activation = "gelu"
    layer_scale: bool = False
    registers: int = 0
    positions: Positions = "class and patches"
    eps: float = 1e-6
    pre_norm: bool = False
    patch_bias: bool = True
    sub_norm: bool = False
    head: Head = "linear"
    project: int = 0
    pooled: int = 0
    built_grid: int = 0

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

    def dim(self, pool: Pool) -> int:
        """Return the length of an embedding."""
        return {
            "cls+mean": 2 * self.width,
            "pooler": self.pooled or self.project,
            "head": self.project,
        }.get(pool, self.width)

    def pools(self) -> tuple[Pool, ...]:
        """Return the poolings that the network can compute."""
        plain: tuple[Pool, ...] = ("cls", "cls+mean", "mean")
        if self.head == "pooler" and self.project:
            return (*plain, "pooler", "head") if self.pooled else (*plain, "pooler")
        return (*plain, "head") if self.project else plain

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
        """Create the network with its head.

        Args:
            shape: sizes of the network.
            pool: the class token, the mean of the patches, both side by side, or the output of the pooler
                or of the whole head.

        Raises:
            BadInput: the network has no such head.
        """
        super().__init__()
        if pool not in shape.pools():
            raise BadInput(
                f"--pool is {pool!r}; expected one of {', '.join(shape.pools())} for this network"
            )
        self.trunk, self.pool = Vit(shape), pool
        self.project: nn.Module
        self.dim = shape.dim(pool)
        if shape.project and shape.head == "pooler":
            self.pooler = Pooler(shape.width, shape.pooled or shape.project)
            if shape.pooled:
                self.project = nn.Linear(shape.pooled, shape.project, bias=False)
        elif shape.project and shape.head == "mlp":
            first, last = (
                nn.Linear(shape.width, shape.project),
                nn.Linear(shape.project, shape.project),
            )
            self.project = nn.Sequential(first, nn.GELU(), last)
        elif shape.project:
            self.project = nn.Linear(shape.width, shape.project, bias=False)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return embeddings, not normalised."""
        return self.pooled(self.trunk(tiles), self.pool)

    def pooled(self, tokens: torch.Tensor, pool: Pool) -> torch.Tensor:
        """Return the embeddings (N, D) that tokens (N, T, width) have by a pooling."""
        shape = self.trunk.shape
        first, mean = tokens[:, 0], tokens[:, shape.prefix :].mean(1)
        pooled: torch.Tensor = mean if pool == "mean" else first
        if pool == "cls+mean":
            pooled = torch.cat([first, mean], 1)
        if pool == "pooler" or (pool == "head" and shape.head == "pooler"):
            pooled = self.pooler(tokens)
        if pool == "head":
            pooled = self.project(pooled)
        return pooled


class Pooler(nn.Module):
    """Map tokens (N, T, width) to vectors (N, dim) by the attention of one learned query (CoCa)."""

    def __init__(self, width: int, dim: int, heads: int = POOLER_HEADS) -> None:
        """Create the query and its attention."""
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.norm_query = nn.LayerNorm(dim, eps=POOLER_EPS)
        self.norm_tokens = nn.LayerNorm(width, eps=POOLER_EPS)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(width, dim)
        self.v = nn.Linear(width, dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=POOLER_EPS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return one vector per image."""
        tokens = self.norm_tokens(tokens)
        query = self.q(self.norm_query(self.query)).expand(tokens.shape[0], 1, -1)
        parts = [
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (query, self.k(tokens), self.v(tokens))
        ]
        found = nn.functional.scaled_dot_product_attention(*parts)
        pooled: torch.Tensor = self.norm(self.proj(found.transpose(1, 2).flatten(2)))[:, 0]
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
        self.attn = Attention(shape.width, shape.heads, shape.eps if shape.sub_norm else None)
        self.ls1 = _Scale(shape.width) if shape.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.mlp: nn.Module
        if shape.mlp == "swiglu":
            self.mlp = _Gated(shape)
        else:
            quick, sub_norm = shape.mlp == "quick_gelu", shape.eps if shape.sub_norm else None
            self.mlp = Mlp(shape.width, shape.hidden, quick, sub_norm)
        self.ls2 = _Scale(shape.width) if shape.layer_scale else nn.Identity()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        after: torch.Tensor = tokens + self.ls2(self.mlp(self.norm2(tokens)))
        return after


class Attention(nn.Module):
    """Multi-head self-attention of tokens (N, T, width)."""

    def __init__(self, width: int, heads: int, sub_norm: float | None = None) -> None:
        """Create one map to queries, keys and values, and one of the joined heads.

        Args:
            width: length of a token.
            heads: number of heads.
            sub_norm: epsilon of a layer norm of the joined heads; None for no such norm.
        """
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.Identity() if sub_norm is None else nn.LayerNorm(width, eps=sub_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return tokens of the same shape; ``mask`` is added to the logits, (N or 1, 1, T, T)."""
        joined = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = joined.unbind(0)
        found = nn.functional.scaled_dot_product_attention(query, key, value, mask)
        output: torch.Tensor = self.proj(self.norm(found.transpose(1, 2).flatten(2)))
        return output


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens * self.gamma


class Mlp(nn.Module):
    """Two linear maps of tokens (N, T, width) with GELU, or its quick approximation, between them."""

    def __init__(
        self, width: int, hidden: int, quick: bool = False, sub_norm: float | None = None
    ) -> None:
        """Create the maps; ``sub_norm`` is the epsilon of a layer norm before the second one, if any."""
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.norm = nn.Identity() if sub_norm is None else nn.LayerNorm(hidden, eps=sub_norm)
        self.fc2 = nn.Linear(hidden, width)
        self.quick = quick

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens of the same shape."""
        inside = self.fc1(tokens)
        inside = (
            inside * torch.sigmoid(1.702 * inside) if self.quick else nn.functional.gelu(inside)
        )
        output: torch.Tensor = self.fc2(self.norm(inside))
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
