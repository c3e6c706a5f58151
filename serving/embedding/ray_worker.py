"""The actor of a Ray cluster: it holds an encoder and embeds one slide after another."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ... import stopping
from ...artifacts.files import temporary_folder
from ...artifacts.manifest import Manifest
from ...errors import HistoseekError
from ..encoders.protocol import Encoder, check_identity
from .job import Job
from .meter import Meter
from .pipeline import embed_jobs
from .ray_cluster import restore_proxy
from .remote_out import features_at
from .results import EmbedOptions, EncoderChoice, Result
from .run import open_chosen
from .work import failed

Bundle = dict[str, bytes]
"""The files of an encoder bundle by name, as they travel to other machines."""


def packed(folder: Path) -> Bundle:
    """Read a bundle's files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Worker:
    """One actor. ``counts`` and ``stop`` run beside ``embed``, in a concurrency group of their own."""

    def __init__(
        self,
        choice: EncoderChoice,
        encoder: Bundle | None,
        expected: Bundle | None,
        manifest: Manifest,
        out: str,
        options: EmbedOptions,
    ) -> None:
        """Unpack the bundles; the encoder is opened by :meth:`open`.

        Args:
            choice: the encoder to use.
            encoder: replaces ``choice.spec`` unless None.
            expected: replaces ``choice.bundle`` unless None.
            manifest: of the encoder that every actor must have.
            out: a folder shared by all machines, or a URL.
            options: how to cut tiles.
        """
        restore_proxy()
        self._temporary = ExitStack()
        self._folder = self._temporary.enter_context(temporary_folder("encoder"))
        if encoder is not None:
            choice = replace(choice, spec=str(self._unpacked(encoder, "encoder")))
        if expected is not None:
            choice = replace(choice, bundle=self._unpacked(expected, "expected"))
        self._choice, self._manifest, self._out, self._options = choice, manifest, out, options
        self._encoder: Encoder | None = None
        self._meter: Meter | None = None

    def _unpacked(self, bundle: Bundle, name: str) -> Path:
        folder = self._folder / name
        for file, content in bundle.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder

    def open(self) -> dict[str, Any]:
        """Open the encoder; return the machine's name, the process and the encoder's settings."""
        return {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "encoder": self._opened().describe(),
        }

    def _opened(self) -> Encoder:
        if self._encoder is None:
            encoder = open_chosen(self._choice)
            check_identity(encoder.manifest, self._manifest)
            self._encoder = encoder
        return self._encoder

    def embed(self, job: Job) -> tuple[Result, dict[str, Any]]:
        """Embed one slide; return its result and the meter's counters."""
        meter = self._meter = Meter()
        try:
            encoder = self._opened()
            with features_at(self._out) as (folder, remote):
                (result,) = embed_jobs(
                    [job], encoder, folder, self._options, lambda *_: None, meter, remote=remote
                )
        except HistoseekError as error:  # a full disk on one machine must not stop the others
            self._encoder = None  # a run that ended early closed it
            result = failed(job, error)
        finally:
            self._meter = None
        return result, meter.read()

    def counts(self) -> dict[str, Any] | None:
        """Return the counters of the slide that is being embedded, or None."""
        meter = self._meter
        return None if meter is None else meter.read()

    def clean(self) -> None:
        """Delete the unpacked bundles; the actor is ended afterwards."""
        self._temporary.close()

    def stop(self) -> None:
        """End ``embed`` soon; it removes its unfinished files."""
        stopping.request()
