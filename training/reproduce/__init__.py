"""Protocols of ``histoseek reproduce``: the papers' tables with published, our and trivial results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ...artifacts.tilesets import TileSet
from ...console import Progress
from ...errors import BadInput, unknown_name
from ..study_options import StudyOptions
from . import ae_dac, arcface, breast_ae, p4m_deepcluster, topology_sweep
from .report import Report
from .sharing import AllAsked, remove_locks
from .study import Study


@dataclass(frozen=True)
class Protocol:
    """A function that reproduces a paper's tables, with a one-line description.

    Attributes:
        run: the function.
        about: the description.
        parts: names that ``--parts`` may have.
        takes: those of the options in :data:`NOT_ALL_TAKE` that it uses.
    """

    run: Callable[[Study], Report]
    about: str
    parts: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


NOT_ALL_TAKE = ("preset", "folds", "split", "positive", "widths", "size_px", "limit_large")
"""Options that some protocols would ignore."""

PROTOCOLS: dict[str, Protocol] = {
    "breast-ae": Protocol(
        breast_ae.reproduce,
        "paper 000, table 1: k-means on pixels and on five codes, DenseNet; F1 and ACC",
        takes=("preset", "folds", "split", "positive", "limit_large"),
    ),
    "ae-dac": Protocol(
        ae_dac.reproduce,
        "paper 001, table 2: k-means, AE + k-means, DEC, DAC, AE + DAC",
        ("table4", "grid", "switches"),
        ("size_px",),
    ),
    "p4m-deepcluster": Protocol(
        p4m_deepcluster.reproduce,
        "paper 002: Sobel-AlexNet and P4M CNN, NMI between epochs, linear probe",
        takes=("split", "widths", "size_px"),
    ),
    "topology-sweep": Protocol(
        topology_sweep.reproduce,
        "paper 003, tables 1 and 2: AE and CAE by code size and K, purity",
        ("AE", "CAE", "relu", "settings"),
        ("size_px",),
    ),
    "arcface": Protocol(
        arcface.reproduce,
        "paper 004: ten folds, k-means and HDBSCAN; ArcFace, softmax, triplet",
        ("lite0",),
        ("folds", "split", "size_px"),
    ),
}


def find_protocol(name: str) -> Protocol:
    """Return a protocol by name.

    Raises:
        BadInput: the name is not registered; the choices are listed.
    """
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def reproduce(
    name: str, options: StudyOptions, tiles: TileSet, progress: Progress
) -> dict[str, Any]:
    """Run a protocol on a tile set and write its report; returns the report as JSON.

    With ``train_only``, it writes no report and returns the names of the cells that it trained.

    Raises:
        BadInput: the protocol is not registered, has no such part, or does not use an option that is set.
        StorageFailed: with ``train_only``, the file system has no locks.
    """
    protocol = find_protocol(name)
    for part in filter(None, options.parts.split(",")):
        if part not in protocol.parts:
            raise unknown_name(f"part of {name} (--parts)", part, protocol.parts or ("none",))
    for option in NOT_ALL_TAKE:
        value = getattr(options, option)
        if option not in protocol.takes and value != getattr(StudyOptions, option):
            flag = f"--{option.replace('_', '-')}"
            users = ", ".join(n for n, other in PROTOCOLS.items() if option in other.takes)
            raise BadInput(
                f"{flag} is {value!r}, but {name} does not use it, only {users}; leave it out"
            )
    options.out.mkdir(parents=True, exist_ok=True)
    if options.train_only:
        return {"trained": _train_only(protocol, options, tiles, progress)}
    study = Study(options, tiles, progress)
    report = protocol.run(study)
    remove_locks(options.out)
    report.about["training time"] = study.took()
    return report.write(options.out)


def _train_only(
    protocol: Protocol, options: StudyOptions, tiles: TileSet, progress: Progress
) -> list[str]:
    """Train until no training is left; returns the names of those that this process ran.

    While other processes train some, waits until one of these ends and starts again: another training may
    have needed it, or its process may have been killed.
    """
    trained: list[str] = []
    while True:
        study = Study(options, tiles, progress)
        with suppress(AllAsked):
            protocol.run(study)
        trained += study.trained
        if not study.shared:
            return trained
        study.wait_for_others()


__all__ = ["PROTOCOLS", "Protocol", "find_protocol", "reproduce"]
