"""Embedding on a Ray cluster: actors hold an encoder each and embed slides, as on one machine.

Slides must have the same paths on every machine, or lie behind URLs. An encoder's files travel to the
actors. Features go to a shared folder, or to a URL (``s3://``, ``gs://`` …). Every actor has one slide at a
time, so a cluster that grows or shrinks is used as it is. If an actor or its machine is lost, its slide is
embedded by another. Feature files appear complete or not at all, so nothing is lost or duplicated.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ... import console, stopping
from ...artifacts.files import remove_leftovers
from ...artifacts.remote import Remote, is_url
from ...console import Progress
from ...errors import BadInput, HistoseekError, Unavailable
from ..encoders.fetched import is_server
from ..encoders.open import DEFAULT, bundle_path
from .job import Job
from .meter import ClusterMeter, Meter
from .metrics_page import metrics_page
from .pipeline import folders_of
from .ray_cluster import connect
from .ray_worker import Worker, packed
from .regions import with_regions
from .results import EmbedOptions, EncoderChoice, RayOptions, Result
from .run import Ran, open_chosen
from .tissue_network import located
from .work import failed

RETRIES = 5
"""How often a slide is embedded again after the actor that had it was lost."""
STARTING = 16
"""Maximum number of actors that start or wait for a machine; an autoscaler adds machines for them."""
BROKEN = 8
"""Number of actors that may fail to start before any other did, until the run ends."""
WATCH_S = 1.0
"""Seconds between two questions for the counters of the running slides."""
NOTICE_S, PATIENCE_S = 10.0, 1800.0
"""Seconds without any actor until that is said, and until the run ends."""
CLOSING_S = 5.0
"""Seconds that slides may take to stop."""
CLEANING_S = 2.0
"""Seconds that an actor may take to delete its copy of the encoder."""
LAST_BACK_OFF_S = 30.0


def run_on_ray(
    jobs: Sequence[Job],
    choice: EncoderChoice,
    out: str,
    options: EmbedOptions,
    cluster: RayOptions,
    progress: Progress,
    metrics: str | None = None,
    results: list[Result] | None = None,
) -> Ran:
    """Embed jobs on a Ray cluster; see also :func:`~histoseek.serving.embedding.pipeline.embed_jobs`.

    Args:
        jobs: all machines must have their paths.
        choice: the encoder to use; opened once in every actor.
        out: a folder shared by all machines, or a URL.
        options: how to cut tiles; ``jobs`` is the number of cores per actor, 1 when None.
        cluster: the cluster, and what each actor needs.
        progress: receives progress.
        metrics: as in :func:`~histoseek.serving.embedding.run.run_here`, for the whole cluster.
        results: as in ``embed_jobs``.

    Raises:
        MissingPart: Ray is not installed.
        Unavailable: no cluster answers at the address, no actor can start, or no machine has room for one.
    """
    if cluster.address is None:
        raise BadInput("no Ray cluster is given; expected its address, or 'local'")
    if is_url(out):
        Remote(out)  # an unknown scheme is reported before the cluster tries
    else:
        out = str(Path(out).resolve())
    ray, connected_here = connect(cluster.address)
    cores = options.jobs or 1
    options = replace(
        options,
        jobs=cores,
        manifest=_absolute(options.manifest),
        regions=_absolute(options.regions),
        tissue_model=located(options.tissue_model),
    )
    choice = replace(choice, streams=None if cluster.gpus_per_actor else cores)
    encoder = open_chosen(choice)  # here too: an error is reported once
    manifest, about = encoder.manifest, encoder.describe()
    encoder.close()
    if about["engine"] != "triton" and not cluster.gpus_per_actor:
        # all actors use the settings measured here; those on GPUs have their own
        choice = replace(choice, engine=about["engine"], batch=about["batch"])
    actor = ray.remote(
        num_cpus=cores,
        num_gpus=cluster.gpus_per_actor,
        max_restarts=0,
        concurrency_groups={"watch": 1},
    )(Worker)
    bundles = [_shipped(ray, folder) for folder in (choice.spec, choice.bundle)]
    meter = ClusterMeter(len(jobs))
    pool = _Pool(
        ray,
        with_regions(jobs, options.regions),
        lambda: actor.remote(choice, *bundles, manifest, out, options),
        cluster.actors or len(jobs),
        {"CPU": cores, "GPU": cluster.gpus_per_actor},
        meter,
        progress,
        [] if results is None else results,
    )
    try:
        with metrics_page(metrics, meter):
            ended = pool.run()
    finally:
        unfinished = pool.close()
        if connected_here:
            ray.shutdown()
        if unfinished and not is_url(out):  # from actors that did not end in time
            remove_leftovers(folders_of(Path(out)))
    about |= pool.about() | {"cluster": f"ray {cluster.address}"}
    return Ran(ended, manifest, about, meter.read())


@dataclass
class _Actor:
    """An actor, its job's number, the question for its counters and the answer, and whether it is open."""

    handle: Any
    number: int = -1
    watch: Any = None
    counts: dict[str, Any] | None = None
    started: bool = False


