"""Options of an embedding run, and the result of each slide."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from ...artifacts.option_models import HIDDEN, PYTHON_ONLY, Field, Flag, options
from ...errors import BadInput
from ..encoders.fetched import is_server

State = Literal["done", "partial", "empty", "skipped", "failed"]


@options
class EncoderChoice:
    """Which encoder to use, and how to run it; small enough to send to other machines."""

    # fmt: off
    spec: Annotated[str,
        Field(description="Folder or URL (s3://...) of an encoder bundle, 'default' (the encoder in this "
        "package), or a Triton server: triton://HOST:PORT/MODEL[@VERSION][?shm=1]."),
        Flag("--encoder")] = "default"
    bundle: Annotated[Path | None,
        Field(description="With a Triton server: folder of an encoder bundle. If the server has another "
        "encoder, nothing is embedded.")] = None
    engine: Annotated[str,
        Field(description="Library that runs the encoder in this process: onnxruntime, openvino, or auto "
        "(the faster one; measured once).")] = "auto"
    precision: Annotated[str,
        Field(description="Number format of the computation: f32, or bf16 (OpenVINO only, on CPUs that "
        "support it).")] = "f32"
    batch: Annotated[int | None,
        Field(ge=1, description="Number of tiles per call of the encoder. Default: chosen "
        "automatically."), HIDDEN] = None
    streams: Annotated[int | None,
        Field(ge=1, description="Number of CPU cores for the encoder in this process; a graph up to 64 MB "
        "runs once per core at the same time. Default: all."), PYTHON_ONLY] = None
    # fmt: on

    def __post_init__(self) -> None:
        """Raise BadInput if an engine or precision is set for an encoder on a server."""
        if is_server(self.spec) and (self.engine, self.precision) != ("auto", "f32"):
            raise BadInput(
                "--engine and --precision are for an encoder in this process; a server uses its own "
                "settings (for half precision use the server's model <name>-fp16)"
            )


@options
class EmbedOptions:
    """How slides are cut into tiles, and which files are written in addition to the features."""

    # fmt: off
    mpp: Annotated[float | None,
        Field(ge=0.01, le=100, description="µm per pixel of the tiles. Default: the value that the "
        "encoder states.")] = None
    assume_mpp: Annotated[float | None,
        Field(ge=0.01, le=100, description="µm per pixel of slides whose file and manifest do not "
        "state it.")] = None
    override_mpp: Annotated[float | None,
        Field(ge=0.01, le=100, description="µm per pixel of all slides of this run; replaces "
        "the values of their files.")] = None
    series: Annotated[int | None,
        Field(ge=0, description="Number of the image that is the slide, in a TIFF with "
        "several images.")] = None
    overlap_px: Annotated[int,
        Field(ge=0, description="Overlap of neighbouring tiles, in pixels."), Flag("--overlap")] = 0
    min_tissue: Annotated[float,
        Field(ge=0, le=1, description="Share of a tile that must be tissue (with --regions: must "
        "lie in a region); tiles with less are left out.")] = 0.25
    tissue_model: Annotated[str,
        Field(description="How tissue is found: absorbance (it is darker than the glass), small (the "
        "network in this package), or the folder or URL of a tissue network.")] = "absorbance"
    min_sharpness: Annotated[float,
        Field(ge=0, le=1, description="Tiles of slides that are less sharp are left out as blurred; 0 "
        "keeps all.")] = 0.12
    max_pen: Annotated[float,
        Field(ge=0, le=1, description="Tiles of slides with a larger share of pen ink (green, blue) are "
        "left out; 1 keeps all.")] = 0.25
    manifest: Annotated[Path | None,
        Field(description="CSV file. Columns for tiles: file, label, group; for slides: file, mpp, "
        "series, label, patient.")] = None
    regions: Annotated[Path | None,
        Field(description="GeoJSON (QuPath) of the regions to embed: a file for one slide, or a folder of "
        "<slide>.geojson.")] = None
    region_classes: Annotated[tuple[str, ...],
        Field(description="With --regions: use only annotations of this class. "
        "Repeatable."), Flag("--region-class")] = ()
    overlays: Annotated[bool,
        Field(description="Write an image per slide that shows its tissue and tiles.")] = True
    geojson: Annotated[bool,
        Field(description="Write a GeoJSON file per slide, for QuPath, with tissue outlines and "
        "tiles.")] = False
    jobs: Annotated[int | None,
        Field(ge=1, le=512, description="Number of threads that read and decode tiles. Default: one per "
        "core; 1 with --ray. It does not change the results.")] = None
    staging_gb: Annotated[float,
        Field(gt=0, description="For slides behind URLs: maximum size of their local copies at one time "
        "(a single larger slide is copied alone).")] = 20.0
    # fmt: on

    def __post_init__(self) -> None:
        """Raise BadInput if options conflict."""
        if self.override_mpp is not None and self.assume_mpp is not None:
            raise BadInput("--override-mpp and --assume-mpp cannot be combined; pass one of them")
        if self.region_classes and self.regions is None:
            raise BadInput("--region-class needs --regions; pass both")
        if self.regions is not None and not self.regions.exists():
            raise BadInput(f"--regions {self.regions} does not exist; check the path")


@options
class RayOptions:
    """The Ray cluster on which to embed, and what each of its actors needs."""

    # fmt: off
    address: Annotated[str | None,
        Field(description="Ray cluster on which to embed: HOST:PORT, 'auto' (the one that runs on this "
        "machine), or 'local' (started here)."), Flag("--ray")] = None
    gpus_per_actor: Annotated[float,
        Field(ge=0, le=64, description="With --ray: GPUs of each actor (an actor holds one encoder); .5 "
        "lets two share a GPU."), Flag("--ray-gpus-per-actor")] = 0.0
    actors: Annotated[int | None,
        Field(ge=1, description="With --ray: maximum number of actors. Default: as many as the cluster has "
        "room for."), Flag("--ray-actors")] = None
    # fmt: on

    def __post_init__(self) -> None:
        """Raise BadInput if options need a cluster."""
        if self.address is None and (self.gpus_per_actor or self.actors is not None):
            raise BadInput(
                "--ray-gpus-per-actor and --ray-actors need --ray; pass the cluster's address"
            )


@dataclass(frozen=True)
class Result:
    """The result of one job.

    Attributes:
        source: the file or folder.
        state: done, partial (some tiles unreadable), empty (no tissue, or all of it left out), skipped
            (already done) or failed.
        reason: reason for the state, unless done.
        unreadable: tiles that could not be read, each with coordinates and reason.
        seconds: time from opening to writing; slides overlap in time.
        features: the feature file, if there is one.
        tissue: share of the slide that is tissue; None for tile sets and unopened slides.
        notes: values that were guessed, overridden or updated, one sentence each.
        left_out: files of a tile set that were not used, each with the reason.
        left_out_tiles: number of tiles of a slide that were left out, by reason: ``blurred``, ``pen``.
        stain: H&E, IHC or other, told from the colours of a slide's tiles; None from too few.
        icc_profile: name of the slide's colour profile; None without one.
        icc_applied: whether the pixels were converted to sRGB with it; whole-slide pixels are not.
    """

    name: str
    source: str
    state: State
    reason: str = ""
    tiles: int = 0
    unreadable: list[str] = field(default_factory=list)
    seconds: float = 0.0
    features: str | None = None
    tissue: float | None = None
    notes: list[str] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    left_out_tiles: dict[str, int] = field(default_factory=dict)
    stain: str | None = None
    icc_profile: str | None = None
    icc_applied: bool = False

    @property
    def ok(self) -> bool:
        """Whether the job is completely done."""
        return self.state in {"done", "empty", "skipped"}
