"""``histoseek demo``: all steps on a few real slides, without any preparation."""

from __future__ import annotations

import hashlib
import http.client
import io
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ... import console
from ...artifacts.files import write_atomic
from ...artifacts.images import Rgb
from ...errors import BadInput, Damaged

if TYPE_CHECKING:
    from ...index.atlas import Atlas
    from ...serving.encoders.protocol import Encoder
    from ...serving.slides.slide import Slide

SLIDE_URL = "https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/CMU-1-Small-Region.svs"
SLIDE_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
SLIDE_BYTES = 1_938_955
SKIN_URL = (
    "https://gitlab.com/scikit-image/data/-/raw/2cdc5ce89b334d28f06a58c9f0ca21aa6992a5ba/"
    "Normal_Epidermis_and_Dermis_with_Intradermal_Nevus_10x.JPG"
)
SKIN_SHA256 = "8759fe080509712163453f4b17106582b8513e73b0788d80160abf840e272075"
SKIN_BYTES = 4_000_000
"""At most; the checksum is exact."""
SKIN_MPP = 1.0
"""About, at 10x."""
TIMEOUT_S = 15
CROP_SEED = 7
TURNED = 20
ENLARGED = 3
ASSUMED_MPP = 0.5


class Sample(NamedTuple):
    """A slide of the demo: its file, organ and stain."""

    path: Path
    organ: str
    stain: str


def run_demo(folder: Path) -> tuple[Path, bool]:
    """Embed, index and cluster a few slides in ``folder``, and search for a part of the first one.

    Returns:
        The atlas, and whether the best hit is the position from which the query was cut.

    Existing results are reused, so the demo can be repeated.
    """
    from ...index.atlas import Atlas
    from ...serving.encoders.open import DEFAULT_BUNDLE, open_encoder
    from ...serving.slides.slide import open_slide

    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--dir {folder} is a file; expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    samples = get_slides(folder)
    slide = samples[0].path
    encoder = open_encoder("default")
    features = _embed([sample.path for sample in samples], encoder, folder / "features")
    path = folder / "atlas"
    atlas = Atlas(path) if path.exists() else Atlas.create(path, DEFAULT_BUNDLE)
    rows = {sample.path.name: {"organ": sample.organ, "stain": sample.stain} for sample in samples}
    added = atlas.add(features, rows)
    for each in added:
        if each.state == "failed":
            raise BadInput(f"{each.reason} (delete {folder} and run the demo again)")
    tiles = sum(each.tiles for each in added)
    console.say(f"2  added {tiles} tiles with tissue of {len(added)} slides to the atlas {path}")
    name = added[0].slide
    _fit(atlas)
    with open_slide(slide) as opened:
        corners, side, crops = _queries(opened, atlas, name, encoder.manifest.size_px)
    query = folder / "query.png"
    Image.fromarray(crops[0]).save(query)
    x, y = corners[0]
    console.say(f"4  query: the tile of {name} at x={x}, y={y}, rotated by 90 degrees ({query})")
    answers = atlas.search(encoder.embed(np.stack(crops)), 5)
    hits = answers[0]
    shown = [(h.rank, h.score, h.slide, h.x, h.y, h.cluster) for h in hits]
    console.table("", ("rank", "score", "slide", "x", "y", "cluster"), shown)
    found = [
        h[0].slide == name and covers(h[0].x, h[0].y, side, *c)
        for h, c in zip(answers, corners, strict=True)
    ]
    console.say(f"   the best hit is {'' if found[0] else 'NOT '}the position of the query")
    console.say(
        f"   of {TURNED} crops at random angles, {sum(found[1:])} were found at their position"
    )
    assigned = atlas.assign(encoder.embed(crops[0][None]))[0]
    console.say(
        f"   cluster of the query: {assigned['cluster']}, strength {assigned['strength']:.2f}"
    )
    document: dict[str, Any] = {
        "slide": str(slide),
        "slides": [str(sample.path) for sample in samples],
        "atlas": str(path),
        "tiles": tiles,
        "query": {"x": x, "y": y},
        "best_hit_is_the_place": found[0],
        "turned_by_any_angle": {"crops": TURNED, "found_their_place": sum(found[1:])},
        "hits": [h._asdict() for h in hits],
        "assigned": assigned,
    }
    console.emit(
        document, lambda: console.say(f"done; to open the page, run: {_program()} ui {path}")
    )
    return path, found[0]


