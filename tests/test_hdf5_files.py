"""HDF5 files that refer to other files are rejected; files with HDF5's standard filters are read."""

import h5py
import numpy as np
import pytest

from histoseek.artifacts.feature_files import read_features
from histoseek.errors import BadInput
from histoseek.index.exchange.imports import read_tool_features

COORDS = np.arange(20).reshape(10, 2)
VECTORS = np.arange(160, dtype=np.float32).reshape(10, 16)


def raw(path, filter_code=None, kind=h5py.h5t.IEEE_F32LE):
    """A feature file whose features are made by HDF5 itself, with a filter that is not there."""
    with h5py.File(path, "w") as out:
        out["coords"] = COORDS
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((10, 16))
        settings.set_filter(filter_code, h5py.h5z.FLAG_OPTIONAL, (1, 2))
        h5py.h5d.create(out.id, b"features", kind, h5py.h5s.create_simple((10, 16)), settings)
    return path


@pytest.mark.parametrize("code", [305, 32001, 32015, 32004])  # unregistered, Blosc, Zstandard, LZ4
@pytest.mark.parametrize(
    "read", [read_features, lambda path: read_tool_features(path, "uni_v1", 0.5)]
)
def test_a_filter_that_needs_a_plugin_is_refused_by_its_number(tmp_path, code, read):
    path = raw(tmp_path / "s.h5", code)
    with pytest.raises(
        BadInput, match=f"/features is compressed .*filter {code}.*plugin"
    ) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_references_are_refused(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as out:
        out["features"], out["coords"] = VECTORS, COORDS
        out.create_dataset("files", (10,), dtype=h5py.ref_dtype)
    with pytest.raises(BadInput, match="/files has references"):
        read_features(tmp_path / "s.h5")


def test_filters_of_hdf5_and_h5py_are_read(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as out:
        more = {"compression": "gzip", "shuffle": True, "fletcher32": True, "chunks": (5, 16)}
        out.create_dataset("features", data=VECTORS, **more)
        out.create_dataset("coords", data=COORDS, compression="lzf")
    found = read_features(tmp_path / "s.h5")
    assert np.array_equal(found.features, VECTORS) and np.array_equal(found.coords, COORDS)


def test_names_that_are_not_as_many_as_features_are_not_read(tmp_path):
    """A few bytes can claim terabytes of names."""
    with h5py.File(tmp_path / "s.h5", "w") as out:
        out["features"], out["coords"] = VECTORS, COORDS
        out.create_dataset("files", (2**40,), chunks=(1024,), dtype=h5py.string_dtype("utf-8"))
    with pytest.raises(BadInput, match="'files' has shape"):
        read_features(tmp_path / "s.h5")
