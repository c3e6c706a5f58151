"""Searches of several atlases at once on the command line: arguments, and what the answer says of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import console
from ...errors import BadInput

if TYPE_CHECKING:
    from ...index.federation.answers import Answer, Example


NUMBER = re.compile(r"[0-9]{1,15}")


def atlases_and_images(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Tell atlases from images.

    The first argument is an atlas. So is a folder, an address of Milvus, and a name without a suffix that
    does not exist: an atlas that is away.
    """
    from ...index.federation.shards import is_milvus

    atlases, images = [arguments[0]], []
    for text in arguments[1:]:
        path = Path(text)
        absent = not path.suffix and not path.exists()
        if is_milvus(text) or path.is_dir() or absent:
            atlases.append(text)
        else:
            images.append(path)
    return atlases, images


def no_query(atlases: Sequence[str]) -> BadInput:
    """Return the error of a search without a query; it says what was taken for an atlas."""
    taken = f" (taken for atlases: {', '.join(atlases)})" if len(atlases) > 1 else ""
    return BadInput(
        f"no query was given{taken}; name an image, --tile with the id of a tile, or --text with words. "
        "The first argument, folders, and names without suffix that do not exist are atlases"
    )


def tile_number(text: str) -> int:
    """Return the id of a tile of the one atlas that is searched.

    Raises:
        BadInput: the text is not an id.
    """
    if not NUMBER.fullmatch(text):
        raise BadInput(f"the tile is {text[:40]!r}; expected the id of a tile, such as 12")
    return int(text)


def example(text: str) -> Example:
    """Return a tile written ATLAS:ID.

    Raises:
        BadInput: the text has another form.
    """
    from ...index.federation.answers import Example

    name, colon, number = text.rpartition(":")
    if not colon or not name or not NUMBER.fullmatch(number):
        raise BadInput(
            f"the tile {text!r} names no atlas; with several atlases write ATLAS:ID, such as north:12"
        )
    return Example(name, int(number))


def named_case(text: str, atlases: Sequence[str]) -> tuple[str | None, str]:
    """Return the atlas, or None, and the name of a slide or patient written NAME or ATLAS:NAME.

    The longest name of an atlas counts, because names may contain colons.
    """
    fitting = [name for name in atlases if text.startswith(f"{name}:")]
    if not fitting:
        return None, text
    atlas = max(fitting, key=len)
    return atlas, text.removeprefix(f"{atlas}:")


def is_number(text: str) -> bool:
    """Return whether a text is the id of a tile and not the path of an image."""
    return NUMBER.fullmatch(text) is not None


def is_example(text: str) -> bool:
    """Return whether a text is ATLAS:ID and not the path of an image."""
    return NUMBER.fullmatch(text.rpartition(":")[2]) is not None and not Path(text).exists()


def searched_of(answer: Answer) -> dict[str, Any]:
    """Return what was searched, as JSON."""
    return {
        "atlases": [shard._asdict() for shard in answer.shards],
        "shared_slides": answer.shared_slides,
    }


def say_what_was_searched(answer: Answer, of_shared: str = "--per-slide counts each once") -> None:
    """Say which atlases were not searched, and which slides occur twice; ``of_shared`` ends that line."""
    for shard in answer.away:
        console.say(f"{shard.atlas} was not searched: {shard.away}")
    searched = [shard for shard in answer.shards if not shard.away]
    tiles = [shard.tiles for shard in searched]
    known = f", {sum(t for t in tiles if t is not None):,} tiles" if None not in tiles else ""
    console.say(f"searched {len(searched)} of {len(answer.shards)} atlases{known}")
    if answer.shared_slides:
        count = len(answer.shared_slides)
        slide, names = next(iter(answer.shared_slides.items()))
        console.say(
            f"{'1 slide is' if count == 1 else f'{count} slides are'} in several atlases, such as {slide} "
            f"in {' and '.join(names)}; {of_shared}"
        )
    if answer.mixed_scales:
        scales = "; ".join(
            f"{s.atlas} {s.scales[0]:.3g} to {s.scales[1]:.3g}" for s in searched if s.scales
        )
        console.say(f"the atlases have tiles of different scales, in µm per pixel: {scales}")
