"""Slides on a DICOMweb server (PS3.18): QIDO-RS finds their series, WADO-RS copies their instances.

A URL names the server, a study or a series, such as
``dicomweb+https://pacs.example/dicom-web/studies/1.2.3``. Credentials come from ``~/.netrc``, or are a
bearer token in ``$HISTOSEEK_DICOMWEB_TOKEN`` or in the file ``$HISTOSEEK_DICOMWEB_TOKEN_FILE``, which is
read for every request; histoseek stores none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

from .. import stopping
from ..errors import BadInput, need
from .remote import Halted, Remote, RemoteFile
from .walking import LeftOut

SCHEMES = ("dicomweb+https://", "dicomweb+http://")
TOKEN, TOKEN_FILE = "HISTOSEEK_DICOMWEB_TOKEN", "HISTOSEEK_DICOMWEB_TOKEN_FILE"
UID = r"[0-9][0-9.]{0,127}"
"""64 characters are allowed; some files have more."""
TIMEOUT_S = (10, 120)
"""Time in s to connect to a server, and to wait for its next bytes."""
PAGE = 100
_CHUNK = 2**20
_URL = re.compile(rf"(.*?)(?:/studies(?:/({UID})(?:/series(?:/({UID}))?)?)?)?/*")
_INSTANCE = re.compile(rf".*/studies/{UID}/series/{UID}/instances/{UID}")
_STUDY, _SERIES, _SOP, _MODALITY = "0020000D", "0020000E", "00080018", "00080060"
SLIDES = "SM"
"""Modality of slides (slide microscopy)."""
_FRAMES, _ROWS, _COLUMNS = "00280008", "00280010", "00280011"
_LOOPBACK = re.compile(r"dicomweb\+http://(localhost|127\.[0-9.]+|\[::1\])[:/]")
_PACKED = 8
"""Uncompressed bytes of a frame per byte that an instance is expected to have."""


class Series(NamedTuple):
    """A series of a slide: its URL, and its instances, that with the most frames first.

    The sizes of the instances are estimated, since servers do not state them.
    """

    url: str
    instances: tuple[RemoteFile, ...]

    @property
    def mark(self) -> str:
        """What identifies the content: instances of the same UID never differ."""
        uids = sorted(file.url.rpartition("/")[2] for file in self.instances)
        return hashlib.sha256("\n".join(["DICOM", *uids]).encode()).hexdigest()


def is_dicomweb(url: object) -> bool:
    """Whether a URL is that of a DICOMweb server."""
    return str(url).startswith(SCHEMES)


class DicomInstance(Remote):
    """A DICOM instance on a server, which can be copied."""

    def __init__(self, url: str) -> None:
        """Set the URL, ``dicomweb+https://…/instances/<uid>``; nothing is read.

        Raises:
            BadInput: it is not the URL of an instance.
        """
        if not _INSTANCE.fullmatch(url):
            raise BadInput(f"{url}: expected the URL of a DICOM instance (…/instances/<uid>)")
        self.url = url

    def fetch(self, to: Path, halted: Callable[[], bool] = stopping.requested) -> None:
        """Copy the instance to a local path, where it appears complete; see :meth:`Remote.fetch`."""
        to.parent.mkdir(parents=True, exist_ok=True)
        part = to.with_name(f"{to.name}.part")

        def copy() -> None:
            accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
            with closing(_get(self.url, accept)) as answer, part.open("wb") as file:
                for piece in _content(answer):
                    if halted():
                        raise Halted
                    file.write(piece)
            with part.open("rb") as file:
                if file.read(132)[128:] != b"DICM":
                    raise OSError("what came is not a DICOM file")
            part.replace(to)

        self._receive(copy, part)


class _Query(Remote):
    """A question to a server, repeated if it fails.

    Attributes:
        incomplete: why there may be more objects than were returned; "" if there are not.
    """

    def __init__(self, url: str) -> None:
        self.url, self.incomplete = url, ""

    def rows(self, **parameters: str | int) -> list[dict[str, Any]]:
        """Return all objects that match; servers limit the number of one answer to less than asked for."""
        found: dict[str, dict[str, Any]] = {}
        while True:
            ask = {**parameters, "limit": PAGE, "offset": len(found)}
            try:
                page = self._again(lambda ask=ask: self._page(ask))  # type: ignore[misc]
            except BadInput as error:
                if found and isinstance(error.__cause__, FileNotFoundError):
                    return list(found.values())  # some servers have no empty pages
                raise
            known = len(found)
            found |= {json.dumps(row, sort_keys=True): row for row in page}
            if len(found) == known and len(page) == PAGE:  # more: the server ignores the limit, too
                raise BadInput(
                    f"{self.url}: the server returns the same {len(page)} objects again, so the others "
                    "cannot be found; name a study or series"
                )
            if len(found) == known:
                if 0 < len(page) < PAGE:  # a longer one is all there is
                    self.incomplete = (
                        "the server returns the same objects at every offset; if there are more, they "
                        "were not found"
                    )
                return list(found.values())

    def _page(self, ask: dict[str, str | int]) -> list[dict[str, Any]]:
        with closing(_get(self.url, "application/dicom+json", ask)) as answer:
            text = answer.content
        try:
            rows = json.loads(text) if text else []
        except ValueError:
            rows = None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise OSError(
                "the answer is not a list of DICOM objects; is this the root of DICOMweb?"
            )
        return rows


class Found(NamedTuple):
    """What is behind a URL: the slides, the series that the server refused, and what was left out."""

    slides: list[Series]
    refused: list[LeftOut]
    left_out: list[LeftOut]


def find_series(url: str) -> Found:
    """Return the slides behind a URL of a server, a study or a series.

    Raises:
        BadInput: the URL is wrong, there are no slides, or the server does not answer or refuses.
        MissingPart: the package ``requests`` is not installed.
    """
    root, study, series = _parts(url)
    found = Found([], [], [])
    if study and series:
        named = [(study, series)]
    else:
        query = _Query(f"{root}/studies/{study}/series" if study else f"{root}/series")
        rows = query.rows(Modality=SLIDES)
        found.left_out.extend(_incomplete(query))
        rows = [row for row in rows if _value(row, _MODALITY) in ("", SLIDES)]  # some do not filter
        named = [(study or _value(row, _STUDY), _value(row, _SERIES)) for row in rows]
    for of_study, uid in dict.fromkeys(named):
        address = f"{root}/studies/{of_study}/series/{uid}"
        if wrong := [each for each in (of_study, uid) if not re.fullmatch(UID, each)]:
            reason = f"{address}: the server names {wrong[0]!r}, which is no UID"
            found.left_out.append(LeftOut(address, reason))
            continue
        query = _Query(f"{address}/instances")
        try:
            found.slides.append(_series(address, query))
        except BadInput as error:
            found.refused.append(LeftOut(address, str(error)))
        found.left_out.extend(_incomplete(query))
    if not found.slides:
        reasons = [left.reason for left in (*found.refused, *found.left_out)]
        reason = f" ({reasons[0]})" if reasons else ""
        raise BadInput(
            f"{url} has no slides, which are series of the modality SM{reason}; expected "
            "dicomweb+https://SERVER/PATH, followed by /studies/UID and /series/UID for one slide"
        )
    return found


def _incomplete(query: _Query) -> list[LeftOut]:
    return [LeftOut(query.url, query.incomplete)] if query.incomplete else []


def _parts(url: str) -> tuple[str, str | None, str | None]:
    """Return the root of a server, and the UIDs of the study and the series that a URL names."""
    if "@" in url:
        shown = f"{url.partition('://')[0]}://…@{url.rpartition('@')[2]}"
        raise BadInput(
            f"{shown}: put the name and password into ~/.netrc, and leave them out of the URL"
        )
    matched = _URL.fullmatch(url)
    if matched is None or "?" in url or "#" in url or "/instances" in url:
        raise BadInput(
            f"{url}: expected dicomweb+https://SERVER/PATH, followed by /studies/UID and /series/UID for "
            "one slide"
        )
    return matched[1], matched[2], matched[3]


def _series(address: str, query: _Query) -> Series:
    """Return a series with the instances that a query finds.

    Raises:
        BadInput: a UID is none, there are no instances, or the server refuses.
    """
    rows = query.rows(includefield=f"{_FRAMES},{_ROWS},{_COLUMNS}")
    named = {_value(row, _SOP): _bytes(row) for row in rows}
    for uid in named:
        if not re.fullmatch(UID, uid):
            raise BadInput(f"{address}: the server names {uid!r}, which is no UID")
    if not named:
        raise BadInput(f"{address} has no instances")
    files = [RemoteFile(f"{address}/instances/{uid}", size) for uid, size in named.items()]
    return Series(address, tuple(sorted(files, key=lambda file: (-file.size, file.url))))


def _value(row: dict[str, Any], tag: str) -> str:
    """Return the first value of a tag; "" if there is none."""
    element = row.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    first = values[0] if isinstance(values, list) and values else values
    return "" if first is None or isinstance(first, list) else str(first)


def _bytes(row: dict[str, Any]) -> int:
    """Return the expected size of an instance; a frame of unknown size counts as 256 x 256 pixels."""

    def number(tag: str, default: int) -> int:
        text = _value(row, tag)
        return max(1, int(text)) if text.isdecimal() and len(text) < 10 else default

    frames, rows, columns = number(_FRAMES, 1), number(_ROWS, 256), number(_COLUMNS, 256)
    return frames * rows * columns * 3 // _PACKED


def _get(url: str, accept: str, parameters: dict[str, str | int] | None = None) -> Any:
    """Return the streamed answer of the server.

    Raises:
        FileNotFoundError, PermissionError, OSError: the server refuses; the message has its answer.
    """
    requests = need("requests", "dicomweb")
    headers = {"Accept": accept, "Accept-Encoding": "identity"}
    token = _token()
    if url.startswith(SCHEMES[1]) and not _LOOPBACK.match(url):
        what = "token" if token else "password"
        if token or requests.utils.get_netrc_auth(url.removeprefix("dicomweb+")):
            raise BadInput(
                f"{url}: a {what} would be sent without encryption; expected dicomweb+https://"
            )
    answer = requests.get(
        url.removeprefix("dicomweb+"), params=parameters, headers=headers, stream=True,
        timeout=TIMEOUT_S, auth=_Bearer(token) if token else None,
    )  # fmt: skip
    if answer.status_code >= 400:
        reason = f"HTTP {answer.status_code} {answer.reason}"
        answer.close()
        if answer.status_code in (401, 403):
            advice = (
                "the token is wrong or expired" if token
                else f"set ${TOKEN} or ${TOKEN_FILE}, or name the server in ~/.netrc"
            )  # fmt: skip
            raise PermissionError(f"{reason}; {advice}")
        raise FileNotFoundError(reason) if answer.status_code in (404, 410) else OSError(reason)
    return answer


def _token() -> str:
    """Return the token of the environment, or of a file that another program may renew; "" without one."""
    path = os.environ.get(TOKEN_FILE)
    if not path:
        return os.environ.get(TOKEN, "")
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        raise BadInput(
            f"${TOKEN_FILE} names {path}, which cannot be read ({error.strerror})"
        ) from error


class _Bearer:
    """Adds a token to requests; given as ``auth``, it takes precedence over ``~/.netrc``."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _content(answer: Any) -> Iterator[bytes]:
    """Yield the bytes of the only part of a multipart answer, or of an answer that is no multipart.

    Raises:
        OSError: the answer ends too soon.
    """
    kind = Message()
    kind["Content-Type"] = answer.headers.get("Content-Type", "")
    pieces = answer.iter_content(_CHUNK)
    boundary = kind.get_boundary()
    if kind.get_content_maintype() != "multipart" or boundary is None:
        yield from pieces
        return
    end = b"\r\n--" + boundary.encode()
    kept = b"\r\n"
    for piece in pieces:  # the headers of the part end at an empty line
        kept += piece
        start = kept.find(b"\r\n\r\n", kept.find(end))
        if start >= 0 and end in kept[:start]:
            kept = kept[start + 4 :]
            break
        if len(kept) > _CHUNK:
            break
    else:
        raise OSError("the answer ends before its first part")
    while end not in kept:
        yield kept[: -len(end)]
        kept = kept[-len(end) :]
        piece = next(pieces, b"")
        if not piece:
            raise OSError("the answer ends before its end")
        kept += piece
    yield kept[: kept.find(end)]
