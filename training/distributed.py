"""Batch norms over all processes of a data-parallel run, so that it trains like a single process."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.nn import functional as collective


def processes() -> int:
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def synchronise_norms(net: nn.Module) -> None:
    """Make every batch norm in training use the mean and variance over the batches of all processes.

    torch's SyncBatchNorm does this on GPUs only; this works on any device.
    """
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = partial(_synchronised, module)  # type: ignore[method-assign]


def release_norms(net: nn.Module) -> None:
    """Undo :func:`synchronise_norms`."""
    for module in net.modules():
        module.__dict__.pop("forward", None)


def _synchronised(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Normalise x (N, C, …) by the mean and variance over all processes; update the running statistics."""
    if not norm.training:
        normed: torch.Tensor = type(norm).forward(norm, x)
        return normed
    axes = [0, *range(2, x.dim())]
    count = x.new_full((1,), x.numel() // x.shape[1], dtype=torch.float32)
    exact = x.float()
    sums = torch.cat([exact.sum(axes), exact.square().sum(axes), count])
    sums = collective.all_reduce(sums)  # type: ignore[no-untyped-call]
    total = sums[-1].detach()
    mean, square = (sums[:-1] / total).chunk(2)
    variance = (square - mean * mean).clamp(min=0)
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * total / (total - 1), norm.momentum)
    shape = [1, -1, *[1] * (x.dim() - 2)]
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    found: torch.Tensor = exact * scale.reshape(shape) + (norm.bias - mean * scale).reshape(shape)
    return found.to(x.dtype)
