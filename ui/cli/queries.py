"""Query images of the command line: reading, cutting and embedding them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import HistoseekError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...index.atlas import Atlas
    from ...serving.encoders.protocol import Encoder

    Read = dict[Path, NDArray[np.uint8]]
    Failed = dict[Path, dict[str, Any]]


SMALL, LARGE, LONG = 0.5, 4.0, 1.25
"""Shorter side of a small and a large query image, in sides of a tile; ratio of the sides of a long one."""


def read_images(
    paths: Sequence[Path], size_px: int, notes: list[str], remedy: str = ""
) -> tuple[Read, Failed]:
    """Read images in the encoder's format, (S, S, 3); a bad image does not stop the others.

    Notes which images are much smaller or larger than a tile, or lose much of their length.

    Args:
        paths: of the images.
        size_px: side of a tile, S.
        notes: notes are added here.
        remedy: end of the note on a large image.

    Returns:
        The images by path, and an error for each unreadable one.
    """
    from ...artifacts.images import decode, square

    def read(path: Path) -> NDArray[np.uint8]:
        image = decode(path)
        height, width = image.shape[:2]
        short = min(height, width)
        small = short < SMALL * size_px
        if small or short > LARGE * size_px or max(height, width) > LONG * short:
            what = f"its middle square of {short} x {short}" if height != width else "it"
            how = "enlarged to" if small else "taken as"
            notes.append(
                f"{path} has {width} x {height} pixels; {what} is {how} one tile of "
                f"{size_px} x {size_px}{remedy}"
            )
        return square(image, size_px)

    return _each(paths, read)


def cut_images(
    atlas: Atlas, paths: Sequence[Path], mpp: float, notes: list[str]
) -> tuple[Read, Failed]:
    """Read images of known scale as tiles of the atlas's scale, (N, S, S, 3) each; note how they were cut.

    Returns:
        The tiles by path, and an error for each unreadable image.
    """
    from ...artifacts.images import decode
    from ..session.scaled import cut_for
    from ..session.words import scaled_text

    def read(path: Path) -> NDArray[np.uint8]:
        image, tiles = cut_for(atlas, decode(path), str(path), mpp)
        notes.append(scaled_text([image]))
        return tiles

    return _each(paths, read)


def _each(paths: Sequence[Path], read: Callable[[Path], NDArray[np.uint8]]) -> tuple[Read, Failed]:
    found: Read = {}
    failed: Failed = {}
    for path in paths:
        try:
            found[path] = read(path)
        except HistoseekError as error:
            reason = {"type": type(error).__name__, "message": str(error)}
            failed[path] = {"query": str(path), "error": reason}
    return found, failed


def mean_vectors(
    atlas: Atlas, read: dict[Path, NDArray[np.uint8]], notes: list[str]
) -> NDArray[np.float32] | None:
    """Return the mean of the embeddings of each image's tiles, (Q, D); None without images."""
    import numpy as np

    from ..session.scaled import mean_of

    if not read:
        return None
    metric = atlas.manifest.metric
    with _encoder_of(atlas) as encoder:
        vectors = [
            _embedded(encoder, tiles, [str(path)], notes, one_image=True)
            for path, tiles in read.items()
        ]
    foreign = [atlas.manifest.out_of_distribution(tiles).mean() > 0.5 for tiles in vectors]
    notes += foreign_notes(
        atlas, [str(path) for path, is_foreign in zip(read, foreign, strict=True) if is_foreign]
    )
    return np.stack([mean_of(tiles, metric) for tiles in vectors])


def check_images(atlas: Atlas) -> None:
    """Raise if images cannot be embedded because the atlas has no encoder.

    Raises:
        BadInput: the atlas holds features of another tool.
    """
    if atlas.manifest.external:
        from ...artifacts.manifest import check_bundle_graph

        check_bundle_graph(atlas.encoder_bundle, atlas.manifest)


def embed_with(
    atlas: Atlas, names: Sequence[str], notes: list[str]
) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """Return a function that opens the atlas's encoder and embeds images (N, S, S, 3) of these names.

    It adds to ``notes`` which are out of distribution, or could not be normalised.
    """

    def embed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with _encoder_of(atlas) as encoder:
            vectors = _embedded(encoder, images, names, notes)
        foreign = atlas.manifest.out_of_distribution(vectors)
        notes.extend(
            foreign_notes(atlas, [n for n, out in zip(names, foreign, strict=True) if out])
        )
        return vectors

    return embed


def foreign_notes(atlas: Atlas, names: Sequence[str]) -> list[str]:
    """Return a note on images that are out of distribution, unless most tiles of the atlas are so too."""
    if not names or atlas.out_of_distribution_share() > 0.5:
        return []
    return [
        f"{', '.join(names)}: unlike the stained tissue that the encoder knows, so hits and clusters mean "
        "little"
    ]


def _encoder_of(atlas: Atlas) -> closing[Encoder]:
    from ...serving.encoders.open import open_encoder

    return closing(open_encoder(str(atlas.encoder_bundle), expect=atlas.manifest))


def _embedded(
    encoder: Encoder,
    images: NDArray[np.uint8],
    names: Sequence[str],
    notes: list[str],
    one_image: bool = False,
) -> NDArray[np.float32]:
    """Embed images, or the tiles of one, and note of which the stain could not be normalised."""
    from ...serving.encoders.stain_normalisation import embed_images, not_normalised

    vectors, reasons = embed_images(encoder, images, one_image=one_image)
    notes += not_normalised(names, reasons[:1] if one_image else reasons)
    return vectors


def embed_text_with(atlas: Atlas) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """Return a function that opens the encoder's text network and embeds texts."""

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        from ...serving.encoders.text import TextEncoder

        return TextEncoder(atlas.encoder_bundle, atlas.manifest).embed(texts)

    return embed
