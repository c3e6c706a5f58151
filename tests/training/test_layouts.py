"""The papers' data sets in their published layouts: small versions are written and read back."""

import gzip
import io
import struct

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from histoseek.errors import BadInput
from histoseek.training.data import load, split
from histoseek.training.layouts import open_data


def silent(done, total, text):
    pass


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def idx(array):
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def png(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


def test_mnist_and_fashion_mnist(tmp_path, rng):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    pictures, labels = rng.integers(0, 256, (7, 28, 28), np.uint8), np.arange(7, dtype=np.uint8)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pictures)))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(pictures[:2]))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:2]))
    tiles = open_data(folder)
    assert (tiles.name, len(tiles)) == ("fashion-mnist", 9)
    assert [t.label for t in tiles.tiles] == list("012345601") and tiles.tiles[8].extra[
        "part"
    ] == "test"
    assert (tiles.read(3)[..., 1] == pictures[3]).all()
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(pictures[:2])[:-5])
    with pytest.raises(BadInput, match="t10k-images-idx3-ubyte is truncated"):
        open_data(folder)
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(pictures[:2])[:9])
    with pytest.raises(BadInput, match="not an idx file of bytes with 3 axes"):
        open_data(folder)
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(pictures[:3]))
    with pytest.raises(BadInput, match="part test has 3 images, but 2 labels"):
        open_data(folder)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bgarbage")
    with pytest.raises(BadInput, match="cannot be read"):
        open_data(folder)


def test_cifar(tmp_path, rng):
    pictures = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    rows = pictures.transpose(0, 3, 1, 2).reshape(4, -1)
    ten, hundred = tmp_path / "ten", tmp_path / "hundred"
    ten.mkdir()
    hundred.mkdir()
    labels = np.array([[0], [9], [3], [3]], np.uint8)
    (ten / "data_batch_1.bin").write_bytes(np.hstack([labels, rows]).tobytes())
    (ten / "test_batch.bin").write_bytes(np.hstack([labels, rows])[:1].tobytes())
    tiles = open_data(ten)
    assert [t.label for t in tiles.tiles] == ["airplane", "truck", "cat", "cat", "airplane"]
    assert (tiles.read(1) == pictures[1]).all()
    both = np.hstack([labels, 7 * np.ones((4, 1), np.uint8), rows])
    (hundred / "train.bin").write_bytes(both.tobytes())
    (hundred / "fine_label_names.txt").write_text("\n".join(f"fine{n}" for n in range(100)))
    (hundred / "coarse_label_names.txt").write_text("\n".join(f"coarse{n}" for n in range(20)))
    assert [t.label for t in open_data(hundred).tiles] == [
        "coarse0",
        "coarse9",
        "coarse3",
        "coarse3",
    ]
    (ten / "data_batch_1.bin").write_bytes(np.hstack([labels + 70, rows]).tobytes())
    with pytest.raises(BadInput, match="label outside 0 to 9"):
        open_data(ten)
    (ten / "data_batch_1.bin").write_bytes(b"x" * 100)
    with pytest.raises(BadInput, match="truncated"):
        open_data(ten)
    python = tmp_path / "python"
    python.mkdir()
    (python / "data_batch_1").write_bytes(b"pickle")
    with pytest.raises(BadInput, match="pickles, which can run code .* binary version"):
        open_data(python)


def test_stl10(tmp_path, rng):
    picture = rng.integers(0, 256, (2, 96, 96, 3), np.uint8)
    (tmp_path / "train_X.bin").write_bytes(picture.transpose(0, 3, 2, 1).tobytes())
    (tmp_path / "train_y.bin").write_bytes(bytes([1, 10]))
    tiles = open_data(tmp_path)
    assert [t.label for t in tiles.tiles] == ["airplane", "truck"]
    assert (tiles.read(0) == picture[0]).all()
    (tmp_path / "train_y.bin").unlink()
    with pytest.raises(BadInput, match="no labels"):
        open_data(tmp_path)


