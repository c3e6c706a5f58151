"""Exported tables: column names never collide, no column is lost, and no cell is a formula."""

import json
import warnings

import numpy as np
import pytest
from atlases import features
from hypothesis import given
from hypothesis import strategies as st

from histoseek.artifacts.spreadsheets import inert
from histoseek.index.atlas import Atlas
from histoseek.index.exchange.column_names import for_anndata, for_numpy, for_tsv, unique_names
from histoseek.index.exchange.exports import export
from histoseek.serving.encoders.open import DEFAULT_BUNDLE

ODD = {
    "ER/PR": "1",
    "ER_PR": "2",
    "ER\\PR": "3",
    "ER_PR_2": "4",
    "_index": "5",
    "cluster.kmeans": "6",
    "target_mpp": "7",
    "=1+1": "8",
    "a\tb": "9",
    "a b": "10",
    ".": "11",
    "../up": "12",
    "é" * 300: "13",
    "é" * 299: "14",
    "-5": "=cmd|' /C calc'!A0",
}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    made = Atlas.create(folder / "atlas", DEFAULT_BUNDLE)
    files = [features(folder / f"s{n}.h5", 30, n) for n in range(2)]
    made.add(files, {"s0": {"label": "-1", **ODD}, "s1": {"label": "@sum"}})
    made.fit("kmeans", k=2)
    return made


def by_name(read, renamed):
    """The value of each odd column in the first row, and that of another slide in the last."""
    for name, value in ODD.items():
        first, last = read(renamed.get(name, name))
        assert first == value, name
        assert last in (None, ""), name


def test_anndata_keeps_every_column(atlas, tmp_path):
    import anndata

    for name in ("a.h5ad", "a.zarr"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata's own, about its string columns
            renamed = export(atlas, tmp_path / name, "anndata").renamed
            read = anndata.read_h5ad if name.endswith("h5ad") else anndata.read_zarr
            obs = (found := read(tmp_path / name)).obs
        assert json.loads(found.uns["renamed_columns"]) == renamed
        assert renamed["ER/PR"] == "ER_PR_3" and "ER_PR" not in renamed
        assert renamed["_index"] == "_index_2"
        clusters = atlas.assigned("kmeans")[1].cluster
        assert np.array_equal(obs["cluster.kmeans"], clusters)  # not the metadata's column
        plain = obs.astype(object).where(obs.notna(), None)
        by_name(lambda c, p=plain: (p[c].iloc[0], p[c].iloc[-1]), renamed)


def test_parquet_numpy_and_projector_keep_every_column(atlas, tmp_path):
    import pyarrow.parquet as parquet

    renamed = export(atlas, tmp_path / "a.parquet", "parquet").renamed
    table = parquet.read_table(tmp_path / "a.parquet")
    assert len(set(table.column_names)) == len(table.column_names)
    assert json.loads(table.schema.metadata[b"renamed_columns"]) == renamed
    assert set(renamed) == {"cluster.kmeans", "target_mpp"}
    by_name(lambda c: (table[c][0].as_py(), table[c][-1].as_py()), renamed)
    renamed = export(atlas, tmp_path / "a.npz", "numpy").renamed
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert json.loads(str(found["renamed_columns"])) == renamed
        assert not any("/" in name or "\\" in name for name in found.files)

        def read(column, found=found):
            names, codes = found[f"names_{column}"], found[f"codes_{column}"]
            return names[codes[0]], None if codes[-1] < 0 else "there"

        by_name(read, renamed)
    renamed = export(atlas, tmp_path / "p", "projector").renamed
    head, first, *_, last = (tmp_path / "p/metadata.tsv").read_bytes().decode().split("\n")[:-1]
    head, first, last = (line.split("\t") for line in (head, first, last))
    assert len(head) == len(set(head)) == len(first) == len(last)
    assert renamed["=1+1"] == "'=1+1" and renamed["a\tb"] == "a b_2" and "-5" not in renamed
    assert first[head.index("-5")] == "'=cmd|' /C calc'!A0"
    assert first[head.index("label")] == "-1" and last[head.index("label")] == "'@sum"
    for name, value in list(ODD.items())[:-1]:
        at = head.index(renamed.get(name, name))
        assert (first[at], last[at]) == (value, ""), name


def test_what_was_renamed_is_said(atlas, tmp_path, cli, cli_json):
    words = ("index", "export", atlas.path, "--to", "anndata", "--out")
    report = cli_json(*words, tmp_path / "a.h5ad")
    assert report["renamed_columns"]["ER/PR"] == "ER_PR_3"
    told = cli(*words, tmp_path / "b.h5ad").stdout.replace("\n", " ")
    assert "the column 'ER/PR' is named 'ER_PR_3' in the file" in told
    assert export(atlas, tmp_path / "c.npz", "numpy").tiles == 60


@given(
    st.lists(st.text("ab_/\\.2=\t\0", max_size=5), unique=True, max_size=12),
    st.sampled_from([for_anndata, for_numpy, for_tsv]),
)
def test_names_are_unique_allowed_and_stay_where_they_can(names, allowed):
    taken = ("_index", "a")
    found = unique_names(names, allowed, taken)
    assert list(found) == names and len(set(found.values())) == len(names)
    for name, called in found.items():
        assert called and called not in taken and allowed(called) == called
        if name and allowed(name) == name and name not in taken:
            assert called == name


@pytest.mark.parametrize(
    "text", ["=1+1", "+SUM(A1)", "-2+3", "@x", "\t=1", "\r=1", "-", "+49 89", "=5", "-inf"]
)
def test_a_formula_gets_an_apostrophe(text):
    assert inert(text) == f"'{text}"


@pytest.mark.parametrize(
    "value", ["", "-1", "+2.5", "-1e-5", "-.5", "tumour", "a=b", 3, -1.5, None]
)
def test_numbers_and_other_texts_stay(value):
    assert inert(value) == value
