"""The published encoders that ``histoseek export --as NAME`` knows: one row each.

The rows state what the authors and the tools around their models state. ``unconfirmed`` names what no
source confirmed; the export prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from .nets.build import Shape
from .nets.resnet import ResNetShape
from .nets.swin import SwinShape
from .nets.text import TextShape
from .nets.vit import Pool, Positions, VitShape

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
OPTIMUS = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HIBOU = (0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816)
LUNIT = (0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464)
NC_ND = "CC-BY-NC-ND-4.0"
MPP_20X, MPP_10X = 0.5, 1.0


@dataclass(frozen=True)
class Published:
    """A published encoder.

    Attributes:
        source: id of its page on huggingface.co, or where its file is.
        licence: as its page states it.
        gated: whether the download needs an agreement.
        shape: sizes of its network.
        colours: mean and standard deviation of red, green and blue, for values in 0..1.
        pool: what forms the embedding.
        mpp: µm per pixel of a tile; None if its authors state no scale.
        tile_px: side of a tile as its authors read it; 0: the network's input, without a change of size.
        crop_from: with ``fit`` crop: side to which a tile is resized before its middle is kept; 0: it is
            not resized.
        fit: how a tile of another side becomes the network's input: resized by a filter, or cropped.
        text: sizes of its text network; None if it has none that can be exported.
        unconfirmed: what no source confirmed.
    """

    source: str
    licence: str
    gated: bool
    shape: Shape
    colours: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    pool: Pool = "cls"
    mpp: float | None = MPP_20X
    tile_px: int = 0
    crop_from: int = 0
    fit: Literal["bilinear", "bicubic", "crop"] = "bilinear"
    text: TextShape | None = None
    unconfirmed: str = ""

    @property
    def dim(self) -> int:
        """Length of the embedding."""
        return self.shape.dim(self.pool)

    @property
    def side(self) -> int:
        """Side of a tile in pixels, before it is resized or cropped."""
        return self.tile_px or self.shape.size_px


def _small(patch: int) -> VitShape:
    return VitShape(patch, 384, 12, 6, 1536)


def _base(patch: int) -> VitShape:
    return VitShape(patch, 768, 12, 12, 3072)


def _large(patch: int, layer_scale: bool = True, registers: int = 0) -> VitShape:
    positions: Positions = "patches" if registers else "class and patches"
    return VitShape(
        patch, 1024, 24, 16, 4096,
        layer_scale=layer_scale, registers=registers, positions=positions,
    )  # fmt: skip


def _gated(
    patch: int, width: int, depth: int, heads: int, hidden: int, registers: int = 0
) -> VitShape:
    positions: Positions = "patches" if registers else "class and patches"
    return VitShape(
        patch, width, depth, heads, hidden,
        mlp="swiglu", layer_scale=True, registers=registers, positions=positions,
    )  # fmt: skip


def _clip(patch: int, quick: bool = False) -> VitShape:
    return VitShape(
        patch, 768, 12, 12, 3072, mlp="quick_gelu" if quick else "gelu",
        eps=1e-5, pre_norm=True, patch_bias=False, project=512,
    )  # fmt: skip


def _clip_text(quick: bool = False) -> TextShape:
    return TextShape("clip", 49408, 77, 512, 12, 8, 2048, 512, quick=quick)


def _bert(context: int, project: int, middle: int = 0) -> TextShape:
    return TextShape("bert", 30522, context, 768, 12, 12, 3072, project, middle, eps=1e-12)


_GIANT = (1536, 40, 24, 4096)
_KAIKO = "kaiko.ai non-commercial"
_KAIKO_PAGE = "1aurent/vit_{}_224.kaiko_ai_towards_large_pathology_fms"
_LUNIT_PAGE = "1aurent/vit_small_patch{}_224.lunit_dino"
_OPTIMUS = _gated(14, *_GIANT, registers=4)
_VIRCHOW = _gated(14, 1280, 32, 16, 3416)
_CONCH = VitShape(16, 768, 12, 12, 3072, size_px=448, head="pooler", pooled=512, project=512)
_CONCH_15 = VitShape(
    16, 1024, 24, 16, 4096, size_px=448, layer_scale=True, head="pooler", project=768, built_grid=14
)
_MUSK = VitShape(16, 1024, 24, 16, 4096, size_px=384, eps=1e-5, sub_norm=True, project=1024)
_VIRCHOW2 = VitShape(
    14, 1280, 32, 16, 3416, mlp="swiglu", layer_scale=True, registers=4, positions="all"
)

PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "uni": Published("MahmoodLab/UNI", NC_ND, True, _large(16), tile_px=256),
        "uni2-h": Published(
            "MahmoodLab/UNI2-h", NC_ND, True, _gated(14, 1536, 24, 24, 4096, 8), tile_px=256
        ),
        "virchow": Published(
            "paige-ai/Virchow", "Apache-2.0, further terms", True, _VIRCHOW, pool="cls+mean",
            fit="bicubic",
        ),
        "virchow2": Published("paige-ai/Virchow2", NC_ND, True, _VIRCHOW2, pool="cls+mean", fit="bicubic"),
        "conch": Published(
            "MahmoodLab/conch", NC_ND, True, _CONCH, CLIP, "head", tile_px=512, fit="bicubic",
            text=TextShape("coca", 32007, 127, 768, 12, 12, 3072, 512),
        ),
        "conch-v1.5": Published(
            "MahmoodLab/conchv1_5", NC_ND, True, _CONCH_15, pool="pooler", tile_px=512,
            unconfirmed="its licence (that of TITAN) and the grid of its positions",
        ),
        "h-optimus-0": Published(
            "bioptimus/H-optimus-0", "Apache-2.0", True, _OPTIMUS, OPTIMUS,
            unconfirmed="whether its download needs an agreement",
        ),
        "h-optimus-1": Published("bioptimus/H-optimus-1", NC_ND, True, _OPTIMUS, OPTIMUS),
        "h0-mini": Published(
            "bioptimus/H0-mini", NC_ND, True, _gated(14, 768, 12, 12, 2048, 4), OPTIMUS, "cls+mean",
            unconfirmed="that its registers have no positions",
        ),
        "gigapath": Published(
            "prov-gigapath/prov-gigapath", "Apache-2.0, research only", True,
            _gated(16, *_GIANT), tile_px=256, crop_from=256, fit="crop",
        ),
        "gigapath-flash": Published(
            "prov-gigapath/prov-gigapath-flash", "Apache-2.0", True,
            _gated(16, 384, 12, 6, 1024), tile_px=256, crop_from=256, fit="crop",
            unconfirmed="its colours (ImageNet's) and its licence",
        ),
        "phikon": Published("owkin/phikon", "Owkin non-commercial", False, _base(16)),
        "phikon-v2": Published(
            "owkin/phikon-v2", "Owkin non-commercial", False, _large(16),
            unconfirmed="the epsilon of its layer norms (1e-6) and the grid of its positions",
        ),
        "hibou-b": Published(
            "histai/hibou-b", "Apache-2.0", True, _gated(14, 768, 12, 12, 2048, 4), HIBOU, fit="bicubic"
        ),
        "hibou-l": Published(
            "histai/hibou-L", "Apache-2.0", True, _gated(14, 1024, 24, 16, 2736, 4), HIBOU, fit="bicubic",
            unconfirmed="the sizes of its network",
        ),
        "midnight": Published(
            "kaiko-ai/midnight", "MIT", False, _gated(14, *_GIANT), HALF, "cls+mean",
            unconfirmed="the grid of its positions",
        ),
        "kaiko-s8": Published(
            _KAIKO_PAGE.format("small_patch8"), _KAIKO, False, _small(8), HALF, tile_px=256
        ),
        "kaiko-s16": Published(
            _KAIKO_PAGE.format("small_patch16"), _KAIKO, False, _small(16), HALF, tile_px=256
        ),
        "kaiko-b8": Published(
            _KAIKO_PAGE.format("base_patch8"), _KAIKO, False, _base(8), HALF, tile_px=256
        ),
        "kaiko-b16": Published(
            _KAIKO_PAGE.format("base_patch16"), _KAIKO, False, _base(16), HALF, tile_px=256
        ),
        "kaiko-l14": Published(
            _KAIKO_PAGE.format("large_patch14_reg4"), _KAIKO, False, _large(14, registers=4), HALF,
            tile_px=256, unconfirmed="the grid of its positions",
        ),
        "lunit-s8": Published(
            _LUNIT_PAGE.format(8), "Lunit non-commercial", False, _small(8), LUNIT
        ),
        "lunit-s16": Published(
            _LUNIT_PAGE.format(16), "Lunit non-commercial", False, _small(16), LUNIT
        ),
        "lunit-resnet50": Published(
            "1aurent/resnet50.lunit_bt", "Lunit non-commercial", False, ResNetShape(), LUNIT, "mean",
            unconfirmed="its colours (Lunit's) and its scale (20x)",
        ),
        "ctranspath": Published(
            "github.com/Xiyue-Wang/TransPath", "GPL-3.0, academic use", False, SwinShape(), pool="mean",
            mpp=MPP_10X, tile_px=256,
        ),
        "retccl": Published(
            "github.com/Xiyue-Wang/RetCCL", "GPL-3.0, non-commercial academic use", False,
            ResNetShape(size_px=256), pool="mean", mpp=MPP_10X,
        ),
        "gpfm": Published(
            "majiabo/GPFM", "CC-BY-NC-4.0", False, _large(14), mpp=0.25, tile_px=512, fit="bicubic",
            unconfirmed="its licence",
        ),
        "openmidnight": Published(
            "SophontAI/OpenMidnight", "Apache-2.0", True, _gated(14, *_GIANT, registers=4)
        ),
        "quiltnet-b32": Published(
            "wisdomik/QuiltNet-B-32", "MIT", False, _clip(32), CLIP, "head", mpp=None, fit="bicubic",
            text=_clip_text(), unconfirmed="its activation (GELU)",
        ),
        "quiltnet-b16": Published(
            "wisdomik/QuiltNet-B-16", "MIT", False, _clip(16), CLIP, "head", mpp=None, fit="bicubic",
            text=_clip_text(), unconfirmed="its activation (GELU)",
        ),
        "plip": Published(
            "vinid/plip", "non-commercial", False, _clip(32, quick=True), CLIP, "head", mpp=None,
            text=_clip_text(quick=True),
            unconfirmed="its licence, patch size and activation (QuickGELU)",
        ),
        "keep": Published(
            "Astaxanthin/KEEP", "MIT", False,
            replace(_large(16), head="mlp", project=768), pool="head", mpp=None, fit="bicubic",
            text=_bert(256, 768),
            unconfirmed="whether its image network descends from UNI, whose licence is stricter",
        ),
        "musk": Published(
            "xiangjx/musk", NC_ND, True, _MUSK, HALF, mpp=None, fit="bicubic",
            unconfirmed="that its file has no parameters but those of BEiT-3 and two heads (the vector of "
            "2,048 numbers over several scales, which some tools store, is not offered)",
        ),
        "biomedclip": Published(
            "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", "MIT", False,
            replace(_base(16), project=512), CLIP, "head", mpp=None, text=_bert(256, 512, 640),
            unconfirmed="its colours (CLIP's) and the maps behind its two networks",
        ),
    }
)  # fmt: skip
