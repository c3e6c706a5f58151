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
from ...errors import BadInput, HistoseekError, Unavailable, need
from ..encoders.protocol import Encoder
from .jobs import Job, distinct_name
from .meter import Meter, added_up
from .pipeline import embed_jobs, folders_of
from .regions import with_regions
from .results import EmbedOptions, EncoderChoice, Result
from .run import Ran, open_chosen
from .work import failed

LOCAL = "local"
RETRIES = 5
CLOSING_S = 5.0
"""Seconds that cancelled tasks may take to end."""
_DEAD_PROXY = "http://127.0.0.1:9"


def run_on_ray(
    jobs: Sequence[Job],
    choice: EncoderChoice,
    out: str,
    options: EmbedOptions,
    address: str,
    progress: Progress,
    results: list[Result] | None = None,
) -> Ran:
    """Embed jobs on a Ray cluster; see also :func:`~histoseek.serving.embedding.pipeline.embed_jobs`.

    Args:
        jobs: all machines must have their paths.
        choice: the encoder to use; opened once in every worker.
        out: a folder shared by all machines, or a URL.
        options: how to cut tiles; ``jobs`` is the number of cores per slide, 1 when None.
        address: the cluster's address, or ``local`` for a cluster on this machine.
        progress: receives progress.
        results: as in ``embed_jobs``.

    Raises:
        MissingPart: Ray is not installed.
        Unavailable: no cluster answers at the address.
    """
    if "://" in out:
        _check_url(out)
    else:
        out = str(Path(out).resolve())
    ray, connected_here = _connect(address)
    started = time.monotonic()
    options = replace(
        options,
        jobs=options.jobs or 1,
        manifest=_absolute(options.manifest),
        regions=_absolute(options.regions),
    )
    choice = replace(
        choice, streams=options.jobs, bundle=_absolute(choice.bundle), spec=_absolute_spec(choice)
    )
    encoder = open_chosen(choice)  # here too: an error is reported once
    manifest, about = encoder.manifest, encoder.describe()
    encoder.close()
    if about["engine"] != "triton":  # all workers use the settings measured here
        choice = replace(choice, engine=about["engine"], batch=about["batch"])
    jobs = with_regions(jobs, options.regions)
    embed = ray.remote(num_cpus=options.jobs, max_retries=RETRIES)(embed_one)
    tasks = {embed.remote(_movable(job), choice, out, options): n for n, job in enumerate(jobs)}
    try:
        ended = _collect(ray, tasks, jobs, progress, [] if results is None else results)
    finally:
        _end(ray, list(tasks), connected_here, out)
    speed = added_up([counts for _, counts in ended], time.monotonic() - started)
    about["cluster"] = f"ray {address}"
    return Ran([result for result, _ in ended], manifest, about, speed)


def _collect(
    ray: Any, tasks: dict[Any, int], jobs: Sequence[Job], progress: Progress, results: list[Result]
) -> list[tuple[Result, dict[str, Any]]]:
    """Wait for all tasks; return each job's result and counters, in the order of the jobs.

    ``tasks`` has the number of the job by task; ended tasks are removed, and their results appended.
    """
    ended: dict[int, tuple[Result, dict[str, Any]]] = {}
    tiles = 0
    while tasks:
        stopping.check()
        ready, _ = ray.wait(list(tasks), num_returns=1, timeout=stopping.POLL_S)
        for task in ready:
            number = tasks.pop(task)
            try:
                ended[number] = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                ended[number] = failed(jobs[number], error), Meter().read()
            except ray.exceptions.RayError as error:
                lost = Unavailable(
                    f"the cluster lost this task {RETRIES + 1} times ({error}); check its machines and "
                    "run the same command again"
                )
                ended[number] = failed(jobs[number], lost), Meter().read()
            results.append(ended[number][0])
            tiles += ended[number][0].tiles
            text = f"{len(ended)}/{len(jobs)} slides, {jobs[number].name}"
            progress(tiles, round(tiles * len(jobs) / len(ended)), text)
    return [ended[number] for number in range(len(jobs))]


def _movable(job: Job) -> Job:
    """Return a job whose paths hold on another machine."""
    return replace(job, source=Path(job.location), aliases=(), regions=_absolute(job.regions))


