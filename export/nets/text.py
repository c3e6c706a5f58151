"""Text networks beside an image network: those of CLIP, of CoCa, and BERT (Devlin et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from .vit import Attention, Mlp


@dataclass(frozen=True)
class TextShape:
    """Sizes of a text network.

    Attributes:
        kind: ``clip`` (causal; the vector is the state at the highest token number, which is the end),
            ``coca`` (causal, with a class token behind the text) or ``bert`` (the first token).
        vocabulary: number of tokens.
        context: number of tokens that the network takes.
        width: length of a token's vector.
        depth: number of blocks.
        heads: attention heads of a block.
        hidden: length of the vector inside an MLP.
        project: length of an embedding.
        middle: length between the two maps of BERT's projection; 0: its pooler, a map and tanh, instead.
        quick: whether the activation is QuickGELU, x * sigmoid(1.702 x).
        eps: epsilon of the layer norms.
        pad: number of the token that fills up a text.
    """

    kind: Literal["clip", "coca", "bert"]
    vocabulary: int
    context: int
    width: int
    depth: int
    heads: int
    hidden: int
    project: int
    middle: int = 0
    quick: bool = False
    eps: float = 1e-5
    pad: int = 0

    def shallow(self, depth: int) -> TextShape:
        """Return the shape with fewer blocks, for tests."""
        return replace(self, depth=depth)


def text_net(shape: TextShape) -> nn.Module:
    """Return the text network of a shape, in evaluation mode, without memory for its weights."""
    with torch.device("meta"):
        net: nn.Module = BertText(shape) if shape.kind == "bert" else ClipText(shape)
    return net.eval()


class ClipText(nn.Module):
    """Map token numbers (N, context) to embeddings (N, D): the text towers of CLIP and CoCa."""

    def __init__(self, shape: TextShape) -> None:
        """Create the network; weights are torch's defaults until a checkpoint is loaded."""
        super().__init__()
        self.shape = shape
        places = shape.context + (shape.kind == "coca")
        self.token_embed = nn.Embedding(shape.vocabulary, shape.width)
        self.pos_embed = nn.Parameter(torch.zeros(places, shape.width))
        if shape.kind == "coca":
            self.cls_token = nn.Parameter(torch.zeros(shape.width))
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)
        self.project = nn.Linear(shape.width, shape.project, bias=False)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return embeddings, not normalised."""
        coca = self.shape.kind == "coca"
        tokens = self.token_embed(numbers)
        if coca:
            last = self.cls_token.expand(tokens.shape[0], 1, -1)
            tokens = torch.cat([tokens, last], 1)
        tokens = tokens + self.pos_embed
        places = torch.arange(tokens.shape[1], device=tokens.device)
        seen = (places[:, None] >= places[None, :])[None, None]
        if coca:
            seen = seen & self._seen_by_class(numbers)
        mask = torch.where(seen, 0.0, float("-inf")).to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, mask)
        if coca:
            pooled = tokens[:, -1]
        else:
            end = numbers.to(torch.int32).argmax(1)
            pooled = tokens.gather(1, end[:, None, None].expand(-1, 1, tokens.shape[2]))[:, 0]
        embedding: torch.Tensor = self.project(self.norm(pooled))
        return embedding

    def _seen_by_class(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return which tokens each token may attend to, (N, 1, T + 1, T + 1).

        Only the class token's row is limited. As in the published code, its mask is one place late: the
        class token sees the first token, and each further one whose predecessor is no padding.
        """
        text = (numbers != self.shape.pad)[:, None]
        first = torch.ones_like(text[:, :, :1])
        row = torch.cat([first, text], 2)
        others = torch.ones_like(row).expand(-1, self.shape.context, -1)
        return torch.cat([others, row], 1)[:, None]


class _Block(nn.Module):
    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.attn = Attention(shape.width, shape.heads)
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.mlp = Mlp(shape.width, shape.hidden, shape.quick)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.attn(self.norm1(tokens), mask)
        after: torch.Tensor = tokens + self.mlp(self.norm2(tokens))
        return after


class BertText(nn.Module):
    """Map token numbers (N, context) to embeddings (N, D): BERT with its pooler or a projection."""

    def __init__(self, shape: TextShape) -> None:
        """Create the network; weights are torch's defaults until a checkpoint is loaded."""
        super().__init__()
        self.shape = shape
        self.token_embed = nn.Embedding(shape.vocabulary, shape.width)
        self.pos_embed = nn.Parameter(torch.zeros(shape.context, shape.width))
        self.type_embed = nn.Parameter(torch.zeros(shape.width))
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)
        self.blocks = nn.ModuleList(_AfterNorm(shape) for _ in range(shape.depth))
        first: Any = nn.Linear(shape.width, shape.middle or shape.project, bias=not shape.middle)
        self.project: nn.Module = nn.Sequential(first, nn.Tanh())
        if shape.middle:
            last = nn.Linear(shape.middle, shape.project, bias=False)
            self.project = nn.Sequential(first, nn.GELU(), last)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return embeddings, not normalised."""
        tokens = self.norm(self.token_embed(numbers) + self.pos_embed + self.type_embed)
        seen = (numbers != self.shape.pad)[:, None, None]
        mask = torch.where(seen, 0.0, float("-inf")).to(tokens.dtype)
        mask = mask.expand(-1, 1, self.shape.context, -1)
        for block in self.blocks:
            tokens = block(tokens, mask)
        embedding: torch.Tensor = self.project(tokens[:, 0])
        return embedding


class _AfterNorm(nn.Module):
    """A block of BERT: the layer norms follow the sums."""

    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.attn = Attention(shape.width, shape.heads)
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.mlp = Mlp(shape.width, shape.hidden)
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.eps)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = self.norm1(tokens + self.attn(tokens, mask))
        after: torch.Tensor = self.norm2(tokens + self.mlp(tokens))
        return after
