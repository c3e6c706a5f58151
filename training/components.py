"""Principal components as an encoder's last layer: they replace its head, or precede clustering."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import BadInput
from ..metrics import Ints
from .data import LabelledTiles
from .evaluate import embed_numbers
from .models import Encoder

FITTED = 20_000
"""Maximum number of training tiles to fit the components on."""
PER_LAYER = 64
"""Maximum number of components of a layer that is not the last."""
LEAST_SPREAD = 1e-4
"""A component is noise if its standard deviation is below this fraction of the first one's.

All features count as the same if none has a standard deviation above this fraction of the largest value.
"""


@dataclass(frozen=True)
class Chain:
    """Turn features f into vectors for clustering: (f - mean) @ projection.T, scaled to length 1.

    Attributes:
        mean: (F,).
        projection: (D, F), principal directions divided by the square root of their variance.
    """

    mean: NDArray[np.float32]
    projection: NDArray[np.float32]

    @classmethod
    def fit(cls, features: NDArray[np.float32], dim: int) -> Chain:
        """Fit PCA with whitening to features (N, F); D is at most ``dim``, F and N - 1."""
        from sklearn.decomposition import PCA

        dim = min(dim, features.shape[1], len(features) - 1)
        with np.errstate(invalid="ignore"):  # identical features have no variance
            fitted = PCA(dim, random_state=0).fit(features)
        kept = fitted.explained_variance_ > 1e-12 * fitted.explained_variance_[0]
        spread = np.sqrt(np.where(kept, fitted.explained_variance_, np.inf))
        return cls(
            fitted.mean_.astype(np.float32),
            (fitted.components_ / spread[:, None]).astype(np.float32),
        )

    def apply(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return vectors of length 1, (N, D)."""
        white = (features - self.mean) @ self.projection.T
        unit: NDArray[np.float32] = white / np.maximum(
            np.linalg.norm(white, axis=1, keepdims=True), 1e-12
        )
        return unit

    def into(self, encoder: Encoder) -> None:
        """Make the projection the encoder's last layer; export adds the scaling to length 1."""
        layer = encoder.attach_chain(len(self.projection))
        layer.to(next(encoder.backbone.parameters()).device)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(self.projection))
            layer.bias.copy_(torch.from_numpy(-self.projection @ self.mean))


def drop_head(encoder: Encoder, data: LabelledTiles, train: Ints, dim: int) -> None:
    """Replace the encoder's head with the principal components of its pooled features.

    The features (F,) are standardised. Each component is divided by the square root of its standard
    deviation (half whitened), so that the first ones do not dominate the distance.

    If the encoder pools several layers, each is first reduced to at most :data:`PER_LAYER` whitened
    components (the last one to ``dim``), and all layers get the same mean length. So no layer dominates by
    its number of features. All steps together are one affine map.

    Args:
        encoder: a trained encoder; changed in place.
        data: tiles.
        train: (K,) indices of the tiles to fit to; at most about :data:`FITTED`, evenly spaced, are used.
        dim: number of components to keep; fewer if the features have fewer.

    Raises:
        BadInput: all features are the same.
    """
    features_of = next(m for m in encoder.head.modules() if isinstance(m, nn.Linear)).in_features
    encoder.dim, encoder.head = features_of, nn.Identity()
    some = train[:: -(-len(train) // FITTED)]
    features = embed_numbers(encoder, data, some, unit=False)[0]
    mean = features.mean(0)
    if encoder.parts:
        layers = []
        for start, stop in itertools.pairwise(np.cumsum((0, *encoder.parts))):
            layer_features = features[:, start:stop]
            most = dim if stop == features_of else PER_LAYER
            axes = _standardised_axes(layer_features, most, power=1.0)
            length = np.linalg.norm((layer_features - mean[start:stop]) @ axes.T, axis=1).mean()
            layers.append(np.pad(axes / length, ((0, 0), (start, features_of - stop))))
        joined = np.concatenate(layers)
        weight = _axes((features - mean) @ joined.T, dim, power=0.5) @ joined
    else:
        weight = _standardised_axes(features, dim, power=0.5)
    layer = encoder.attach_chain(len(weight)).to(next(encoder.backbone.parameters()).device)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(-weight @ mean))


def _standardised_axes(
    features: NDArray[np.float32], dim: int, power: float
) -> NDArray[np.float32]:
    """Return :func:`_axes` of standardised features (N, F), applicable to the features as they are."""
    spread = features.std(0)
    if spread.max() <= LEAST_SPREAD * np.abs(features).max():
        raise BadInput("the features of all training tiles are the same; check the tiles")
    spread += 1e-6
    axes: NDArray[np.float32] = _axes(features / spread, dim, power) / spread
    return axes


def _axes(features: NDArray[np.float32], dim: int, power: float) -> NDArray[np.float32]:
    """Return the principal directions (D, F) of features (N, F), each divided by its deviation ** power.

    Args:
        features: (N, F).
        dim: maximum number of directions, D.
        power: 1 whitens the components, 0.5 whitens them by half, 0 not at all.
    """
    from sklearn.decomposition import PCA

    fitted = PCA(min(dim, *features.shape), random_state=0).fit(features)
    deviation = np.sqrt(fitted.explained_variance_)
    kept = deviation > LEAST_SPREAD * deviation[0]
    scale = (deviation[kept] / deviation[0]) ** power
    axes: NDArray[np.float32] = fitted.components_[kept] / scale[:, None]
    return axes
