"""The tissue gate: a small classifier on colour statistics that detects tiles out of distribution.

An encoder trained only on tissue embeds a photograph near some tissue. So the gate measures how stains
absorb light: means, spreads and correlations of the channels' optical densities.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

POOL = 4
LIMIT = 5.0
"""Statistics are clipped at this many standard deviations from the mean."""
SHARPNESS = 2.0
HIDDEN = 16
"""Number of hidden units."""
STATISTICS = 25


def shrink(tiles: torch.Tensor) -> torch.Tensor:
    """Return tiles (N, C, S, S) averaged over squares of 4 x 4 pixels: (N, C, S / 4, S / 4)."""
    return nn.functional.avg_pool2d(tiles, POOL)


def colour_statistics(small: torch.Tensor) -> torch.Tensor:
    """Return the statistics, float (N, 25), of shrunken pixels (N, 3, H, H) in 0..1.

    Of the optical densities: mean, standard deviation (also its logarithm and direction), covariances,
    correlations and direction of the mean. Of the saturation: mean and standard deviation (also its
    logarithm). Of the grey values: mean difference between neighbours. Rotations by quarter turns and
    reflections of a tile give the same statistics if its side is a multiple of 4.
    """
    density = -torch.log(small.clamp(min=1 / 255)).flatten(2)
    mean = density.mean(2)
    rest = density - mean[:, :, None]
    spread = (rest.square().mean(2) + 1e-6).sqrt()
    pairs = torch.stack([(rest[:, a] * rest[:, b]).mean(1) for a, b in ((0, 1), (0, 2), (1, 2))], 1)
    product = torch.stack(
        [spread[:, 0] * spread[:, 1], spread[:, 0] * spread[:, 2], spread[:, 1] * spread[:, 2]], 1
    )
    saturation = (small.amax(1) - small.amin(1)).flatten(1)
    around = saturation.mean(1, keepdim=True)
    varies = ((saturation - around).square().mean(1, keepdim=True) + 1e-6).sqrt()
    grey = small.mean(1)
    down = (grey[:, 1:] - grey[:, :-1]).abs().mean((1, 2))
    across = (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean((1, 2))
    directions = [part / (part.norm(dim=1, keepdim=True) + 1e-3) for part in (mean, spread)]
    others = [around, varies, ((down + across) / 2)[:, None], spread.log(), varies.log()]
    return torch.cat([mean, spread, pairs, pairs / product, *directions, *others], 1)


class TissueGate(nn.Module):
    """Map shrunken pixels (N, 3, H, H) in 0..1 to a score: 0 tissue, 1 out of distribution, (N,).

    Attributes:
        centre: (25,) means of the statistics.
        scale: (25,) reciprocals of their standard deviations.
        hidden: (16, 25) weights of the hidden units.
        hidden_bias: (16,) their biases.
        weight: (16,) weight of each unit.
        bias: (1,) bias of the score.
    """

    def __init__(self) -> None:
        """Create a gate; until it is fitted, every tile has a score of 0.5."""
        super().__init__()
        self.centre = nn.Buffer(torch.zeros(STATISTICS))
        self.scale = nn.Buffer(torch.ones(STATISTICS))
        self.hidden = nn.Buffer(torch.zeros(HIDDEN, STATISTICS))
        self.hidden_bias = nn.Buffer(torch.zeros(HIDDEN))
        self.weight = nn.Buffer(torch.zeros(HIDDEN))
        self.bias = nn.Buffer(torch.zeros(1))

    shrink = staticmethod(shrink)

    def forward(self, small: torch.Tensor) -> torch.Tensor:
        """Return the score of each tile, 0 (tissue) to 1 (out of distribution)."""
        scaled = (colour_statistics(small) - self.centre) * self.scale
        units = torch.relu(scaled.clamp(-LIMIT, LIMIT) @ self.hidden.T + self.hidden_bias)
        logit = (units * self.weight).sum(1) + self.bias
        return torch.sigmoid(SHARPNESS * logit)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load a gate; one without hidden units, as written before, becomes two of them: x and -x."""
        linear = state.get(f"{prefix}weight")
        if linear is not None and linear.shape == (STATISTICS,):
            hidden, weight = torch.zeros(HIDDEN, STATISTICS), torch.zeros(HIDDEN)
            hidden[0], hidden[1] = linear, -linear
            weight[0], weight[1] = 1, -1
            state |= {
                f"{prefix}hidden": hidden,
                f"{prefix}hidden_bias": torch.zeros(HIDDEN),
                f"{prefix}weight": weight,
            }
        super()._load_from_state_dict(state, prefix, *rest)
