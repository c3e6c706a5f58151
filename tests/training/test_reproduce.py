"""The protocols: each writes a report, resumes after a stop, and counts the tiles that it leaves out."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from digit_tiles import digits

from histoseek.artifacts.tileset_files import open_tiles
from histoseek.artifacts.tilesets import Tile, TileSet
from histoseek.errors import BadInput
from histoseek.stopping import Stopped
from histoseek.training.reproduce import PROTOCOLS, StudyOptions, reproduce, topology_sweep
from histoseek.training.reproduce.report import SAYS, Cell, Report, Table, difference, said
from histoseek.training.reproduce.study import Study, draw, first_classes


def silent(done, total, text):
    pass


def quick(name, tiles, out, **options):
    """Train, then write the report, which trains nothing further but what the figures need."""
    chosen = StudyOptions(out, quick=True, accelerator="cpu", **options)
    written = (out / "report.json").exists()
    reproduce(name, replace(chosen, train_only=True), tiles, silent)
    assert (out / "report.json").exists() == written
    runs = set(out.rglob("run.json"))
    reproduce(name, chosen, tiles, silent)
    assert written or set(out.rglob("run.json")) == runs
    assert not list(out.rglob("*.lock"))  # removed with the report
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def kinds(tile_folder):
    return open_tiles(tile_folder)


def check(document, out, rows):
    for table in document["tables"]:
        for name, cells in table["rows"].items():
            for column, cell in cells.items():
                assert cell["ours"], (table["title"], name, column)
    assert set(document["tables"][0]["rows"]) == set(rows)
    text = (out / "report.md").read_text()
    assert len(document["says"]) == 3 and all(text.endswith(".") for text in document["says"])
    for head, words in zip(SAYS, document["says"], strict=True):
        assert f"**{head}** {words}" in text and "nan" not in words and "None" not in words
    assert text.split("\n")[2].startswith("**Fewer epochs.** ") and document["fewer"] in text
    assert "shows that the protocol runs; it measures nothing" in text
    for figure in document["figures"]:
        assert (out / figure["file"]).stat().st_size > 5000 and f"]({figure['file']})" in text


def test_ae_dac(tmp_path):
    out = tmp_path / "r"
    parts = "table4,grid,switches"
    document = quick("ae-dac", digits(), out, parts=parts, epochs=2)
    methods = ("k-means on pixels", "AE + k-means", "DEC", "DAC", "AE + DAC")
    check(document, out, methods)
    assert {f["file"] for f in document["figures"]} == {
        "accuracy.png", "confusion.png", "tsne.png", "reconstructions.png", "grid.png",
        "switches.png",
    }  # fmt: skip
    switches, stops = document["tables"][1:3]
    assert len(switches["rows"]) == 7
    assert (
        switches["rows"]["as in paper 001"]["ACC %"]["ours"]
        == (document["tables"][0]["rows"]["AE + DAC"]["ACC %"]["ours"])
    )
    for name, cells in stops["rows"].items():
        best = cells["best"]["mean"]
        assert all(cell["mean"] <= best for cell in cells.values()), name
    assert document["about"]["split"].startswith("none")
    kmeans = document["tables"][0]["rows"]["k-means on pixels"]
    assert kmeans["ACC %"]["mean"] > 40 and kmeans["ACC %"]["trivial"] == 10
    assert all(c["published"] is None for c in kmeans.values())  # the paper has no such set
    changed = {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("run.json")}
    again = quick("ae-dac", digits(), out, parts=parts, epochs=2)
    assert again["tables"] == document["tables"]
    assert changed == {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("run.json")}

    # Another machine continues with the records alone; only what the figures and new seeds need is trained.
    shutil.rmtree(out / "runs")
    records = json.loads((out / "records.json").read_text())
    assert all(record["seconds"] > 0 for record in records.values())
    minutes, trainings = map(float, re.findall(r"[\d.]+", document["about"]["training time"]))
    assert minutes > 0 and trainings > len(records)  # table 4 has no records
    del records["dac-0"]["seconds"]  # as an earlier version wrote it
    (out / "records.json").write_text(json.dumps(records))
    elsewhere = quick("ae-dac", digits(), out, parts=parts, epochs=2)
    assert elsewhere["about"]["training time"].endswith("1 more have no recorded duration")
    assert elsewhere["tables"] == document["tables"]
    trained = {path.parent.name for path in (out / "runs").rglob("run.json")}
    assert {"ae-kmeans-0", "ae-dac-0"} <= trained and not any("switch" in name for name in trained)


def test_topology_sweep_has_all_cells_beside_the_papers(tmp_path, monkeypatch):
    document = quick("topology-sweep", digits(), tmp_path / "r", parts="settings")
    check(document, tmp_path / "r", [f"K = {k}" for k in (10, 20, 30, 40, 50)])
    cae, ae, _, settings = document["tables"]
    batches = {"cae": 128, "ae": 256}
    for net, batch in batches.items():
        run = json.loads((tmp_path / f"r/runs/{net}-64/run.json").read_text())
        assert (run["options"]["model"], run["options"]["batch"]) == (f"topology-{net}", batch)
    assert topology_sweep.EPOCHS == {"CAE": 50, "AE": 100}  # as in Keras's examples
    assert document["about"]["epochs"] == "CAE: 1; AE: 1"
    assert "of CAE; the paper names no number, this protocol has 50." in document["fewer"]
    assert "of AE; the paper names no number, this protocol has 100." in document["fewer"]
    assert (
        len(settings["rows"]) == 10
    )  # four settings of the optimiser and one of the layers, two nets
    runs = [json.loads((tmp_path / f"r/runs/ae-32{n}/run.json").read_text()) for n in ("", "-4")]
    layers = [run["options"]["model_options"] for run in runs]
    assert layers == ["dim=32", "dim=32,relu_code=true"]
    assert (
        topology_sweep._settings("AE", relu=True)["Adadelta 1, cross-entropy"]["model_options"]
        == "relu_code=true"
    )
    assert settings["rows"]["AE: Adam 1e-3, squared error"]["K = 50"]["published"] == 83.52
    compared = settings["rows"]["AE: Adadelta 1, cross-entropy"]["K = 10"]["ours"]
    assert compared == ae["rows"]["K = 10"]["code 32"]["ours"]
    means = [[cell["mean"] for cell in row.values()] for row in settings["rows"].values()]
    assert len({tuple(row) for row in means}) == 10  # each setting was trained by itself
    assert ae["rows"]["K = 50"]["code 32"]["published"] == 83.52
    assert cae["rows"]["K = 10"]["code 128"]["published_sd"] == 2.69
    assert any("within 2 published sd" in note for note in cae["notes"])
    for table in (cae, ae):
        for cells in table["rows"].values():
            assert all(c["mean"] > c["trivial"] for c in cells.values())

    # The long part after the trainings shows its progress, which is also where it can be stopped.
    seen = []
    (tmp_path / "r/runs/ae-16/clusterings.json").unlink()

    def stop(done, total, text):
        seen.append((done, total, text))
        if "k-means" in text:
            raise Stopped(2)

    options = StudyOptions(tmp_path / "r", quick=True, accelerator="cpu", parts="settings")
    with pytest.raises(Stopped):
        reproduce("topology-sweep", options, digits(), stop)
    assert seen[-1] == (1000, 1000, "ae-16: k-means, K = 10, 1 of 2")
    quick("topology-sweep", digits(), tmp_path / "r", parts="settings")

    # Nothing is computed again by the same command.
    monkeypatch.setattr(topology_sweep, "random_kmeans", None)
    again = quick("topology-sweep", digits(), tmp_path / "r", parts="settings")
    assert again["tables"] == document["tables"]


def test_p4m_deepcluster(kinds, tmp_path):
    document = quick("p4m-deepcluster", kinds, tmp_path / "r", widths="2-4-8")
    check(document, tmp_path / "r", ("Sobel-AlexNet", "P4M CNN"))
    probe = document["tables"][1]["rows"]
    assert "pixels (16 x 16)" in probe and probe["P4M CNN"]["macro-AUC"]["trivial"] == 0.5
    turned, training = (table["rows"] for table in document["tables"][2:4])
    assert turned["P4M CNN"]["mean cosine"]["mean"] > 0.9999  # its features are invariant
    assert turned["P4M CNN"]["same cluster"]["mean"] == 1
    assert turned["Sobel-AlexNet"]["mean cosine"]["mean"] < 0.9999
    assert training["P4M CNN"]["million MACs a tile"]["mean"] > 0
    assert 0.3 < training["Sobel-AlexNet"]["last loss / ln K"]["mean"] < 1.5


def test_arcface(kinds, tmp_path):
    document = quick(
        "arcface", kinds, tmp_path / "r", size_px=32, parts="lite0", seeds=2, epochs=2, folds=4
    )
    rows = document["tables"][-1]["rows"]
    assert set(rows) == {
        "ArcFace", "softmax", "triplet", "ArcFace on EfficientNet-Lite0 (ImageNet)",
        "random weights", "pixels (16 x 16)",
    }  # fmt: skip
    assert len(rows["triplet"]["5-NN of other groups"]["ours"]) == 2
    assert document["about"]["seeds"] == "2 of 4 folds"
    run = json.loads((tmp_path / "r/runs/triplet-1/run.json").read_text())
    assert run["options"]["folds"] == 4
    assert document["about"]["split"] == "by group"


def test_breast_ae(kinds, tmp_path, monkeypatch):
    """Without the two large nets, which take minutes even for one epoch."""
    from histoseek.training.reproduce import breast_ae

    small = {name: net for name, net in breast_ae.NETS.items() if not net.large}
    monkeypatch.setattr(breast_ae, "NETS", small)
    two = kinds.without("label", ["cat"])
    document = quick("breast-ae", two, tmp_path / "r", positive="retina", split="tile")
    rows = ("k-means on pixels", "FC AE", "CNN AE", "CNN AE, no max-pool", "DenseNet, supervised")
    check(document, tmp_path / "r", rows)
    assert "LEAKY" in document["about"]["split"]
    pixels = document["tables"][0]["rows"]["k-means on pixels"]
    one_to_one = pixels["ACC (one-to-one)"]
    assert one_to_one["mean"] > one_to_one["trivial"]  # tissue is pale, a retina is dark
    assert pixels["F1"]["published"] == 0.593
    supervised = document["tables"][0]["rows"]["DenseNet, supervised"]
    assert 0 <= supervised["F1"]["mean"] <= 1 and supervised["F1"]["published"] == 0.825
    assert any("IDC set" in note for note in document["notes"])
    rules, rebuilt = document["tables"][1:]
    of_table = document["tables"][0]["rows"]["CNN AE"]["F1"]["ours"]
    assert rules["rows"]["CNN AE"]["full"]["ours"] == of_table, "the authors' rule"
    r2 = rebuilt["rows"]["CNN AE"]["R² of held-out tiles"]["mean"]
    assert r2 < 1 and r2 != 0
    assert len(document["figures"]) == 3

    # another machine has only the records, which suffice for all but the pictures
    shutil.rmtree(tmp_path / "r/runs")
    again = quick("breast-ae", two, tmp_path / "r", positive="retina", split="tile")
    assert not list((tmp_path / "r").rglob("run.json")) and not again["figures"]
    assert [table["rows"] for table in again["tables"]] == [t["rows"] for t in document["tables"]]
    assert any("earlier run: 4 trainings" in note for note in again["notes"])
    assert any("No pictures" in note for note in again["notes"])
    with pytest.raises(BadInput, match="is not a label"):
        quick("breast-ae", two, tmp_path / "x", positive="tumour")
    with pytest.raises(BadInput, match=r"1 label\(s\)"):
        quick("breast-ae", kinds.without("label", ["cat", "retina"]), tmp_path / "y")


def test_the_command_line_prints_and_writes_the_report(tmp_path, tile_folder, cli, cli_process):
    words = (
        "reproduce", "p4m-deepcluster", "--data", tile_folder, "--out", tmp_path / "r", "--quick",
        "--widths", "2-4-8", "--accelerator", "cpu",
    )  # fmt: skip
    document = json.loads(cli_process(*words, "--json", check=True).stdout)  # it reports its words
    assert document["command"].startswith("histoseek reproduce p4m-deepcluster --data")
    shown = cli(*words)  # nothing is trained again
    assert shown.returncode == 0 and "report.md" in shown.stdout and "NMI(t, t-1)" in shown.stdout
    wrong = cli("reproduce", "simclr", "--data", tile_folder, "--out", tmp_path / "x")
    assert wrong.returncode == 1 and all(name in wrong.stderr for name in PROTOCOLS)
    wrong = cli(
        "reproduce", "arcface", "--data", tile_folder, "--out", tmp_path / "x", "--split", "slide"
    )
    assert wrong.returncode == 1 and "expected one of: group, tile" in wrong.stderr


def test_what_a_protocol_cannot_do_is_refused_before_it_starts(kinds, tmp_path):
    for name, options, says in (
        ("breast-ae", {"seeds": 6}, "has 5 folds"),
        ("arcface", {"seeds": 11}, "has 10 folds"),
        ("breast-ae", {"folds": 2}, "at least 3, or 0 for the paper's 5"),
        ("ae-dac", {"folds": 5}, "ae-dac does not use it, only breast-ae, arcface; leave it out"),
        ("ae-dac", {"preset": "paper"}, "--preset is 'paper', but ae-dac does not use it"),
        ("ae-dac", {"split": "tile"}, "--split is 'tile'"),
        ("arcface", {"positive": "cat"}, "--positive is 'cat'"),
        ("arcface", {"limit_large": 9}, "--limit-large is 9"),
        ("topology-sweep", {"widths": "8"}, "only p4m-deepcluster"),
        ("breast-ae", {"size_px": 64}, "--size-px is 64"),
        ("topology-sweep", {"parts": "CAE,relu", "size_px": 32}, "changes only the AE"),
        ("topology-sweep", {"parts": "AE,setings"}, "AE, CAE, relu, settings"),
        ("breast-ae", {"parts": "AE"}, "none"),
        ("ae-dac", {"size_px": 50}, "28, 32, 96"),
        ("topology-sweep", {}, "pass --size-px 32"),
        ("arcface", {"limit": -5}, "--limit is -5; expected at least 0"),
        ("arcface", {"preset": "mine"}, "authors, paper"),
    ):
        with pytest.raises(BadInput, match=says):
            quick(name, kinds, tmp_path / "r", **options)


def test_tiles_without_a_label_are_left_out_and_counted(tmp_path):
    tiles = digits(120)
    half = tuple(Tile(t.file, t.label if n % 3 else None) for n, t in enumerate(tiles.tiles))
    some = TileSet("mnist", "digits", half, "some", tiles._load)
    document = quick("topology-sweep", some, tmp_path / "r", parts="AE")
    assert "40 tiles without a label were left out." in document["notes"]
    assert document["about"]["data"].startswith("80 tiles")
    assert [table["title"][:7] for table in document["tables"]][0] == "Table 2"


def test_the_sweep_takes_the_training_part_where_there_are_parts(tmp_path):
    tiles = digits(120)
    test = [{"part": "test"}, {"is_test": "True"}, {"group": "test"}]
    train = [{"part": "train"}, {"is_test": "False"}, {"group": "train"}]
    parts = tuple(
        Tile(t.file, t.label, column.pop("group", None), column)
        for n, t in enumerate(tiles.tiles)
        for column in [dict((test if n < 40 else train)[n % 3])]
    )
    study = TileSet("mnist", "digits", parts, "parts", tiles._load)
    document = quick("topology-sweep", study, tmp_path / "r", parts="AE")
    assert document["about"]["data"] == "80 tiles of mnist"
    assert "The 40 tiles of the test part were left out." in document["notes"]


def test_a_test_part_is_known_by_its_group_also_in_joined_sets(tmp_path):
    """The training part is then one group, of which a limit draws single tiles."""
    tiles = digits(120)
    for group, limit, used in (("{}", 50, 50), ("mnist/{}", 0, 80)):
        named = tuple(
            Tile(t.file, t.label, group.format("test" if n < 40 else "train"))
            for n, t in enumerate(tiles.tiles)
        )
        study = Study(
            StudyOptions(tmp_path, limit=limit), TileSet("mnist", "", named, "", tiles._load), print
        )
        study.leave_out_test_part()
        assert study.test_tiles == 40 and len(study.tiles) == used
        assert {tile.group for tile in study.tiles.tiles} == {group.format("train")}
    only = tuple(Tile(t.file, t.label, None, {"is_test": "true"}) for t in tiles.tiles)
    study = Study(StudyOptions(tmp_path), TileSet("mnist", "", only, "", tiles._load), print)
    with pytest.raises(BadInput, match="all 120 tiles are of the test part"):
        study.leave_out_test_part()


def test_a_cell_has_mean_and_sample_sd():
    cell = Cell(0.5, (0.4, 0.6, 0.8), 0.1)
    assert cell.mean == pytest.approx(0.6) and cell.sd == pytest.approx(0.2)
    assert Cell(None, (0.4,)).sd is None and Cell().mean is None
    assert Cell(None, (float("nan"),)).as_dict()["ours"] == [None]


def test_a_table_is_markdown(tmp_path):
    table = Table(
        "T", ("ACC",), {"k-means": [Cell(0.5, (0.4, 0.6), 0.1)]}, "chance", notes=["a note"]
    )
    assert table.markdown()[2:5] == [
        "| | ACC: published | ours | trivial |", "|---|---|---|---|",
        "| k-means | 0.500 | 0.500 ± 0.141 | 0.100 |",
    ]  # fmt: skip
    rows = {"a": [Cell(None, (0.4,), 0.1), Cell(None, (1.0,))], "b": [Cell(), Cell(None, (2.0,))]}
    some = Table("T", ("ACC", "minutes"), rows, digits=1)
    assert some.markdown()[2:6] == [
        "| | ACC: ours | trivial | minutes |", "|---|---|---|---|",
        "| a | 0.4 | 0.1 | 1.0 |", "| b | – | – | 2.0 |",
    ], "without the columns that would be empty"  # fmt: skip
    report = Report("R", "000", "histoseek …", {"data": "d"}, [table])
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Trivial: chance." in text and "a note" in text and "| date | 20" in text


def test_tiles_are_drawn_by_whole_groups(kinds):
    some = draw(kinds, 30)
    assert 20 <= len(some) <= 30 and len(draw(kinds, 0)) == 72
    sizes = {}
    for tile in kinds.tiles:
        sizes[tile.group] = sizes.get(tile.group, 0) + 1
    found = {}
    for tile in some.tiles:
        found[tile.group] = found.get(tile.group, 0) + 1
    assert all(found[group] == sizes[group] for group in found)
    assert {t.label for t in first_classes(kinds, 2).tiles} == {"cat", "retina"}


def test_listing_and_dry_run(tile_folder, tmp_path, cli, cli_json):
    listed = cli_json("train", "--list")
    assert listed["models"]["fc-ae"]["parameters"] == 35_092_692
    assert listed["models"]["p4m-cnn"]["paper"].startswith("002")
    assert set(listed["protocols"]) == set(PROTOCOLS)
    flags = {row["flag"]: row["meaning"] for row in listed["recipes"]["dac"]["options"]}
    assert "Weight of the loss on pairs" in flags["--beta"] and flags["--precision"]
    assert cli("train", "--list").returncode == 0
    plan = cli_json(
        "train", "autoencoder", tile_folder, "--dry-run", "--model", "cnn-ae", "--epochs", 2
    )
    assert plan["parameters"] == 10_569_347 and plan["tiles"] == 72
    assert sum(layer["macs"] for layer in plan["layers"]) == plan["macs_per_tile"]
    shown = cli("train", "autoencoder", "--dry-run", "--model", "fc-ae")
    assert shown.returncode == 0 and "35,092,692 parameters" in shown.stdout
    assert "nothing was trained" in shown.stdout and not list(tmp_path.iterdir())


def test_help_of_a_recipe_shows_its_options(cli):
    shown = " ".join(cli("train", "arcface", "--help").stdout.split())
    assert "Options of recipe arcface:" in shown
    assert "--batch <int> Number of tiles per step and device. [at least 2] [default: 32]" in shown
    assert "Options of recipe" not in cli("train", "--help").stdout
    assert "--relu-embedding/--no-relu-embedding, --easy-margin/--no-easy-margin" in shown
    assert "only to positive cosines" not in shown
    explained = " ".join(cli("train", "arcface", "--help-all").stdout.split())
    assert "Apply ArcFace's margin only to positive cosines." in explained


def test_help_names_rarely_used_options(cli):
    shown = " ".join(cli("reproduce", "--help").stdout.split())
    assert "Rarely used (--help-all explains them): --folds," in shown
    assert "Number of folds into which" not in shown
    explained = " ".join(cli("reproduce", "--help-all").stdout.split())
    assert "--folds <int> Number of folds into which" in explained


def test_a_difference_has_an_interval():
    from scipy import stats

    a, b = Cell(ours=(0.7, 0.8, 0.95)), Cell(ours=(0.6, 0.7, 0.8))
    low, high = stats.ttest_rel(a.ours, b.ours).confidence_interval()  # paired
    assert difference(a, b) == f"+0.117 (95 % interval {low:+.3f} to {high:+.3f})"
    low, high = stats.ttest_ind(a.ours, (0.6, 0.9), equal_var=False).confidence_interval()
    said_of = difference(a, Cell(ours=(0.6, 0.9)), 1)
    assert said_of == f"+0.1 (95 % interval {low:+.1f} to {high:+.1f}; it may be chance)"
    assert "one run" in difference(Cell(ours=(0.5,)), b)
    equal = Cell(ours=(0.5, 0.5))
    assert difference(equal, equal) == "+0.000 (95 % interval +0.000 to +0.000; it may be chance)"
    assert difference(Cell(ours=(np.nan, 0.5)), b) == difference(Cell(), b) == "no value"
    assert said(b) == "0.700 ± 0.100" and said(Cell(ours=(0.5,)), 1) == "0.5"


def test_the_whole_of_a_set_has_the_published_numbers(tmp_path):
    tiles = digits(120)
    whole = TileSet("mnist_full", "digits", tiles.tiles, "whole", tiles._load)
    document = quick("topology-sweep", whole, tmp_path / "r", parts="AE")
    assert document["tables"][0]["rows"]["K = 50"]["code 32"]["published"] == 83.52
    assert "two published standard deviations" in document["says"][1]


def test_a_record_is_taken_only_for_what_it_is_of(tmp_path):
    def train(pretrain=1, **settings):
        study = Study(StudyOptions(tmp_path, accelerator="cpu"), digits(60), silent)
        options = {"method": "ae-kmeans", "pretrain": pretrain, "judge": False}
        study("cell", "dac", record_only=True, builds_on=settings, **options)
        return study.elsewhere

    assert train(of=50) == 0
    shutil.rmtree(tmp_path / "runs")
    assert train(of=50) == 1, "the record is enough"
    assert train(of=37) == 0, "it builds on another training"
    shutil.rmtree(tmp_path / "runs")
    assert train(of=37) == 1
    assert train(2, of=37) == 0, "other options"
    of_two = (tmp_path / "records.json").read_bytes()
    shutil.rmtree(tmp_path / "runs")
    assert train(1, of=37) == 0
    (tmp_path / "records.json").write_bytes(of_two)  # from another machine
    assert train(2, of=37) == 1, "the weights that are here are not those of the record"


def test_the_progress_counts_only_what_is_still_to_train(tmp_path):
    def reported(*seeds):
        seen = []
        options = StudyOptions(tmp_path, accelerator="cpu")
        study = Study(options, digits(60), lambda done, total, text: seen.append((done, total)))
        study.cells = 2
        for seed in seeds:
            known = {"record_only": True} if seed == 0 else {}
            study(f"cell-{seed}", "autoencoder", model="topology-ae", epochs=1, judge=False,
                  seed=seed, **known)  # fmt: skip
        return seen

    first = reported(0)
    assert first[-1] == (1000, 2000)
    assert all(total == 1000 for _, total in reported(0, 1)), "the first is known by its record"
    assert reported(0, 1) == [], "both are finished"


def test_an_error_of_the_mean_colour_only_is_an_r2_of_0():
    from histoseek.training.reproduce import breast_ae

    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    exact = tiles.astype(np.float32) / 255
    mean = np.broadcast_to(exact.mean((1, 2), keepdims=True), exact.shape)
    assert breast_ae._r2(tiles, exact) == 1
    assert abs(breast_ae._r2(tiles, mean)) < 1e-6
    assert 0.7 < breast_ae._r2(tiles, (mean + exact) / 2) < 0.8


def test_an_epoch_of_few_tiles_has_as_many_steps_as_the_papers():
    from histoseek.training.reproduce import breast_ae

    def batch(tiles, *net, folds=5):
        return breast_ae._batch(range(tiles), folds, *net)

    assert batch(1070, 1000) == 16 and batch(1070, 300, True) == 8, "the smallest"
    assert batch(20_000, 1000) == 72, "12,000 tiles to train on in 166 steps"
    assert batch(20_000, 1000, folds=3) == 40
    assert batch(277_524, 1000) == 1000 and batch(277_524, 300, True) == 75, "the paper's"


def test_p4m_deepcluster_has_the_papers_epochs_where_clusterings_are_rare(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Study, "__call__", lambda *_, **options: asked.append(options) or {})
    reproduce("p4m-deepcluster", StudyOptions(tmp_path, train_only=True), digits(1560), silent)
    assert {(one["reassign"], one["epochs"]) for one in asked} == {(3, 100)}
