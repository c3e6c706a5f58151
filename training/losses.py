"""Losses on embeddings, on cluster probabilities, and on codes."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from torch import nn


def full_precision(like: torch.Tensor) -> AbstractContextManager[None]:
    """Turn autocast off: half precision rounds 1 - 1e-7 to 1, where gradients are not finite."""
    return torch.autocast(like.device.type, enabled=False)


class ArcFace(nn.Module):
    """Additive angular margin softmax (Deng et al., CVPR 2019), as used by paper 004.

    With unit embeddings e and unit class weights w, cos = <e, w>. The logit of the true class is
    ``scale * cos(angle + margin)``; that of every other class is ``scale * cos``. Beyond
    ``angle + margin = pi`` the logit continues as ``cos - margin * sin(margin)``, times ``scale``, so that
    it keeps decreasing (``easy_margin=False``). With ``easy_margin=True`` the margin applies only if
    cos > 0.

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
        """Create the class weights (C, D)."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.xavier_normal_(self.weight)
        self.scale, self.margin, self.easy_margin = scale, margin, easy_margin

    def logits(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return scaled logits (N, C) with the margin in the column of each label."""
        with full_precision(embeddings):
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


class Softmax(nn.Module):
    """A linear classifier with cross-entropy: the control that paper 004 lacks."""

    def __init__(self, dim: int, classes: int) -> None:
        """Create the classifier (D, C)."""
        super().__init__()
        self.linear = nn.Linear(dim, classes)

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of embeddings (N, D) with labels (N,)."""
        with full_precision(embeddings):
            return nn.functional.cross_entropy(self.linear(embeddings.float()), labels)


class Triplet(nn.Module):
    """Triplet margin loss on unit embeddings, over all triplets of a batch that violate the margin.

    Schroff et al. 2015 with all valid triplets: the mean of max(0, d(a, p) - d(a, n) + margin) over the
    triplets for which it is positive, with the Euclidean distance d.

    Args:
        margin: required difference between the distances to a negative and to a positive.
    """

    def __init__(self, margin: float = 0.2) -> None:
        """Remember the margin."""
        super().__init__()
        self.margin = margin

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of embeddings (N, D) with labels (N,); 0 if there is no valid triplet."""
        distance = _distances(embeddings)
        same = labels[:, None] == labels[None, :]
        positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        gap = distance[:, :, None] - distance[:, None, :] + self.margin
        valid = positive[:, :, None] & ~same[:, None, :]
        wrong = nn.functional.relu(gap[valid])
        return wrong.sum() / (wrong > 0).sum().clamp(min=1)


class Contrastive(nn.Module):
    """Contrastive loss on unit embeddings (Hadsell et al. 2006), over all pairs of a batch.

    The loss of a positive pair is its distance; that of a negative pair is max(0, margin - distance). Each
    kind is averaged over its pairs with a loss above 0, and the two means are added.

    Args:
        margin: distance from which the loss of a negative pair is 0.
    """

    def __init__(self, margin: float = 1.0) -> None:
        """Remember the margin."""
        super().__init__()
        self.margin = margin

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of embeddings (N, D) with labels (N,)."""
        distance = _distances(embeddings)
        same = labels[:, None] == labels[None, :]
        other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        near = nn.functional.relu(distance[same & other])
        far = nn.functional.relu(self.margin - distance[~same])
        return _mean_of_positive(near) + _mean_of_positive(far)


def _distances(embeddings: torch.Tensor) -> torch.Tensor:
    """Return Euclidean distances (N, N) of unit embeddings, with finite gradients at 0."""
    with full_precision(embeddings):
        unit = nn.functional.normalize(embeddings.float())
        squared = (2 - 2 * unit @ unit.T).clamp(min=0)
    return torch.where(squared > 1e-12, squared.clamp(min=1e-12).sqrt(), squared)


def _mean_of_positive(values: torch.Tensor) -> torch.Tensor:
    return values.sum() / (values > 0).sum().clamp(min=1)


def pair_loss(
    probabilities: torch.Tensor,
    upper: float,
    lower: float,
    reference: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of Deep Adaptive Clustering (Chang et al. 2017), as intended in paper 001.

    s_ij is the cosine of the cluster probabilities of i and j. Pairs with s >= upper count as similar
    (r = 1), pairs with s <= lower as different (r = 0); the others are ignored. The loss is the mean over
    the chosen pairs i != j of -[r log s + (1 - r) log(1 - s)]. No gradient passes through the choice.

    This corrects paper 001 as printed: its equations (5) and (8) are products that are 0 for every r in
    {0, 1}; its equation (4) drops the different pairs; its s lacks the normalisation that DAC requires.

    Args:
        probabilities: (N, K), rows that sum to 1.
        upper: u.
        lower: l.
        reference: (N, K), probabilities by which the pairs are chosen; None: ``probabilities``.
    """
    with full_precision(probabilities):
        unit = nn.functional.normalize(probabilities.float())
        similarity = unit @ unit.T
        judged = similarity
        if reference is not None:
            known = nn.functional.normalize(reference.float())
            judged = known @ known.T
    with torch.no_grad():
        pairs = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        alike = (judged >= upper) & pairs
        different = (judged <= lower) & pairs
        chosen = (alike.sum() + different.sum()).clamp(min=1)
    s = similarity.clamp(1e-7, 1 - 1e-7)
    loss = -(torch.log(s)[alike].sum() + torch.log1p(-s)[different].sum()) / chosen
    return loss + 0 * similarity.sum()  # a NaN chooses no pair; let it reach the loss


def student_assignment(vectors: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return q (N, K) of DEC (Xie et al. 2016, equation 1): Student's t with one degree of freedom."""
    with full_precision(vectors):
        a, b = vectors.float(), centres.float()
        squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    q = 1 / (1 + squared.clamp(min=0))
    return q / q.sum(1, keepdim=True)


def target_assignment(q: torch.Tensor) -> torch.Tensor:
    """Return p (N, K) of DEC (equation 3): q squared over cluster size, scaled so that rows sum to 1."""
    weight = q.square() / q.sum(0)
    return weight / weight.sum(1, keepdim=True)


def gaussian_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, variance) || N(0, 1)) for (N, D), summed over D and averaged over N."""
    terms = 1 + log_variance - mean.square() - log_variance.exp()
    return -0.5 * terms.sum(1).mean()


def info_nce(views: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the InfoNCE loss (NT-Xent; Chen et al., ICML 2020) of two views of N items.

    Each vector has to be nearer to the other view of its item than to both views of all other items.

    Args:
        views: (2 N, D), any length; rows n and n + N are the two views of item n.
        temperature: divides the cosines.
    """
    with full_precision(views):
        unit = nn.functional.normalize(views.float(), dim=1)
        cosines = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)
        other = torch.arange(len(views), device=views.device).roll(len(views) // 2)
        return nn.functional.cross_entropy(cosines, other)
