"""Principal components as an encoder's last layer: in place of its head, or before clustering."""

from __future__ import annotations

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
"""Most training tiles that the components are fitted on."""
LEAST_SPREAD = 1e-4
"""Components that vary less than this share of the first, or of the largest feature, are noise."""


@dataclass(frozen=True)
class Chain:
    """From features to vectors that are clustered: (f - mean) @ projection.T, then length 1.

    Attributes:
        mean: (F,).
        projection: (D, F), principal directions over the square root of their variance.
    """

    mean: NDArray[np.float32]
    projection: NDArray[np.float32]

    @classmethod
    def fit(cls, features: NDArray[np.float32], dim: int) -> Chain:
        """Fit PCA with whitening on features (N, F); D is at most ``dim``, F and N - 1."""
        from sklearn.decomposition import PCA

        dim = min(dim, features.shape[1], len(features) - 1)
        with np.errstate(invalid="ignore"):  # features that are all the same have no variance
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
        """Make it the encoder's last layer; export adds the length."""
        layer = encoder.attach_chain(len(self.projection))
        layer.to(next(encoder.backbone.parameters()).device)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(self.projection))
            layer.bias.copy_(torch.from_numpy(-self.projection @ self.mean))


def drop_head(encoder: Encoder, data: LabelledTiles, train: Ints, dim: int) -> None:
    """Replace the encoder's head by principal components of its pooled features.

    The features (F,) are standardised; each component is divided by the root of its standard deviation
    (half whitened), so that the first ones do not dominate the distance.

    Args:
        encoder: as trained; is changed.
        data: tiles.
        train: (K,) numbers of those to fit to; at most :data:`FITTED` are taken, evenly.
        dim: components to keep; fewer where the features have fewer.

    Raises:
        BadInput: all features are the same.
    """
    from sklearn.decomposition import PCA

    assert isinstance(encoder.head, nn.Sequential) and isinstance(encoder.head[0], nn.Linear)
    encoder.dim, encoder.head = encoder.head[0].in_features, nn.Identity()
    some = train[:: -(-len(train) // FITTED)]
    features = embed_numbers(encoder, data, some, unit=False)[0]
    spread = features.std(0)
    if spread.max() <= LEAST_SPREAD * np.abs(features).max():
        raise BadInput("the features of all training tiles are the same; check the tiles")
    spread += 1e-6
    fitted = PCA(min(dim, *features.shape), random_state=0).fit(features / spread)
    deviation = np.sqrt(fitted.explained_variance_)
    kept = deviation > LEAST_SPREAD * deviation[0]
    weight = fitted.components_[kept] / np.sqrt(deviation[kept] / deviation[0])[:, None] / spread
    layer = encoder.attach_chain(len(weight)).to(next(encoder.backbone.parameters()).device)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(-weight @ features.mean(0)))
