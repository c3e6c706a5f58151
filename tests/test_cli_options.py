"""Option models: the values that they reject, and the flags generated from them."""

import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from histoseek.artifacts.option_models import HIDDEN, PYTHON_ONLY, Field, Flag, options
from histoseek.errors import BadInput
from histoseek.training.commands import select
from histoseek.ui.cli.options import parse, with_flags


@options
class Few:
    rate: Annotated[float, Field(ge=0, le=1, description="Share of tiles.")] = 0.5
    count: Annotated[int, Field(ge=2, description="Tiles; all of a slide.")] = 8
    order: Annotated[Literal["", "up", "down"], Field(description="Order of tiles.")] = "up"
    mirror: Annotated[bool, Field(description="Mirror tiles.")] = False
    where: Annotated[Path | None, Field(description="Folder."), Flag("--folder")] = None
    names: Annotated[tuple[str, ...], Field(description="Names.")] = ()
    rare: Annotated[int, Field(description="Rarely used."), HIDDEN] = 3
    inner: Annotated[int | None, Field(ge=1, description="From Python."), PYTHON_ONLY] = None


@options
class More(Few):
    count: int = 16
    extra: Annotated[int, Field(gt=0, description="More.")] = 1


@with_flags
def few(options: Few, also: Annotated[int, typer.Option(help="Beside the model.")] = 7):
    """Show the options."""
    print(also, options)


app = typer.Typer(rich_markup_mode=None)
app.command()(few)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rate": 2}, r"^--rate is 2; expected 0 to 1 \(Share of tiles\)$"),
        ({"rate": float("nan")}, r"^--rate is nan; expected 0 to 1"),
        ({"count": 1}, r"^--count is 1; expected at least 2 \(Tiles\)$"),
        ({"count": "many"}, r"^--count is 'many'; expected a value of type int, at least 2"),
        ({"count": 2.5}, r"^--count is 2.5; expected a value of type int"),
        ({"order": "left"}, r"^--order is 'left'; expected one of: '' \(none\), up, down$"),
        ({"inner": 0}, r"^--inner is 0; expected at least 1"),
        ({"rate": -1, "count": 0}, r"--rate is -1; .*\n--count is 0; "),
        ({"wrong": 1}, r"option 'wrong': .*; the options are: --rate, --count, .*--folder"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(values, says):
    with pytest.raises(BadInput, match=says):
        Few(**values)


def test_a_model_is_a_frozen_dataclass_that_can_be_changed_sent_and_stored():
    made = Few(rate=1, names=["a"])
    assert asdict(made)["names"] == ("a",) and isinstance(made.rate, float)
    assert pickle.loads(pickle.dumps(made)) == made
    assert replace(made, count=3).count == 3
    with pytest.raises(BadInput, match="--count is 0"):
        replace(made, count=0)
    with pytest.raises(AttributeError):
        made.rate = 0.1


def test_a_subclass_sets_another_default_and_keeps_the_range():
    assert (More().count, Few().count, More().extra) == (16, 8, 1)
    with pytest.raises(BadInput, match="--count is 1; expected at least 2"):
        More(count=1)
    with pytest.raises(BadInput, match="--extra is 0; expected over 0"):
        More(extra=0)


def test_words_become_a_model():
    words = ["--rate", "0.25", "--mirror", "--folder", "a/b", "--names", "x", "--names", "y"]
    made = parse(More, [*words, "--order=down", "--rare", "5"], "more")
    assert made == More(
        rate=0.25, mirror=True, where=Path("a/b"), names=("x", "y"), order="down", rare=5
    )
    assert not parse(More, ["--no-mirror"], "more").mirror
    for wrong, says in (
        (["--count", "many"], "--count is 'many'; expected a value of type int"),
        (["--count"], "--count.*requires an argument"),
        (["--inner", "3"], "No such option: --inner.* options of more are: --rate"),
        (["loose"], "unexpected extra argument"),
    ):
        with pytest.raises(BadInput, match=says):
            parse(More, wrong, "more")


def test_help_shows_type_range_default_and_meaning():
    shown = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    for part in (
        "--rate <float> Share of tiles. [0 to 1] [default: 0.5]",
        "--count <int> Tiles; all of a slide. [at least 2] [default: 8]",
        "--order <up|down> Order of tiles. [default: up]",
        "--mirror Mirror tiles.",
        "--folder <path> Folder.",
        "--names <list[str]> Names.",
        "--also <int> Beside the model. [default: 7]",
    ):
        assert part in shown
    assert "--rare" not in shown and "--inner" not in shown and "--no-mirror" not in shown


def test_a_command_gets_the_model_and_its_other_parameters():
    result = CliRunner().invoke(app, ["--also", "9", "--names", "a", "--rare", "4", "--mirror"])
    assert result.output == f"9 {Few(names=('a',), rare=4, mirror=True)}\n"
    assert isinstance(CliRunner().invoke(app, ["--rate", "3"]).exception, BadInput)
    assert CliRunner().invoke(app, ["--count", "many"]).exit_code == 2


def test_train_joins_several_data_sets_and_label_columns(cli, tile_folder):
    sources = (tile_folder, tile_folder / "manifest.csv")
    words = ("--label-from", "label", "--label-from", "group", "--size-px", 64, "--dry-run")
    done = cli("train", "arcface", *sources, *words, check=True)
    assert "144 tiles" in done.stdout and "nothing was trained" in done.stdout


def test_groups_of_several_data_sets_are_joined_on_request(cli, tmp_path, tissue):
    words = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        rows = ["file,label,group"]
        for number in range(4):
            Image.fromarray(tissue[: 64 + number, :64]).save(folder / f"{number}.png")
            rows.append(f"{number}.png,tissue,patient-{number}")
        (folder / "manifest.csv").write_text("\n".join(rows))
        words.append(folder)
    apart = select(words, [], ["label"])
    assert len({tile.group for tile in apart.tiles}) == 8
    assert "4 names of groups occur in several data sets" in apart.notes[-1]
    same = select(words, [], ["label"], shared_groups=True)
    assert {tile.group for tile in same.tiles} == {f"patient-{n}" for n in range(4)}
    assert not same.notes
    shown = cli("train", "arcface", *words, "--shared-groups", "--dry-run", check=True)
    assert "8 tiles" in shown.stdout and "names of groups" not in shown.stdout
