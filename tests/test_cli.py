"""The command line, used by a person or by a program."""

import json

import pytest
import typer
from PIL import Image

from histoseek import __version__, console
from histoseek.__main__ import app
from histoseek.ui.cli import embed, model


@pytest.fixture(scope="module")
def atlas(tmp_path_factory, tile_folder):
    from histoseek.index.atlas import Atlas
    from histoseek.serving.embedding.jobs import find_jobs
    from histoseek.serving.embedding.pipeline import embed_jobs
    from histoseek.serving.embedding.results import EmbedOptions
    from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder

    folder = tmp_path_factory.mktemp("cli")
    found = find_jobs([tile_folder])
    embed_jobs(found, open_encoder("default"), folder / "features", EmbedOptions(), lambda *_: None)
    made = Atlas.create(folder / "atlas", DEFAULT_BUNDLE)
    made.add(sorted((folder / "features").rglob("*.h5")))
    made.fit("kmeans")
    return folder / "atlas"


def test_version_and_help(cli_process):
    assert cli_process("--version").stdout == f"histoseek {__version__}\n"
    text = cli_process("--help").stdout
    for verb in ("demo", "train", "export", "embed", "index", "ui", "doctor"):
        assert verb in text


def test_search_gives_a_list_of_hits_per_picture(cli_answers, atlas, tile_folder):
    one, two = cli_answers(
        "index", "search", atlas, tile_folder / "cat/01.png", tile_folder / "retina/02.png", "-k", 3
    )
    assert len(one) == len(two) == 3
    assert {
        "rank",
        "score",
        "slide",
        "x",
        "y",
        "size_px_level0",
        "mpp",
        "label",
        "patient",
        "cluster",
    } <= set(one[0])
    assert (one[0]["label"], one[0]["patient"]) == ("cat", "cat-0") and one[0]["score"] > 0.999
    assert one[0]["file"] in {f"cat/0{n}.png" for n in range(4)}  # quarter turns of one place
    assert two[0]["label"] == "retina" and two[0]["cluster"] >= 0


def test_assign_gives_cluster_distance_strength_unknown(cli_answers, atlas, tile_folder):
    (placed,) = cli_answers("index", "assign", atlas, tile_folder / "cat/01.png")
    assert {"cluster", "distance", "strength", "unknown"} <= set(placed)


def test_one_bad_picture_stops_no_other_and_the_exit_code_tells(
    cli_answers, atlas, tile_folder, tmp_path
):
    (tmp_path / "bad.png").write_bytes(b"")
    for verb in ("search", "assign"):
        bad, good = cli_answers(
            "index", verb, atlas, tmp_path / "bad.png", tile_folder / "cat/01.png", expect=1
        )
        assert "0 bytes" in bad["error"]["message"] and good


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((1200, 900), "has 1200 x 900 pixels; its middle square of 900 x 900 is taken as one tile"),
        ((1200, 1200), "has 1200 x 1200 pixels; it is taken as one tile of 224 x 224"),
        ((300, 200), "has 300 x 200 pixels; its middle square of 200 x 200"),
        ((90, 90), "has 90 x 90 pixels; it is enlarged to one tile of 224 x 224"),
        ((250, 230), None),
    ],
)
def test_a_picture_much_smaller_larger_or_longer_than_a_tile_is_said(
    cli, cli_json, atlas, tmp_path, size, said
):
    path = tmp_path / "region.png"
    Image.new("RGB", size, "pink").save(path)
    for verb, remedy in (("search", "; pass --mpp to search all of it"), ("assign", "")):
        notes = cli_json("index", verb, atlas, path)["notes"]
        text = " ".join(cli("index", verb, atlas, path, check=True).stdout.split())
        assert all(note in text for note in notes)
        of_size = [note for note in notes if "one tile of" in note]
        if said is None:
            assert of_size == []
        else:
            (note,) = of_size
            assert f"{path.name} {said}" in note
            assert note.endswith(f"224 x 224{remedy}")


def test_stats_and_verify(cli_json, atlas):
    facts = cli_json("index", "stats", atlas)
    assert (facts["slides"], facts["tiles"]) == (1, 72) and facts["labels"]["cat"] == 24
    assert cli_json("index", "verify", atlas) == {
        "ok": True,
        "problems": [],
        "repaired": [],
    }


def test_errors_are_one_json_document_and_exit_1(cli, cli_json, tmp_path, tile_folder):
    for words, says in (
        (["train", "simclr", tile_folder, "--out", tmp_path / "r"], "arcface"),
        (["index", "stats", tmp_path / "none"], "not an atlas"),
        (["embed", tile_folder, "--encoder", tmp_path / "none", "--out", tmp_path / "o"], "not an encoder"),
        (["embed", tile_folder, "--encoder", "triton://x", "--out", tmp_path / "o"], "triton://HOST:PORT"),
        (["export", tmp_path / "none", "--out", tmp_path / "b", "--tiles", tile_folder], "no finished run"),
        (["embed", tile_folder, "--out", tmp_path / "o", "--mpp", "0"], "--mpp"),
        (["train", "arcface", tile_folder, "--out", tmp_path / "r", "--dropout", "2"], "dropout"),
        (["train", "arcface", tile_folder, "--out", tmp_path / "r", "--precision", "x"], "precision"),
        (["ui", tmp_path / "none", "--port", "99999"], "--port"),
        (["embed", tile_folder, "--out", tmp_path / "o", "--overlap", "224"], "--overlap"),
    ):  # fmt: skip
        error = cli_json(*words, expect=1)["error"]
        assert says in error["message"], error
        human = cli(*words)
        assert human.returncode == 1 and human.stdout == "" and "Traceback" not in human.stderr


