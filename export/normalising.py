"""Make an encoder with stain normalisation from a bundle, whose network it keeps."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..artifacts.files import publish_folder, sha256_file, write_atomic, write_json
from ..artifacts.manifest import (
    CARD,
    CLUSTERS,
    GRAPH,
    MANIFEST,
    PROJECTION,
    PROJECTION_SHA256,
    Manifest,
    read_manifest,
)
from ..artifacts.onnx_files import with_property
from ..errors import BadInput
from .options import NOT_STATED, ExportOptions, encoder_name

METHOD_KEY = "histoseek_stain_normalise"
"""Property of the graph that names the method, so that its sha256 tells the two encoders apart."""
NOTE = """
## Stain normalisation
Made from `{source}` (sha256 `{sha256}`), whose network it has. Before a tile is embedded, its colours are
brought to those of a reference (H&E) by the method of {author}, which is fitted to the slide or the query
image. The scores in this card were measured without this.
"""
AUTHORS = {"macenko": "Macenko et al. (2009)", "reinhard": "Reinhard et al. (2001)"}


def export_normalising(bundle: Path, out: Path, options: ExportOptions) -> Manifest:
    """Write a bundle with the network of another bundle, and with stain normalisation.

    Args:
        bundle: folder of the other bundle.
        out: folder of the new bundle, which must not exist.
        options: ``stain_normalise`` names the method; also ``name``.

    Returns:
        The manifest of the new bundle. Its sha256 is another one, so that features of the two encoders
        cannot be mixed.

    Raises:
        BadInput: the method is missing, another option is set, or the encoder normalises stains already.
    """
    options.only_for("a bundle", "stain_normalise")
    method = options.stain_normalise
    if method is None:
        raise BadInput(
            f"{bundle} is a bundle already; with --stain-normalise macenko or reinhard, `export` makes an "
            "encoder with stain normalisation from it"
        )
    for flag, given in (
        ("--notes", options.notes), ("--mpp", options.mpp), ("--licence", options.licence != NOT_STATED),
    ):  # fmt: skip
        if given:
            raise BadInput(f"{flag} is not for a bundle; leave it out")
    if out.resolve().is_relative_to(bundle.resolve()):
        raise BadInput(f"{out} is in the bundle {bundle}; expected another folder")
    before = read_manifest(bundle)
    if before.stain_normalise:
        raise BadInput(
            f"{bundle} has stain normalisation already ({before.stain_normalise}); give the bundle that it "
            "was made from"
        )
    name = encoder_name(options, out)
    with publish_folder(out) as folder:
        unwanted = shutil.ignore_patterns(CLUSTERS, PROJECTION, MANIFEST, GRAPH)
        shutil.copytree(bundle, folder, ignore=unwanted, dirs_exist_ok=True)
        graph = with_property((bundle / GRAPH).read_bytes(), METHOD_KEY, method)
        write_atomic(folder / GRAPH, graph)
        training = {k: v for k, v in before.training.items() if k != PROJECTION_SHA256}
        manifest = Manifest.model_validate(
            {
                **before.model_dump(),
                "name": name,
                "sha256": sha256_file(folder / GRAPH),
                "training": training,
                "stain_normalise": method,
            }
        )
        write_json(folder / MANIFEST, manifest.model_dump())
        card = folder / CARD
        text = card.read_text() if card.is_file() else f"# {before.name}\n"
        text = text.replace(f"# {before.name}\n", f"# {name}\n", 1)
        text = text.replace(before.sha256, manifest.sha256)
        note = NOTE.format(source=before.name, sha256=before.sha256, author=AUTHORS[method])
        write_atomic(card, (text + note).encode())
    return manifest