def _embed(slides: list[Path], encoder: Encoder, out: Path) -> list[Path]:
    """Embed the slides; return their feature files."""
    from ...serving.embedding.jobs import find_jobs
    from ...serving.embedding.pipeline import embed_jobs
    from ...serving.embedding.results import EmbedOptions

    # the pictures are enlarged, so their tiles would count as blurred
    options = EmbedOptions(overlap_px=encoder.manifest.size_px // 2, min_sharpness=0)
    names = ", ".join(slide.name for slide in slides)
    console.say(f"1  embedding {names} with {encoder.manifest.name}")
    with console.progress("embedding") as progress:
        results = embed_jobs(find_jobs(slides), encoder, out, options, progress)
    by_source = {Path(result.source).resolve(): result for result in results}
    files = []
    for slide in slides:
        result = by_source[slide.resolve()]
        if not result.ok or result.features is None:
            raise BadInput(f"{slide}: {result.reason}")
        files.append(Path(result.features))
    return files


def _fit(atlas: Atlas) -> None:
    for method in ("hdbscan", "kmeans"):  # hits show the clusters of the last one
        try:
            fitted = atlas.fit(method)
        except BadInput as error:  # a small slide may have too few kinds of tissue
            console.say(f"3  {error}")
            continue
        sizes = ", ".join(f"{'noise' if c < 0 else c}: {n}" for c, n in fitted["sizes"].items())
        console.say(f"3  {method}: {fitted['clusters']} clusters ({sizes})")


def _program() -> str:
    """Return the command that starts this program."""
    here = Path(sys.executable).with_name("histoseek")
    on_path = shutil.which("histoseek")
    return "histoseek" if on_path and Path(on_path).resolve() == here.resolve() else str(here)


def _queries(
    slide: Slide, atlas: Atlas, name: str, size_px: int
) -> tuple[list[tuple[int, int]], int, list[Rgb]]:
    """Cut one tile of a slide rotated by 90 degrees, and twenty by random angles.

    Returns:
        Their coordinates, the side of a tile in level-0 pixels, and the crops.
    """
    rng = np.random.default_rng(CROP_SEED)
    columns = atlas.view().columns
    number = [row["name"] for row in columns.slides].index(name)
    tiles = columns.places_of(number).tolist()
    chosen = rng.choice(len(tiles), TURNED + 1, replace=len(tiles) <= TURNED)
    corners = [(tiles[n][0], tiles[n][1]) for n in chosen]
    side = int(columns.slides[number]["size_px_level0"])
    first = np.ascontiguousarray(np.rot90(slide.read_tile(*corners[0], side, size_px)))
    others = (rotated_crop(slide, x, y, side, size_px, rng) for x, y in corners[1:])
    return corners, side, [first, *others]


def covers(hit_x: int, hit_y: int, side: int, x: int, y: int) -> bool:
    """Whether the hit's tile contains the centre of the tile at x, y of the same side."""
    return abs(hit_x - x) <= side // 2 and abs(hit_y - y) <= side // 2


def rotated_crop(
    slide: Any, x: int, y: int, side: int, size_px: int, rng: np.random.Generator
) -> Rgb:
    """Cut the tile at level-0 x, y, rotated by a random angle about its centre and mirrored half the time.

    The pixels come from the slide; only corners outside the slide are background.
    """
    scale = side / size_px
    reach = int(np.ceil(side * 0.75))  # half a diagonal plus a margin
    cx, cy = x + side // 2, y + side // 2
    wide = slide.read_tile(cx - reach, cy - reach, 2 * reach, round(2 * reach / scale))
    image = Image.fromarray(wide)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = image.rotate(float(rng.uniform(0, 360)), Image.Resampling.BICUBIC)
    edge = (turned.width - size_px) // 2
    return np.asarray(turned.crop((edge, edge, edge + size_px, edge + size_px)))


def get_slides(folder: Path) -> list[Sample]:
    """Return the demo's slides; the first one is searched for. Those that cannot be had are left out."""
    colon = folder / "immunohistochemistry.tiff"
    first = get_slide(folder)
    if first == colon:
        return [Sample(colon, "colon", "IHC")]
    if not colon.is_file():
        make_tissue_slide(colon)
    samples = [Sample(first, "skin", "H&E"), Sample(colon, "colon", "IHC")]
    nevus = folder / "skin-nevus.tiff"
    try:
        if not nevus.is_file():
            console.say(f"downloading {SKIN_URL}")
            make_skin_slide(fetch(SKIN_URL, SKIN_SHA256, SKIN_BYTES), nevus)
        samples.append(Sample(nevus, "skin", "H&E"))
    except (BadInput, Damaged) as error:
        console.say(f"   {error}; going on without this slide")
    return samples


def get_slide(folder: Path) -> Path:
    """Return the demo's slide: downloaded, or without network access made from an image of scikit-image."""
    real = folder / "CMU-1-Small-Region.svs"
    if real.is_file() and _sha256(real.read_bytes()) == SLIDE_SHA256:
        return real
    made = folder / "immunohistochemistry.tiff"
    if made.is_file():
        return made
    console.say(f"downloading {SLIDE_URL}")
    try:
        write_atomic(real, fetch(SLIDE_URL, SLIDE_SHA256, SLIDE_BYTES))
        return real
    except (BadInput, Damaged) as error:
        console.say(f"   {error}")
    console.say("   using a slide made from scikit-image's immunohistochemistry image instead")
    make_tissue_slide(made)
    return made


def fetch(url: str, sha256: str, size: int) -> bytes:
    """Download a file and check it.

    Raises:
        BadInput: there is no connection.
        Damaged: the downloaded file has the wrong checksum.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            blob: bytes = answer.read(2 * size + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise BadInput(
            f"{url} cannot be downloaded ({reason}); check the internet connection"
        ) from error
    if _sha256(blob) != sha256:
        raise Damaged(
            f"the file downloaded from {url} ({len(blob):,} bytes) has a wrong checksum; try again later"
        )
    return blob


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def make_tissue_slide(path: Path) -> None:
    """Write scikit-image's immunohistochemistry image, enlarged three times, as a pyramidal TIFF.

    Real tissue (colon, FHL2 with haematoxylin), 512 x 512, enlarged to 1536 x 1536 so that it holds
    enough tiles. Its scale is unknown; 0.5 µm per pixel is assumed.
    """
    from skimage import data

    image = Image.fromarray(data.immunohistochemistry())
    _write_pyramid(image, ENLARGED, ASSUMED_MPP, path)


def make_skin_slide(jpeg: bytes, path: Path) -> None:
    """Write scikit-image's image of skin (an intradermal nevus, H&E, 10x), enlarged to 20x, as a TIFF."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    _write_pyramid(image, round(SKIN_MPP / ASSUMED_MPP), ASSUMED_MPP, path)


def _write_pyramid(image: Image.Image, enlarged: int, mpp: float, path: Path) -> None:
    """Write an image, enlarged by a factor, as a pyramidal TIFF of three levels."""
    import tifffile

    width, height = image.width * enlarged, image.height * enlarged
    level = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as out:
        for number in range(3):
            per_cm = 10_000 / (mpp * 2**number)
            size = (width >> number, height >> number)
            out.write(
                np.asarray(level.resize(size, Image.Resampling.BOX)),
                photometric="rgb",
                tile=(256, 256),
                compression="zlib",
                subfiletype=1 if number else 0,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    write_atomic(path, buffer.getvalue())