def commands(group, words=()):
    """Yield every command below a group, with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


def test_every_command_and_every_option_has_a_help_text():
    listed = [
        *commands(typer.main.get_command(app)),
        *commands(typer.main.get_group(embed.app)),
        *commands(typer.main.get_group(model.app)),
    ]
    real = dict(listed)  # the last two groups stand in for commands that are imported later
    assert len(real) >= 34
    for words, command in real.items():
        assert command.help and "Options:" not in command.help, words
        assert all(p.help for p in command.params), (words, [p.name for p in command.params])
        assert {"--json"} <= {flag for p in command.params for flag in p.opts}, words


@pytest.mark.parametrize("words", [(), ("index",), ("triton",)])
def test_a_group_without_a_command_prints_its_help(cli, words):
    done = cli(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: ") and "Commands:" in done.stderr


def test_wrong_usage_exits_2(cli_process):
    assert cli_process("embed").returncode == 2
    assert cli_process("no-such-verb").returncode == 2
    wrong = cli_process("index", "search", "atlas", "a.png", "-k", "abc", "--json")
    assert wrong.returncode == 2
    assert "Invalid value for '-k'" in json.loads(wrong.stdout)["error"]["message"]
    missing = cli_process("embed", "--json")
    assert missing.returncode == 2 and "inputs" in json.loads(missing.stdout)["error"]["message"]


def test_train_list_shows_recipes_models_and_options(cli, cli_json):
    document = cli_json("train", "--list")
    assert document["models"]["mobilenet-v3-small"]["parameters"] == 1_091_808
    assert {"--margin", "--scale", "--easy-margin"} <= {
        o["flag"] for o in document["recipes"]["arcface"]["options"]
    }
    assert "--margin" in cli("train", "--list").stdout


def test_train_export_embed_search_with_an_encoder_of_ones_own(
    cli_json, cli_answers, tile_folder, tmp_path
):
    run, bundle, atlas = tmp_path / "run", tmp_path / "mine", tmp_path / "atlas"
    record = cli_json(
        "train", "arcface", tile_folder, "--out", run, "--size-px", 64, "--epochs", 4,
        "--batch", 8, "--lr", 0.003, "--dropout", 0, "--margin", 0.2, "--folds", 3, "--accelerator", "cpu",
    )  # fmt: skip
    assert record["split"]["by"] == "group" and len(record["epochs"]) == 4
    manifest = cli_json("export", run, "--out", bundle, "--name", "mine", "--mpp", 0.5)
    assert (manifest["size_px"], manifest["dim"], manifest["name"]) == (64, 64, "mine")
    report = cli_json("embed", tile_folder, "--encoder", bundle, "--out", tmp_path / "f")
    assert report["ok"] and report["tiles"] == 72
    cli_json("index", "create", atlas, "--encoder", bundle)
    assert cli_json("index", "add", atlas, tmp_path / "f")["ok"]
    ((best, *_),) = cli_answers("index", "search", atlas, tile_folder / "tissue/00.png", "-k", 2)
    assert best["score"] > 0.99 and best["patient"] == "tissue-0"
    foreign = cli_json("embed", tile_folder, "--out", tmp_path / "default")
    refused = cli_json("index", "add", atlas, foreign["results"][0]["features"], expect=1)
    assert "mine" in refused["added"][0]["reason"]


def test_doctor_says_what_is_there(cli, cli_json):
    report = cli_json("doctor")
    assert report["ok"] and report["encoder"]["ok"]
    parts = {p["name"]: p for p in report["parts"]}
    assert parts["embedding"]["installed"] and parts["index"]["versions"]["hdbscan"]
    for part in parts.values():
        assert part["installed"] or part["remedy"].startswith("pip install 'histoseek[")
    assert "default encoder" in cli("doctor").stdout


def test_demo_finds_the_place_the_crop_was_cut_from(cli_json, tmp_path):
    """With no internet the slide is made of scikit-image's tissue; with it, fetched."""
    document = cli_json("demo", "--dir", tmp_path / "demo", "--no-ui")
    assert document["best_hit_is_the_place"] and document["hits"][0]["rank"] == 1
    assert document["turned_by_any_angle"]["found_their_place"] >= 12
    assert document["tiles"] > 50 and document["assigned"]["cluster"] >= 0
    with Image.open(tmp_path / "demo/query.png") as query:
        assert query.size == (224, 224)
    again = cli_json("demo", "--dir", tmp_path / "demo", "--no-ui")
    assert again["hits"] == document["hits"]


def test_json_is_the_only_thing_on_stdout(cli_process, tile_folder, tmp_path):
    done = cli_process("embed", tile_folder, "--out", tmp_path / "f", "--json")
    assert json.loads(done.stdout)["ok"]


def test_json_ends_with_the_command(cli_json, tmp_path):
    cli_json("index", "stats", tmp_path / "none", expect=1)
    console.say("for a person")
    assert not console.mode.json


@pytest.mark.parametrize(
    "words",
    [
        ("index", "create", "s3://bucket/atlas"),
        ("index", "stats", "s3://bucket/atlas"),
        ("embed", ".", "--out", "out", "--manifest", "s3://bucket/table.csv"),
        ("index", "relocate", "atlas", "--slides", "gs://bucket/slides"),
    ],
)
def test_a_url_for_a_local_path_is_refused(cli_json, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = cli_json(*words, expect=1)["error"]["message"]
    url = next(word for word in words if "://" in word)
    assert said.startswith(f"{url}: a path on this machine is needed here, not a URL")
    assert list(tmp_path.iterdir()) == []
