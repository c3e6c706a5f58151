"""The network that finds tissue on an overview: a small U-Net."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = (16, 24, 32, 48, 64)


def _block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(inplace=True),
    )


class TissueNet(nn.Module):
    """A U-Net from RGB images (N, 3, S, S) in 0..1, S a multiple of 32, to logits (N, 1, S/2, S/2)."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        """Build the network; ``widths`` are the channels from S/2 down to S/32."""
        super().__init__()
        self.stem = _block(3, widths[0], 2)
        self.down = nn.ModuleList(
            nn.Sequential(_block(a, b, 2), _block(b, b))
            for a, b in zip(widths, widths[1:], strict=False)
        )
        self.up = nn.ModuleList(_block(a + b, a) for a, b in zip(widths, widths[1:], strict=False))
        self.out = nn.Conv2d(widths[0], 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits; positive: tissue."""
        found = self.stem((images - 0.75) / 0.25)
        kept = []
        for step in self.down:
            kept.append(found)
            found = step(found)
        for step, beside in zip(reversed(self.up), reversed(kept), strict=True):
            found = nn.functional.interpolate(found, scale_factor=2.0, mode="nearest")
            found = step(torch.cat([beside, found], 1))
        logits: Tensor = self.out(found)
        return logits
