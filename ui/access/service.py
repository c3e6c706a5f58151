"""The state behind the routes: the open atlas, slides being added, counters, and the audit log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..session.addition import Addition
from ..session.additions import Additions
from ..session.answers import ClusterAnswer, SearchAnswer, SimilarAnswer
from ..session.session import Session
from .audit import Audit
from .policy import REQUEST_ID, USER
from .traffic import Traffic

NOBODY = {"user": "-", "address": "-", "request_id": "-"}
"""Of an upload that was found at the start of the server."""


@dataclass(frozen=True)
class Server:
    """The state behind the routes."""

    session: Session
    additions: Additions
    audit: Audit | None
    traffic: Traffic

    def note(self, request: Any, action: str, **facts: Any) -> None:
        """Record an action in the audit log."""
        if self.audit is not None:
            self.audit.write(action, who(request), **facts)

    @contextmanager
    def change(self, request: Any, action: str, **facts: Any) -> Iterator[None]:
        """Record a change in the audit log before it is made, and again with ``failed`` if it fails."""
        self.note(request, action, **facts)
        try:
            yield
        except Exception as error:
            self.note(request, action, **facts, failed=type(error).__name__)
            raise

    def note_addition(self, job: Addition) -> None:
        """Record that a slide waits to be added, and how that ended."""
        if self.audit is not None:
            ends = {"state": job.state, "message": job.message} if job.over else {}
            self.audit.write("add", job.by or NOBODY, slide=job.slide, job=job.id, **ends)

    def note_search(self, request: Any, answer: SearchAnswer) -> None:
        """Record a search in the audit log."""
        query, among = answer.query, answer.among
        elsewhere: dict[str, Any] = {}
        if answer.searched:
            elsewhere["atlases"] = [shard.atlas for shard in answer.searched if not shard.away]
        if among.like or among.unlike:
            elsewhere["like_elsewhere"] = [tile._asdict() for tile in among.like]
            elsewhere["unlike_elsewhere"] = [tile._asdict() for tile in among.unlike]
        self.note(
            request, "search", result=answer.id, k=query.k, where=query.where, hits=len(answer.hits),
            images=len(query.images) + len(query.unlike_images), like=list(query.tiles),
            unlike=list(query.unlike_tiles), texts=list(query.texts),
            unlike_texts=list(query.unlike_texts), generation=answer.generation, revision=answer.revision,
            **elsewhere,
        )  # fmt: skip

    def note_similar(
        self, request: Any, slide: str, by: str, how: str, answer: SimilarAnswer
    ) -> None:
        """Record a comparison of slides in the audit log."""
        elsewhere: dict[str, Any] = {}
        if answer.searched:
            elsewhere["atlases"] = [shard.atlas for shard in answer.searched if not shard.away]
        self.note(
            request, "similar", slide=slide, by=by, how=how, found=len(answer.cases), **elsewhere
        )

    def note_assign(self, request: Any, answer: ClusterAnswer) -> None:
        """Record an assignment of images in the audit log."""
        self.note(
            request, "assign", result=answer.id, clustering=answer.clustering,
            images=len(answer.names), refused=len(answer.refused),
            revision=self.session.atlas.catalog.revision(),
        )  # fmt: skip


def who(request: Any) -> dict[str, str]:
    """Return user, address and request id, which the guard put into the request's headers."""
    client = getattr(request, "client", None)
    headers = request.headers
    return {
        "user": headers.get(USER, "-").encode("latin-1").decode("utf-8", "replace"),
        "address": getattr(client, "host", None) or "-",
        "request_id": headers.get(REQUEST_ID, "-"),
    }
