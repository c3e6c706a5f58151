"""Searches of several atlases at once on the command line: arguments, and what the answer says of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import console
from ...errors import BadInput

if TYPE_CHECKING:
    from ...index.federation.federation import Answer, Example


def atlases_and_images(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Tell atlases from images.

    The first argument is an atlas. So is a folder, an address of Milvus, and a name without a suffix that
    does not exist: an atlas that is away.
    """
    atlases, images = [arguments[0]], []
    for text in arguments[1:]:
        path = Path(text)
        absent = not path.suffix and not path.exists()
        if text.startswith(("milvus://", "milvus+https://")) or path.is_dir() or absent:
            atlases.append(text)
        else:
            images.append(path)
    return atlases, images


def tile_number(text: str) -> int:
    """Return the id of a tile of the one atlas that is searched.

    Raises:
        BadInput: the text is not an id.
    """
    if not text.isdigit():
        raise BadInput(f"--tile is {text!r}; expected the id of a tile, such as 12")
    return int(text)


def example(text: str) -> Example:
    """Return a tile written ATLAS:ID.

    Raises:
        BadInput: the text has another form.
    """
    from ...index.federation.federation import Example

    name, colon, number = text.rpartition(":")
    if not colon or not name or not number.isdigit():
        raise BadInput(
            f"the tile {text!r} names no atlas; with several atlases write ATLAS:ID, such as north:12"
        )
    return Example(name, int(number))


def is_example(text: str) -> bool:
    """Return whether a text is ATLAS:ID and not the path of an image."""
    return text.rpartition(":")[2].isdigit() and not Path(text).exists()


def described(answer: Answer, answers: Sequence[Any]) -> dict[str, Any]:
    """Return the JSON document: what was searched, and the answers."""
    return {
        "atlases": [shard._asdict() for shard in answer.shards],
        "shared_slides": answer.shared_slides,
        "answers": answers,
    }


def say_what_was_searched(answer: Answer) -> None:
    """Say which atlases were not searched, and which slides occur twice."""
    for shard in answer.away:
        console.say(f"{shard.atlas} was not searched: {shard.away}")
    searched = [shard for shard in answer.shards if not shard.away]
    tiles = [shard.tiles for shard in searched]
    known = f", {sum(t for t in tiles if t is not None):,} tiles" if None not in tiles else ""
    console.say(f"searched {len(searched)} of {len(answer.shards)} atlases{known}")
    if answer.shared_slides:
        slide, names = next(iter(answer.shared_slides.items()))
        console.say(
            f"{len(answer.shared_slides)} slides are in several atlases and count as one, such as {slide} "
            f"in {' and '.join(names)}"
        )