def test_svhn(tmp_path, rng):
    pictures = rng.integers(0, 256, (32, 32, 3, 3), np.uint8)
    savemat(tmp_path / "train_32x32.mat", {"X": pictures, "y": np.array([[10], [1], [9]])})
    tiles = open_data(tmp_path)
    assert [t.label for t in tiles.tiles] == ["0", "1", "9"]
    assert (tiles.read(2) == pictures[..., 2]).all()
    (tmp_path / "train_32x32.mat").write_bytes(b"no matlab file")
    with pytest.raises(BadInput, match="not a cropped SVHN file"):
        open_data(tmp_path)


def test_idc_has_its_patients_as_groups(tmp_path, rng):
    for patient in ("8863", "9036", "10253"):
        for label in "01":
            folder = tmp_path / "idc" / patient / label
            folder.mkdir(parents=True)
            for x in (51, 101):
                name = f"{patient}_idx5_x{x}_y1_class{label}.png"
                (folder / name).write_bytes(png(rng.integers(0, 256, (50, 50, 3), np.uint8)))
    tiles = open_data(tmp_path / "idc")
    assert len(tiles) == 12 and {t.label for t in tiles.tiles} == {"0", "1"}
    assert {t.group for t in tiles.tiles} == {"8863", "9036", "10253"}
    data = load(tiles, 50, silent)
    parts = split(data, 3, 0, 0)
    assert parts.by == "group" and not set(data.groups[parts.train]) & set(data.groups[parts.test])
    leaky = split(data, 3, 0, 0, by="tile")
    assert "leaky" in leaky.by and set(data.groups[leaky.train]) & set(data.groups[leaky.test])


@pytest.mark.shared
def test_the_real_idc_sample_is_recognised(shared):
    tiles = open_data(shared / "idc_tiny.tar")
    assert len(tiles) == 82 and {t.group for t in tiles.tiles} == {"8975"}


def test_chestxray14_reads_nihs_table(tmp_path, rng):
    (tmp_path / "images_001").mkdir()
    rows = ["Image Index,Finding Labels,Follow-up #,Patient ID"]
    for number, (finding, patient) in enumerate(
        (("No Finding", 1), ("Mass|Nodule", 2), ("Mass", 2), ("Effusion", 3))
    ):
        name = f"{number:08d}_000.png"
        if number < 3:
            grey = rng.integers(0, 256, (64, 64), np.uint8)
            (tmp_path / "images_001" / name).write_bytes(png(grey))
        rows.append(f"{name},{finding},0,{patient}")
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows))
    for path in (tmp_path, tmp_path / "Data_Entry_2017_v2020.csv"):
        tiles = open_data(path)
        assert [t.label for t in tiles.tiles] == ["No Finding", "Mass|Nodule", "Mass"]
        assert [t.group for t in tiles.tiles] == ["1", "2", "2"] and tiles.name == "chestxray14"
        assert tiles.read(1).shape == (64, 64, 3)


def test_findings_are_probed_one_by_one():
    """Macro-AUC over findings: a finding's score is the sum over the combinations that hold it."""
    from histoseek.training.probe import linear_probe

    rng = np.random.default_rng(0)
    names = ("Effusion", "Mass", "Mass|Nodule", "No Finding")
    labels = rng.integers(0, 4, 400)
    features = np.eye(4)[labels] + 0.2 * rng.normal(size=(400, 4))
    rows = {
        m.name: m
        for m in linear_probe(features[:300], labels[:300], features[300:], labels[300:], names)
    }
    assert rows["probe_accuracy"].value > 0.95 and rows["probe_macro_auc"].value > 0.95
    assert rows["probe_micro_auc"].baseline == pytest.approx(0.5, abs=0.1)
    skewed = np.where(rng.random(400) < 0.95, 3, labels)
    noise = rng.normal(size=(400, 4))
    rows = {
        m.name: m for m in linear_probe(noise[:300], skewed[:300], noise[300:], skewed[300:], names)
    }
    assert (
        rows["probe_micro_auc"].baseline > 0.95
    )  # as on ChestX-ray14: the shares alone score high
    assert linear_probe(noise, np.zeros(400, int), noise, labels, names) == []


def test_anything_else_is_a_tile_set(tile_folder, tmp_path):
    assert len(open_data(tile_folder)) == 72
    with pytest.raises(BadInput, match="does not exist"):
        open_data(tmp_path / "none")
