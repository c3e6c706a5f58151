"""Swin transformer (Liu et al. 2021), with the convolutional stem of CTransPath (Wang et al. 2022).

Parameters have timm's names, except that ``downsample`` is in the stage before which it stands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from .vit import Mlp


@dataclass(frozen=True)
class SwinShape:
    """Sizes of a Swin transformer.

    Attributes:
        width: length of a token in the first stage; it doubles from stage to stage.
        depths: number of blocks of each of the four stages.
        heads: attention heads of the blocks of each stage.
        window: side of an attention window, in tokens.
        size_px: side of the input in pixels.
    """

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    size_px: int = 224

    def dim(self, pool: str) -> int:
        """Return the length of an embedding."""
        return self.width << (len(self.depths) - 1)

    def pools(self) -> tuple[str, ...]:
        """Return the poolings that the network can compute."""
        return ("mean",)

    def shallow(self, depth: int) -> SwinShape:
        """Return the shape with fewer blocks per stage, for tests; a pair is the least."""
        return replace(self, depths=(max(2, depth),) * len(self.depths))


class Swin(nn.Module):
    """Map normalised tiles (N, 3, S, S) to embeddings (N, D): the mean of the last tokens."""

    def __init__(self, shape: SwinShape) -> None:
        """Create the network; weights are torch's defaults until a checkpoint is loaded."""
        super().__init__()
        self.patch_embed = _Stem(shape.width)
        side, width = shape.size_px // 4, shape.width
        stages = []
        for number, (depth, heads) in enumerate(zip(shape.depths, shape.heads, strict=True)):
            if number:
                side, width = side // 2, 2 * width
            stages.append(_Stage(width, depth, heads, side, shape.window, merge=number > 0))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(width)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return embeddings, not normalised."""
        tokens = self.patch_embed(tiles)
        for stage in self.layers:
            tokens = stage(tokens)
        pooled: torch.Tensor = self.norm(tokens).mean((1, 2))
        return pooled


class _Stem(nn.Module):
    """Two convolutions of stride 2 and one of 1 x 1, in place of a map of patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        inside = 3
        for out in (width // 8, width // 4):
            parts += [
                nn.Conv2d(inside, out, 3, 2, 1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            inside = out
        self.proj = nn.Sequential(*parts, nn.Conv2d(inside, width, 1))
        self.norm = nn.LayerNorm(width)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> tokens (N, S / 4, S / 4, width)."""
        tokens: torch.Tensor = self.norm(self.proj(tiles).permute(0, 2, 3, 1))
        return tokens


class _Merging(nn.Module):
    """Join each 2 x 2 tokens to one of twice their length."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * width)
        self.reduction = nn.Linear(2 * width, width, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        corners = [tokens[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        joined: torch.Tensor = self.reduction(self.norm(torch.cat(corners, -1)))
        return joined


class _Stage(nn.Module):
    def __init__(
        self, width: int, depth: int, heads: int, side: int, window: int, merge: bool
    ) -> None:
        super().__init__()
        self.downsample = _Merging(width) if merge else nn.Identity()
        window = min(window, side)
        shifts = [window // 2 if block % 2 and side > window else 0 for block in range(depth)]
        self.blocks = nn.ModuleList(_Block(width, heads, side, window, s) for s in shifts)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.downsample(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift, self.side = window, shift, side
        self.norm1 = nn.LayerNorm(width)
        self.attn = _WindowAttention(width, heads, window, side, shift)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found = self.norm1(tokens)
        if self.shift:
            found = torch.roll(found, (-self.shift, -self.shift), (1, 2))
        count, width = self.side // self.window, tokens.shape[3]
        found = found.unflatten(1, (count, self.window)).unflatten(3, (count, self.window))
        found = found.transpose(2, 3).reshape(-1, self.window**2, width)
        found = self.attn(found)
        found = found.reshape(-1, count, count, self.window, self.window, width).transpose(2, 3)
        found = found.reshape(-1, self.side, self.side, width)
        if self.shift:
            found = torch.roll(found, (self.shift, self.shift), (1, 2))
        tokens = tokens + found
        after: torch.Tensor = tokens + self.mlp(self.norm2(tokens))
        return after


class _WindowAttention(nn.Module):
    """Attention inside windows (N * windows, T, width), with a learned bias per relative position."""

    def __init__(self, width: int, heads: int, window: int, side: int, shift: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        with torch.device("cpu"):  # computed even if the weights have no memory yet
            places, mask = _relative_places(window), _shift_mask(side, window, shift)
        self._places, self._mask = places, mask

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        tokens = windows.shape[1]
        joined = self.qkv(windows).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = joined.unbind(0)
        table = self.relative_position_bias_table
        bias = table[self._places.to(table.device)].permute(2, 0, 1)[None]
        if self._mask is not None:
            mask = self._mask.to(table.device)
            count = mask.shape[0]
            # one bias per window of an image and head: (1, windows, heads, T, T)
            bias = (bias[None] + mask[None, :, None]).to(query.dtype)
            shape = (-1, count, self.heads, tokens, query.shape[-1])
            query, key, value = (part.reshape(shape) for part in (query, key, value))
        logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias
        found = (logits.softmax(-1) @ value).reshape(-1, self.heads, tokens, query.shape[-1])
        output: torch.Tensor = self.proj(found.transpose(1, 2).flatten(2))
        return output


def _relative_places(window: int) -> torch.Tensor:
    """Return the row of the bias table for each pair of tokens of a window, (T, T)."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()])
    apart = places[:, :, None] - places[:, None, :] + window - 1
    return apart[0] * (2 * window - 1) + apart[1]


def _shift_mask(side: int, window: int, shift: int) -> torch.Tensor | None:
    """Return -100 for pairs of tokens that only the shift brings together, (windows, T, T)."""
    if not shift:
        return None
    bands = torch.zeros(side, dtype=torch.long)
    bands[side - window :] = 1
    bands[side - shift :] = 2
    regions = (3 * bands[:, None] + bands[None, :]).float()
    count = side // window
    parts = regions.reshape(count, window, count, window).transpose(1, 2).reshape(count**2, -1)
    return torch.where(parts[:, :, None] == parts[:, None, :], 0.0, -100.0)
