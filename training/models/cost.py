"""The cost of a model: parameters, and multiply-adds of its convolutions and linear layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .dac import ClusteringAutoEncoder
from .embedding import AutoEncoder, Encoder
from .p4m_cnn import GroupConv, LiftingConv


@dataclass(frozen=True)
class Layer:
    """One row of a model's summary: name, kind, output shape and cost of a layer."""

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    macs: int


def summarise(model: Encoder) -> list[Layer]:
    """Run one tile through a model and return its layers with their cost, in order.

    As in the papers' tables, this includes the decoder of an autoencoder and the classifier of an encoder.
    It also works on the meta device, which computes nothing.
    """
    layers: list[Layer] = []

    def note(
        name: str, module: nn.Module, inputs: Sequence[torch.Tensor], out: torch.Tensor
    ) -> None:
        shape, macs = tuple(out.shape[1:]), _macs(module, inputs[0], out)
        layers.append(Layer(name, type(module).__name__, shape, parameters(module), macs))

    handles = [
        module.register_forward_hook(partial(note, name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    tile = torch.zeros(1, 3, model.size_px, model.size_px, device=device)
    with torch.no_grad():
        if isinstance(model, AutoEncoder):
            code, _, _ = model.reconstruct(tile)
            if isinstance(model, ClusteringAutoEncoder):
                model.cluster_head(code)
        elif model.top is not None:
            model.classify(tile)
        else:
            model(tile)
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return layers


def _macs(module: nn.Module, given: torch.Tensor, out: torch.Tensor) -> int:
    """Return the multiply-adds of one layer for one tile; 0 unless it is a convolution or linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if isinstance(module, nn.ConvTranspose2d):
        return math.prod(given.shape[1:]) * math.prod(module.weight.shape[1:])
    if isinstance(module, nn.Conv2d | LiftingConv | GroupConv):
        return math.prod(out.shape[1:]) * math.prod(module.weight.shape[1:])
    return 0


def parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model, including frozen ones."""
    return sum(p.numel() for p in model.parameters())
