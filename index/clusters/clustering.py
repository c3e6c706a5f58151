"""A fitted clustering: a value that assigns vectors to its clusters."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ...artifacts.manifest import CLUSTERS
from ...errors import BadInput, Damaged
from . import hdbscan as density
from .hdbscan import Arrays, Floats
from .kmeans import nearest_two, project

Method = Literal["kmeans", "hdbscan"]
FITTED = ("kmeans", "hdbscan")
METHODS = (*FITTED, "encoder")


@dataclass(frozen=True)
class Assigned:
    """Assignments of images to clusters; arrays of length N.

    Attributes:
        cluster: cluster number; -1 for no cluster (HDBSCAN noise).
        distance: distance to the cluster in the space of the principal components. k-means: to its centre.
            HDBSCAN: mutual reachability distance to the nearest member.
        strength: 0 to 1. k-means: 1 - distance to the nearest centre / distance to the second nearest.
            HDBSCAN: membership probability of ``approximate_predict``.
        unknown: whether the image fits no cluster, or is out of distribution.
    """

    cluster: NDArray[np.int64]
    distance: Floats
    strength: Floats
    unknown: NDArray[np.bool_]

    def rows(self, names: dict[int, str]) -> list[dict[str, Any]]:
        """Return the assignment of each image, JSON-ready, with the name of its cluster."""
        return [
            {
                "cluster": int(self.cluster[n]),
                "name": names.get(int(self.cluster[n]), ""),
                "distance": round(float(self.distance[n]), 6),
                "strength": round(float(self.strength[n]), 6),
                "unknown": bool(self.unknown[n]),
            }
            for n in range(len(self.cluster))
        ]

    def part(self, rows: slice | NDArray[Any]) -> Assigned:
        """Return some of the images."""
        return Assigned(
            self.cluster[rows], self.distance[rows], self.strength[rows], self.unknown[rows]
        )


@dataclass(frozen=True)
class Clustering:
    """A fitted clustering.

    Attributes:
        method: kmeans or hdbscan.
        arrays: everything needed to assign new images; saved as .npz without pickles.
        about: parameters and what the fit found, JSON-ready.
    """

    method: Method
    arrays: Arrays
    about: dict[str, Any]

    @property
    def clusters(self) -> int:
        """Number of clusters."""
        return int(self.about["clusters"])

    def assign(self, vectors: NDArray[np.float32]) -> Assigned:
        """Assign vectors (N, D)."""
        flat = project(vectors, self.arrays)
        assign = _assign_kmeans if self.method == "kmeans" else _assign_hdbscan
        assigned = assign(flat, self.arrays)
        if "foreign" not in self.arrays:  # the encoder has no tissue gate
            return assigned
        out_of_distribution = vectors[:, -1] > self.arrays["foreign"]
        return replace(assigned, unknown=assigned.unknown | out_of_distribution)

    def to_bytes(self) -> bytes:
        """Serialise the arrays as .npz."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **self.arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, method: Method, blob: bytes, about: dict[str, Any]) -> Clustering:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            Damaged: the bytes are not such a file.
        """
        try:
            with np.load(io.BytesIO(blob), allow_pickle=False) as stored:
                return cls(method, {key: stored[key] for key in stored.files}, about)
        except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
            raise Damaged(
                f"the arrays of a clustering cannot be read ({error}); fit it again"
            ) from error


def shipped(bundle: Path) -> Clustering:
    """Return the clusters that an encoder was trained with, from its bundle.

    Raises:
        BadInput: the bundle has none.
        Damaged: the file does not have the exported format.
    """
    path = bundle / CLUSTERS
    if not path.is_file():
        raise BadInput(
            "the encoder of the atlas has no clusters (only encoders of the recipes autoencoder, dac and "
            "deepcluster, exported without --pca and --views, have them); use --method kmeans or hdbscan"
        )
    stored = Clustering.from_bytes("kmeans", path.read_bytes(), {}).arrays
    expected = {"centroids", "reach"}
    if set(stored) != expected or stored["reach"].shape != stored["centroids"].shape[:1]:
        raise Damaged(
            f"{path} is not a cluster file of `histoseek export`; export the encoder again"
        )
    count, dim = stored["centroids"].shape
    arrays = {"mean": np.zeros(dim), "components": np.eye(dim), **stored}
    return Clustering("kmeans", arrays, {"clusters": count, "from": "encoder"})


def _assign_kmeans(flat: Floats, arrays: Arrays) -> Assigned:
    centroids = arrays["centroids"]
    distances, order = nearest_two(flat, centroids)
    cluster, nearest = order[:, 0], distances[:, 0]
    second = distances[:, -1] if len(centroids) > 1 else np.full(len(nearest), np.inf)
    strength = np.clip(1 - nearest / np.maximum(second, 1e-12), 0, 1)
    return Assigned(cluster, nearest, strength, nearest > arrays["reach"][cluster] * (1 + 1e-9))


def _assign_hdbscan(flat: Floats, arrays: Arrays) -> Assigned:
    cluster, distance, strength = density.place(flat, arrays)
    return Assigned(cluster, distance, strength, cluster < 0)
