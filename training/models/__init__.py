"""The architectures by public name; the registry ``MODELS`` maps each name to its builder and source."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ...errors import BadInput, unknown_name
from .alexnet_ae import build_alexnet_ae
from .cnn_ae import build_cnn_ae, build_cnn_ae_no_pool
from .dac import build_dac_cifar, build_dac_fmnist, build_dac_stl
from .densenet import build_densenet, build_densenet121
from .efficientnet_lite import build_efficientnet_lite0
from .embedding import AutoEncoder, Encoder
from .fc_ae import build_fc_ae
from .gate import TissueGate
from .mobilenet_v3 import build_mobilenet_v3_small
from .p4m_cnn import build_p4m_cnn
from .resnet_ae import build_resnet_ae
from .sobel_alexnet import build_sobel_alexnet
from .topology import build_topology_ae, build_topology_cae
from .vae import build_vae


@dataclass(frozen=True)
class Model:
    """A registered architecture: its builder, and the paper and section that define it."""

    build: Callable[..., Encoder]
    paper: str


MODELS: dict[str, Model] = {
    "fc-ae": Model(build_fc_ae, "000: FC AE"),
    "cnn-ae": Model(build_cnn_ae, "000: CNN AE"),
    "cnn-ae-no-pool": Model(build_cnn_ae_no_pool, "000: CNN AE, no pool"),
    "alexnet-ae": Model(build_alexnet_ae, "000: AlexNet AE"),
    "resnet-ae": Model(build_resnet_ae, "000: ResNet AE"),
    "densenet": Model(build_densenet, "000: DenseNet"),
    "densenet121": Model(build_densenet121, "000: DenseNet-121"),
    "dac-fmnist": Model(build_dac_fmnist, "001: table 3, F-MNIST"),
    "dac-cifar": Model(build_dac_cifar, "001: table 3, CIFAR"),
    "dac-stl": Model(build_dac_stl, "001: table 3, STL-10"),
    "sobel-alexnet": Model(build_sobel_alexnet, "002: Sobel-AlexNet"),
    "p4m-cnn": Model(build_p4m_cnn, "002: P4M CNN"),
    "topology-ae": Model(build_topology_ae, "003: AE"),
    "topology-cae": Model(build_topology_cae, "003: CAE"),
    "mobilenet-v3-small": Model(build_mobilenet_v3_small, "004: encoder"),
    "efficientnet-lite0": Model(build_efficientnet_lite0, "Tan & Le 2019"),
    "vae": Model(build_vae, "for 000 and 003"),
}


def model_options(model: str) -> dict[str, Any]:
    """Return the options of a registered model with their defaults.

    Raises:
        BadInput: the name is not registered; the choices are listed.
    """
    if model not in MODELS:
        raise unknown_name("model", model, MODELS)
    signature = inspect.signature(MODELS[model].build)
    return {name: parameter.default for name, parameter in signature.parameters.items()}


def parse_model_options(model: str, text: str) -> dict[str, Any]:
    """Read a model's options from ``name=value,name=value``.

    Raises:
        BadInput: the model has no such option, or a value has the wrong type.
    """
    defaults = model_options(model)
    types = get_type_hints(MODELS[model].build)
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in defaults:
            raise _wrong_option(model, part, defaults)
        try:
            options[name] = TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            expected = types[name].__name__
            raise BadInput(f"model option {part!r}: expected a value of type {expected}") from error
    return options


def build(model: str, chain: int = 0, gate: bool = False, **options: Any) -> Encoder:
    """Build a registered model by name, with the options of its builder.

    Args:
        model: name in the registry.
        chain: length of the embedding after a fitted PCA and whitening; 0: no such layer.
        gate: add a tissue gate, still to be fitted, that detects images out of distribution.
        options: options of the model's builder.

    Raises:
        BadInput: the name is not registered, or the model has no such option; the choices are listed.
    """
    defaults = model_options(model)
    for name in options:
        if name not in defaults:
            raise _wrong_option(model, name, defaults)
    try:
        encoder = MODELS[model].build(**options)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        raise BadInput(f"model {model} cannot be built with {given}: {error}") from error
    if chain:
        encoder.attach_chain(chain)
    if gate:
        encoder.gate = TissueGate()
    return encoder


def _wrong_option(model: str, option: str, defaults: dict[str, Any]) -> BadInput:
    choices = ", ".join(f"{name}={default}" for name, default in defaults.items())
    return BadInput(f"model {model} has no option {option!r}; it has {choices}")


__all__ = ["MODELS", "AutoEncoder", "Encoder", "Model", "build", "model_options",
           "parse_model_options"]  # fmt: skip