class _Pool:
    """Starts actors while slides wait, and gives each one slide at a time."""

    def __init__(
        self,
        ray: Any,
        jobs: Sequence[Job],
        start: Callable[[], Any],
        limit: int,
        needs: dict[str, float],
        meter: ClusterMeter,
        progress: Progress,
        results: list[Result],
    ) -> None:
        self._ray, self._jobs, self._start, self._limit = ray, jobs, start, limit
        self._needs, self._meter, self._progress, self._results = needs, meter, progress, results
        self._waiting = deque(range(len(jobs)))
        self._starting: dict[Any, _Actor] = {}  # by the reference to what is awaited
        self._busy: dict[Any, _Actor] = {}
        self._ended: dict[int, Result] = {}
        self._losses: Counter[int] = Counter()  # by slide
        self._hosts: Counter[str] = Counter()  # actors that started, by machine
        self._engines: dict[str, dict[str, Any]] = {}
        self._lost_actors = 0
        self._broken: list[str] = []  # why actors did not start, since the last that did
        self._did_not: Counter[str] = Counter()  # how many actors did not start, by reason
        self._not_before = self._watched = 0.0
        self._said = False
        self._idle_since: float | None = time.monotonic()

    def run(self) -> list[Result]:
        """Embed all jobs; return their results in order."""
        while self._waiting or self._busy:
            stopping.check()
            self._grow()
            awaited = [*self._busy, *self._starting]
            if not awaited:
                time.sleep(stopping.POLL_S)
                continue
            ready, _ = self._ray.wait(awaited, num_returns=1, timeout=stopping.POLL_S)
            for reference in ready:
                if reference in self._busy:
                    self._slide_ended(reference)
                else:
                    self._started(reference)
            self._watch()
            self._check_patience()
        return [self._ended[number] for number in range(len(self._jobs))]

    def about(self) -> dict[str, Any]:
        """Return the number of actors by machine, those lost, and the encoder's settings in them."""
        found: dict[str, Any] = {"actors": dict(self._hosts), "actors_lost": self._lost_actors}
        engines = list({str(engine): engine for engine in self._engines.values()}.values())
        if engines:
            found |= engines[0]
        notes = [
            f"{count} actors did not start: {reason}" for reason, count in self._did_not.items()
        ]
        if len(engines) > 1:
            hosts = ", ".join(
                f"{host}: {e['engine']} {e.get('device', '')}".rstrip()
                for host, e in self._engines.items()
            )
            notes.append(f"machines run the encoder differently ({hosts})")
        if notes:
            found["notes"] = [*found.get("notes", []), *notes]
        return found

    def close(self) -> bool:
        """Stop slides that are still embedded, and end all actors; return whether any was embedded."""
        busy = list(self._busy)
        for actor in self._busy.values():
            self._beside(actor, "stop")
        if busy:
            self._ray.wait(busy, num_returns=len(busy), timeout=CLOSING_S)
        self._finish([*self._busy.values(), *self._starting.values()])
        self._busy, self._starting = {}, {}
        return bool(busy)

    def _finish(self, actors: Sequence[_Actor]) -> None:
        """Let actors delete what they unpacked, and end them."""
        cleaned = [actor.handle.clean.remote() for actor in actors if actor.started]
        if cleaned:
            self._ray.wait(cleaned, num_returns=len(cleaned), timeout=CLEANING_S)
        for actor in actors:
            self._ray.kill(actor.handle)

    def _beside(self, actor: _Actor, method: str) -> Any:
        """Call a method that runs beside ``embed``; return the reference to its result."""
        return getattr(actor.handle, method).options(concurrency_group="watch").remote()

    def _grow(self) -> None:
        """Start actors, or end those that are not needed any more."""
        while len(self._starting) > len(self._waiting):
            _, actor = self._starting.popitem()
            self._ray.kill(actor.handle)
        wanted = min(STARTING, len(self._waiting), self._limit - len(self._busy))
        if time.monotonic() < self._not_before:
            return
        while len(self._starting) < wanted:
            actor = _Actor(self._start())
            self._starting[actor.handle.open.remote()] = actor

    def _started(self, reference: Any) -> None:
        """Give an actor that has started its first slide; drop one that failed."""
        actor = self._starting.pop(reference)
        try:
            told = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._did_not_start(actor, error)
            return
        self._hosts[told["host"]] += 1
        self._engines[told["host"]] = told["encoder"]
        self._broken, self._not_before = [], 0.0
        actor.started = True
        self._next(actor)

    def _did_not_start(self, actor: _Actor, error: Exception) -> None:
        self._ray.kill(actor.handle)
        cause = getattr(error, "cause", None)
        reason = str(cause if isinstance(cause, HistoseekError) else error).strip()
        self._broken.append(reason)
        self._did_not[reason] += 1
        if len(self._broken) >= BROKEN and not self._hosts:
            raise Unavailable(
                f"{len(self._broken)} actors failed to start, and none did: {self._broken[-1]}; check that "
                "the machines of the cluster have the same histoseek and can open the encoder"
            )
        wait = min(LAST_BACK_OFF_S, 2.0 ** min(len(self._broken) - 1, 9))
        self._not_before = time.monotonic() + wait

    def _next(self, actor: _Actor) -> None:
        """Give an actor the next slide, or end it."""
        if not self._waiting:
            self._finish([actor])
            return
        actor.number, actor.watch, actor.counts = self._waiting.popleft(), None, None
        job = _movable(self._jobs[actor.number])
        self._busy[actor.handle.embed.remote(job)] = actor

    def _slide_ended(self, reference: Any) -> None:
        """Record a slide's result; if its actor was lost, let another embed the slide."""
        actor = self._busy.pop(reference)
        number = actor.number
        try:
            result, counts = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # one that nobody expects
            result, counts = failed(self._jobs[number], error), Meter().read()
        except self._ray.exceptions.RayError as error:
            self._lost_actors += 1
            self._losses[number] += 1
            self._ray.kill(actor.handle)
            if self._losses[number] <= RETRIES:
                self._waiting.appendleft(number)
                return
            lost = Unavailable(
                f"the cluster lost the actor that embedded this slide {RETRIES + 1} times ({error}); check "
                "its machines and run the same command again"
            )
            self._record(number, failed(self._jobs[number], lost), Meter().read())
            return
        self._record(number, result, counts)
        self._next(actor)

    def _record(self, number: int, result: Result, counts: dict[str, Any]) -> None:
        if self._losses[number] and result.ok:
            again = f"embedded again after its actor was lost ({self._losses[number]} x)"
            result = replace(result, notes=[*result.notes, again])
        self._ended[number] = result
        self._results.append(result)
        self._meter.ended(number, counts)
        self._meter.report(self._progress, result.name)

    def _watch(self) -> None:
        """Ask the actors for the counters of their slides, without waiting, and report progress."""
        if time.monotonic() - self._watched < WATCH_S:
            return
        self._watched = time.monotonic()
        for actor in self._busy.values():
            actor.watch = actor.watch or self._beside(actor, "counts")
        asked = [actor.watch for actor in self._busy.values()]
        answered = set(self._ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else [])
        for actor in self._busy.values():
            if actor.watch in answered:
                with suppress(self._ray.exceptions.RayError):  # lost; its slide's end tells
                    actor.counts = self._ray.get(actor.watch) or actor.counts
                actor.watch = None
        counts = {a.number: a.counts for a in self._busy.values() if a.counts is not None}
        self._meter.running(counts)
        if counts:
            self._meter.report(self._progress, f"{len(self._busy)} actors")

    def _check_patience(self) -> None:
        """Say if no actor has a slide because no machine has room, and give up after a while.

        Raises:
            Unavailable: that was so for PATIENCE_S.
        """
        now = time.monotonic()
        if self._busy:
            self._idle_since = None
            return
        self._idle_since = self._idle_since or now
        if now - self._idle_since < NOTICE_S:
            return
        has = self._ray.cluster_resources()
        lacks = (
            f"no machine of the cluster has room for an actor of {_resources(self._needs)}; the cluster "
            f"has {_resources({key: has.get(key, 0) for key in self._needs})}"
        )
        if self._broken:
            lacks = f"no actor can start ({self._broken[-1]})"
        if now - self._idle_since > PATIENCE_S:
            raise Unavailable(f"{lacks}; add machines, or lower --jobs or --ray-gpus-per-actor")
        if not self._said:
            self._said = True
            console.say(f"{lacks}; waiting up to {PATIENCE_S / 60:.0f} minutes for one")


def _resources(amounts: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items())


def _shipped(ray: Any, folder: Path | str | None) -> Any:
    """Put a bundle's files into the cluster's object store; None for an encoder that all machines have."""
    if folder is None or folder == DEFAULT or is_server(str(folder)):
        return None
    return ray.put(packed(bundle_path(str(folder))))


def _movable(job: Job) -> Job:
    """Return a job whose paths hold on another machine."""
    source = job.source if job.url else Path(job.location)
    return replace(job, source=source, aliases=(), regions=_absolute(job.regions))


def _absolute(path: Path | None) -> Path | None:
    return path.resolve() if path is not None else None
