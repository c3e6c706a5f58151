"""Embedding on a Ray cluster: one task per slide, with the same code as on one machine.

Slides must have the same paths on every machine. Features go to a shared folder, or to a URL (fsspec:
``s3://``, ``gs://``, ``file://`` …). If a worker or machine is lost, its task runs again elsewhere.
Feature files appear complete or not at all, so nothing is lost and nothing is duplicated.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ... import stopping
from ...artifacts.files import remove_leftovers
from ...console import Progress
from ...errors import BadInput, HistoseekError, MissingPart, Unavailable
from ..encoders.protocol import Encoder
from .jobs import Job, distinct_name
from .meter import STAGES, Meter
from .pipeline import embed_jobs, folders_of
from .regions import with_regions
from .results import EmbedOptions, EncoderChoice, Result
from .run import Ran, open_chosen
from .work import failed

LOCAL = "local"
RETRIES = 5
CLOSING_S = 5.0
"""Seconds that cancelled tasks may take to end."""
_NOWHERE = "http://127.0.0.1:9"


def run_on_ray(
    jobs: Sequence[Job],
    choice: EncoderChoice,
    out: str,
    options: EmbedOptions,
    address: str,
    progress: Progress,
    results: list[Result] | None = None,
) -> Ran:
    """Embed jobs on a Ray cluster.

    Args:
        jobs: from :func:`~histoseek.serving.embedding.jobs.find_jobs`; all machines must have their paths.
        choice: the encoder to use; opened once in every worker.
        out: a folder shared by all machines, or a URL.
        options: how to cut tiles; ``jobs`` is the number of cores per slide, 1 when None.
        address: the cluster's address, or ``local`` for a cluster on this machine.
        progress: receives progress.
        results: the result of each job is appended as the job ends.

    Raises:
        MissingPart: Ray is not installed.
        Unavailable: no cluster answers at the address.
    """
    if "://" in out:
        _check_url(out)
    ray, mine = _connect(address)
    started = time.monotonic()
    per_slide = options.jobs or 1
    choice = replace(choice, streams=per_slide, bundle=_absolute(choice.bundle), spec=_spec(choice))
    options = replace(
        options,
        jobs=per_slide,
        manifest=_absolute(options.manifest),
        regions=_absolute(options.regions),
    )
    place = out if "://" in out else str(Path(out).resolve())
    task = ray.remote(num_cpus=per_slide, max_retries=RETRIES)(embed_one)
    # open it here too: an error is reported once, and all workers run it alike
    encoder = open_chosen(choice)
    manifest, about = encoder.manifest, encoder.describe()
    encoder.close()
    if about["engine"] != "triton":
        choice = replace(choice, engine=about["engine"], batch=about["batch"])
    jobs = with_regions(jobs, options.regions)
    sent = [_movable(job) for job in jobs]
    waiting = {task.remote(job, choice, place, options): n for n, job in enumerate(sent)}
    found: dict[int, tuple[Result, dict[str, Any]]] = {}
    ended = [] if results is None else results
    try:
        while waiting:
            stopping.check()
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=stopping.POLL_S)
            if not done:
                continue
            ready = done[0]
            number = waiting.pop(ready)
            try:
                found[number] = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                found[number] = failed(jobs[number], error), Meter().read()
            except ray.exceptions.RayError as error:
                lost = Unavailable(f"lost {RETRIES + 1} times by the cluster: {error}")
                found[number] = failed(jobs[number], lost), Meter().read()
            ended.append(found[number][0])
            tiles = sum(result.tiles for result, _ in found.values())
            text = f"{len(found)}/{len(jobs)} slides, {jobs[number].name}"
            progress(tiles, round(tiles * len(jobs) / len(found)), text)
    finally:
        _end(ray, list(waiting), mine, place)
    ordered = [found[number] for number in range(len(jobs))]
    speed = _together([counted for _, counted in ordered], time.monotonic() - started)
    return Ran(
        [result for result, _ in ordered], manifest, {**about, "cluster": f"ray {address}"}, speed
    )


def _movable(job: Job) -> Job:
    """Return a job whose paths hold on another machine."""
    return replace(job, source=Path(job.location), aliases=(), regions=_absolute(job.regions))


def _end(ray: Any, waiting: list[Any], mine: bool, out: str) -> None:
    """Cancel the remaining tasks, wait a while for their cleanup, and disconnect from the cluster."""
    for left in waiting:
        ray.cancel(left)
    if waiting:
        ray.wait(waiting, num_returns=len(waiting), timeout=CLOSING_S)
    if mine:
        ray.shutdown()
    if waiting and "://" not in out:  # from local workers that did not end in time
        remove_leftovers(folders_of(Path(out)))


def _connect(address: str) -> tuple[Any, bool]:
    """Connect Ray; return the module, and whether this call made the connection."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before the import: Ray may send telemetry
    try:
        import ray
    except ImportError as error:
        raise MissingPart("--ray needs Ray: pip install 'histoseek[ray]'") from error
    stopping.rearm()  # Ray replaces the SIGTERM handler
    if ray.is_initialized():
        return ray, False
    _knock(address)
    try:
        if address == LOCAL:
            with _nowhere_to_report():
                # Without "local" Ray joins the cluster that last ran here, even a dead one.
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise Unavailable(f"no Ray cluster answers at {address!r} ({error})") from error
    stopping.rearm()
    return ray, True


