"""Losses on embeddings."""

from __future__ import annotations

import math

import torch
from torch import nn


class ArcFace(nn.Module):
    """Additive angular margin softmax (Deng et al., CVPR 2019), as used by paper 004.

    With unit embeddings e and unit class weights w, cos = <e, w>. The logit of the true class is
    ``scale * cos(angle + margin)``, of the others ``scale * cos``. Where ``angle + margin`` passes
    pi the logit continues as ``cos - margin * sin(margin)``, which keeps it decreasing
    (``easy_margin=False``); with ``easy_margin=True`` the margin applies only where cos > 0.

    Args:
        dim: D, length of the embedding.
        classes: C.
        scale: s of the paper.
        margin: m of the paper, radians.
        easy_margin: see above.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        scale: float = 30.0,
        margin: float = 0.5,
        easy_margin: bool = False,
    ) -> None:
        """Make the class weights (C, D)."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.xavier_normal_(self.weight)
        self.scale, self.margin, self.easy_margin = scale, margin, easy_margin

    def logits(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return scaled logits (N, C) with the margin in the column of each label."""
        unit = nn.functional.normalize(embeddings.float())
        cosine = unit @ nn.functional.normalize(self.weight.float()).T
        target = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-7, 1 - 1e-7)
        sine = torch.sqrt(1 - target * target)
        moved = target * math.cos(self.margin) - sine * math.sin(self.margin)
        if self.easy_margin:
            moved = torch.where(target > 0, moved, target)
        else:
            beyond = target - self.margin * math.sin(self.margin)
            moved = torch.where(target > math.cos(math.pi - self.margin), moved, beyond)
        return self.scale * cosine.scatter(1, labels[:, None], moved)

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of embeddings (N, D) with labels (N,)."""
        return nn.functional.cross_entropy(self.logits(embeddings, labels), labels)