def _end(ray: Any, tasks: list[Any], disconnect: bool, out: str) -> None:
    """Cancel the remaining tasks, wait a while for their cleanup, and disconnect from the cluster."""
    for task in tasks:
        ray.cancel(task)
    if tasks:
        ray.wait(tasks, num_returns=len(tasks), timeout=CLOSING_S)
    if disconnect:
        ray.shutdown()
    if tasks and "://" not in out:  # from local workers that did not end in time
        remove_leftovers(folders_of(Path(out)))


def _connect(address: str) -> tuple[Any, bool]:
    """Connect Ray; return the module, and whether this call made the connection."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before the import: Ray may send telemetry
    ray: Any = need("ray", "ray")
    stopping.rearm()  # Ray replaces the SIGTERM handler
    if ray.is_initialized():
        return ray, False
    _check_address(address)
    try:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == LOCAL:
            with _without_cloud_metadata():
                # without "local" Ray joins the cluster that last ran here, even a dead one
                ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise Unavailable(f"no Ray cluster answers at {address!r} ({error})") from error
    stopping.rearm()
    return ray, True


def _check_url(out: str) -> None:
    """Raise BadInput if a URL's scheme is unknown or its package is missing, before the cluster tries."""
    fsspec = need("fsspec", "ray")
    try:
        fsspec.core.url_to_fs(out)
    except (ImportError, ValueError) as error:
        raise BadInput(f"--out {out!r}: {error}") from error


def _check_address(address: str) -> None:
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
def _without_cloud_metadata() -> Iterator[None]:
    """Start a cluster whose processes cannot query cloud metadata services.

    Ray queries the metadata services of three clouds over HTTP even if its usage statistics are off.
    Its processes therefore inherit the address of a proxy that does not exist; workers remove it
    before they start work.
    """
    before = {name: os.environ.get(name) for name in ("http_proxy", "no_proxy")}
    os.environ["http_proxy"] = _DEAD_PROXY
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


def _absolute_spec(choice: EncoderChoice) -> str:
    folder = Path(choice.spec)
    return str(folder.resolve()) if "://" not in choice.spec and folder.is_dir() else choice.spec


@lru_cache(maxsize=1)
def _encoder(choice: EncoderChoice) -> Encoder:
    return open_chosen(choice)


def embed_one(
    job: Job, choice: EncoderChoice, out: str, options: EmbedOptions
) -> tuple[Result, dict[str, Any]]:
    """Embed one slide on a worker; return its result and the meter's counters."""
    meter = Meter()
    if os.environ.get("http_proxy") == _DEAD_PROXY:
        del os.environ["http_proxy"]
    try:
        encoder = _encoder(choice)
        # Ray cancels a task by Ctrl-C in its worker; set the flag instead of raising inside a library.
        with stopping.armed(), _staged(job, encoder, out) as folder:
            (result,) = embed_jobs([job], encoder, folder, options, lambda *_: None, meter)
            if "://" in out and result.features:
                inside = Path(result.features).relative_to(folder).as_posix()
                result = replace(result, features=f"{out.rstrip('/')}/{inside}")
    except HistoseekError as error:  # a full disk on one machine must not stop the others
        _encoder.cache_clear()  # a run that ended early closed the encoder
        result = failed(job, error)
    return result, meter.read()


@contextmanager
def _staged(job: Job, encoder: Encoder, out: str) -> Iterator[Path]:
    """Yield the folder to write to; for a URL a temporary folder, which is uploaded at the end."""
    if "://" not in out:
        yield Path(out)
        return
    system, root = need("fsspec", "ray").core.url_to_fs(out)
    with TemporaryDirectory(prefix="histoseek-") as temp:
        folder = Path(temp)
        names = {job.name, job.stem, distinct_name(job)}
        for remote in system.glob(f"{root}/*/features_{encoder.manifest.name}/*.h5"):
            if Path(remote).is_relative_to(root) and Path(remote).stem in names:
                local = folder / Path(remote).relative_to(root)
                local.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(remote, str(local))
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.h5")}
        yield folder
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        for path in sorted(files, key=lambda p: p.suffix == ".h5"):  # features last: they mean done
            if before.get(path) == path.stat().st_mtime_ns:
                continue
            target = f"{root}/{path.relative_to(folder).as_posix()}"
            system.makedirs(target.rpartition("/")[0], exist_ok=True)
            part = f"{target}.{os.uname().nodename}-{os.getpid()}.part"
            system.put_file(str(path), part)
            system.mv(part, target)