def _check_url(out: str) -> None:
    """Check that this machine can write to a URL, before the cluster tries.

    Raises:
        BadInput: the URL's scheme is unknown, or its package is missing.
    """
    try:
        import fsspec

        fsspec.core.url_to_fs(out)
    except (ImportError, ValueError) as error:
        raise BadInput(f"--out {out!r}: {error}") from error


def _knock(address: str) -> None:
    """Check that the address accepts connections: if not, Ray would end the whole process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "local", "auto", a name that Ray looks up itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise Unavailable(
            f"no Ray cluster answers at {address!r} ({error}); start one with `ray start --head`"
        ) from error


@contextmanager
def _nowhere_to_report() -> Iterator[None]:
    """Start a cluster whose processes cannot query cloud metadata services.

    Ray queries the metadata services of three clouds over HTTP even if its usage statistics are off.
    Its processes therefore inherit the address of a proxy that does not exist; workers remove it
    before they start work.
    """
    before = {name: os.environ.get(name) for name in ("http_proxy", "no_proxy")}
    os.environ["http_proxy"] = _NOWHERE
    os.environ["no_proxy"] = ",".join(filter(None, [before["no_proxy"], "127.0.0.1", "localhost"]))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _absolute(path: Path | None) -> Path | None:
    return path.resolve() if path is not None else None


def _spec(choice: EncoderChoice) -> str:
    here = Path(choice.spec)
    return str(here.resolve()) if "://" not in choice.spec and here.is_dir() else choice.spec


@lru_cache(maxsize=1)
def _encoder(choice: EncoderChoice) -> Encoder:
    return open_chosen(choice)


def embed_one(
    job: Job, choice: EncoderChoice, out: str, options: EmbedOptions
) -> tuple[Result, dict[str, Any]]:
    """Embed one slide on a worker; return its result and the meter's counters."""
    meter = Meter()
    if os.environ.get("http_proxy") == _NOWHERE:
        del os.environ["http_proxy"]
    try:
        encoder = _encoder(choice)
        # Ray cancels a task by Ctrl-C in its worker; set the flag instead of raising inside a library.
        with stopping.armed(), _staged(job, encoder, out) as folder:
            (result,) = embed_jobs([job], encoder, folder, options, _no_report, meter)
            if "://" in out and result.features:
                inside = Path(result.features).relative_to(folder).as_posix()
                result = replace(result, features=f"{out.rstrip('/')}/{inside}")
    except HistoseekError as error:  # a full disk on one machine must not stop the others
        _encoder.cache_clear()  # a run that ended early closed the encoder
        result = failed(job, error)
    return result, meter.read()


def _no_report(done: int, total: int, text: str) -> None:
    """Do nothing: workers show no progress."""


@contextmanager
def _staged(job: Job, encoder: Encoder, out: str) -> Iterator[Path]:
    """Yield the folder to write to; for a URL a temporary folder, which is uploaded at the end."""
    if "://" not in out:
        yield Path(out)
        return
    import fsspec

    system, root = fsspec.core.url_to_fs(out)
    with TemporaryDirectory(prefix="histoseek-") as temp:
        folder = Path(temp)
        names = {job.name, job.stem, distinct_name(job)}
        for known in system.glob(f"{root}/*/features_{encoder.manifest.name}/*.h5"):
            inside = Path(known).relative_to(root) if Path(known).is_relative_to(root) else None
            if inside is not None and inside.stem in names:
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                system.get_file(known, str(folder / inside))
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.h5")}
        yield folder
        made = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        for path in sorted(made, key=lambda p: p.suffix == ".h5"):  # features last: they mean done
            if before.get(path) == path.stat().st_mtime_ns:
                continue
            target = f"{root}/{path.relative_to(folder).as_posix()}"
            system.makedirs(target.rpartition("/")[0], exist_ok=True)
            part = f"{target}.{os.uname().nodename}-{os.getpid()}.part"
            system.put_file(str(path), part)
            system.mv(part, target)


def _together(counted: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Sum the counters of all tasks."""
    tiles = sum(one["tiles_done"] for one in counted)
    stages: dict[str, dict[str, float]] = {}
    for name in STAGES:
        items = sum(one["stages"][name]["items"] for one in counted)
        spent = sum(one["stages"][name]["seconds"] for one in counted)
        stages[name] = {"items": items, "seconds": round(spent, 3)}
        if name != "open":
            stages[name]["tiles_per_s"] = round(items / spent, 1) if spent else 0
    states = Counter({})  # type: ignore[var-annotated]
    for one in counted:
        states.update(one["states"])
    return {
        "seconds": round(seconds, 3),
        "jobs": len(counted),
        "states": dict(states),
        "tiles_done": tiles,
        "tiles_unreadable": sum(one["tiles_unreadable"] for one in counted),
        "tiles_per_s": round(tiles / seconds, 1) if seconds else 0,
        "stages": stages,
    }
